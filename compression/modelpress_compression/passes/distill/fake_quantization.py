"""Training of quantized models: integers become float weights behind fake quantization, and integers again.

    unfold    a copy of the model in which every quantized weight is a float weight ("latent") that fake quantization
              brings onto its grid; gradients pass as they are (straight-through, Bengio et al., arXiv:1308.3432)
    fold      the model as it was, with the integers of the trained weights, and scales where they were trained too
              (learned_scales); zero points and nodes stay

So that a model that was quantized after training becomes one that was trained for its quantization (QAT). What computes
in integers itself, as dynamic quantization does, passes no gradient: it is left as it is, with a reason.

A latent is a matrix [R, S] whose rows have one scale and one zero point each. Its way to the weight's own shape is

    W -> Min, Max -> QuantizeLinear -> DequantizeLinear -> Reshape, Transpose, Reshape, Slice

with the range of the levels in the file, about the zero point: levels that leave room in an accumulator keep it. The
int32 biases of integer products are trained as floats, since 32 bits round nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.operands import computes_in_integers, operand
from modelpress_compression.encodings.products import split_products
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.encodings.weight import Levels, QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor, Spot, clean, replace_numbers
from modelpress_compression.graph.read import (
    constant_array,
    constant_tensor,
    graph_of,
    int_attribute,
    is_op,
    label,
    required,
)
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip, is_excluded
from modelpress_compression.passes.distill.learned_scales import BIAS_BITS, LearnedScales, factors

# Makes what is stored of a trained constant, and of the factors of its scales [R] where these were trained.
Pack = Callable[[Array, NDArray[np.float32] | None], Array]

# Quantization along an axis came with this version.
_LEAST_OPSET = 13
_INT32 = np.iinfo(np.int32)
# The last node of each format whose weights are trained.
_TRAINED = ("DequantizeLinear", "Mul", "Reshape", "MatMulNBits", "GatherBlockQuantized")
_NO_GRADIENT = (
    "{op_type} computes in integers, which have no gradient: it and the weights before it learn nothing through it. "
    "Distill before quantizing, or quantize with scheme static or weight_only."
)


@dataclass(frozen=True)
class Unfolded:
    """`model`: what is trained. `latents`: by the name of each trained constant, the constant that stores it in the
    model as it was, and how its integers are made. `scales`: those that are trained too. `skipped`: nodes without
    gradients."""

    model: Model
    latents: dict[str, tuple[str, Pack]]
    skipped: tuple[Skip, ...]
    scales: LearnedScales
    fixed: frozenset[str]  # constants that were not in the model as it was, and are not trained
    integers_multiplied: bool = False  # whether 8-bit weights meet 8-bit activations, as under static quantization

    def fold(self, trained: Model, into: Model) -> Model:
        """A copy of `into`, the model that was unfolded, with the numbers of the trained one."""
        written = into.clone()
        mine, theirs = (dict(_constants(model)) for model in (written, trained))
        for name, value in mine.items():
            found = constant_tensor(theirs.get(name))
            if found is not None and found.dtype.is_floating_point() and found is not constant_tensor(value):
                replace_numbers(value, np.asarray(found.numpy()))

        def numbers_of(name: str) -> Array | None:
            return constant_array(theirs.get(name))

        biases: dict[str, Array] = {}
        for latent, (stored, pack) in self.latents.items():
            numbers = numbers_of(latent)
            if numbers is not None:
                replace_numbers(mine[stored], pack(numbers, factors(numbers_of(self.scales.weights.get(stored, "")))))
                if mine[stored].dtype == onnx_ir.DataType.INT32:
                    biases[stored] = numbers
        if self.scales.trained:
            self.scales.write(written, numbers_of, biases)
        return written


def unfold(model: Model, exclude: tuple[str, ...], *, scales: bool = False) -> Unfolded:
    """Weights that match `exclude`, by their own name or that of a node that uses them, stay as they are.

    `scales`: whether scales are trained too.
    """
    work = model.clone()
    editor = Editor(work)
    split_products(work, editor)
    learned = LearnedScales(editor)
    if scales and work.opset >= _LEAST_OPSET:
        learned.learn_activations(work, exclude)
    unfolding = _Unfolding(editor, learned if scales else None)
    skipped, multiplied = [], False
    for node in list(work.nodes()):
        if computes_in_integers(node):
            skipped.append(Skip(label(node), _NO_GRADIENT.format(op_type=node.op_type)))
        elif is_op(node, *_TRAINED, domain=node.domain) and work.opset >= _LEAST_OPSET:
            for stored in stored_weights(node):
                if not _is_excluded(node, stored.values, exclude) and unfolding.replace(node, stored):
                    multiplied = multiplied or is_op(node, "DequantizeLinear")
    clean(work)
    latents = {made.name or "": (stored.name or "", pack) for stored, (made, pack) in unfolding.latents.items()}
    given = {name for name, _ in _constants(model)}
    fixed = frozenset(name for name, _ in _constants(work)) - given - latents.keys() - learned.trained
    return Unfolded(work, latents, tuple(skipped), learned, fixed, multiplied)


@dataclass
class _Unfolding:
    """Puts latents in the place of quantized weights.

    `learned`: where their scales are trained too; None: they stay. `latents`: for each constant that stores levels, the
    trained one and how its numbers are stored.
    """

    editor: Editor
    learned: LearnedScales | None = None
    latents: dict[onnx_ir.Value, tuple[onnx_ir.Value, Pack]] = field(default_factory=dict)
    _scales: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)

    def replace(self, node: onnx_ir.Node, stored: StoredWeight) -> bool:
        """Lets those who use the node's weight read its latent; False for numbers that cannot be trained like this."""
        weight = stored.weight
        if weight.scale.dtype != np.float32 or weight.zero_point.dtype.kind not in "iu":
            return False
        if weight.bits == BIAS_BITS:
            latent = self._latent(stored, weight.dequantize(), lambda trained, _: _whole(trained, weight))
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], latent)
            return True
        if weight.bits > 8 or not weight.levels.ndim:
            return False
        rows = _Rows.of(weight)
        grid = _Grid.of(weight, rows)
        real = rows.deal(weight.dequantize())
        latent = self._latent(
            stored, real, lambda trained, factor: stored.pack(rows.collect(grid.scaled(factor).quantize(trained)))
        )
        spot = Spot(self.editor, node, f"{label(node)}__trained")
        value = rows.collected(spot, grid.fake_quantized(spot, latent, self._scale(node, stored, grid)))
        # Under its name an output is an output still, and matched with the original's.
        self.editor.hand_over(node.outputs[0], _in_place_of(node, value, spot))
        return True

    def _scale(self, node: onnx_ir.Node, stored: StoredWeight, grid: _Grid) -> onnx_ir.Value | None:
        """The trained scales of a weight [R], one for all who share the stored levels; None: they stay."""
        plain = is_op(node, "DequantizeLinear") and not stored.weight.block and stored.scale is not None
        if self.learned is None or not plain or stored.weight.scale.size not in (1, grid.scale.size):
            return None
        if node.graph is not self.editor.ir.graph or stored.weight.scale.size == 1 < grid.scale.size:
            return None
        if stored.values not in self._scales:
            # Before the first node: those who share the levels may come in any order.
            spot = Spot(self.editor, self.editor.ir.graph[0], f"{stored.values.name}__trained")
            self._scales[stored.values] = self.learned.weight_scale(spot, stored.values.name or "", grid.scale)
        return self._scales[stored.values]

    def _latent(self, stored: StoredWeight, real: Array, pack: Pack) -> onnx_ir.Value:
        """One for all who share the stored levels, in the graph that they lie in."""
        if stored.values not in self.latents:
            producer = stored.values.producer()
            graph = stored.values.graph if producer is None else graph_of(producer)
            if not isinstance(graph, onnx_ir.Graph):
                raise TypeError(f"value {stored.values.name!r} lies in no graph")
            self.latents[stored.values] = self.editor.constant(graph, real, f"{stored.values.name}__latent"), pack
        return self.latents[stored.values][0]


