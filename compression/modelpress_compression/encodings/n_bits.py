"""Matrices in blocks along their rows, as com.microsoft MatMulNBits and GatherBlockQuantized take them.

    MatMulNBits             A [..., K] times the transposed W [N, K]
        levels [N, blocks, size * bits / 8], the last block of a row filled up with zero points
    GatherBlockQuantized    rows of W [N, K]
        levels [N, K * bits / 8]; or [N, K] in a type of 4 bits

    both                    scales [N, blocks], zero points [N, ceil(blocks * bits / 8)]; without them the middle is 0

2, 4 or 8 bits; blocks = ceil(K / size). Source: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir

from modelpress_compression.encodings.operands import arranged, operand
from modelpress_compression.encodings.qdq import whole
from modelpress_compression.encodings.weight import Levels, QuantizedWeight, StoredWeight, as_they_are, pack, unpack
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import MICROSOFT, constant_array, int_attribute, is_op, label, required
from modelpress_compression.inputs import Array

_INT8_COMPUTE = 4  # accuracy_level
_OPERANDS = ("w", "w_scale", "w_zero", "w_order")


def store_matrix(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str) -> StoredWeight:
    """The constants that a MatMulNBits takes; the weight is [N, K], its blocks lie along axis 1."""
    return _store(editor, graph, weight, _by_block(weight.levels, weight), name)


def store_table(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str) -> StoredWeight:
    """Those of a GatherBlockQuantized; K times the bits is a multiple of 8."""
    return _store(editor, graph, weight, pack(weight.levels, weight.bits), name)


def _store(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, levels: Array, name: str) -> StoredWeight:
    values = editor.constant(graph, levels, f"{name}_quantized")
    scale, zero_point = editor.constant(graph, weight.scale, f"{name}_scale"), None
    if (weight.zero_point != _middle(weight.bits)).any():
        zero_point = editor.constant(graph, pack(weight.zero_point, weight.bits), f"{name}_zero_point")
    return StoredWeight(weight, values, scale, zero_point)


def write_product(
    editor: Editor, node: onnx_ir.Node, stored: StoredWeight, bias: onnx_ir.Value | None = None
) -> onnx_ir.Value:
    """A MatMulNBits before a node, of that node's first input; `bias` [N]."""
    rows, columns = stored.weight.levels.shape
    attributes = {"K": columns, "N": rows, "bits": stored.weight.bits, "block_size": stored.weight.block}
    inputs = arranged("MatMulNBits", x=required(node, 0), **stored.operands(), bias=bias)
    attributes["accuracy_level"] = _INT8_COMPUTE
    return editor.emit(node, "MatMulNBits", inputs, label(node), domain=MICROSOFT, attributes=attributes)[0]


def computes_in_int8(node: onnx_ir.Node) -> bool:
    """Whether a MatMulNBits may round its activations to 8 bits while it runs."""
    return is_op(node, "MatMulNBits", domain=MICROSOFT) and int_attribute(node, "accuracy_level", 0) == _INT8_COMPUTE


def write_lookup(editor: Editor, node: onnx_ir.Node, stored: StoredWeight) -> onnx_ir.Value:
    """A GatherBlockQuantized before a node, of that node's second input as indices of rows."""
    attributes = {"bits": stored.weight.bits, "block_size": stored.weight.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = arranged("GatherBlockQuantized", indices=required(node, 1), **stored.operands())
    return editor.emit(node, "GatherBlockQuantized", inputs, label(node), domain=MICROSOFT, attributes=attributes)[0]


def read_product(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The weight [N, K] of a MatMulNBits. With `w_order`, the group of each column, each level has its own scale."""
    rows, columns, size = (int_attribute(node, name, 0) for name in ("N", "K", "block_size"))
    bits, blocks = int_attribute(node, "bits", 4), -(-columns // size)
    found = _constants(node)
    whole_bytes = rows * blocks * size * bits // 8
    if found is None or found["w"].nbytes != whole_bytes or found["w_scale"].size != rows * blocks:
        return ()
    packed, zero_point = found["w"], found.get("w_zero")
    levels = unpack(packed.reshape(rows, -1), bits)[:, :columns]
    if zero_point is None:
        zero_point = np.full((rows, blocks), _middle(bits), np.uint8)
    elif zero_point.dtype == np.uint8:
        zero_point = unpack(zero_point.reshape(rows, -1), bits)[:, :blocks]
    blocked = QuantizedWeight(
        levels, found["w_scale"].reshape(rows, blocks), zero_point.reshape(rows, blocks), 1, size, bits
    )
    weight = blocked
    if (order := found.get("w_order")) is not None:
        groups = order.reshape(-1)[:columns]
        weight = replace(blocked, scale=blocked.scale[:, groups], zero_point=blocked.zero_point[:, groups], block=0)
    return _stored(node, weight, lambda new: _by_block(new, blocked).reshape(packed.shape))


def read_table(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The table of a GatherBlockQuantized."""
    bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 128)
    found = _constants(node)
    if found is None:
        return ()
    levels, scale, zero_point = found["w"], found["w_scale"], found.get("w_zero")
    is_packed = levels.dtype == np.uint8
    if zero_point is None:
        zero_point = np.asarray(_middle(bits) if is_packed else 0, np.uint8)
    elif is_packed:
        zero_point = unpack(zero_point, bits)[..., : scale.shape[-1]]
    levels = unpack(levels, bits) if is_packed else whole(levels)
    axis = int_attribute(node, "quantize_axis", 1) % levels.ndim
    weight = QuantizedWeight(levels, scale, whole(zero_point), axis, size, bits)
    return _stored(node, weight, (lambda new: pack(new, bits)) if is_packed else as_they_are)


def _constants(node: onnx_ir.Node) -> dict[str, Array] | None:
    """Numbers of the weight and of what goes with it, by the operands' names; None where some are computed."""
    found = {}
    for name in _OPERANDS:
        if (value := operand(node, name)) is not None:
            if (array := constant_array(value)) is None:
                return None
            found[name] = array
    return found


def _stored(node: onnx_ir.Node, weight: QuantizedWeight, pack: Callable[[Levels], Array]) -> tuple[StoredWeight, ...]:
    values, scale, zero_point, order = (operand(node, name) for name in _OPERANDS)
    return () if values is None else (StoredWeight(weight, values, scale, zero_point, order, pack),)


def _by_block(levels: Levels, weight: QuantizedWeight) -> Array:
    """Levels [N, K] as MatMulNBits takes them."""
    return pack(weight.filled(levels), weight.bits).reshape(*weight.scale.shape, -1)


def _middle(bits: int) -> int:
    """The zero point of a file that has none."""
    return 1 << (bits - 1)
