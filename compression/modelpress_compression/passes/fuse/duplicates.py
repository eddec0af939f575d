"""The same thing twice: equal nodes on equal inputs, equal weights.

Two nodes are equal when operator, inputs, attributes and number of outputs are; small constants count by content, so
that the copies which exporters write for every use do not stand in the way. One walk in the graph's order finds chains,
since the inputs of later nodes have been replaced by then. Nodes of a subgraph may be replaced by equal ones of an
outer graph, never the other way round. Random operators and nodes with subgraphs are left alone.

Weights are merged from 1 KiB on: merging smaller ones saves nothing, and would tie layers together (a shape constant
that two Reshapes share cannot follow when one of them gets fewer channels).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable

import onnx_ir

from modelpress_compression.graph.read import constant_tensor, is_overwritten
from modelpress_compression.graph.subgraphs import subgraphs
from modelpress_compression.noise import RANDOM
from modelpress_compression.passes.fuse.rewriting import Scope

MIN_SHARED_BYTES = 1024  # 1 KiB
_MAX_KEY_BYTES = 512
_PLAIN = {
    onnx_ir.AttributeType.INT,
    onnx_ir.AttributeType.FLOAT,
    onnx_ir.AttributeType.STRING,
    onnx_ir.AttributeType.INTS,
    onnx_ir.AttributeType.FLOATS,
    onnx_ir.AttributeType.STRINGS,
}


def merge_common_subexpressions(scope: Scope) -> int:
    """Replaces nodes by equal earlier ones; how many."""
    return _merge_nodes(scope.ir.graph, {}, scope)


def _merge_nodes(graph: onnx_ir.Graph, seen: dict[Hashable, onnx_ir.Node], scope: Scope) -> int:
    """`seen`: nodes of this graph so far and of the graphs around it."""
    merged = 0
    for node in list(graph):
        merged += sum(_merge_nodes(inner, dict(seen), scope) for inner in subgraphs(node).values())
        key = None if scope.excluded(node) else _node_key(node)
        if key is None:
            continue
        twin = seen.setdefault(key, node)
        # An output's name cannot be given to another node; such nodes stay.
        if twin is node or any(output.is_graph_output() for output in node.outputs):
            continue
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        merged += 1
    return merged


def _node_key(node: onnx_ir.Node) -> Hashable | None:
    """What makes the node what it is; None if it is not to be merged."""
    if node.op_type in RANDOM or node.op_type == "Constant":
        return None
    if any(attribute.type not in _PLAIN or attribute.is_ref() for attribute in node.attributes.values()):
        return None
    attributes = tuple(
        (name, attribute.type, tuple(value) if isinstance(value := attribute.value, list | tuple) else value)
        for name, attribute in sorted(node.attributes.items())
    )
    # Which optional outputs exist matters as well: Dropout-like operators compute other things without them.
    outputs = tuple(bool(output.name) for output in node.outputs)
    return node.domain, node.op_type, node.overload, tuple(map(_value_key, node.inputs)), attributes, outputs


def _value_key(value: onnx_ir.Value | None) -> Hashable:
    tensor = constant_tensor(value)
    if tensor is None or tensor.nbytes > _MAX_KEY_BYTES or tensor.dtype.is_string():
        return id(value)
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()


def merge_initializers(scope: Scope) -> int:
    """Gives equal weights of the main graph one tensor; how many went.

    Only those that agree in type and shape are hashed, so that most of a large model is never read.
    """
    graph = scope.ir.graph
    alike: dict[Hashable, list[onnx_ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = constant_tensor(value)
        if tensor is None or tensor.nbytes < MIN_SHARED_BYTES or tensor.dtype.is_string() or value.is_graph_output():
            continue
        if is_overwritten(value):
            continue
        alike[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    count = 0
    for values in alike.values():
        if len(values) < 2:
            continue
        first: dict[bytes, onnx_ir.Value] = {}
        for value in values:
            kept = first.setdefault(_digest(value), value)
            if kept is value or value.name is None:
                continue
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name]
            count += 1
    return count


def _digest(value: onnx_ir.Value) -> bytes:
    tensor = constant_tensor(value)
    return b"" if tensor is None else hashlib.sha256(tensor.tobytes()).digest()
