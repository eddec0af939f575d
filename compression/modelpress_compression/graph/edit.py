"""Changing a graph: new initializers, new nodes, and a node's output handed over to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from modelpress_compression.graph.read import constant_tensor, graph_of, is_op
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model


class Editor:
    """Adds to a model that belongs to the caller. New names never meet old ones, in any graph of the model."""

    def __init__(self, model: Model) -> None:
        self.ir = model.ir
        self._names: set[str] = set()
        for graph in model.graphs():
            self._names.update(value.name for value in graph.inputs if value.name)
            self._names.update(graph.initializers)
        for node in model.nodes():
            self._names.update(output.name for output in node.outputs if output.name)
            self._names.update([node.name] if node.name else [])

    def name(self, wish: str) -> str:
        """`wish`, or `wish` with a number; taken from now on."""
        name, number = wish, 1
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    def constant(self, graph: onnx_ir.Graph, array: NDArray[Any], wish: str) -> onnx_ir.Value:
        """A new initializer of `graph`."""
        name = self.name(wish)
        tensor = onnx_ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
        value = onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    def emit(
        self,
        before: onnx_ir.Node,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        wish: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: Sequence[str] = ("",),
    ) -> tuple[onnx_ir.Value, ...]:
        """A new node just before another, in its graph; `outputs`: what to append to the outputs' names."""
        node = self.make(op_type, inputs, wish, attributes=attributes, domain=domain, outputs=outputs)
        graph_of(before).insert_before(before, node)
        return tuple(node.outputs)

    def make(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        wish: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: Sequence[str] = ("",),
    ) -> onnx_ir.Node:
        """A new node that is in no graph yet."""
        if domain:
            self.ir.opset_imports.setdefault(domain, 1)
        values = [onnx_ir.Value(name=self.name(f"{wish}_{op_type}{suffix}")) for suffix in outputs]
        return onnx_ir.node(
            op_type, inputs, attributes, domain=domain, outputs=values, name=self.name(f"{wish}/{op_type}")
        )

    @staticmethod
    def hand_over(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        """`new` takes the place of `old` for every consumer, as graph output, and in name, type and shape."""
        name, new.type, new.shape = old.name, old.type, old.shape
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = None
        new.name = name


def clean(model: Model) -> None:
    """Removes nodes and initializers that no one uses any more, in every graph."""
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model.ir)
    for graph in model.graphs():  # the pass above leaves the initializers of subgraphs alone
        kept = {id(value) for value in (*graph.outputs, *graph.inputs)}
        for name, value in list(graph.initializers.items()):
            if not value.uses() and id(value) not in kept:
                del graph.initializers[name]


def replace_numbers(value: onnx_ir.Value, array: Array) -> None:
    """Gives a constant these numbers, in the element type that it has, be it an initializer or of a Constant node."""
    old = constant_tensor(value)
    if old is None:
        raise TypeError(f"value {value.name!r} is not constant")
    tensor = onnx_ir.Tensor(np.ascontiguousarray(array, dtype=old.dtype.numpy()), dtype=old.dtype, name=old.name)
    producer = value.producer()
    if producer is not None and is_op(producer, "Constant"):
        producer.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
    value.const_value = tensor
