"""Small tensors that a graph computes from shapes: Shape -> Gather -> Mul -> Concat -> Reshape and the like.

`evaluate` computes one node with numpy. The analysis runs it with the shapes of the whole model, the cut once more with
the shapes that are left, to see which targets of Reshape, Expand and others have to be mended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import axes_of, constant_tensor, int_attribute, is_op

Small = NDArray[Any]
# Shapes, axes, sizes. Larger tensors are data.
MAX_ELEMENTS = 64

_BINARY: Mapping[str, Callable[[Small, Small], Small]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
    "GreaterOrEqual": np.greater_equal,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Min": np.minimum,
    "Max": np.maximum,
    "Mod": np.mod,
}
_UNARY: Mapping[str, Callable[[Small], Small]] = {
    "Identity": np.asarray,
    "Neg": np.negative,
    "Abs": np.abs,
    "Not": np.logical_not,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.round,
    "Sqrt": np.sqrt,
}
_STRUCTURAL = frozenset(("Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Transpose"))
_OTHERS = frozenset(("Shape", "Size", "Cast", "Div", "Where", "ReduceProd", "ConstantOfShape", "Expand"))
EVALUATED = _STRUCTURAL | _OTHERS | frozenset(_BINARY) | frozenset(_UNARY)


def small_constant(value: onnx_ir.Value | None) -> Small | None:
    """A constant that shapes may be computed from: integers of at most one axis, or a single number."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > MAX_ELEMENTS or len(tensor.shape) > 1 or tensor.dtype.is_string():
        return None
    array = np.asarray(tensor.numpy())
    return array if array.dtype.kind in "iub" or array.size == 1 else None


def is_structural(node: onnx_ir.Node) -> bool:
    """Whether the node moves elements and computes nothing."""
    return is_op(node, *_STRUCTURAL) or (
        is_op(node, "Cast") and onnx_ir.DataType(int_attribute(node, "to", 1)).is_integer()
    )


def evaluate(
    node: onnx_ir.Node, inputs: Sequence[Small | None], shape: Callable[[onnx_ir.Value], tuple[int, ...] | None]
) -> Small | None:
    """Output 0, or None where it is not known or not small. `shape` answers for the values that Shape asks for."""
    if not is_op(node, *EVALUATED) or len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type in ("Shape", "Size"):
        return _shape(node, shape(node.inputs[0]))
    known = [array for array, value in zip(inputs, node.inputs, strict=True) if value is not None and array is not None]
    if len(known) != sum(value is not None for value in node.inputs):
        return None
    try:
        with np.errstate(all="ignore"):
            result = _compute(node, list(inputs), known)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        return None
    return result if result is not None and result.ndim <= 1 and result.size <= MAX_ELEMENTS else None


def _shape(node: onnx_ir.Node, shape: tuple[int, ...] | None) -> Small | None:
    if shape is None:
        return None
    if node.op_type == "Size":
        return np.asarray(int(np.prod(shape, dtype=np.int64)))
    end = int_attribute(node, "end", len(shape))
    return np.asarray(shape[int_attribute(node, "start", 0) : end], np.int64)


def _compute(node: onnx_ir.Node, inputs: list[Small | None], known: list[Small]) -> Small | None:  # noqa: PLR0911 - one line an operator
    operator, first = node.op_type, known[0]
    if operator in _BINARY:
        result = first
        for other in known[1:]:
            result = _BINARY[operator](result, other)
        return np.asarray(result)
    if operator in _UNARY:
        return np.asarray(_UNARY[operator](first))
    if operator == "Div":
        # ONNX truncates; shapes are not negative.
        return np.asarray(first // known[1] if first.dtype.kind in "iu" else first / known[1])
    if operator == "Cast":
        return first.astype(onnx_ir.DataType(int_attribute(node, "to", 1)).numpy())
    if operator == "Gather":
        return np.asarray(np.take(first, known[1], axis=int_attribute(node, "axis", 0)))
    if operator == "Concat":
        return np.concatenate(known, axis=int_attribute(node, "axis", 0))
    if operator == "Where":
        return np.where(known[0], known[1], known[2])
    if operator in ("Reshape", "Expand"):
        target = tuple(int(extent) for extent in known[1])
        return first.reshape(target) if operator == "Reshape" else np.broadcast_to(first, target)
    if operator == "ReduceProd":
        return np.asarray([np.prod(first)] if int_attribute(node, "keepdims", 1) else np.prod(first))
    if operator == "ConstantOfShape":
        fill = node.attributes.get("value")
        number = fill.as_tensor().numpy().reshape(-1)[0] if fill is not None else np.float32(0)
        return np.full(tuple(int(extent) for extent in first), number) if first.size <= 1 else None
    return _move(node, inputs, first)


def _move(node: onnx_ir.Node, inputs: list[Small | None], first: Small) -> Small | None:
    if node.op_type == "Slice":
        return _slice(inputs, first)
    if node.op_type == "Squeeze":
        return first.reshape(())
    if node.op_type == "Unsqueeze":
        return first.reshape(1) if first.ndim == 0 and len(axes_of(node) or ()) == 1 else None
    return first if node.op_type == "Transpose" else None


def _slice(inputs: list[Small | None], first: Small) -> Small | None:
    if len(inputs) < 3 or inputs[1] is None or inputs[2] is None:
        return None
    step = int(inputs[4].reshape(-1)[0]) if len(inputs) > 4 and inputs[4] is not None else 1
    return first[slice_of(int(inputs[1].reshape(-1)[0]), int(inputs[2].reshape(-1)[0]), step, first.size)]


def slice_of(start: int, end: int, step: int, extent: int) -> slice:
    """The slice that ONNX means: negative numbers count from the end, bounds are clamped."""
    start = start + extent if start < 0 else start
    end = end + extent if end < 0 else end
    if step > 0:
        return slice(min(max(start, 0), extent), min(max(end, 0), extent), step)
    start, end = min(max(start, 0), extent - 1), min(max(end, -1), extent - 1)
    return slice(start, None if end < 0 else end, step)
