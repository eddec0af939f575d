"""A graph in blocks: stretches of nodes, each ending in the one value through which its weights act on the rest.

A value is such a border if, in the order of the graph, no other value that depends on a trained weight is still needed
behind it: the output of a layer in a chain, or of a whole residual block. Masks and shapes, which depend on no weight,
may pass by. The last block ends with the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import onnx_ir

from modelpress_compression.graph.read import constant_tensor, is_op, only_consumer
from modelpress_compression.graph.subgraphs import read_values
from modelpress_compression.model import Model

Selector = Callable[[onnx_ir.Value], bool]  # of constants

MAX_BLOCKS = 32
_END = 1 << 60
_ACTIVATIONS = ("Relu", "Clip")


@dataclass(frozen=True)
class Block:
    """`inputs`: values that it takes as given; `target`: the value that it ends with, "" for the model's outputs;
    `weights`: constants that are trained here."""

    inputs: tuple[str, ...]
    target: str
    weights: frozenset[onnx_ir.Value]


def find_blocks(model: Model, selector: Selector, matched: Collection[str], most: int = MAX_BLOCKS) -> list[Block]:
    """At most so many blocks in order, each with weights of its own; borders are among the `matched` names. Weights
    that several blocks use belong to none of them."""
    nodes = list(model.graph)
    fixed = _fixed_values(nodes)
    owned = [_weights_of(node, selector, fixed) for node in nodes]
    ends = _borders(model, nodes, selector, owned, matched, most)
    stretches = list(zip([0, *(end + 1 for end, _ in ends)], [*ends, (len(nodes) - 1, "")], strict=True))
    uses: dict[onnx_ir.Value, int] = {}
    for start, (end, _) in stretches:
        for value in frozenset().union(*owned[start : end + 1]):
            uses[value] = uses.get(value, 0) + 1
    blocks = []
    for start, (end, target) in stretches:
        weights = frozenset(value for value in frozenset().union(*owned[start : end + 1]) if uses[value] == 1)
        blocks.append(Block(_inputs(nodes[start : end + 1], fixed), target, weights))
    return blocks


def layer_blocks(model: Model, selector: Selector, matched: Collection[str]) -> list[Block]:
    """Each node of the main graph that multiplies by a weight of its own, as a block that ends with its answer, or with
    that of the Relu or Clip which alone reads it. Its input comes from the last value before it of a `matched` name."""
    users: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
    nodes = list(model.graph)
    fixed = _fixed_values(nodes)
    owned = {node: _weights_of(node, selector, fixed) for node in nodes}
    for node, weights in owned.items():
        for weight in weights:
            users.setdefault(weight, []).append(node)
    blocks = []
    for node, weights in owned.items():
        mine = frozenset(weight for weight in weights if users[weight] == [node])
        end = node.outputs[0] if node.outputs else None
        if not mine or end is None or end.name not in matched:
            continue
        reader = only_consumer(end)
        stretch = [node]
        if reader is not None and is_op(reader, *_ACTIVATIONS) and reader.outputs[0].name in matched:
            end, stretch = reader.outputs[0], [node, reader]
        blocks.append(Block(_inputs(_with_pairs(stretch, matched), fixed), end.name or "", mine))
    return blocks


def _with_pairs(stretch: Sequence[onnx_ir.Node], matched: Collection[str]) -> list[onnx_ir.Node]:
    """The nodes, and those before them that make their inputs of values with a `matched` name."""
    found = list(stretch)
    waiting = [value for value in read_values(stretch[0]) if value.name not in matched]
    while waiting:
        maker = waiting.pop().producer()
        if maker is not None and maker not in found:
            found.insert(0, maker)
            waiting += [value for value in maker.inputs if value is not None and value.name not in matched]
    return found


def _borders(
    model: Model,
    nodes: Sequence[onnx_ir.Node],
    selector: Selector,
    owned: Sequence[frozenset[onnx_ir.Value]],
    matched: Collection[str],
    most: int,
) -> list[tuple[int, str]]:
    """(index of the last node of a block, its target); some are left out where there would be more than `most`."""
    last = _last_uses(model, nodes)
    reached: set[onnx_ir.Value] = set()
    live: set[onnx_ir.Value] = set()
    found: list[tuple[int, str]] = []
    waiting = False  # whether there were weights since the last border
    for index, node in enumerate(nodes):
        waiting = waiting or bool(owned[index])
        if any(value in reached or selector(value) for value in read_values(node)):
            reached.update(node.outputs)
            live.update(value for value in node.outputs if last.get(value, -1) > index)
        live.difference_update(value for value in read_values(node) if last[value] == index)
        if waiting and len(live) == 1 and (name := next(iter(live)).name) in matched and index < len(nodes) - 1:
            found.append((index, name or ""))
            waiting = False
    # Nodes at the end without weights of their own belong to the block before them.
    if found and not any(owned[index] for index in range(found[-1][0] + 1, len(nodes))):
        found.pop()
    step = -(-len(found) // (most - 1))
    return found[step - 1 :: step] if found else []


def _last_uses(model: Model, nodes: Sequence[onnx_ir.Node]) -> dict[onnx_ir.Value, int]:
    last: dict[onnx_ir.Value, int] = {}
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys(read_values(node), index))
    last.update(dict.fromkeys(model.graph.outputs, _END))
    return last


def _fixed_values(nodes: Sequence[onnx_ir.Node]) -> set[onnx_ir.Value]:
    """Values that are computed from constants alone: dequantized or transposed weights."""
    fixed: set[onnx_ir.Value] = set()
    for node in nodes:
        if all(value in fixed or constant_tensor(value) is not None for value in read_values(node)):
            fixed.update(node.outputs)
    return fixed


def _weights_of(node: onnx_ir.Node, selector: Selector, fixed: set[onnx_ir.Value]) -> frozenset[onnx_ir.Value]:
    """Trained constants that the node reads, directly or through fixed values; none for nodes that compute fixed values
    themselves, since the weight belongs to the node that uses it."""
    if any(value in fixed for value in node.outputs):
        return frozenset()
    found, frontier = set(), list(read_values(node))
    while frontier:
        value = frontier.pop()
        producer = value.producer()
        if selector(value):
            found.add(value)
        elif value in fixed and producer is not None:
            frontier += read_values(producer)
    return frozenset(found)


def _inputs(nodes: Sequence[onnx_ir.Node], fixed: set[onnx_ir.Value]) -> tuple[str, ...]:
    """Computed values from before these nodes that they read."""
    made = {value for node in nodes for value in node.outputs}
    graph = nodes[0].graph
    found: dict[str, None] = {}
    for node in nodes:
        for value in read_values(node):
            producer = value.producer()
            outer = value.is_graph_input() if producer is None else producer.graph is graph
            if outer and value not in made and value not in fixed and constant_tensor(value) is None and value.name:
                found[value.name] = None
    return tuple(found)
