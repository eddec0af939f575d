"""The constant tensors and nodes of a model by the names that the members of a group have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.channels import Group, Indices, Member
from modelpress_compression.graph.read import constant_array, is_op, label
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model


class Weights:
    """Looks up what members name. Arrays come as the model stores them, memory-mapped where they lie in a file."""

    def __init__(self, model: Model) -> None:
        self._values: dict[str, onnx_ir.Value] = {}
        self._nodes: dict[str, onnx_ir.Node] = {}
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                self._values.setdefault(name, value)
        for node in model.nodes():
            self._nodes.setdefault(label(node), node)
            if is_op(node, "Constant") and node.outputs[0].name:
                self._values.setdefault(node.outputs[0].name, node.outputs[0])

    def node(self, name: str) -> onnx_ir.Node | None:
        """The node of this label."""
        return self._nodes.get(name)

    def value(self, tensor: str) -> onnx_ir.Value | None:
        """The constant value of this name."""
        return self._values.get(tensor)

    def array(self, tensor: str) -> Array:
        """The numbers of a constant. Raises KeyError."""
        array = constant_array(self._values.get(tensor))
        if array is None:
            raise KeyError(f"no constant {tensor!r}")
        return array

    def judged(self, group: Group) -> list[Member]:
        """The members whose numbers say how important a unit is: weights that multiply, no biases or scales.

        Integers (quantized weights) count only where a group has nothing else: their scale is not theirs.
        """
        members = [member for member in group.members if self.array(member.tensor).ndim > 1]
        floats = [member for member in members if self.array(member.tensor).dtype.kind == "f"]
        return floats or members or list(group.members)


def per_unit(along_axis: NDArray[np.float64], member: Member) -> NDArray[np.float64]:
    """Sums what belongs to each unit: from one number an index of the member's axis to [units]."""
    sums: NDArray[np.float64] = along_axis[member.indices].sum(axis=1)
    return sums


def along(array: Array, axis: int) -> Array:
    """The array as [extent of the axis, everything else]."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def kept_indices(groups: Mapping[str, Group], kept: Mapping[str, Indices]) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """For every axis that shrinks, by (tensor, axis): which of its first indices stay; later ones all do."""
    gone: dict[tuple[str, int], list[Indices]] = {}
    for name, units in kept.items():
        group = groups[name]
        removed = np.setdiff1d(np.arange(group.units), units)
        for member in group.members:
            gone.setdefault((member.tensor, member.axis), []).append(member.indices[removed].reshape(-1))
    masks = {}
    for place, parts in gone.items():
        indices = np.concatenate(parts)
        mask = np.ones(int(indices.max(initial=-1)) + 1, np.bool_)
        mask[indices] = False
        masks[place] = mask
    return masks
