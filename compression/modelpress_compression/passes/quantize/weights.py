"""Constant weights of nodes: finding them, and putting their 8-bit form into the graph, once for all who share them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings import folded, qdq
from modelpress_compression.encodings.packed import can_pack
from modelpress_compression.encodings.weight import QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import (
    attribute,
    constant_array,
    input_of,
    is_op,
    required,
)
from modelpress_compression.passes.base import is_excluded
from modelpress_compression.passes.integers.certificate import REDUCED
from modelpress_compression.passes.integers.products import Summation, of_node, output_axis
from modelpress_compression.passes.integers.saturation import bounds, least_squares_scale, within_limit
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.eligible import why_not_matrix
from modelpress_compression.passes.quantize.rounding.affine import quantize_weight
from modelpress_compression.passes.quantize.rounding.balance import balanced
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder, Rounder, Rounding, nearest
from modelpress_compression.passes.quantize.views import root_of
from modelpress_compression.target import Target

# Shorter rows are those of depthwise convolutions and stems: few weights, on which much depends. They stay in 8 bits.
MIN_4_BIT_COLUMNS = 64
# Two products of such a weight and 255 stay within 16 bits.
_SAFE_LEVEL = 64


@dataclass(frozen=True)
class _Kept:
    """A weight that is in the graph. `turned`: whether its levels are transposed against the numbers of `root`."""

    root: onnx_ir.TensorProtocol
    turned: bool
    stored: StoredWeight


@dataclass
class WeightStore:
    """Quantizes each weight once, whoever reads it; `config` gives the type and whether each channel has its own scale.

    A weight is stored in the graph that owns it, so that all branches of an If share it. Where its users count their
    outputs along different axes, it has one scale: two copies would cost more than they keep.

    Unless `target` says that products do not saturate, weights are kept from that (integers.saturation).
    """

    editor: Editor
    config: QuantizeConfig
    rounder: Rounder = field(default_factory=NearestRounder)
    target: Target = field(default_factory=Target)
    wide: frozenset[str] = frozenset()  # names of weights in 8 bits where the others have 4
    _stored: dict[tuple[object, ...], StoredWeight] = field(default_factory=dict)
    # By the identity of their root, which clones of a model share.
    _kept: dict[int, list[_Kept]] = field(default_factory=dict)
    _turned: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)
    _axes: dict[int, set[int]] | None = None

    def matrix(self, node: onnx_ir.Node) -> StoredWeight:
        """The second factor of a MatMul or Gemm as `[..., K, N]`, with a scale per column where it has two axes."""
        source = required(node, 1)
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        alpha = float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
        key = (source, transposed, alpha)
        if key not in self._stored:
            weight = self.array(source)
            axis = self._scaled_axis(node, weight.ndim)
            summation = of_node(node, weight.shape, axis)
            found = self.quantize(weight, summation, self._least_scale(source), self.rounder.rounding(node))
            levels = found.levels.T if transposed else found.levels
            scale = np.asarray(found.scale * np.float32(alpha))
            found = replace(found, levels=levels, scale=scale, axis=None if axis is None else 1)
            self._stored[key] = self.store(source, found, turned=transposed)
        return self._stored[key]

    def quantize(
        self,
        weight: NDArray[np.float32],
        summation: Summation,
        least_scale: NDArray[np.float64] | None = None,
        rounding: Rounding = nearest,
        *,
        packs: bool = False,
    ) -> QuantizedWeight:
        """In the type of the recipe, with a scale for each slice of the axis that `summation` names.

        What is rounded to nearest is balanced as well; other roundings know better. `packs`: the user can read 4 bits;
        where it cannot, or rows are too short for them, there are 8 instead.
        """
        axis, kind = summation.axis, self.config.weights
        if kind == "int2":
            kind = "int4"  # the kernels of 8-bit products read no less
        if kind == "int4" and not (packs and self._fits_4_bits(weight.shape, axis)):
            kind = "int8"
        unsafe = self._saturating(quantize_weight(weight, axis, kind, least_scale), summation)
        if unsafe is not None and unsafe.any():
            safe_scale = np.where(unsafe, least_squares_scale(weight, summation), 0.0)
            least_scale = safe_scale if least_scale is None else np.maximum(safe_scale, least_scale)
        found = quantize_weight(weight, axis, kind, least_scale, rounding)
        if rounding is nearest:
            found = balanced(found, weight, summation)
        if unsafe is None:
            return found
        aim = weight if rounding is nearest else found.dequantize()
        levels = within_limit(found.levels.astype(np.int8, copy=False), found.scale, aim, summation)
        return replace(found, levels=levels, reduced=int(unsafe.sum()))

    @staticmethod
    def _fits_4_bits(shape: tuple[int, ...], axis: int | None) -> bool:
        """Whether rows are long enough for 4 bits, and levels fill whole bytes."""
        rows = shape[axis] if axis is not None else 1
        return can_pack(shape) and math.prod(shape) // max(rows, 1) >= MIN_4_BIT_COLUMNS

    def _saturating(self, quantized: QuantizedWeight, summation: Summation) -> NDArray[np.bool_] | None:
        """Which slices can saturate; None: nothing can, or it does not matter."""
        if not self.target.saturates or not summation.paired or quantized.levels.dtype != np.int8:
            return None
        found = bounds(quantized.levels.astype(np.int8, copy=False), summation)
        return np.asarray(found.saturates.any(axis=1))

    def store(self, source: onnx_ir.Value, quantized: QuantizedWeight, *, turned: bool = False) -> StoredWeight:
        """Puts one into the graph that owns `source`, with a note for its certificate; what is there already is taken.

        `turned`: its levels are transposed against the source's numbers.
        """
        root, is_view = root_of(source)
        if root is None:
            raise ValueError(f"{source.name!r} is not constant.")
        wanted = turned != is_view
        for kept in self._kept.get(id(root), ()):
            if (found := self._fitting(kept, quantized, wanted)) is not None:
                return found
        store = qdq.store_packed if quantized.bits == 4 else qdq.store
        stored = store(self.editor, self.owner(source), quantized, source.name or "weight")
        stored.values.meta[REDUCED] = quantized.reduced
        self._kept.setdefault(id(root), []).append(_Kept(root, wanted, stored))
        return stored

    def _fitting(self, kept: _Kept, quantized: QuantizedWeight, turned: bool) -> StoredWeight | None:
        """What is kept, in the layout that is wanted; None where its scales are others."""
        own = kept.stored.weight
        if own.bits != quantized.bits:
            return None
        if own.levels.shape != (quantized.levels.shape if kept.turned == turned else quantized.levels.shape[::-1]):
            return None
        same_scale = own.scale.shape == quantized.scale.shape and np.array_equal(own.scale, quantized.scale)
        if kept.turned == turned:
            return kept.stored if same_scale and own.axis == quantized.axis else None
        along = None if quantized.axis is None else 1 - quantized.axis
        if not same_scale or own.levels.ndim != 2 or own.axis != along:
            return None
        return replace(
            kept.stored,
            weight=replace(own, levels=own.levels.T, axis=quantized.axis),
            values=self._transposed(kept.stored.values),
        )

    def _transposed(self, values: onnx_ir.Value) -> onnx_ir.Value:
        """Behind a Transpose, which onnxruntime takes away when it loads the model."""
        if values not in self._turned:
            graph = self.owner(values)
            turned = Spot(self.editor, graph[0], values.name or "weight").emit("Transpose", values, perm=[1, 0])
            self._turned[values] = turned
        return self._turned[values]

    def rows(self, table: onnx_ir.Value) -> StoredWeight:
        """A table [R, C] whose rows are looked up, with a scale per row [R, 1], or one for all [1, 1].

        Products that read the table too come first: what is stored for them is what is looked up.
        """
        root, is_view = root_of(table)
        key = (table, "rows")
        if key in self._stored:
            return self._stored[key]
        kept = next((item for item in self._kept.get(id(root), ()) if _has_rows(item, is_view)), None)
        if kept is None:
            found = quantize_weight(self.array(table), 0, "int8")
            rows = replace(found, scale=found.scale[:, None], axis=None)
            self._stored[key] = folded.store_rows(self.editor, self.owner(table), rows, table.name or "table")
            return self._stored[key]
        own = kept.stored
        same = kept.turned == is_view
        scale = own.weight.scale.reshape(-1, 1)
        levels = own.weight.levels if same else own.weight.levels.T
        self._stored[key] = StoredWeight(
            replace(own.weight, levels=levels, scale=scale, zero_point=np.zeros((), levels.dtype), axis=None),
            own.values if same else self._transposed(own.values),
            self.editor.constant(self.owner(table), scale, f"{table.name}_row_scale"),
        )
        return self._stored[key]

    def product_of(self, table: onnx_ir.Value) -> onnx_ir.Node | None:
        """A product that reads the table as well, by its own name or as its transpose, and can share its levels."""
        root, _ = root_of(table)
        return next((node for node in self._products(root) if why_not_matrix(node) is None), None)

    def _products(self, root: onnx_ir.TensorProtocol | None) -> list[onnx_ir.Node]:
        """MatMul and Gemm nodes whose second factor holds these numbers."""
        owners = (value for graph in self._graphs() for value in graph.initializers.values())
        values = [value for value in owners if root is not None and root_of(value)[0] is root]
        return [use.node for value in values for use in value.uses() if is_op(use.node, "MatMul", "Gemm") and use.idx]

    def finish(self) -> int:
        """Weights in 8 bits that float nodes still read: these read them too, as floats; returns how many.

        Without this a weight that a product and a float32 operator share would be written twice.
        """
        count = 0
        for graph in self._graphs():
            for value in list(graph.initializers.values()):
                root, is_view = root_of(value) if value.uses() and not value.is_graph_output() else (None, False)
                kept = next((item for item in self._kept.get(id(root), ()) if item.stored.weight.signed), None)
                if root is None or kept is None or any(self._excluded(use.node) for use in value.uses()):
                    continue
                real = self._floats(kept, value, turned=kept.turned != is_view)
                onnx_ir.convenience.replace_all_uses_with(value, real)
                count += 1
        return count

    def _floats(self, kept: _Kept, value: onnx_ir.Value, *, turned: bool) -> onnx_ir.Value:
        """A value of `value`'s layout made of the levels that are kept."""
        stored, graph = kept.stored, self.owner(value)
        weight, scale = stored.weight, stored.scale
        if weight.axis is not None and weight.scale.ndim == 1 and weight.scale.size > 1:
            shape = [-1 if axis == weight.axis % weight.levels.ndim else 1 for axis in range(weight.levels.ndim)]
            scale = self.editor.constant(graph, weight.scale.reshape(shape), f"{value.name}_factor")
        head = Spot(self.editor, graph[0], value.name or "weight")
        real = head.emit("Mul", head.real(stored.values), scale)
        real = head.emit("Transpose", real, perm=[1, 0]) if turned else real
        real.type, real.shape = value.type, value.shape
        return real

    def _excluded(self, node: onnx_ir.Node) -> bool:
        return is_excluded(node.name, self.config.exclude)

    def _graphs(self) -> list[onnx_ir.Graph]:
        return [self.editor.ir.graph, *self.editor.ir.graph.subgraphs()]

    def owner(self, value: onnx_ir.Value) -> onnx_ir.Graph:
        """The graph that a constant belongs to; its constants are seen from all graphs inside."""
        graph = value.graph
        return graph if isinstance(graph, onnx_ir.Graph) else self.editor.ir.graph

    def layer(self, node: onnx_ir.Node, least_scale: NDArray[np.float64] | None = None) -> QuantizedWeight:
        """The weight of a Conv, MatMul or Gemm in its own layout, with a scale per output channel."""
        source = required(node, 1)
        safe = self._least_scale(source)
        if safe is not None:
            least_scale = safe if least_scale is None else np.maximum(safe, least_scale.max())
        rounding = self.rounder.rounding(node)
        packs = source.name not in self.wide
        return self.quantize(self.array(source), self.summation(node), least_scale, rounding, packs=packs)

    def is_narrow(self, node: onnx_ir.Node) -> bool:
        """Whether the weight of a Conv, MatMul or Gemm is stored in less than 8 bits."""
        source = required(node, 1)
        axis = self.summation(node).axis
        return (
            self.config.is_narrow and source.name not in self.wide and self._fits_4_bits(self.array(source).shape, axis)
        )

    def summation(self, node: onnx_ir.Node) -> Summation:
        """How a layer sums over its weight, and the axis of its scales."""
        weight = self.array(required(node, 1))
        return of_node(node, weight.shape, self._scaled_axis(node, weight.ndim))

    def _scaled_axis(self, node: onnx_ir.Node, rank: int) -> int | None:
        """The axis of the weight that has a scale for each index; None: one scale for all."""
        # A stack of matrices has one scale: DequantizeLinear takes one axis, and MatMul's kernels one of two axes.
        if not self.config.per_channel or (node.op_type != "Conv" and rank != 2):
            return None
        return None if self._both_ways(required(node, 1)) else output_axis(node, rank)

    def _both_ways(self, source: onnx_ir.Value) -> bool:
        """Whether products sum over the weight along one axis here and along another one there."""
        root, _ = root_of(source)
        if self._axes is None:
            self._axes = self._axes_by_root()
        return len(self._axes.get(id(root), ())) > 1

    def _least_scale(self, source: onnx_ir.Value) -> NDArray[np.float64] | None:
        """With levels so small no pair of products saturates, whichever way it is summed up."""
        if not self.target.saturates or self.config.weights == "uint8" or not self._both_ways(source):
            return None
        return np.asarray(np.abs(self.array(source)).max(initial=0) / _SAFE_LEVEL, np.float64)

    def _axes_by_root(self) -> dict[int, set[int]]:
        """Of each weight the axes along which its products count their outputs, in its own layout."""
        found: dict[int, set[int]] = {}
        for graph in self._graphs():
            for node in graph:
                weight = input_of(node, 1) if is_op(node, "Conv", "MatMul", "Gemm") else None
                root, turned = root_of(weight) if weight is not None else (None, False)
                if root is not None:
                    axis = output_axis(node, len(root.shape))
                    found.setdefault(id(root), set()).add(1 - axis if turned else axis)
        return found

    @staticmethod
    def array(source: onnx_ir.Value | None) -> NDArray[np.float32]:
        """The data of a value that is known to be constant."""
        found = constant_array(source)
        if found is None:
            raise ValueError(f"{source.name if source is not None else 'a missing input'!r} is not constant.")
        return np.asarray(found, np.float32)


def _has_rows(kept: _Kept, is_view: bool) -> bool:
    """Whether levels that are kept have a scale for each row of a table, or one for all."""
    weight = kept.stored.weight
    if not weight.signed or weight.levels.ndim != 2:
        return False
    return weight.scale.size == 1 or weight.axis == (0 if kept.turned == is_view else 1)
