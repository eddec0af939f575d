"""The rounder of `rounding: gptq`: GPTQ where a weight's inputs can be observed, to the nearest elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import onnx_ir

from modelpress_compression.graph.linear import Linear, Matrix
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.gptq import gptq
from modelpress_compression.passes.quantize.rounding.hessians import Hessians
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder, Numbers, Rounder, Rounding, nearest

_NEEDS_DATA = (
    "Rounding 'gptq' needs representative inputs, which tell how a weight's inputs go together: give them with --data. "
    "The weights were rounded to the nearest level."
)


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
        return partial(_rounded, linear, self._hessians.of(weight))


def _rounded(linear: Linear, hessian: Matrix, weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
    weights, scales, lows, highs = (
        linear.matrix(np.broadcast_to(np.asarray(part, np.float64), weight.shape))
        for part in (weight, scale, low, high)
    )
    return linear.weight(gptq(weights, scales, lows, highs, hessian), weight.shape)


def make_rounder(
    model: Model, config: QuantizeConfig, context: Context, findings: Findings, only: Collection[str] | None = None
) -> Rounder:
    """The rounder that the configuration asks for, for the weights of `model` as it is now.

    `rounding: auto` is GPTQ for 4 bits, where that gains much, and to the nearest for 8; static quantization, which
    knows the error of each weight, decides layer by layer and names those in `only`.
    """
    wanted = config.rounding == "gptq" or (config.rounding == "auto" and (only or config.weights == "int4"))
    if not wanted:
        return NearestRounder()
    if not context.data.provided:
        if config.rounding == "gptq":
            findings.warnings.append(_NEEDS_DATA)
        return NearestRounder()
    return GptqRounder(Hessians(model, context, only), findings.skip)
