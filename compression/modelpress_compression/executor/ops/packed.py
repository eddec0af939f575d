"""Weights in a few bits (domain com.microsoft): MatMulNBits and GatherBlockQuantized, and the quantized LSTM.

Packed values lie in bytes, the lower bits first. Without zero points the middle of the range, 2 ** (bits - 1), is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import DataType
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.ops.recurrent import recurrent
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


def unpack(packed: Tensor, bits: int) -> Tensor:
    """[..., bytes] -> [..., bytes * 8 / bits] of uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    spread: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return spread.flatten(-2)


@operator("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(site: Site) -> Function:
    """x [..., K] times a weight [N, blocks, bytes of a block], scales [N, blocks]; gradients reach x and the scales."""
    rows, columns = site.integer("N", 0), site.integer("K", 0)
    bits, block = site.integer("bits", 4), site.integer("block_size", 32)
    blocks = -(-columns // block)

    def levels(weight: Tensor, zero: Tensor | None, like: Tensor) -> Tensor:
        """q - z as floats [N, blocks, block]."""
        q: Tensor = unpack(weight.reshape(rows, blocks, -1), bits).to(like.dtype)
        if zero is None:
            return q - (1 << (bits - 1))
        if zero.dtype == torch.uint8:
            zero = unpack(zero.reshape(rows, -1), bits)[:, :blocks]
        return q - zero.reshape(rows, blocks, 1).to(like.dtype)

    kept: list[Tensor] = []
    fixed = site.constant(1) is not None and (not site.has(3) or site.constant(3) is not None)

    def run(*inputs: Any) -> Tensor:
        x, weight, scales, zero, order, bias = (*inputs, *([None] * 6))[:6]
        if not (fixed and kept):
            kept[:] = [levels(weight, zero, x)]
        scales = scales.reshape(rows, blocks)
        if order is None:
            real = (kept[0] * scales.unsqueeze(-1)).flatten(1)[:, :columns]
        else:
            real = kept[0].flatten(1)[:, :columns] * scales[:, order.to(torch.int64)]
        return F.linear(x, real, bias)

    return run


@operator("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(site: Site) -> Function:
    """Rows of a table that is quantized in blocks along `quantize_axis`."""
    axis, along = site.integer("gather_axis", 0), site.integer("quantize_axis", 1)
    block, bits = site.integer("block_size", 128), site.integer("bits", 4)
    packed = site.dtype(0) == DataType.UINT8
    default_zero = 2 ** (bits - 1) if packed else 0

    def run(table: Tensor, indices: Tensor, scales: Tensor, zero: Tensor | None = None) -> Tensor:
        values = unpack(table, bits) if packed else table
        levels = values.to(scales.dtype)
        if zero is None:
            levels = levels - default_zero
        else:
            zeros = unpack(zero, bits).narrow(-1, 0, scales.shape[-1]) if packed else zero
            levels = levels - _repeated(zeros.to(scales.dtype), along, block, values.shape[along])
        real = levels * _repeated(scales, along, block, values.shape[along])
        taken = real.index_select(axis, indices.reshape(-1).to(torch.int64) % real.shape[axis])
        position = axis % real.dim()
        return taken.reshape(real.shape[:position] + indices.shape + real.shape[position + 1 :])

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
