"""Shapes seen in a run of the model: what shape inference cannot tell, because shapes are computed from data.

All values of the main graph become outputs. A branch of `If` cannot be looked into from outside, so the branch that
the run takes is first written in the place of its `If`, level by level. Bodies of Loop and Scan stay closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir

from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import open_session, run

# Key of `Node.meta` of an If: the attribute name of the branch that ran.
TAKEN_BRANCH = "modelpress.taken_branch"
MAX_DEPTH = 8


def observe_shapes(ir: onnx_ir.Model, feeds: Feeds) -> bool:
    """Runs `ir` once and writes the shapes of its values, and the branch that each `If` took, into it.

    Returns whether it ran; a model that does not run on these feeds has no shapes there.
    """
    copy = ir.clone()
    # Original node, and the values of the copy that stand for its outputs.
    pairs = [
        (mine, list(theirs.outputs), theirs)
        for mine, theirs in zip(ir.graph.all_nodes(), copy.graph.all_nodes(), strict=True)
    ]
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
        found = dict(zip(values, _values_of(list(values.values()), copy, feeds), strict=True))
    except (CompressionError, ValueError, TypeError, KeyError):
        return False
    for mine, outputs, _ in pairs:
        for value, output in zip(mine.outputs, outputs, strict=True):
            if id(output) in found:
                value.shape = onnx_ir.Shape(found[id(output)].shape)
    return True


def _in_main_graph(value: onnx_ir.Value, model: onnx_ir.Model) -> bool:
    producer = value.producer()
    is_tensor = value.type is None or isinstance(value.type, onnx_ir.TensorType)
    return bool(value.name) and is_tensor and producer is not None and producer.graph is model.graph


def _values_of(values: Sequence[onnx_ir.Value | None], model: onnx_ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """What the values hold when the model runs on `feeds`."""
    wanted = [value for value in values if value is not None and value.name]
    exposed = {value.name: value for value in wanted if value.producer() is not None}
    kept = list(model.graph.outputs)
    model.graph.outputs.clear()
    # The declared extents are those of another run.
    for value in exposed.values():
        value.shape = None
    model.graph.outputs.extend(exposed.values())
    try:
        found = dict(feeds) | _run(model, feeds) if exposed else dict(feeds)
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(kept)
    return [value.const_value.numpy() if value.const_value is not None else found[value.name or ""] for value in wanted]


def _run(ir: onnx_ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    with TemporaryDirectory(prefix="modelpress-") as folder:
        path = Path(folder) / "model.onnx"
        Model(ir, Provenance("onnx", "", 0)).save(path)
        return run(open_session(path, optimize=False), feeds)


def _write_out(graph: onnx_ir.Graph, node: onnx_ir.Node, branch_name: str, suffix: str) -> list[onnx_ir.Value]:
    """Puts the nodes of a branch in the place of its `If`; returns the values that stand for the outputs of it."""
    branch = node.attributes[branch_name].as_graph()
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
