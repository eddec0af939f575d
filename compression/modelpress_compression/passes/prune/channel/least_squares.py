"""Closed-form repair: every layer that reads cut channels is fitted to the answers that it gave before the cut.

    W, b = argmin |X' W + b - Y|^2 + lambda |W - W0|^2

X' is what the layer reads in the cut model, whose earlier layers are fitted already; Y is what it made in the uncut
model, of the channels that stay (He et al., arXiv:1707.06168, and the layer-wise reconstruction of ThiNet,
arXiv:1707.06342). So each layer mends what those before it could not, and its bias takes over the mean of what is gone.

A quarter of the samples is held out: it chooses lambda, and says whether a fit is better than the layer as it was; only
then it is taken. Samples are streamed, one at a time, through both models; kept are the sums of `normal_equations`, for
as many layers of one level at a time as fit into 1 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from modelpress_compression.analysis.channels import Analysis, Indices
from modelpress_compression.analysis.graph import constant_array, label
from modelpress_compression.analysis.linear import Matrix, Places
from modelpress_compression.analysis.streams import taps
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.passes.prune.channel.layers import Bias, Layer, find_layers
from modelpress_compression.passes.prune.channel.normal_equations import Sums
from modelpress_compression.passes.prune.channel.weights import kept_indices
from modelpress_compression.passes.prune.tensors import replace_numbers

MAX_SAMPLES = 512
MAX_SUMS_BYTES = 1024**3  # 1 GiB
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Rows for each input of a layer: fits settle at some eight; more only takes time.
ROWS_PER_INPUT = 8
ROWS = (4096, 65536)  # fewest and most rows of a layer, where the data has as many
_CHUNK_ROWS = 2048
HELD_OUT = 4  # every fourth sample
# Below this a layer is as good as unchanged.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Fit:
    """One layer: the error of its answers on held-out data before and after, as a share of their variance."""

    node: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Repair:
    """`fits`: layers that were fitted anew, in their order; `skipped`: those that could not be, with the reason."""

    fits: tuple[Fit, ...]
    skipped: tuple[Skip, ...]


def repair(full: Model, pruned: Model, analysis: Analysis, kept: Mapping[str, Indices], context: Context) -> Repair:
    """Fits the layers of `pruned`, in place, to those of `full`.

    Raises TimeLimitError, ModelNotRunnableError.
    """
    groups = {group.id: group for group in analysis.groups}
    stay = kept_indices(groups, kept)
    readers = frozenset(member.node for name in kept for member in groups[name].members if member.role == "consumer")
    layers, skipped = find_layers(
        pruned, frozenset(tensor for tensor, _ in stay), readers, {label(node): node for node in full.graph}
    )
    fits: list[Fit] = []
    done = 0
    context.progress(0.0, f"repairing {len(layers)} layers")
    for _, level in groupby(sorted(layers, key=lambda layer: layer.level), key=lambda layer: layer.level):
        for batch, refused in _batches(list(level)):
            skipped += [Skip(layer.name, "Not fitted anew: its sums would take over 1 GiB.") for layer in refused]
            fitters = [_Fitter(layer, pruned, stay) for layer in batch]
            _gather(full, pruned, fitters, context)
            fits += [fit for fitter in fitters if (fit := fitter.fit()) is not None]
            done += len(batch) + len(refused)
            context.progress(done / len(layers), f"repaired {done} of {len(layers)} layers")
    return Repair(tuple(fits), tuple(skipped))


def _batches(layers: Sequence[Layer]) -> Iterator[tuple[list[Layer], list[Layer]]]:
    """Layers whose sums fit into memory together, and those whose sums alone do not."""
    batch: list[Layer] = []
    refused: list[Layer] = []
    used = 0
    for layer in layers:
        size = _sums_bytes(layer)
        if size > MAX_SUMS_BYTES:
            refused.append(layer)
            continue
        if used + size > MAX_SUMS_BYTES:
            yield batch, []
            batch, used = [], 0
        batch.append(layer)
        used += size
    yield batch, refused


def _sums_bytes(layer: Layer) -> int:
    matrix = layer.linear.matrix(_numbers(layer))
    # Two sets, and as much again while the equations are solved.
    return 4 * Sums.size_bytes(*matrix.shape)


def _numbers(layer: Layer) -> Array:
    array = constant_array(layer.weight)
    if array is None:
        raise TypeError(f"the weight of {layer.name!r} is not constant")
    return array


def _gather(full: Model, pruned: Model, fitters: Sequence[_Fitter], context: Context) -> None:
    """Streams the samples through both models."""
    samples = context.data.spread(MAX_SAMPLES)
    count = len(samples) // (samples.fixed_batch or 1)
    with (
        taps(full, [fitter.layer.output for fitter in fitters]) as answers,
        taps(pruned, [fitter.layer.data for fitter in fitters]) as inputs,
    ):
        for index, feed in enumerate(samples.feeds(1)):
            context.check_time()
            wanted, given = answers(feed), inputs(feed)
            for fitter in fitters:
                fitter.take(given[fitter.layer.data], wanted[fitter.layer.output], index, count)


class _Fitter:
    """Gathers one layer's sums and fits it."""

    def __init__(self, layer: Layer, pruned: Model, stay: Mapping[tuple[str, int], np.ndarray]) -> None:
        self.layer = layer
        self._weight = _numbers(layer)
        self._start = layer.linear.matrix(self._weight)
        self._bias = Bias(layer, pruned)
        self._stay = stay.get((layer.weight.name or "", layer.output_axis))
        self._sums = (Sums.zeros(*self._start.shape), Sums.zeros(*self._start.shape))  # to fit, held out
        self._waiting: tuple[list[tuple[Matrix, Matrix]], ...] = ([], [])  # rows that are not in the sums yet
        low, high = ROWS
        self._rows = int(np.clip(ROWS_PER_INPUT * self._start.shape[1], low, high))

    def take(self, data: Array, output: Array, index: int, count: int) -> None:
        """One sample: the layer's input in the cut model, its output in the uncut one."""
        answers = self._kept(output)
        total = self.layer.linear.positions(answers)
        wanted = -(-self._rows // count)
        places: Places = np.arange(total)
        if wanted < total:
            places = np.random.default_rng(index).choice(total, wanted, replace=False, shuffle=False)
        if count >= 2 * HELD_OUT:
            self._add(data, answers, places, held_out=index % HELD_OUT == HELD_OUT - 1)
            return
        # Too few samples to hold one out: some positions of each are.
        chosen = np.arange(len(places)) % HELD_OUT == HELD_OUT - 1
        self._add(data, answers, places[~chosen], held_out=False)
        self._add(data, answers, places[chosen], held_out=True)

    def _add(self, data: Array, answers: Array, places: Places, *, held_out: bool) -> None:
        linear = self.layer.linear
        waiting = self._waiting[held_out]
        waiting.append((linear.inputs(data, answers, places), linear.answers(answers, places)))
        # A product of a few rows costs as much memory traffic as one of a thousand.
        if sum(rows.shape[1] for rows, _ in waiting) >= min(_CHUNK_ROWS, self._start.shape[1]):
            self._flush(held_out=held_out)

    def _flush(self, *, held_out: bool) -> None:
        waiting = self._waiting[held_out]
        if waiting:
            inputs, answers = (np.concatenate(parts, axis=1) for parts in zip(*waiting, strict=True))
            self._sums[held_out].add(inputs, answers)
            waiting.clear()

    def _kept(self, output: Array) -> Array:
        """The channels of the uncut model's output that the cut layer still makes."""
        if self._stay is None:
            return output
        axis = self.layer.linear.channel_axis
        rest = np.ones(output.shape[axis], np.bool_)
        rest[: len(self._stay)] = self._stay
        return np.compress(rest, output, axis=axis)

    def fit(self) -> Fit | None:
        """Puts the fitted weight and bias into the model; None where nothing is better than what is there."""
        for which in (False, True):
            self._flush(held_out=which)
        known, held_out = self._sums
        if not known.rows or not held_out.rows or not self._bias.readable:
            return None
        scale = held_out.spread()
        old_bias = self._old_bias()
        before = held_out.error(self._start, old_bias)
        if scale <= 0 or before <= _NEGLIGIBLE * scale:
            return None
        intercept = self._bias.possible
        errors = {ridge: self._error(ridge, intercept=intercept) for ridge in RIDGES}
        ridge = min(errors, key=lambda key: errors[key])
        if not errors[ridge] < before:
            return None
        known.merge(held_out)
        weight = known.solve(self._start, ridge, intercept=intercept)
        replace_numbers(self.layer.weight, self.layer.linear.weight(weight, self._weight.shape))
        if intercept:
            shift = known.best_bias(weight) - old_bias
            self._bias.shift(shift.reshape(-1), shift.size)
        return Fit(self.layer.name, before / scale, errors[ridge] / scale)

    def _old_bias(self) -> Matrix:
        groups, _, answers = self._start.shape
        own = self._bias.own
        flat = np.zeros(groups * answers) if own is None else np.broadcast_to(own.reshape(-1), (groups * answers,))
        return flat.astype(np.float64).reshape(groups, 1, answers)

    def _error(self, ridge: float, *, intercept: bool) -> float:
        """On what is held out, of a fit to the rest."""
        known, held_out = self._sums
        try:
            weight = known.solve(self._start, ridge, intercept=intercept)
        except np.linalg.LinAlgError:
            return np.inf
        bias = known.best_bias(weight) if intercept else self._old_bias()
        error = held_out.error(weight, bias)
        return error if np.isfinite(error) else np.inf
