"""Which layers go back to float32 first, and how few suffice.

Layers are ordered by gain over cost. The gain is the error that vanishes from the outputs when the layer goes back to
float32, the cost is the time that it takes in float32 on this machine. As layers are added in that order, the error
falls and the time rises, so that the fewest that suffice are found by bisection: about `2 log2(n)` models are built and
judged.
"""

from __future__ import annotations

from collections.abc import Callable

from modelpress_compression.graph.read import label
from modelpress_compression.measure.node_times import node_times_ms
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer

# No layer is free: one that takes no measurable time counts with this share of the slowest one's time.
_LEAST_SHARE = 1e-3


def order_of(quantizer: StaticQuantizer, context: Context) -> list[str]:
    """The output names of the layers in 8 bits, the most worthwhile to leave in float32 first; empty: not measured."""
    plan, ranges = quantizer.plan, quantizer.ranges
    if not ranges.weight_errors:
        return []
    with context.alone():
        (times,) = node_times_ms([quantizer.setup.model], context.data, context.work_directory, context.check_time)
    least = _LEAST_SHARE * max(times.values(), default=0.0) or 1.0
    worth = {
        node.outputs[0].name or "": ranges.error_saved(node, plan) / max(times.get(label(node), 0.0), least)
        for node in plan.layers
    }
    return sorted(worth, key=lambda name: -worth[name])


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
