"""Weights in a few bits (domain com.microsoft): MatMulNBits and GatherBlockQuantized, and the quantized LSTM.

Packed values lie in bytes, the lower bits first. Without zero points the middle of the range, 2 ** (bits - 1), is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import DataType
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.encodings.weight import unpack
from modelpress_compression.executor.ops.recurrent import recurrent
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """[..., bytes] -> [..., bytes * 8 / bits] of uint8."""
    return torch.from_numpy(unpack(packed.cpu().numpy(), bits)).to(packed.device)


@operator("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(site: Site) -> Function:
    """x [..., K] times a weight [N, blocks, bytes of a block], scales [N, blocks]; gradients reach x and the scales."""
    rows, columns = site.integer("N", 0), site.integer("K", 0)
    bits, size = site.integer("bits", 4), site.integer("block_size", 32)
    blocks = -(-columns // size)

    def by_column(value: Tensor, order: Tensor | None) -> Tensor:
        """[N, blocks] -> [N, K]; `order`: the block of each column, where that is not its place."""
        value = value.reshape(rows, blocks)
        return _repeated(value, 1, size, columns) if order is None else value[:, order[:columns].to(torch.int64)]

    def centred(weight: Tensor, zero: Tensor | None, order: Tensor | None, like: Tensor) -> Tensor:
        """q - z as floats [N, K]."""
        levels = unpacked(weight.reshape(rows, -1), bits)[:, :columns].to(like.dtype)
        if zero is None:
            return levels - (1 << (bits - 1))
        if zero.dtype == torch.uint8:
            zero = unpacked(zero.reshape(rows, -1), bits)[:, :blocks]
        return levels - by_column(zero.to(like.dtype), order)

    kept: list[Tensor] = []
    fixed = all(not site.has(index) or site.constant(index) is not None for index in (1, 3, 4))

    def run(*inputs: Any) -> Tensor:
        x, weight, scales, zero, order, bias = (*inputs, *([None] * 6))[:6]
        if not (fixed and kept):
            kept[:] = [centred(weight, zero, order, x)]
        return F.linear(x, kept[0] * by_column(scales, order), bias)

    return run


@operator("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(site: Site) -> Function:
    """Rows of a table that is quantized in blocks along `quantize_axis`."""
    axis, along = site.integer("gather_axis", 0), site.integer("quantize_axis", 1)
    block, bits = site.integer("block_size", 128), site.integer("bits", 4)
    packed = site.dtype(0) == DataType.UINT8
    default_zero = 2 ** (bits - 1) if packed else 0

    def run(table: Tensor, indices: Tensor, scales: Tensor, zero: Tensor | None = None) -> Tensor:
        chosen = indices.reshape(-1).to(torch.int64) % table.shape[axis]
        # Blocks lie along another axis, so that rows are taken first and dequantized then.
        taken, scales = table.index_select(axis, chosen), scales.index_select(axis, chosen)
        levels = (unpacked(taken, bits) if packed else taken).to(scales.dtype)
        extent = levels.shape[along]
        if zero is None:
            levels = levels - default_zero
        else:
            zero = zero.index_select(axis, chosen)
            zeros = unpacked(zero, bits).narrow(-1, 0, scales.shape[-1]) if packed else zero
            levels = levels - _repeated(zeros.to(scales.dtype), along, block, extent)
        real = levels * _repeated(scales, along, block, extent)
        position = axis % real.dim()
        return real.reshape(real.shape[:position] + indices.shape + real.shape[position + 1 :])

    return run


def _repeated(value: Tensor, axis: int, block: int, extent: int) -> Tensor:
    return value.repeat_interleave(block, axis).narrow(axis, 0, extent)


@operator("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_quantize_lstm(site: Site) -> Function:
    """LSTM with weights [directions, in, 4 * hidden] of 8 bits; the values stay floats, where onnxruntime quantizes
    them by their range."""
    float_lstm = recurrent(site, "LSTM")

    def run(*inputs: Any) -> Any:
        x, w, r, bias, lengths, h, c, p, w_scale, w_zero, r_scale, r_zero = inputs
        weights = [
            _dequantized(value, scale, zero).to(x.dtype)
            for value, scale, zero in ((w, w_scale, w_zero), (r, r_scale, r_zero))
        ]
        return float_lstm(x, *weights, bias, lengths, h, c, p)

    return run


def _dequantized(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[directions, in, columns] -> [directions, columns, in]; a scale for each direction or each column."""
    shape = (weight.shape[0], 1, -1)
    real = (weight.to(torch.float32) - zero.reshape(shape).to(torch.float32)) * scale.reshape(shape)
    return real.transpose(1, 2)
