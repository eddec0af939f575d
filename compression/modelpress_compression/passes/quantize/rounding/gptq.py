"""GPTQ: weights are rounded one input at a time, and those still to come take up the error (arXiv:2210.17323).

    minimize |X W - X Q|^2,   H = X^T X + damping,   H^-1 = U^T U with U upper triangular
    for k = 0 ... K-1:   q_k = round(w_k),   e = (w_k - q_k) / U_kk,   w_j -= U_kj e   for all j > k

W [K, O] is rounded row by row, all O columns at once. Rows come in the order of falling H_kk, so that the inputs that
matter most are rounded while there are still many others to make up for it. Scales are fixed beforehand, hence any
layout of them will do: one a tensor, a channel, or a block.

Each column is kept only where its error, e^T H e, is below that of rounding to the nearest, so that no column gets
worse by it. The H of this is one of samples held out: on those that it was fitted to GPTQ always looks good. A network
with 72 images given, whose last layers see 49 positions of each, lost 12 dB between the one and the other. Where a
weight errs much more on what is held out, more damping is tried: it trusts single correlations less.

`make_rounder` gives the rounder that does so for a model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import numpy as np
import onnx_ir

from modelpress_compression.graph.linear import Linear, Matrix
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.hessians import Hessians
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder, Numbers, Rounder, Rounding, nearest

# Added to the diagonal, as a share of its mean; the paper's choice. Where H is singular still, or was learned by heart,
# ten times as much.
DAMPING = 0.01
_DAMPINGS = (DAMPING, 10 * DAMPING, 100 * DAMPING)
# Of shares of the answers' power: errors that differ by less tell of the same data.
_SAME = 1.25
_TINY = np.finfo(np.float64).tiny
_BLOCK = 128  # rows whose updates of the rest are put off and done in one product
# What is learned starts from GPTQ, and is compared with it.
_ASKING = ("gptq", "adaround", "brecq")
_NEEDS_DATA = (
    "Rounding '{rounding}' needs representative inputs, which tell how a weight's inputs go together: give them with "
    "--data. The weights were rounded to the nearest level."
)


def gptq(
    weight: Matrix, scale: Matrix, low: Matrix, high: Matrix, hessian: Matrix, held_out: Matrix | None = None
) -> Matrix:
    """Levels [g, K, O] of `weight` [g, K, O]; `scale`, `low`, `high` have its shape, `hessian` is X^T X [g, K, K].

    `held_out`: the same of other samples, which judges; None: `hessian` itself has to.
    """
    best = _nearest(weight, scale, low, high)
    if not _tells(hessian):
        return best
    held_out = held_out if held_out is not None and _tells(held_out) else None
    judge = hessian if held_out is None else held_out
    least = output_error(weight - best * scale, judge)
    powers: tuple[float, float] | None = None
    for levels in _candidates(weight, scale, low, high, hessian):
        difference = weight - levels * scale
        error = output_error(difference, judge)
        best = np.where((error < least)[:, None, :], levels, best)
        least = np.minimum(error, least)
        if held_out is None:
            break
        fitted = float(output_error(difference, hessian).sum())
        powers = powers or (_power(weight, hessian), _power(weight, held_out))
        # As large a share of the answers' power on what judges: nothing was learned by heart.
        if float(error.sum()) / powers[1] <= _SAME * fitted / powers[0]:
            break
    return best


def _tells(hessian: Matrix) -> bool:
    """Whether there is anything to learn from it."""
    return bool(np.isfinite(hessian).all() and np.diagonal(hessian, axis1=1, axis2=2).any())


def _candidates(weight: Matrix, scale: Matrix, low: Matrix, high: Matrix, hessian: Matrix) -> Iterator[Matrix]:
    """Levels with more and more damping."""
    order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), axis=1, kind="stable")
    ordered = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], axis=1), order[:, None, :], axis=2)
    rows = order[:, :, None]
    weights, scales, lows, highs = (np.take_along_axis(part, rows, axis=1) for part in (weight, scale, low, high))
    for damping in _DAMPINGS:
        factor = _inverse_factor(ordered, damping)
        if factor is None:
            continue
        found = _round_rows(weights.copy(), scales, lows, highs, factor)
        levels = np.empty_like(found)
        np.put_along_axis(levels, np.broadcast_to(rows, found.shape), found, axis=1)
        yield levels


def _power(weight: Matrix, hessian: Matrix) -> float:
    """Of the answers."""
    return max(float(output_error(weight, hessian).sum()), _TINY)


def output_error(difference: Matrix, hessian: Matrix) -> Matrix:
    """e^T H e for each column e of `difference` [g, K, O]: the squared error of its outputs, [g, O]."""
    return np.asarray((difference * (hessian @ difference)).sum(axis=1))


def _inverse_factor(hessian: Matrix, damping: float) -> Matrix | None:
    """U, upper triangular with U^T U = (H + damping)^-1; None where that cannot be factorized."""
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    identity = np.eye(hessian.shape[1])
    # An input that is never anything but zero has an empty row and column: it neither gives nor takes.
    alive = np.where(diagonal > 0, 0.0, 1.0)[:, :, None] * identity
    mean = np.maximum(diagonal.mean(axis=1), _TINY)[:, None, None]
    # H = R R^T with R upper triangular, by way of the Cholesky factor of H turned end to end; then U = R^-1.
    turned = (hessian + (damping * mean) * identity + alive)[:, ::-1, ::-1]
    try:
        return _inverse_of_upper(np.linalg.cholesky(turned)[:, ::-1, ::-1])
    except np.linalg.LinAlgError:
        return None


def _inverse_of_upper(matrix: Matrix) -> Matrix:
    """Of upper triangular matrices [g, K, K], by halves: a sixth of the work of a general inverse."""
    count = matrix.shape[1]
    if count <= _BLOCK:
        return np.asarray(np.linalg.inv(matrix), np.float64)
    half = count // 2
    first, second = _inverse_of_upper(matrix[:, :half, :half]), _inverse_of_upper(matrix[:, half:, half:])
    inverse = np.zeros_like(matrix)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, :half, half:] = -first @ matrix[:, :half, half:] @ second
    return inverse


def _round_rows(weight: Matrix, scale: Matrix, low: Matrix, high: Matrix, factor: Matrix) -> Matrix:
    """The loop over K, in blocks; `weight` is used up."""
    levels = np.empty_like(weight)
    count = weight.shape[1]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        errors = np.empty_like(weight[:, start:stop])
        for row in range(start, stop):
            current = weight[:, row]
            levels[:, row] = _nearest(current, scale[:, row], low[:, row], high[:, row])
            error = (current - levels[:, row] * scale[:, row]) / factor[:, row, row, None]
            # Rows of this block at once, which come next; the many behind it wait for one product with all its errors.
            weight[:, row + 1 : stop] -= factor[:, row, row + 1 : stop, None] * error[:, None, :]
            errors[:, row - start] = error
        weight[:, stop:] -= factor[:, start:stop, stop:].transpose(0, 2, 1) @ errors
    return levels


def _nearest(weight: Matrix, scale: Matrix, low: Matrix, high: Matrix) -> Matrix:
    return np.asarray(nearest(weight, scale, low, high), np.float64)


class GptqRounder:
    """Rounds the weights of one model, as it was when this was made."""

    def __init__(self, hessians: Hessians, skip: Callable[[onnx_ir.Node, str], None]) -> None:
        self._hessians = hessians
        self._skip = skip

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """GPTQ, or `nearest` where it cannot be done; the reason is handed to `skip`."""
        weight = node.inputs[1]
        linear = self._hessians.linear(weight) if weight is not None else "it has no weight"
        if weight is None or isinstance(linear, str):
            self._skip(node, f"its weights were rounded to the nearest level, not by gptq: {linear}")
            return nearest
        # The Hessian is asked for when the rounding is done: of a large model only a few fit into memory at a time.
        return partial(_rounded, linear, partial(self._sums, weight))

    def _sums(self, weight: onnx_ir.Value) -> tuple[Matrix, Matrix | None]:
        return self._hessians.of(weight), self._hessians.held_out(weight)


def _rounded(
    linear: Linear,
    sums: Callable[[], tuple[Matrix, Matrix | None]],
    weight: Numbers,
    scale: Numbers,
    low: Numbers,
    high: Numbers,
) -> Numbers:
    weights, scales, lows, highs = (
        linear.matrix(np.broadcast_to(np.asarray(part, np.float64), weight.shape))
        for part in (weight, scale, low, high)
    )
    return linear.weight(gptq(weights, scales, lows, highs, *sums()), weight.shape)


def rounds_by_data(config: QuantizeConfig) -> bool:
    """Whether all weights are rounded by the products of their inputs."""
    return config.rounding in _ASKING or (config.rounding == "auto" and config.is_narrow)


def make_rounder(
    model: Model, config: QuantizeConfig, context: Context, findings: Findings, only: Collection[str] | None = None
) -> Rounder:
    """The rounder that the configuration asks for, for the weights of `model` as it is now.

    `rounding: auto` is GPTQ for 4 bits, where that gains much, and to the nearest for 8; static quantization, which
    knows the error of each weight, decides layer by layer and names those in `only`.
    """
    if not (rounds_by_data(config) or (config.rounding == "auto" and only)):
        return NearestRounder()
    if not context.data.can_be_fitted:
        if config.rounding in _ASKING:
            findings.warnings.append(_NEEDS_DATA.format(rounding=config.rounding))
        return NearestRounder()
    return GptqRounder(Hessians(model, context, only, holds_out=True), findings.skip)
