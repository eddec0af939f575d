"""Which layers go back to float32 first, and how few suffice.

Layers are ordered by gain over cost. The gain is the error that vanishes from the outputs when the layer goes back to
float32, the cost is the work that it does there. As layers are added in that order, the error falls and the time rises,
so that the fewest that suffice are found by bisection: about `2 log2(n)` models are built and judged.

Work is counted, not timed: clocks differ from run to run by more than like layers do, and each order leads to other
models. So the same model and data give the same candidates, whatever else the machine does; how fast those are is
measured on the whole models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir

from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.shapes import sample_shapes, shape_of, static_shapes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer

# No layer is free: one that does hardly anything counts with this share of the largest one's work.
_LEAST_SHARE = 1e-3
# What moving a number costs beside a multiply-accumulate in float32. On a Xeon with AVX512 large products take 0.02 ns
# a MAC and what only moves numbers 0.4 ns each.
_MACS_PER_NUMBER = 20


def order_of(quantizer: StaticQuantizer, context: Context) -> list[str]:
    """The output names of the layers in 8 bits, the most worthwhile to leave in float32 first; empty: no errors are
    known."""
    plan, ranges = quantizer.plan, quantizer.ranges
    if not ranges.weight_errors:
        return []
    works = _works(quantizer.setup.model, context)
    least = _LEAST_SHARE * max(works.values(), default=0.0) or 1.0
    worth = {
        name: ranges.error_saved(node, plan) / max(works.get(name, 0.0), least)
        for node in plan.layers
        if (name := node.outputs[0].name or "")
    }
    return sorted(worth, key=lambda name: -worth[name])


def _works(model: Model, context: Context) -> Mapping[str, float]:
    """By the name of its first output, what each node of the main graph does for one sample, in MACs: its own, and what
    the numbers that it reads and writes cost."""
    shapes = sample_shapes(context.data)
    macs = count_macs(model, shapes).by_output
    return {
        name: (macs.get(name) or 0) + _MACS_PER_NUMBER * _numbers(node)
        for node in static_shapes(model, shapes).graph
        if (name := node.outputs[0].name or "")
    }


def _numbers(node: onnx_ir.Node) -> int:
    """Those that the node reads and writes, as far as they are known."""
    shapes = (shape_of(value) for value in (*node.inputs, *node.outputs))
    return sum(math.prod(shape) for shape in shapes if shape is not None)


def fewest_in_float(layers: int, keeps: Callable[[int], bool]) -> int | None:
    """About the least count in [1, layers] for which `keeps` holds; None: it holds for none.

    Counts double until one holds. Then the gap below it is halved until it is at most a quarter of the count: each call
    of `keeps` builds a model, while a few layers more in float32 cost hardly any time.
    """
    failed, held = 0, None
    count = 1
    while held is None and failed < layers:
        count = min(count, layers)
        if keeps(count):
            held = count
        else:
            failed, count = count, count * 2
    if held is None:
        return None
    while held - failed > max(1, held // 4):
        middle = (failed + held) // 2
        if keeps(middle):
            held = middle
        else:
            failed = middle
    return held
