"""The forms that quantized weights have in a graph, each taken apart into a grid and put together again.

    DequantizeLinear(Q, scale, zero_point)                static quantization; per tensor or along an axis
    DequantizeLinear(B, scale) of int32                   its biases: trained as floats, since 32 bits round nothing
    Mul(Cast(Q), scale)                                   weight-only, 8 bits, folded when loaded
    Mul(Sub(Concat(low, high), zero_point), scale)        weight-only, 4 bits, two levels a byte, folded when loaded
    MatMulNBits, GatherBlockQuantized (com.microsoft)     weight-only, blocks along the rows

Layouts are those of ONNX and of onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import MICROSOFT, constant_array, constant_tensor, input_of, int_attribute, is_op
from modelpress_compression.inputs import Array
from modelpress_compression.passes.distill.fake_quantization.grid import (
    Emitter,
    Grid,
    Levels,
    fake_quantized,
    first_columns,
    reshaped,
)

_BITS = {
    onnx_ir.DataType.INT8: (8, True),
    onnx_ir.DataType.UINT8: (8, False),
    onnx_ir.DataType.INT4: (4, True),
    onnx_ir.DataType.UINT4: (4, False),
}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Form:
    """One weight of a node. `stored`: the constant that holds its integers; `latent`: what is trained; `replace` puts
    the latent value in the node's place; `pack` makes the stored array of trained numbers."""

    stored: onnx_ir.Value
    latent: Array
    replace: Callable[[Emitter, onnx_ir.Value], onnx_ir.Value]
    pack: Callable[[Array], Array]


def form_of(node: onnx_ir.Node) -> Form | None:
    """The quantized weight that this node hands out or uses; None where it has none that is understood."""
    if is_op(node, "DequantizeLinear"):
        return _dequantized(node)
    if is_op(node, "Mul"):
        return _scaled(node)
    if is_op(node, "MatMulNBits", domain=MICROSOFT):
        return _product(node)
    if is_op(node, "GatherBlockQuantized", domain=MICROSOFT):
        return _embedding(node)
    return None


def _dequantized(node: onnx_ir.Node) -> Form | None:
    stored, tensor = node.inputs[0], constant_tensor(node.inputs[0])
    scale = constant_array(node.inputs[1])
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if stored is None or tensor is None or scale is None or scale.dtype != np.float32:
        return None
    if int_attribute(node, "block_size", 0) or (len(node.inputs) > 2 and zero is None):
        return None
    levels = np.asarray(tensor.numpy())
    axis = int_attribute(node, "axis", 1) % max(1, levels.ndim)
    if tensor.dtype == onnx_ir.DataType.INT32:
        return _bias(stored, levels, scale, axis)
    if tensor.dtype not in _BITS or not levels.ndim:
        return None
    turned = np.moveaxis(levels, axis, 0) if scale.size > 1 else levels
    rows = turned.shape[0] if scale.size > 1 else 1
    bits, signed = _BITS[tensor.dtype]
    grid = Grid.of(turned.reshape(rows, -1), scale.reshape(-1), _flat(zero), bits, signed=signed)
    places = [axis, *(other for other in range(levels.ndim) if other != axis)]
    back = tuple(int(place) for place in np.argsort(places)) if scale.size > 1 else None

    def replace(emitter: Emitter, latent: onnx_ir.Value) -> onnx_ir.Value:
        value = reshaped(emitter, fake_quantized(emitter, latent, grid), turned.shape)
        return value if back in (None, tuple(range(levels.ndim))) else emitter.emit("Transpose", [value], perm=back)

    def pack(trained: Array) -> Array:
        array = grid.quantize(trained).reshape(turned.shape)
        return array if back is None else np.transpose(array, back)

    return Form(stored, grid.real, replace, pack)


