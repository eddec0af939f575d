"""The layers of a cut model that repair can fit anew, in the order in which it must, and the places of their biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.analysis.graph import (
    constant_array,
    int_attribute,
    is_op,
    label,
    only_consumer,
)
from modelpress_compression.analysis.linear import Linear, linear_of
from modelpress_compression.analysis.streams import observable
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip
from modelpress_compression.passes.prune.tensors import replace_numbers


@dataclass(frozen=True)
class Layer:
    """One node of the cut model. `level`: how many other such layers lie before it on the longest way from the inputs:
    layers of one level do not depend on each other."""

    node: onnx_ir.Node
    linear: Linear
    level: int

    @property
    def name(self) -> str:
        return label(self.node)

    @property
    def data(self) -> str:
        """Name of the value that it reads."""
        value = self.node.inputs[0]
        return (value.name or "") if value is not None else ""

    @property
    def output(self) -> str:
        """Name of the value that it makes."""
        return self.node.outputs[0].name or ""

    @property
    def weight(self) -> onnx_ir.Value:
        value = self.node.inputs[1]
        if value is None:
            raise TypeError(f"node {self.name!r} has no weight")
        return value

    @property
    def output_axis(self) -> int:
        """The axis of the weight along which its outputs lie."""
        if is_op(self.node, "Conv"):
            return 0
        return 0 if is_op(self.node, "Gemm") and int_attribute(self.node, "transB", 0) else 1


def find_layers(
    pruned: Model, touched: frozenset[str], readers: frozenset[str], full: Mapping[str, onnx_ir.Node]
) -> tuple[list[Layer], list[Skip]]:
    """The layers among `readers` (labels), those that read cut channels, and why others of them cannot be fitted.

    `touched`: names of the tensors that were cut; `full`: the nodes of the uncut model by label.
    """
    layers: list[Layer] = []
    skipped: list[Skip] = []
    levels: dict[int, int] = {}  # of values that are not what they were, by identity
    for node in pruned.graph:
        known = [levels[id(value)] for value in _read(node) if id(value) in levels]
        level = max(known, default=0)
        changed = bool(known) or any(value.name in touched for value in _read(node))
        if label(node) in readers:
            found = _layer(node, level, pruned, full)
            if isinstance(found, Layer):
                layers.append(found)
                level += 1
            else:
                skipped.append(Skip(label(node), f"Not fitted anew: {found}."))
        if changed:
            levels.update((id(value), level) for value in node.outputs)
    return layers, skipped


def _read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What the node reads, its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (value for value in inner.inputs if value is not None)


def _layer(node: onnx_ir.Node, level: int, pruned: Model, full: Mapping[str, onnx_ir.Node]) -> Layer | str:
    """The layer, or why it cannot be fitted."""
    linear = linear_of(node)
    if isinstance(linear, str):
        return linear
    weight, original = node.inputs[1], full.get(label(node))
    if weight is None or len(weight.uses()) != 1 or weight.is_graph_output():
        return "others use its weight as well"
    if original is None or original.outputs[0].name != node.outputs[0].name:
        return "the uncut model has no such node"
    if not observable(node.inputs[0], pruned) or not node.outputs[0].name:
        return "its activations have no name"
    return Layer(node, linear, level)


class Bias:
    """Where a layer's bias is or can be: its third input, or the constant that an Add puts on a product."""

    def __init__(self, layer: Layer, model: Model) -> None:
        self._layer, self._model = layer, model
        self._own = is_op(layer.node, "Conv", "Gemm")
        self._add = None if self._own else _added(layer)

    @property
    def possible(self) -> bool:
        return self._own or self._add is not None

    @property
    def own(self) -> Array | None:
        """The bias that is in the node's output; None: there is none."""
        return constant_array(self._given()) if self._own else None

    @property
    def readable(self) -> bool:
        """Whether the bias is constant, or there is none."""
        return not self._own or self._given() is None or self.own is not None

    def shift(self, by: NDArray[np.float64], channels: int) -> None:
        """Adds `by` [channels] to the bias; gives the node one where it has none."""
        value = self._given() if self._own else self._add
        old = constant_array(value)
        if value is None or old is None or len(value.uses()) > 1 or old.size != channels:
            dtype = self._layer.weight.dtype or onnx_ir.DataType.FLOAT
            start = np.zeros(channels) if old is None else np.broadcast_to(old.astype(np.float64).reshape(-1), channels)
            self._give((start + by).astype(dtype.numpy()))
        else:
            replace_numbers(value, (old.astype(np.float64) + by.reshape(old.shape)).astype(old.dtype))

    def _given(self) -> onnx_ir.Value | None:
        return self._layer.node.inputs[2] if len(self._layer.node.inputs) > 2 else None

    def _give(self, array: Array) -> None:
        """A bias of its own, under a new name."""
        name = f"{self._layer.weight.name}_repaired_bias"
        while name in self._model.graph.initializers:
            name += "_"
        value = onnx_ir.val(name, const_value=onnx_ir.Tensor(array, name=name))
        self._model.graph.register_initializer(value)
        node = self._layer.node
        if self._own:
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, value)
            return
        add = only_consumer(node.outputs[0])
        if add is not None:
            add.replace_input_with(0 if add.inputs[0] is self._add else 1, value)


def _added(layer: Layer) -> onnx_ir.Value | None:
    """The constant vector that an Add puts on the product, and on nothing else."""
    add = only_consumer(layer.node.outputs[0])
    if not is_op(add, "Add") or add is None:
        return None
    other = add.inputs[1] if add.inputs[0] is layer.node.outputs[0] else add.inputs[0]
    array = constant_array(other)
    outputs = layer.weight.shape[layer.output_axis] if layer.weight.shape is not None else None
    return other if array is not None and array.ndim and array.shape[-1] == array.size == outputs else None
