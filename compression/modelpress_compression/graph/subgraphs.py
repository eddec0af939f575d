"""Subgraphs, the outer values that they use, and the part of a graph that some outputs need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir


def subgraphs(node: onnx_ir.Node) -> dict[str, onnx_ir.Graph]:
    """The node's subgraphs by the name of their attribute."""
    found = {}
    for name, attribute in node.attributes.items():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            found[name] = attribute.as_graph()
    return found


def captured_values(node: onnx_ir.Node) -> tuple[onnx_ir.Value, ...]:
    """Values of outer graphs that the node's subgraphs use, without those that are constant there."""
    used: dict[onnx_ir.Value, None] = {}
    inside: set[onnx_ir.Value] = set()
    for graph in _nested_graphs(node):
        inside.update(graph.inputs)
        inside.update(graph.initializers.values())
        used.update(dict.fromkeys(graph.outputs))
        for inner in graph:
            inside.update(inner.outputs)
            used.update((value, None) for value in inner.inputs if value is not None)
    return tuple(value for value in used if value not in inside)


def _nested_graphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    for graph in subgraphs(node).values():
        yield graph
        for inner in graph:
            yield from _nested_graphs(inner)


def needed_nodes(
    graph: onnx_ir.Graph, inputs: Collection[onnx_ir.Value], outputs: Sequence[onnx_ir.Value]
) -> list[onnx_ir.Node]:
    """Nodes of the graph that the outputs depend on, in order, where `inputs` are given."""
    needed: set[onnx_ir.Node] = set()
    frontier = list(outputs)
    while frontier:
        value = frontier.pop()
        node = value.producer()
        if node is None or node in needed or value in inputs:
            continue
        needed.add(node)
        frontier.extend(item for item in (*node.inputs, *captured_values(node)) if item is not None)
    return [node for node in graph if node in needed]
