"""Weights of a model under change: each is copied once, however many groups touch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
from modelpress_compression.graph.read import constant_tensor, is_op, label
from modelpress_compression.model import Model

Change = Callable[[np.ndarray[Any, Any]], None]


class Constants:
    """Copies of the constant tensors by the names of their values; `write` puts them into the graph.

    A change counts for the one node that it names; where other nodes use the tensor as well and that node takes it
    directly, it gets a tensor of its own, so that nothing is assumed about the others.
    """

    def __init__(self, model: Model) -> None:
        self._values: dict[str, onnx_ir.Value] = {}
        for graph in model.graphs():
            self._values.update(graph.initializers)
        for node in model.nodes():
            if is_op(node, "Constant") and node.outputs[0].name:
                self._values[node.outputs[0].name] = node.outputs[0]
        self._arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}

    def change(self, tensor: str, node: str, change: Change) -> None:
        """Applies `change` in place to the copy of the tensor that the node named `node` uses."""
        value = self._values[tensor]
        users = {label(user) for user in value.consumers()}
        key = (tensor, node if node in users and len(users) > 1 else "")
        if key not in self._arrays:
            constant = constant_tensor(value)
            if constant is None:
                raise KeyError(f"{tensor!r} is not constant")
            self._arrays[key] = np.array(constant.numpy())
        change(self._arrays[key])

    def write(self) -> None:
        """Puts the changed tensors into the graph."""
        for (name, user), array in self._arrays.items():
            value = self._values[name]
            tensor = onnx_ir.Tensor(array, name=f"{name}/{user}" if user else name)
            if user:
                self._private(value, user, tensor)
            elif (producer := value.producer()) is not None:
                producer.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
            else:
                value.const_value = tensor

    @staticmethod
    def _private(value: onnx_ir.Value, user: str, tensor: onnx_ir.Tensor[Any]) -> None:
        for node, position in list(value.uses()):
            if label(node) != user:
                continue
            graph = node.graph
            if not isinstance(graph, onnx_ir.Graph):
                raise TypeError(f"node {user!r} is in no graph")
            if tensor.name not in graph.initializers:
                graph.register_initializer(constant_value(tensor))
            node.replace_input_with(position, graph.initializers[tensor.name or ""])


def constant_value(tensor: onnx_ir.Tensor[Any]) -> onnx_ir.Value:
    """A value to register as an initializer."""
    return onnx_ir.Value(
        name=tensor.name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(tensor.shape), const_value=tensor
    )
