"""Extents of the values of a graph, asked for by axes that are counted from the back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir

from modelpress_compression.graph.read import (
    constant_tensor,
    is_constant,
)
from modelpress_compression.graph.shapes import Shape, shape_of, static_shapes
from modelpress_compression.model import Model


@dataclass(frozen=True)
class Shapes:
    """Extents of all values for inputs of one shape; axes are counted from the back."""

    known: Mapping[str, Shape]

    @classmethod
    def of(cls, model: Model, input_shapes: Mapping[str, Shape] | None) -> Shapes:
        graph = static_shapes(model, input_shapes).graph
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        found = ((value.name, shape_of(value)) for value in values)
        return cls({name: shape for name, shape in found if name and shape is not None})

    def shape(self, value: onnx_ir.Value | None) -> Shape | None:
        tensor = constant_tensor(value)
        if tensor is not None:
            return tuple(int(size) for size in tensor.shape.numpy())
        return None if value is None else self.known.get(value.name or "")

    def rank(self, value: onnx_ir.Value | None) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def extent(self, value: onnx_ir.Value | None, axis: int) -> int | None:
        """None: not known; 1 where the value has no such axis, as in broadcasting."""
        shape = self.shape(value)
        return None if shape is None else ((1,) * -axis + shape)[axis]

    def behind(self, value: onnx_ir.Value | None, axis: int) -> int | None:
        """How many elements one index of the axis holds."""
        shape = self.shape(value)
        return None if shape is None else math.prod(shape[axis:][1:])

    def same_for_all(self, value: onnx_ir.Value | None, axis: int) -> bool:
        """Whether the value has one number for all indices of an axis, for inputs of any shape."""
        symbolic = None if value is None or is_constant(value) else value.shape
        fixed = symbolic is None or len(symbolic) < -axis or isinstance(symbolic[axis], int)
        return fixed and self.extent(value, axis) == 1