def _bias(stored: onnx_ir.Value, levels: Array, scale: Array, axis: int) -> Form:
    shape = [1] * levels.ndim
    if scale.size > 1:
        shape[axis] = -1
    step = scale.astype(np.float64).reshape(shape if levels.ndim else ())

    def pack(trained: Array) -> Array:
        return np.clip(np.rint(trained.astype(np.float64) / step), _INT32.min, _INT32.max)

    return Form(stored, (levels.astype(np.float64) * step).astype(np.float32), lambda _, latent: latent, pack)


def _scaled(node: onnx_ir.Node) -> Form | None:
    """Both forms that onnxruntime folds."""
    inner, scale = node.inputs[0].producer() if node.inputs[0] is not None else None, constant_array(node.inputs[1])
    if inner is None or scale is None:
        return None
    if is_op(inner, "Cast") and (tensor := constant_tensor(inner.inputs[0])) is not None and tensor.dtype in _BITS:
        return _by_channel(inner.inputs[0], np.asarray(tensor.numpy()), scale, *_BITS[tensor.dtype])
    if is_op(inner, "Sub") and scale.ndim == 3:
        return _halves(inner, scale)
    return None


def _by_channel(stored: onnx_ir.Value | None, levels: Array, scale: Array, bits: int, signed: bool) -> Form | None:
    if stored is None or scale.ndim != levels.ndim:
        return None
    kept = [axis for axis in range(levels.ndim) if scale.shape[axis] > 1]
    order = [*kept, *(axis for axis in range(levels.ndim) if axis not in kept)]
    turned = np.transpose(levels, order)
    grid = Grid.of(turned.reshape(scale.size, -1), np.transpose(scale, order).reshape(-1), None, bits, signed=signed)
    back = [int(place) for place in np.argsort(order)]

    def replace(emitter: Emitter, latent: onnx_ir.Value) -> onnx_ir.Value:
        value = reshaped(emitter, fake_quantized(emitter, latent, grid), turned.shape)
        return emitter.emit("Transpose", [value], perm=back)

    return Form(
        stored, grid.real, replace, lambda trained: np.transpose(grid.quantize(trained).reshape(turned.shape), back)
    )


def _halves(sub: onnx_ir.Node, scale: Array) -> Form | None:
    """[rows, blocks, size]: the first half of each block in the low halves of its bytes, the second in the high."""
    concat, cast = (value.producer() if value is not None else None for value in sub.inputs)
    if not is_op(concat, "Concat") or concat is None or not is_op(cast, "Cast") or cast is None:
        return None
    zero, packed = constant_array(cast.inputs[0]), _packed(concat)
    stored = constant_array(packed)
    if zero is None or packed is None or stored is None or stored.dtype != np.uint8 or stored.ndim != 3:
        return None
    levels = np.concatenate(_nibbles(stored), axis=2)
    grid = Grid.of(levels.reshape(-1, levels.shape[2]), scale.reshape(-1), zero.reshape(-1), 4, signed=False)

    def pack(trained: Array) -> Array:
        low, high = np.split(grid.quantize(trained).reshape(levels.shape), 2, axis=2)
        return low | (high << 4)

    return Form(
        packed,
        grid.real,
        lambda emitter, latent: reshaped(emitter, fake_quantized(emitter, latent, grid), levels.shape),
        pack,
    )


def _packed(concat: onnx_ir.Node) -> onnx_ir.Value | None:
    """The bytes: Concat's second operand is Floor(Cast(P) / 16)."""
    value = concat.inputs[1] if len(concat.inputs) == 2 else None
    for op_type in ("Floor", "Mul", "Cast"):
        node = value.producer() if value is not None else None
        if node is None or not is_op(node, op_type):
            return None
        value = node.inputs[0]
    return value


