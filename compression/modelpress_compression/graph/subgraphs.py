"""Subgraphs of If, Loop and Scan, what a node reads with them, and the part of a graph that some outputs need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir


def subgraphs(node: onnx_ir.Node) -> dict[str, onnx_ir.Graph]:
    """The node's subgraphs by the name of their attribute. No operator has a list of graphs as an attribute."""
    found = {}
    for name, attribute in node.attributes.items():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            found[name] = attribute.as_graph()
    return found


def read_values(node: onnx_ir.Node) -> tuple[onnx_ir.Value, ...]:
    """What the node reads, each value once: its inputs, then what is read inside its subgraphs, at any depth.

    Values that belong to the subgraphs are among them, since weights may lie there.
    """
    inputs = (value for value in node.inputs if value is not None)
    return tuple(dict.fromkeys((*inputs, *_read_inside(node))))


def captured_values(node: onnx_ir.Node) -> tuple[onnx_ir.Value, ...]:
    """Values of outer graphs that the node's subgraphs read, each once."""
    inside: set[onnx_ir.Value] = set()
    for graph in _nested_graphs(node):
        inside.update(graph.inputs, graph.initializers.values(), *(inner.outputs for inner in graph))
    return tuple(dict.fromkeys(value for value in _read_inside(node) if value not in inside))


def _read_inside(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    for graph in _nested_graphs(node):
        # A branch may hand out a value of the outer graph as it is: no node of the branch reads it then.
        yield from graph.outputs
        yield from (value for inner in graph for value in inner.inputs if value is not None)


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
