"""The walk that finds what is turned together with a value, rule by rule for the operators on its way (streams.py).

A rule gets a node, and a value that is turned already: one of the node's inputs, or its output. It adds what has to be
turned with it, and the constants that take the matrix in, and answers with what is in the way, or with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import (
    axes_of,
    constant_array,
    constant_scalar,
    input_of,
    int_attribute,
    ints_attribute,
    is_constant,
    is_op,
    label,
)
from modelpress_compression.passes.quantize.scaling.edges import Slot, is_shared
from modelpress_compression.passes.quantize.scaling.extents import Shapes

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
SUMS = ("ReduceMean", "ReduceSum")
_NORMS = (*SUMS, "ReduceL2", "ReduceSumSquare")
# Biases are divided by gains: beyond this ratio rounding in float32 would show.
_MOST_OF_GAINS = 1e3
# Of those the odd part has a dense matrix.
MAX_CHANNELS = 8192

Factor = NDArray[np.float64]  # [K], none of them 0


@dataclass(frozen=True)
class Fold:
    """A constant that takes Q in: its channels, along the slot's axis, are multiplied by `factor` and then turned."""

    slot: Slot
    factor: Factor | None


def squares(node: onnx_ir.Node) -> bool:
    """Whether the node squares its first input."""
    if is_op(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    return is_op(node, "Pow") and constant_scalar(input_of(node, 1)) == 2


@dataclass(frozen=True)
class Turn:
    """How a value is turned; `axis`: of its channels, counted from the back; `factor`: None where it is 1."""

    axis: int
    factor: Factor | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and np.allclose(self.factor, 1, rtol=1e-6, atol=0):
            object.__setattr__(self, "factor", None)

    def agrees(self, other: Turn) -> bool:
        own, others = (np.ones(1) if turn.factor is None else turn.factor for turn in (self, other))
        return self.axis == other.axis and np.allclose(own, others, rtol=1e-6, atol=0)


@dataclass
class Walk:
    """From one value to all that have to be turned with it. `seen`: values of earlier walks, with their reasons."""

    graph: onnx_ir.Graph
    shapes: Shapes
    shared: Collection[int]
    seen: Mapping[onnx_ir.Value, str]
    channels: int
    members: dict[onnx_ir.Value, Turn] = field(default_factory=dict)
    folds: dict[Slot, Fold] = field(default_factory=dict)
    gains: dict[Slot, None] = field(default_factory=dict)

    def all_from(self, seed: onnx_ir.Value) -> str:
        """What is in the way; empty: nothing."""
        waiting = [seed]
        reason = self._join(seed, Turn(-1))
        while waiting and not reason:
            value = waiting.pop()
            known = len(self.members)
            reason = self._around(value)
            waiting += list(self.members)[known:]
        return reason

    def _around(self, value: onnx_ir.Value) -> str:
        """The node that makes the value, and all that read it."""
        maker = value.producer()
        if maker is None:
            return f"{value.name!r} is an input of the model"
        reason = self._node(maker, -1, value)
        for node, index in value.uses():
            reason = reason or self._node(node, index, value)
        return reason

    def _node(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """`index`: of the input that the value is, -1 for an output."""
        if node.graph is not self.graph:
            return f"{node.op_type} {label(node)!r} lies inside an If, Loop or Scan"
        rule = None if node.domain not in ("", "ai.onnx") else _RULES.get(node.op_type)
        reason = "it is no part that could be turned" if rule is None else rule(self, node, index, value)
        # A reason that comes from further on names its node already.
        return reason if not reason or reason.startswith("at ") else f"at {node.op_type} {label(node)!r}: {reason}"

    def _join(self, value: onnx_ir.Value | None, turn: Turn) -> str:
        """The value has to be turned so."""
        if value is None:
            return "an input is missing"
        known = self.members.get(value)
        if known is not None:
            return "" if known.agrees(turn) else "gains lie before it that no product takes in"
        if value in self.seen:
            return self.seen[value] or "it belongs to another stream"
        if value.is_graph_output():
            return f"{value.name!r} is an output of the model"
        # Where the shape is not known, the weights at the ends have to fit.
        if not 1 < self.channels <= MAX_CHANNELS or self.shapes.extent(value, turn.axis) not in (None, self.channels):
            return f"{value.name!r} does not have {self.channels} channels, or these are not 2 to {MAX_CHANNELS}"
        self.members[value] = turn
        return ""

    def _fold(self, slot: Slot, factor: Factor | None) -> str:
        array = constant_array(input_of(slot.node, slot.index))
        if array is None or array.dtype != np.float32 or not -array.ndim <= slot.axis < array.ndim:
            return "its weight is no float32 constant"
        if array.shape[slot.axis] != self.channels:
            return f"its weight does not have the {self.channels} channels"
        if is_shared(slot, self.shared) and array.size > self.channels:
            return "its weight is shared with other nodes"
        self.folds[slot] = Fold(slot, factor)
        return ""

    def not_finite(self) -> str:
        """The reason, if there is a weight with infinite or NaN values."""
        bad = next((slot.node for slot in self.folds if not np.isfinite(slot.array).all()), None)
        return "" if bad is None else f"at {bad.op_type} {label(bad)!r}: its weight holds infinite or NaN values"

    def _operand(self, node: onnx_ir.Node, index: int, turn: Turn) -> str:
        """Something that is turned with the others: a constant, or a computed value."""
        value = input_of(node, index)
        return self._fold(Slot(node, index, turn.axis), turn.factor) if is_constant(value) else self._join(value, turn)

    def _gain(self, slot: Slot) -> Factor | str:
        """The numbers of a gain, which becomes 1; one number for all channels stays, and is answered by 1."""
        array = constant_array(input_of(slot.node, slot.index))
        if array is None or array.size != self.channels or array.shape[slot.axis] != self.channels:
            return "its gain is no constant with a number for each channel"
        gains = np.asarray(array, np.float64).reshape(-1)
        if np.ptp(gains) == 0:
            return np.ones(1)
        least, most = float(np.abs(gains).min()), float(np.abs(gains).max())
        if not most < _MOST_OF_GAINS * least:
            return "some of its gains are nearly 0"
        self.gains[slot] = None
        return gains

    # Rules, each for a node that reads the value as input `index` or makes it (-1)

    def _sum(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        turn = self.members[value]
        reason = self._join(node.outputs[0], turn)
        for number, operand in enumerate(node.inputs):
            # The same number for all channels: Q leaves it as it is, where there are no gains.
            if turn.factor is None and self.shapes.same_for_all(operand, turn.axis):
                continue
            reason = reason or self._operand(node, number, turn)
        return reason

    def _product(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """Squares, and products with a gain or with one number a row, which may also be a divisor."""
        first, second = node.inputs[0], node.inputs[1]
        turn = self.members[value]
        if first is second or is_op(node, "Pow"):
            return self._square(node, index, turn)
        turns_first = not is_constant(first) and not self.shapes.same_for_all(first, turn.axis)
        data, number = (first, 1) if turns_first else (second, 0)
        other, output = input_of(node, number), node.outputs[0]
        if index == number or (is_op(node, "Div") and not turns_first):
            return "it multiplies two computed values, or divides by one"
        gains: Factor | str = np.ones(1)
        if not self.shapes.same_for_all(other, turn.axis):
            gains = self._gain(Slot(node, number, turn.axis)) if is_op(node, "Mul") else "it divides by a gain"
        if isinstance(gains, str):
            return gains
        own = np.ones(1) if turn.factor is None else turn.factor
        if index >= 0:
            return self._join(output, Turn(turn.axis, own / gains))
        return self._join(data, Turn(turn.axis, own * gains))

    def _square(self, node: onnx_ir.Node, index: int, turn: Turn) -> str:
        """Squares may be summed over the channels, and nothing else."""
        output = node.outputs[0]
        summed = all(is_op(user, *SUMS) and self._over(user, output) == {turn.axis} for user, _ in output.uses())
        if index < 0 or turn.factor is not None or output.is_graph_output() or not squares(node) or not summed:
            return "it is a power that is not only summed over the channels"
        return ""

    def _over(self, node: onnx_ir.Node, data: onnx_ir.Value | None) -> set[int]:
        """The axes that a reduction goes over, counted from the back; none where they are not known."""
        own, axes = self.shapes.rank(data), axes_of(node)
        return set() if own is None or axes is None else {axis - own if axis >= 0 else axis for axis in axes}

    def _reduction(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        data = input_of(node, 0)
        turn = self.members[value]
        over = self._over(node, data)
        if index == 0 and over == {turn.axis}:
            return "" if turn.factor is None else "it sums channels that have gains"
        if not is_op(node, *SUMS) or max(over, default=0) >= turn.axis:
            return "it reduces over axes that are not known, or cannot be"
        return self._join(data, turn) or self._join(node.outputs[0], turn)

    def _normalization(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        data, output = input_of(node, 0), node.outputs[0]
        own = self.shapes.rank(data)
        if index > 0 or int_attribute(node, "axis", -1) not in (-1, own - 1 if own else -1):
            return "it normalizes over other axes"
        gains = self._gain(Slot(node, 1, -1))
        if isinstance(gains, str):
            return gains
        turn = Turn(-1, 1 / gains)
        reason = self._join(data, Turn(-1)) or self._join(output, turn)
        if not reason and input_of(node, 2) is not None:
            reason = self._fold(Slot(node, 2, -1), turn.factor)
        return reason

    def _matrix(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """MatMul and Gemm: a reader where the value is the left factor, a writer where it is the answer."""
        turn = self.members[value]
        weight = constant_array(input_of(node, 1))
        turned = bool(int_attribute(node, "transB", 0))
        if index > 0 or turn.axis != -1 or int_attribute(node, "transA", 0) or weight is None or weight.ndim != 2:
            return "it is no product of rows of channels with one constant matrix"
        if index == 0:
            return self._fold(Slot(node, 1, 1 if turned else 0), _inverse(turn.factor))
        reason = self._fold(Slot(node, 1, 0 if turned else 1), turn.factor)
        return reason or self._bias(node, turn)

    def _bias(self, node: onnx_ir.Node, turn: Turn) -> str:
        bias = input_of(node, 2)
        if bias is None:
            return ""
        return self._fold(Slot(node, 2, 0 if is_op(node, "Conv") else -1), turn.factor)

    def _convolution(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        turn = self.members[value]
        weight = constant_array(input_of(node, 1))
        if index > 0 or weight is None or turn.axis != 1 - weight.ndim or int_attribute(node, "group", 1) != 1:
            return "it is no convolution of all channels with a constant weight"
        if index == 0:
            return self._fold(Slot(node, 1, 1), _inverse(turn.factor))
        return self._fold(Slot(node, 1, 0), turn.factor) or self._bias(node, turn)

    def _gather(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """A table of rows, or some rows of what is turned."""
        turn = self.members[value]
        data = input_of(node, 0)
        own = self.shapes.rank(data)
        axis = int_attribute(node, "axis", 0)
        if index > 0 or own is None or (axis - own if axis >= 0 else axis) >= turn.axis:
            return "it picks channels"
        return self._operand(node, 0, turn) or self._join(node.outputs[0], turn)

    def _layout(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """One input and one output that have the same channels, perhaps on another axis."""
        turn = self.members[value]
        there = self._other_axis(node, turn.axis, forwards=index == 0)
        if index > 0 or there is None:
            return "it takes channels apart, or is not known to leave them together"
        source, target = (turn.axis, there) if index == 0 else (there, turn.axis)
        reason = self._join(node.outputs[0], Turn(target, turn.factor))
        return reason or self._operand(node, 0, Turn(source, turn.factor))

    def _other_axis(self, node: onnx_ir.Node, axis: int, *, forwards: bool) -> int | None:
        """Where the channels of a node's input lie in its output, or the other way round."""
        if is_op(node, "Identity", "Dropout", "Cast"):
            cast = int_attribute(node, "to", onnx_ir.DataType.FLOAT.value)
            return axis if cast == onnx_ir.DataType.FLOAT.value else None
        if is_op(node, "Transpose"):
            order = ints_attribute(node, "perm")
            if order is None:
                return None
            place = axis + len(order)
            return (order.index(place) if forwards else order[place]) - len(order)
        ends = input_of(node, 0), node.outputs[0]
        here, there = ends if forwards else reversed(ends)
        behind, channels, own = self.shapes.behind(here, axis), self.shapes.extent(here, axis), self.shapes.rank(there)
        places = () if behind is None or own is None else range(-1, -own - 1, -1)
        fits = (
            place
            for place in places
            if self.shapes.behind(there, place) == behind and self.shapes.extent(there, place) == channels
        )
        return next(fits, None)

    def _sizes(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """Shape and Size: they stay."""
        return ""

    def _along(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> str:
        """Concat, Slice and Split along axes other than that of the channels, and Expand."""
        turn = self.members[value]
        own = self.shapes.rank(value)
        if own is None:
            return "its rank is not known"
        if is_op(node, "Slice"):
            axes = constant_array(input_of(node, 3))
            over = None if axes is None else {int(axis) for axis in axes.reshape(-1)}
        else:
            over = set() if is_op(node, "Expand") else {int_attribute(node, "axis", 0)}
        inputs = range(len(node.inputs)) if is_op(node, "Concat") else range(1)
        if over is None or index not in (-1, *inputs) or turn.axis in {a - own if a >= 0 else a for a in over}:
            return "it takes channels apart"
        reason = next((found for number in inputs if (found := self._operand(node, number, turn))), "")
        return reason or next((found for output in node.outputs if (found := self._join(output, turn))), "")


def _inverse(factor: Factor | None) -> Factor | None:
    return None if factor is None else 1 / factor


_Rule = Callable[[Walk, onnx_ir.Node, int, onnx_ir.Value], str]
_RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        **dict.fromkeys(("Add", "Sub", "Sum"), Walk._sum),
        **dict.fromkeys(("Mul", "Div", "Pow"), Walk._product),
        **dict.fromkeys(_NORMS, Walk._reduction),
        **dict.fromkeys(NORMALIZATIONS, Walk._normalization),
        **dict.fromkeys(("MatMul", "Gemm"), Walk._matrix),
        **dict.fromkeys(
            ("Identity", "Dropout", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"), Walk._layout
        ),
        **dict.fromkeys(("Concat", "Slice", "Split", "Expand"), Walk._along),
        **dict.fromkeys(("Shape", "Size"), Walk._sizes),
        "Conv": Walk._convolution,
        "Gather": Walk._gather,
    }
)