def _product(node: onnx_ir.Node) -> Form | None:
    rows, columns = int_attribute(node, "N", 0), int_attribute(node, "K", 0)
    bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
    x, stored, array, scale, zero = _operands(node)
    if array is None or scale is None or x is None or _given(node, 4) is not None or bits not in (4, 8):
        return None
    blocks = -(-columns // size)
    levels = _unpacked(array.reshape(rows, -1), bits, blocks * size).reshape(-1, size)
    grid = _blocks(levels, scale, zero, bits, rows, blocks)
    bias = _given(node, 5)

    def replace(emitter: Emitter, latent: onnx_ir.Value) -> onnx_ir.Value:
        value = reshaped(emitter, fake_quantized(emitter, latent, grid), (rows, blocks * size))
        value = emitter.emit("Transpose", [first_columns(emitter, value, columns)], perm=[1, 0])
        product = emitter.emit("MatMul", [x, value])
        return product if bias is None else emitter.emit("Add", [product, bias])

    return Form(stored, grid.real, replace, lambda trained: _repacked(grid.quantize(trained), bits, rows, array.shape))


def _embedding(node: onnx_ir.Node) -> Form | None:
    bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 128)
    stored, _, array, scale, zero = _operands(node, table=True)
    along_rows = int_attribute(node, "gather_axis", 0) == 0 and int_attribute(node, "quantize_axis", 1) == 1
    if array is None or scale is None or not along_rows or array.ndim != 2 or array.dtype != np.uint8:
        return None
    rows, columns = len(array), array.shape[1] * 8 // bits
    blocks = -(-columns // size)
    levels = np.pad(_unpacked(array, bits, columns), ((0, 0), (0, blocks * size - columns)), mode="edge")
    grid = _blocks(levels.reshape(-1, size), scale, zero, bits, rows, blocks)

    def replace(emitter: Emitter, latent: onnx_ir.Value) -> onnx_ir.Value:
        value = reshaped(emitter, fake_quantized(emitter, latent, grid), (rows, blocks * size))
        return emitter.emit("Gather", [first_columns(emitter, value, columns), node.inputs[1]], axis=0)

    def pack(trained: Array) -> Array:
        return _repacked(grid.quantize(trained).reshape(rows, -1)[:, :columns], bits, rows, array.shape)

    return Form(stored, grid.real, replace, pack)


def _operands(
    node: onnx_ir.Node, *, table: bool = False
) -> tuple[onnx_ir.Value, onnx_ir.Value, Array | None, Array | None, Array | None]:
    """(first, second operand, stored bytes, scales, packed zero points or None for the default)."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        raise TypeError(f"node {node.name!r} lacks an operand")
    zero = _given(node, 3)
    numbers = constant_array(zero)
    understood = zero is None or (numbers is not None and numbers.dtype == np.uint8)
    array = constant_array(first if table else second) if understood else None
    return first, second, array, constant_array(node.inputs[2]), numbers


def _blocks(levels: Array, scale: Array, zero: Array | None, bits: int, rows: int, blocks: int) -> Grid:
    middle = np.full(rows * blocks, 1 << (bits - 1), np.uint8)
    points = middle if zero is None else _unpacked(zero.reshape(rows, -1), bits, blocks).reshape(-1)
    return Grid.of(levels, scale.reshape(-1), points, bits, signed=False)


def _unpacked(packed: Array, bits: int, columns: int) -> Array:
    """[N, bytes] -> [N, columns]; the low half of a byte comes first."""
    if bits == 8:
        return packed[:, :columns]
    return np.stack(_nibbles(packed), axis=-1).reshape(len(packed), -1)[:, :columns]


def _nibbles(packed: Array) -> tuple[Array, Array]:
    """The low and the high halves of bytes."""
    whole = packed.astype(np.uint8)
    return whole & np.uint8(15), whole >> np.uint8(4)


def _repacked(levels: Levels, bits: int, rows: int, shape: Sequence[int]) -> Array:
    flat = levels.reshape(rows, -1)
    if bits == 4:
        flat = flat[:, ::2] | (flat[:, 1::2] << 4)
    return flat.astype(np.uint8).reshape(shape)


def _given(node: onnx_ir.Node, position: int) -> onnx_ir.Value | None:
    return input_of(node, position)


def _flat(array: Array | None) -> Array | None:
    return None if array is None else array.reshape(-1)
