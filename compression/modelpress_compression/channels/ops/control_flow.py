"""If, Loop and Scan: values of the outer graph carry their labels into the bodies."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import label
from modelpress_compression.graph.subgraphs import subgraphs

_CARRIED = "The value is carried from one run of a loop to the next."


@rule("If")
def if_(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Both branches are traced; their outputs are tied."""
    branches = [subgraphs(node)[name] for name in ("then_branch", "else_branch")]
    for branch in branches:
        tracer.walk(branch)
    for number, output in enumerate(node.outputs):
        one, other = (tracer.axes(branch.outputs[number]) for branch in branches)
        shapes = [tracer.shape(branch.outputs[number]) for branch in branches]
        if one is None or other is None or shapes[0] != shapes[1]:
            for branch in branches:
                tracer.freeze_value(branch.outputs[number], label(node), "The branches answer with different shapes.")
            tracer.plain_output(output)
            continue
        tracer.set(output, tuple(tracer.unify(*pair, node) for pair in zip(one, other, strict=True)))
    return None


@rule("Loop", "Scan")
def loop(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """What goes in and comes out is frozen; weights that the body uses alone, or takes from outside, are traced."""
    body = subgraphs(node)["body"]
    for value in node.inputs:
        tracer.freeze_value(value, label(node), _CARRIED)
    tracer.walk(body)
    for value in (*body.inputs, *body.outputs):
        tracer.freeze_value(value, label(node), _CARRIED)
    tracer.plain_outputs(node)
    return None
