"""Which layers go back to float32 first, and how few suffice.

A layer's place in the order is the error that goes from the outputs when it goes back to float32, over the time that it
takes in float32 on this machine, which is what going back costs. Layers added in that order make the error fall and the
time rise, so that the fewest that suffice are found by bisection: some `2 log2(n)` models are built and judged.
"""

from __future__ import annotations

from collections.abc import Callable

from modelpress_compression.graph.read import label
from modelpress_compression.measure.node_times import node_times_ms
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer

# No layer is free: what takes no measurable time still costs so much of what the slowest costs.
_LEAST_SHARE = 1e-3


def order_of(quantizer: StaticQuantizer, context: Context) -> list[str]:
    """Names of the outputs of the layers in 8 bits, the best to leave in float32 first; empty: not measured."""
    plan, ranges = quantizer.plan, quantizer.ranges
    if not ranges.weight_errors:
        return []
    (times,) = node_times_ms([quantizer.model], context.data, context.work_directory, context.check_time)
    least = _LEAST_SHARE * max(times.values(), default=0.0) or 1.0
    worth = {
        node.outputs[0].name or "": ranges.error_saved(node, plan) / max(times.get(label(node), 0.0), least)
        for node in plan.heavy
    }
    return sorted(worth, key=lambda name: -worth[name])


def fewest_in_float(layers: int, keeps: Callable[[int], bool]) -> int | None:
    """The least count in [1, layers] for which `keeps` holds, which is asked rarely; None: for none.

    Counts double until one holds; the gap below it is halved until it is no larger than a quarter of the count, for
    each try costs a model and the last few layers hardly any time.
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
