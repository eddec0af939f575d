"""The kind of a model's input, as far as its graph and its samples show: images, a signal, token indices, or other."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir

from modelpress_compression.graph.read import constant_tensor, is_op
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model

IMAGE, SIGNAL, TOKENS, OTHER = "image", "signal", "tokens", "other"

# States, masks and switches: changed at random they would be no valid input any more.
_NO_DATA = re.compile(
    r"state|hidden|cell|cache|past|memory|mask|length|position|type|segment|(?:^|_)sr$", re.IGNORECASE
)
_MAX_CHANNELS = 4
_MIN_TOKENS = 8  # rows of an embedding; smaller tables are those of segments or other switches
_CARRIERS = ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_MAX_HOPS = 4


@dataclass(frozen=True)
class InputKind:
    """`axis`: where an image has its channels, 1 or 3, or where a signal has its time."""

    name: str
    kind: str
    axis: int = -1


def input_kinds(model: Model, data: InputData) -> list[InputKind]:
    """The kind of every input."""
    values = {value.name: value for value in model.graph.inputs}
    return [_kind_of(values[spec.name], data.arrays[spec.name].shape, data.whole_feeds) for spec in model.inputs]


def _kind_of(value: onnx_ir.Value, shape: tuple[int, ...], whole_feeds: bool) -> InputKind:
    name = value.name or ""
    extents = shape[1:] if whole_feeds else shape
    if _NO_DATA.search(name) or value.dtype is None:
        return InputKind(name, OTHER)
    floats, rank = value.dtype.is_floating_point(), len(extents)
    if rank == 4 and (floats or value.dtype == onnx_ir.DataType.UINT8) and (axis := _channel_axis(extents)):
        return InputKind(name, IMAGE, axis)
    if rank in (2, 3) and floats:
        return InputKind(name, SIGNAL, _time_axis(value))
    if rank == 2 and value.dtype.is_integer() and _is_looked_up(value, _MAX_HOPS):
        return InputKind(name, TOKENS)
    return InputKind(name, OTHER)


def _channel_axis(extents: tuple[int, ...]) -> int:
    """1 or 3; 0 where neither has few enough channels for an image."""
    if extents[3] <= _MAX_CHANNELS < extents[1]:
        return 3
    return 1 if extents[1] <= _MAX_CHANNELS else 0


def _time_axis(value: onnx_ir.Value) -> int:
    """The last axis, or the middle one of [N, T, F] with a dynamic T."""
    dims = list(value.shape) if value.shape is not None else []
    open_middle = len(dims) == 3 and not isinstance(dims[1], int) and isinstance(dims[2], int)
    return 1 if open_middle else -1


def _is_looked_up(value: onnx_ir.Value, hops: int) -> bool:
    """Whether the input's numbers are rows of an embedding."""
    for node, position in value.uses():
        if is_op(node, "Gather") and position == 1 and _rows(node.inputs[0]) >= _MIN_TOKENS:
            return True
        if node.op_type in ("EmbedLayerNormalization", "GatherBlockQuantized"):
            return position == (0 if node.op_type == "EmbedLayerNormalization" else 1)
        if is_op(node, *_CARRIERS) and position == 0 and hops and _is_looked_up(node.outputs[0], hops - 1):
            return True
    return False


def _rows(table: onnx_ir.Value | None) -> int:
    tensor = constant_tensor(table)
    if tensor is None and table is not None and is_op(table.producer(), "DequantizeLinear"):
        producer = table.producer()
        tensor = constant_tensor(producer.inputs[0]) if producer is not None else None
    return int(tensor.shape.numpy()[0]) if tensor is not None and len(tensor.shape) == 2 else 0
