"""Shapes seen in a run of the model: what shape inference cannot tell, because shapes are computed from data.

The shapes of all values of the main graph become outputs, and of those alone that have no known type the values
themselves: together the activations may take many times the memory of a run. A branch of `If` cannot be looked into
from outside, so the branch that the run takes is first written in the place of its `If`, level by level. Bodies of Loop
and Scan stay closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.subgraphs import subgraphs
from modelpress_compression.graph.watch import observable, taps
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model

# Key of `Node.meta` of an If: the attribute name of the branch that ran.
TAKEN_BRANCH = "modelpress.taken_branch"
MAX_DEPTH = 8


def observe_shapes(model: Model, feeds: Feeds) -> bool:
    """Runs the model once and writes the shapes of its values, and the branch that each `If` took, into its graph.

    Returns whether it ran; a model that does not run on these feeds has no shapes there.
    """
    copy = model.clone()
    # Original node, and the values of the copy that stand for its outputs.
    pairs = [(mine, list(theirs.outputs), theirs) for mine, theirs in zip(model.nodes(), copy.nodes(), strict=True)]
    places = {id(theirs): index for index, (_, _, theirs) in enumerate(pairs)}
    try:
        for depth in range(MAX_DEPTH):
            branches = [node for node in copy.graph if node.op_type == "If"]
            if not branches:
                break
            conditions = _values_of([node.inputs[0] for node in branches], copy, feeds)
            for node, condition in zip(branches, conditions, strict=True):
                name = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
                mine, outputs, _ = pairs[places[id(node)]]
                mine.meta[TAKEN_BRANCH] = name
                outputs[:] = _write_out(copy.graph, node, name, f"{depth}_{places[id(node)]}")
        values = {id(value): value for _, outputs, _ in pairs for value in outputs if _in_main_graph(value, copy)}
        found = dict(zip(values, _shapes_of(list(values.values()), copy, feeds), strict=True))
    except (CompressionError, ValueError, TypeError, KeyError):
        return False
    for mine, outputs, _ in pairs:
        for value, output in zip(mine.outputs, outputs, strict=True):
            if id(output) in found:
                shape, dtype = found[id(output)]
                value.shape = onnx_ir.Shape(shape)
                if value.type is None and dtype is not None and dtype.kind not in "OU":
                    value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(dtype))
    return True


def _in_main_graph(value: onnx_ir.Value, model: Model) -> bool:
    is_tensor = value.type is None or isinstance(value.type, onnx_ir.TensorType)
    return is_tensor and value.producer() is not None and observable(value, model)


def _shapes_of(
    values: Sequence[onnx_ir.Value], model: Model, feeds: Feeds
) -> list[tuple[tuple[int, ...], np.dtype[Any] | None]]:
    """Of each value its shape, and what it holds where it has no type, when the model runs on `feeds`."""
    editor = Editor(model)
    shapes = {}
    for value in values:
        if value.type is not None:
            node = editor.make("Shape", [value], value.name or "tensor")
            model.graph.append(node)
            shapes[id(value)] = node.outputs[0]
    found = _values_of([shapes.get(id(value), value) for value in values], model, feeds)
    return [
        (tuple(array.tolist()), None) if id(value) in shapes else (array.shape, array.dtype)
        for value, array in zip(values, found, strict=True)
    ]


def _values_of(values: Sequence[onnx_ir.Value | None], model: Model, feeds: Feeds) -> list[Array]:
    """What the values hold when the model runs on `feeds`."""
    wanted = [value for value in values if value is not None]
    names = [value.name or "" for value in wanted if value.const_value is None]
    with taps(model, names, optimize=False) as look:
        found = look(feeds)
    return [value.const_value.numpy() if value.const_value is not None else found[value.name or ""] for value in wanted]


def _write_out(graph: onnx_ir.Graph, node: onnx_ir.Node, branch_name: str, suffix: str) -> list[onnx_ir.Value]:
    """Puts the nodes of a branch in the place of its `If`; returns the values that stand for the outputs of it."""
    branch = subgraphs(node)[branch_name]
    nodes, results = list(branch), list(branch.outputs)
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = f"{name}__{suffix}"
        graph.register_initializer(value)
    branch.outputs.clear()
    branch.remove(nodes)
    for moved in nodes:
        for value in moved.outputs:
            # Branches may use the same names, each in its own scope.
            if value.name:
                value.name = f"{value.name}__{suffix}"
    graph.insert_before(node, nodes)
    for output, result in zip(node.outputs, results, strict=True):
        onnx_ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return results
