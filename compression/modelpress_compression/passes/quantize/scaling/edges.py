"""Scales of channels that move between an activation and the weights that read it, without changing the answer.

    X W = (X / s) (diag(s) W)        X: [..., K] (or [N, K, ...] before a Conv), s: [K], all positive

Where `X / s` can be had for nothing, because what makes X is linear in constants of its own (a LayerNormalization, a
Conv, a product and its bias, seen through Relu, pooling, or the values of an attention), those constants are divided;
else a Mul divides X for the products alone. SmoothQuant (Xiao et al., arXiv:2211.10438) and cross-layer equalization
(Nagel et al., arXiv:1906.04721) are two choices of s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_array,
    graph_of,
    input_of,
    is_constant,
    required,
)
from modelpress_compression.passes.quantize.views import root_of

# f(X / s) = f(X) / s for every positive s, channel by channel.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity")
_POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool")

Scale = NDArray[np.float64]  # [K], positive


@dataclass(frozen=True)
class Slot:
    """A constant operand of a node, and the axis along which the channels lie."""

    node: onnx_ir.Node
    index: int
    axis: int

    @property
    def array(self) -> NDArray[Any]:
        """The operand's numbers."""
        return np.asarray(constant_array(required(self.node, self.index)))

    def scaled(self, scale: Scale, editor: Editor) -> None:
        """Multiplies the operand, which stays as it is for its other users."""
        array = self.array
        shape = [1] * array.ndim
        shape[self.axis] = len(scale)
        self.put(array * scale.reshape(shape), editor, "scaled")

    def put(self, numbers: NDArray[Any], editor: Editor, what: str) -> None:
        """Gives the operand other numbers, in its type; `what`: appended to its name where others read it too."""
        value = required(self.node, self.index)
        if len(value.uses()) == 1 and not value.is_graph_output():
            editor.replace_numbers(value, numbers)
            return
        new = editor.constant(graph_of(self.node), numbers.astype(self.array.dtype), f"{value.name or 'weight'}_{what}")
        self.node.replace_input_with(self.index, new)


@dataclass(frozen=True)
class Edge:
    """An activation X and the layers that read it.

    `axis`: of X's channels, counted from the front for a Conv (1) and from the back for products (-1).
    `makers`: the constants that make X, empty where a Mul has to be inserted.
    """

    value: onnx_ir.Value
    axis: int
    channels: int
    weights: tuple[Slot, ...]
    makers: tuple[Slot, ...]

    @property
    def name(self) -> str:
        return self.value.name or ""

    def apply(self, scale: Scale, editor: Editor) -> None:
        """Divides X by `scale` and multiplies the weights behind it."""
        for slot in self.weights:
            slot.scaled(scale, editor)
        for slot in self.makers:
            slot.scaled(1 / scale, editor)
        if not self.makers:
            first = self.weights[0].node
            inverse = editor.constant(graph_of(first), (1 / scale).astype(np.float32), f"{self.name}_inverse_scale")
            (divided,) = editor.emit(first, "Mul", [self.value, inverse], f"{self.name}_smoothed")
            for slot in self.weights:
                slot.node.replace_input_with(0, divided)


def find_edges(graph: onnx_ir.Graph, layers: Iterable[onnx_ir.Node]) -> list[Edge]:
    """The edges behind which all of `layers` stand, in the graph's order; each layer belongs to one at most."""
    readers: dict[onnx_ir.Value, list[Slot]] = {}
    for node in layers:
        slot, value = _weight_slot(node), node.inputs[0]
        if slot is not None and value is not None and not is_constant(value):
            readers.setdefault(value, []).append(slot)
    edges = [_edge(graph, value, slots) for value, slots in readers.items()]
    turned = turned_roots(graph)
    return [
        edge
        for edge in edges
        if edge is not None and not any(is_shared(slot, turned) for slot in (*edge.weights, *edge.makers))
    ]


def turned_roots(graph: onnx_ir.Graph) -> Collection[int]:
    """Identities of the tensors that the graph's nodes read transposed too."""
    return {id(root) for root, is_view in map(root_of, graph.initializers.values()) if is_view}


def is_shared(slot: Slot, turned: Collection[int]) -> bool:
    """Whether another node reads the weight as well: it would need a copy with other numbers. Vectors are copied."""
    value = required(slot.node, slot.index)
    root, _ = root_of(value)
    return root is not None and len(root.shape) > 1 and (id(root) in turned or len(value.uses()) > 1)


def _weight_slot(node: onnx_ir.Node) -> Slot | None:
    """The node's weight with the axis of its inputs; None for grouped convolutions but depthwise ones."""
    weight = constant_array(input_of(node, 1))
    if weight is None:
        return None
    if node.op_type == "Conv":
        group = attribute(node, "group", 1)
        if group == 1:
            return Slot(node, 1, 1)
        return Slot(node, 1, 0) if weight.shape[1] == 1 and weight.shape[0] == group else None
    if weight.ndim != 2:
        return None
    return Slot(node, 1, 1 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 0)


