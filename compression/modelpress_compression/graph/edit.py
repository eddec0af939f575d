"""The one way to change a graph: new constants and nodes under new names, one node in the place of another.

`Editor` knows every name of a model, so that what it adds never meets what is there. Changes that need no new name are
its static methods or functions: a model is taken apart with them as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from modelpress_compression.graph.read import constant_tensor, graph_of
from modelpress_compression.inputs import Array
from modelpress_compression.mapped import WeightFile
from modelpress_compression.model import MADE, Model

Inputs = Sequence[onnx_ir.Value | None]


class Editor:
    """Changes a model that belongs to the caller. New names never meet old ones, in any graph of the model.

    `weights`: the file that large constants go to, new ones and those that get other numbers; None: to memory.
    """

    def __init__(self, model: Model, weights: WeightFile | None = None) -> None:
        self.ir, self._weights = model.ir, weights
        self._names: set[str] = set()
        for graph in model.graphs():
            self._names.update(value.name for value in graph.inputs if value.name)
            self._names.update(graph.initializers)
        for node in model.nodes():
            self._names.update(output.name for output in node.outputs if output.name)
            self._names.update([node.name] if node.name else [])

    # New things

    def name(self, wish: str) -> str:
        """`wish`, else `wish_1`, `wish_2`, ...; taken from now on."""
        name, number = wish, 0
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    def constant(self, graph: onnx_ir.Graph, array: NDArray[Any], wish: str) -> onnx_ir.Value:
        """A new initializer of `graph`."""
        return self.hold(graph, onnx_ir.Tensor(np.asarray(array, order="C")), wish)

    def hold(self, graph: onnx_ir.Graph, tensor: onnx_ir.TensorProtocol, wish: str) -> onnx_ir.Value:
        """A new initializer of `graph` with a tensor as it is."""
        name, tensor = self.name(wish), self._weights.put(tensor) if self._weights is not None else tensor
        value = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(tensor.dtype),
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def replace_numbers(self, value: onnx_ir.Value, array: Array) -> None:
        """As the function of this name."""
        replace_numbers(value, array)
        if self._weights is not None and value.producer() is None and value.const_value is not None:
            value.const_value = self._weights.put(value.const_value)

    def make(
        self,
        op_type: str,
        inputs: Inputs,
        wish: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: Sequence[str] = ("",),
    ) -> onnx_ir.Node:
        """A new node that is in no graph yet; `outputs`: what to append to the outputs' names."""
        self._import(domain)
        values = [onnx_ir.Value(name=self.name(f"{wish}_{op_type}{suffix}")) for suffix in outputs]
        name = self.name(f"{wish}/{op_type}")
        node = onnx_ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        node.meta[MADE] = True
        return node

    def emit(
        self,
        before: onnx_ir.Node,
        op_type: str,
        inputs: Inputs,
        wish: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: Sequence[str] = ("",),
    ) -> tuple[onnx_ir.Value, ...]:
        """As `make`, with the node just before another, in its graph."""
        node = self.make(op_type, inputs, wish, attributes=attributes, domain=domain, outputs=outputs)
        graph_of(before).insert_before(before, node)
        return tuple(node.outputs)

    def make_like(
        self,
        like: onnx_ir.Node,
        op_type: str,
        inputs: Inputs,
        attributes: Iterable[onnx_ir.Attr] | Mapping[str, Any] = (),
        *,
        domain: str = "",
    ) -> onnx_ir.Node:
        """A node for the place of `like`, in no graph yet: it keeps that node's name, by which users exclude and find
        it, and the type of its first output."""
        self._import(domain)
        if isinstance(attributes, Mapping):
            attributes = onnx_ir.convenience.convert_attributes(attributes)
        node = onnx_ir.Node(domain, op_type, inputs, tuple(attributes), name=like.name)
        node.outputs[0].name = self.name(like.outputs[0].name or op_type)
        node.outputs[0].type = like.outputs[0].type
        return node

    def _import(self, domain: str) -> None:
        if domain:
            self.ir.opset_imports.setdefault(domain, 1)

    # One thing in the place of another

    @staticmethod
    def hand_over(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        """`new` takes the place of `old` for every consumer, as graph output, and in name, type and shape."""
        name, new.type, new.shape = old.name, old.type, old.shape
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = None
        new.name = name

    @classmethod
    def replace(cls, last: onnx_ir.Node, old: Sequence[onnx_ir.Node], new: Sequence[onnx_ir.Node]) -> None:
        """Puts `new` in the place of `last`, whose one output the last of them makes now, and removes `old`.

        `old` is given from the first to the last; those whose outputs are still used stay.
        """
        # onnxruntime refuses two nodes of one name; the first keeps that of the node it stands for.
        for number, node in enumerate(new):
            if number and node.name and any(node.name == other.name for other in new[:number]):
                node.name = f"{node.name}.{number}"
        onnx_ir.convenience.replace_nodes_and_values(
            graph_of(last), last, [last], list(new), [last.outputs[0]], [new[-1].outputs[0]]
        )
        cls.remove_unused(node for node in reversed(list(old)) if node is not last)

    @staticmethod
    def bypass(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
        """Removes a node that passes `value` on; False where that would cost the graph one of its outputs' names."""
        output = node.outputs[0]
        graph = graph_of(node)
        if output.is_graph_output():
            producer = value.producer()
            if producer is None or value.is_graph_output() or producer.graph is not graph:
                return False
            value.name, output.name = output.name, None
            # What the file says of an output stays: names of dimensions are the user's, inference makes up others.
            value.type = value.type if value.type is not None else output.type
            value.shape = output.shape if output.shape is not None else value.shape
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return True

    @staticmethod
    def remove_unused(nodes: Iterable[onnx_ir.Node]) -> None:
        """Removes those whose outputs no one uses; users come before what they use."""
        for node in nodes:
            if node.graph is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs):
                node.graph.remove(node, safe=True)


@dataclass(frozen=True)
class Spot:
    """Where an editor adds: nodes just before `before`, constants to the graph of that, all named after `name`."""

    editor: Editor
    before: onnx_ir.Node
    name: str

    def emit(self, op_type: str, *inputs: onnx_ir.Value | None, **attributes: Any) -> onnx_ir.Value:
        """The output of a new node of the standard."""
        return self.editor.emit(self.before, op_type, inputs, self.name, attributes=attributes)[0]

    def constant(self, array: NDArray[Any] | np.generic, what: str = "constant") -> onnx_ir.Value:
        return self.editor.constant(graph_of(self.before), np.asarray(array), f"{self.name}_{what}")

    def real(self, integers: onnx_ir.Value) -> onnx_ir.Value:
        """As float32."""
        return self.emit("Cast", integers, to=int(onnx_ir.DataType.FLOAT))


def clean(model: Model) -> None:
    """Removes nodes and initializers that no one uses any more, in every graph."""
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model.ir)
    for graph in model.graphs():  # the pass above leaves the initializers of subgraphs alone
        kept = {id(value) for value in (*graph.outputs, *graph.inputs)}
        for name, value in list(graph.initializers.items()):
            if not value.uses() and id(value) not in kept:
                del graph.initializers[name]


def set_input(node: onnx_ir.Node, position: int, value: onnx_ir.Value) -> None:
    """Gives the node an input, which may lie beyond those that it has."""
    node.resize_inputs(max(position + 1, len(node.inputs)))
    node.replace_input_with(position, value)


def replace_numbers(value: onnx_ir.Value, array: Array) -> None:
    """Gives a constant these numbers, in the element type that it has, be it an initializer or of a Constant node.

    Raises TypeError when the value is not constant.
    """
    old = constant_tensor(value)
    if old is None:
        raise TypeError(f"value {value.name!r} is not constant")
    tensor = onnx_ir.Tensor(np.asarray(array, old.dtype.numpy(), order="C"), dtype=old.dtype, name=old.name)
    producer = value.producer()
    if producer is not None:
        # A Constant may hold its numbers in value_ints and the like, and may have one attribute only.
        producer.attributes.clear()
        producer.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
    value.const_value = tensor
    if tensor.shape != old.shape:
        value.shape = onnx_ir.Shape(tensor.shape)