def _in_place_of(node: onnx_ir.Node, weight: onnx_ir.Value, spot: Spot) -> onnx_ir.Value:
    """What the node makes, of a weight in floats."""
    if is_op(node, "Reshape"):
        return spot.emit("Reshape", weight, required(node, 1))
    if node.op_type == "MatMulNBits":
        product = spot.emit("MatMul", operand(node, "x"), spot.emit("Transpose", weight, perm=(1, 0)))
        bias = operand(node, "bias")
        return product if bias is None else spot.emit("Add", product, bias)
    if node.op_type == "GatherBlockQuantized":
        return spot.emit("Gather", weight, operand(node, "indices"), axis=int_attribute(node, "gather_axis", 0))
    return weight


@dataclass(frozen=True)
class _Rows:
    """How the elements of a weight are dealt to rows [R, S], each of one scale and one zero point.

    `padded`: the weight's shape with the last block filled up; `split`: the same with the blocks and the levels of one
    as axes of their own; `order`: the axes of `split`, those first along which scales differ, `count` of them.
    """

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> _Rows:
        shape, axis, block = weight.levels.shape, weight.axis, weight.block
        # Without blocks, parameters are spread no further than to their own extents.
        plain = replace(weight, block=0)
        extents = [plain.spread(parameter).shape for parameter in (weight.scale, weight.zero_point)]
        differing = {place for own in extents for place, extent in enumerate(own) if extent > 1}
        padded = split = shape
        if axis is not None and block:
            blocks = -(-shape[axis] // block)
            padded = (*shape[:axis], blocks * block, *shape[axis + 1 :])
            split = (*shape[:axis], blocks, block, *shape[axis + 1 :])
            differing = {place + (place > axis) for place in differing}
        first = sorted(differing)
        order = (*first, *(place for place in range(len(split)) if place not in differing))
        return cls(shape, padded, split, order, len(first))

    def deal(self, array: NDArray[Any]) -> NDArray[Any]:
        """[R, S]; what fills the last block up repeats its last element."""
        filled = np.pad(array, [(0, whole - own) for own, whole in zip(self.shape, self.padded, strict=True)], "edge")
        turned = filled.reshape(self.split).transpose(self.order)
        return turned.reshape(math.prod(turned.shape[: self.count]), -1)

    def collect(self, matrix: Levels) -> Levels:
        """The inverse of `deal`."""
        turned = matrix.reshape([self.split[place] for place in self.order])
        whole = turned.transpose(np.argsort(self.order)).reshape(self.padded)
        return whole[tuple(slice(extent) for extent in self.shape)]

    def collected(self, spot: Spot, matrix: onnx_ir.Value) -> onnx_ir.Value:
        """`collect` as nodes."""
        value = spot.emit("Reshape", matrix, _shape(spot, [self.split[place] for place in self.order]))
        if self.order != tuple(range(len(self.order))):
            value = spot.emit("Transpose", value, perm=np.argsort(self.order).tolist())
        if self.split != self.shape:
            value = spot.emit("Reshape", value, _shape(spot, self.padded))
        for axis, (own, whole) in enumerate(zip(self.shape, self.padded, strict=True)):
            if own != whole:
                value = spot.emit("Slice", value, *(_shape(spot, [number]) for number in (0, own, axis)))
        return value


@dataclass(frozen=True)
class _Grid:
    """Of each row `scale` and `zero_point` [R]; `low` and `high` [R] bound the levels that may be written."""

    scale: NDArray[np.float32]
    zero_point: Levels
    low: Levels
    high: Levels
    signed: bool

    @classmethod
    def of(cls, weight: QuantizedWeight, rows: _Rows) -> _Grid:
        """8 bits stay within the largest distance from the zero point that the weight has; fewer use all levels."""

        def by_row(parameter: NDArray[Any]) -> NDArray[Any]:
            return rows.deal(np.broadcast_to(weight.spread(parameter), weight.levels.shape))[:, 0]

        zero = by_row(weight.zero_point).astype(np.int64)
        smallest = -(1 << (weight.bits - 1)) if weight.signed else 0
        largest = smallest + (1 << weight.bits) - 1
        reach = 1 << weight.bits
        if weight.bits > 4:
            reach = np.abs(weight.levels.astype(np.int64) - weight.spread(weight.zero_point)).max(initial=1)
        low, high = (np.clip(zero + distance, smallest, largest) for distance in (-reach, reach))
        return cls(by_row(weight.scale), zero, low, high, weight.signed)

    def quantize(self, latent: Array) -> Levels:
        """The levels of a float matrix [R, S]."""
        whole = np.rint(latent.astype(np.float64) / self.scale[:, None]) + self.zero_point[:, None]
        return np.clip(whole, self.low[:, None], self.high[:, None]).astype(np.int64)

    def scaled(self, factor: NDArray[np.float32] | None) -> _Grid:
        """With trained scales; None: with its own."""
        return self if factor is None else replace(self, scale=np.asarray(self.scale * factor, np.float32))

    def fake_quantized(self, spot: Spot, latent: onnx_ir.Value, trained: onnx_ir.Value | None = None) -> onnx_ir.Value:
        """[R, S]: the latent weight as the integers of its grid will have it. `trained`: scales [R] in place of its
        own."""
        scale = spot.constant(self.scale) if trained is None else trained
        low, high = (self._bound(spot, level, trained) for level in (self.low, self.high))
        within = spot.emit("Max", spot.emit("Min", latent, high), low)
        zero = spot.constant(self.zero_point.astype(np.int8 if self.signed else np.uint8))
        quantized = spot.emit("QuantizeLinear", within, scale, zero, axis=0)
        return spot.emit("DequantizeLinear", quantized, scale, zero, axis=0)

    def _bound(self, spot: Spot, level: Levels, trained: onnx_ir.Value | None) -> onnx_ir.Value:
        """[R, 1]: what a level stands for."""
        distance = np.asarray(level - self.zero_point, np.float32)[:, None]
        if trained is None:
            return spot.constant(distance * self.scale[:, None])
        return spot.emit("Mul", spot.constant(distance), spot.emit("Unsqueeze", trained, _shape(spot, [1])))


def _shape(spot: Spot, numbers: Sequence[int]) -> onnx_ir.Value:
    return spot.constant(np.asarray(numbers, np.int64))


def _whole(trained: Array, bias: QuantizedWeight) -> Levels:
    """A bias in 32 bits."""
    levels = np.rint(trained.astype(np.float64) / bias.spread(bias.scale).astype(np.float64))
    whole: Levels = np.clip(levels + bias.spread(bias.zero_point), _INT32.min, _INT32.max).astype(np.int64)
    return whole


def _is_excluded(node: onnx_ir.Node, stored: onnx_ir.Value, exclude: tuple[str, ...]) -> bool:
    names = [stored.name, node.name, *(user.name for user in node.outputs[0].consumers())]
    return any(is_excluded(name, exclude) for name in names)


def _constants(model: Model) -> Iterator[tuple[str, onnx_ir.Value]]:
    """Initializers and outputs of Constant nodes by name, the main graph's last, so that they count."""
    for node in model.nodes():
        if is_op(node, "Constant") and node.outputs[0].name:
            yield node.outputs[0].name, node.outputs[0]
    for graph in reversed(list(model.graphs())):
        yield from graph.initializers.items()