def _edge(graph: onnx_ir.Graph, value: onnx_ir.Value, slots: Sequence[Slot]) -> Edge | None:
    axis = 1 if slots[0].node.op_type == "Conv" else -1
    shapes = [required(slot.node, 1).shape for slot in slots]
    channels = {shape[slot.axis] for slot, shape in zip(slots, shapes, strict=True) if shape is not None}
    if len(channels) != 1 or len({slot.node.op_type == "Conv" for slot in slots}) != 1:
        return None
    (extent,) = channels
    if not isinstance(extent, int):
        return None
    alone = len(tuple(value.uses())) == len(slots) and not value.is_graph_output()
    makers = _makers(value, axis, extent) if alone else None
    if makers is None and axis == 1:
        # A Mul before a Conv would end the 8-bit chain, and costs as much as a small Conv.
        return None
    return Edge(value, axis, extent, tuple(slots), tuple(makers or ()))


def _makers(value: onnx_ir.Value, axis: int, channels: int) -> list[Slot] | None:
    """The constants in which `value` is linear, channel by channel; None: there is something else on the way."""
    found: list[Slot] = []
    while True:
        node = value.producer()
        if node is None or node.outputs[0] is not value or any(output.uses() for output in node.outputs[1:]):
            return None
        before = _through(node, axis)
        if before is None:
            slots = _ends(node, axis, channels)
            return None if slots is None else found + slots
        if node.op_type == "Add" and (bias := _operand(node, before, axis, channels)) is not None:
            found.append(bias)
        elif node.op_type == "Add":
            return None
        if len(tuple(before.uses())) != 1 or before.is_graph_output():
            return None
        value = before


def _through(node: onnx_ir.Node, axis: int) -> onnx_ir.Value | None:
    """The input through which the scale goes on towards the front; None: it ends here."""
    if node.domain == MICROSOFT and node.op_type == "MultiHeadAttention":
        # The output is a mean of the values, so their scale is its scale; a packed or biased form is left alone.
        plain = input_of(node, 2) is not None and all(input_of(node, index) is None for index in (3, 6, 7))
        return input_of(node, 2) if plain and axis == -1 else None
    if node.domain:
        return None
    if node.op_type in _HOMOGENEOUS or (node.op_type in _POOLING and axis == 1):
        return input_of(node, 0)
    if node.op_type == "Add":
        return next((value for value in node.inputs if value is not None and not is_constant(value)), None)
    return None


def _ends(node: onnx_ir.Node, axis: int, channels: int) -> list[Slot] | None:
    """The constants of the node that makes the channels."""
    if node.domain:
        return None
    if node.op_type == "LayerNormalization" and axis == -1 and attribute(node, "axis", -1) == -1:
        slots = [Slot(node, index, -1) for index in (1, 2) if input_of(node, index) is not None]
    elif node.op_type == "Conv" and axis == 1:
        slots = [Slot(node, index, 0) for index in (1, 2) if input_of(node, index) is not None]
    elif node.op_type == "MatMul" and axis == -1:
        slots = [Slot(node, 1, -1)]
    elif node.op_type == "Gemm" and axis == -1:
        slots = [Slot(node, 1, 0 if attribute(node, "transB", 0) else 1)]
        slots += [Slot(node, 2, -1)] if input_of(node, 2) is not None else []
    elif node.op_type == "Mul":
        other = next((value for value in node.inputs if value is not None and not is_constant(value)), None)
        slot = _operand(node, other, axis, channels) if other is not None else None
        slots = [slot] if slot is not None else []
    else:
        return None
    return slots if slots and all(_fits(slot, channels) for slot in slots) else None


def _operand(node: onnx_ir.Node, other: onnx_ir.Value, axis: int, channels: int) -> Slot | None:
    """The constant operand of an elementwise node, where it has one number a channel."""
    index = 1 if node.inputs[0] is other else 0
    rank = None if other.shape is None else len(other.shape)
    if axis == 1 and rank is None:
        return None
    slot = Slot(node, index, -1 if axis == -1 or rank is None else 1 - rank)
    return slot if _fits(slot, channels) else None


def _fits(slot: Slot, channels: int) -> bool:
    value = input_of(slot.node, slot.index)
    array = constant_array(value) if is_constant(value) else None
    if array is None or array.dtype != np.float32 or array.ndim < (slot.axis + 1 if slot.axis >= 0 else -slot.axis):
        return False
    return array.shape[slot.axis] == channels and math.isfinite(float(np.abs(array).max(initial=0)))
