"""A part of a model as a model of its own.

Constants are shared with the model, so that a part costs no memory but its nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir

from modelpress_compression.graph.subgraphs import captured_values, needed_nodes
from modelpress_compression.model import Model


def extract(model: Model, outputs: Sequence[str], given: Collection[str] = ()) -> Model:
    """The model that computes these values of the main graph from its inputs, and from the values that are `given`.

    Inputs are those that the outputs depend on. Raises KeyError for names that no node of the main graph makes.
    """
    made = {value.name: value for node in model.graph for value in node.outputs}
    wanted = [made[name] for name in outputs]
    nodes = needed_nodes(model.graph, frozenset(made[name] for name in given), wanted)
    return replace(model, ir=as_model(model.ir, nodes, wanted))


def as_model(ir: onnx_ir.Model, nodes: Sequence[onnx_ir.Node], outputs: Sequence[onnx_ir.Value]) -> onnx_ir.Model:
    """Copies of these nodes, given in their order; what they read and do not make is a constant or becomes an input."""
    made = {value for node in nodes for value in node.outputs}
    reads = dict.fromkeys(value for node in nodes for value in (*node.inputs, *captured_values(node)))
    from_before = [value for value in reads if value is not None and value not in made]
    # An initializer that is an input as well is a default, which a caller may override: it stays both.
    inputs = [value for value in from_before if value.is_graph_input() or not value.is_initializer()]
    view = onnx_ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=[value for value in from_before if value.is_initializer()],
        opset_imports=dict(ir.graph.opset_imports),
        name="part",
    )
    graph = view.clone()
    for original, value in zip(inputs, graph.inputs, strict=True):
        if not original.is_graph_input():
            value.shape = None  # what the exporter recorded may hold for its example alone
    for value in graph.outputs:
        value.shape = value.type = None  # onnxruntime finds out; a wrong shape would be a warning for each run
    return onnx_ir.Model(graph, ir_version=ir.ir_version, functions=list(ir.functions.values()))
