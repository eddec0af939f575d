"""Matrices in blocks of 4 or 8 bits, as com.microsoft MatMulNBits and GatherBlockQuantized store them.

    w = scale * (level - zero_point),   W [N, K] in N * ceil(K / size) blocks along K, one scale and zero point each

4 bits are asymmetric, over the range of the block that loses least: cut to 95, 90, ... 60 % of its extent, or not. On
the matrices of a sentence encoder in blocks of 32 this keeps 22.0 dB of the weights, without the cut 21.7 dB, and
symmetric 21.4 or 21.1 dB (20.0 dB with equal ranges on both sides of zero); the zero points take 0.125 bit a weight.
8 bits are symmetric about 128, which is the operators' default zero point, so that none is stored: 45 dB.

Layout (onnxruntime's docs/ContribOperators.md): two levels a byte, the first in the low half.
    MatMulNBits           levels [N, blocks, size * bits / 8], the last block of a row filled up with zero points
    GatherBlockQuantized  levels [N, K * bits / 8]
    both                  scales [N, blocks], zero points [N, ceil(blocks * bits / 8)]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.passes.quantize.rounding.affine import MIN_SCALE
from modelpress_compression.passes.quantize.rounding.rounder import Rounding, nearest

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_Kind = TypeVar("_Kind", np.uint8, np.float32)
_CUTS = tuple(np.float32(percent / 100) for percent in range(95, 55, -5))
_CHUNK = 1 << 22  # elements of a matrix that are looked at together: bounds the temporary arrays


@dataclass(frozen=True)
class Blocks:
    """`levels` [N, K], `scale` and `zero_point` [N, ceil(K / size)]; `bits` is 4 or 8."""

    levels: Bytes
    scale: Floats
    zero_point: Bytes
    bits: int
    size: int

    @property
    def has_zero_points(self) -> bool:
        """Whether they differ from the operators' default, so that they must be stored."""
        return self.bits == 4

    def by_block(self) -> Bytes:
        """The levels as MatMulNBits takes them."""
        rows, columns = self.levels.shape
        blocks = self.scale.shape[1]
        filled = np.repeat(self.zero_point, self.size, axis=1)
        filled[:, :columns] = self.levels
        return pack(filled, self.bits).reshape(rows, blocks, -1)

    def by_row(self) -> Bytes:
        """The levels as GatherBlockQuantized takes them; K times `bits` is a multiple of 8."""
        return pack(self.levels, self.bits)

    def packed_zero_points(self) -> Bytes:
        return pack(self.zero_point, self.bits)

    def dequantize(self) -> Floats:
        """[N, K]."""
        columns = self.levels.shape[1]
        zero_point = along_rows(self.zero_point, self.size, columns).astype(np.float32)
        return np.asarray((self.levels - zero_point) * along_rows(self.scale, self.size, columns))


def quantize_blocks(weight: Floats, bits: int, size: int, rounding: Rounding | None = None) -> Blocks:
    """A matrix [N, K]. `rounding` sees it in this layout; without one, each weight goes to the nearest level."""
    rows, columns = weight.shape
    step = max(1, _CHUNK // columns)
    chunks = [weight[start : start + step] for start in range(0, rows, step)]
    found = [_parameters(chunk, bits, size) for chunk in chunks]
    scale, zero_point = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if rounding is not None:
        return Blocks(_levels(weight, scale, zero_point, bits, size, rounding), scale, zero_point, bits, size)
    levels = [_levels(chunk, *own, bits, size, nearest) for chunk, own in zip(chunks, found, strict=True)]
    return Blocks(np.concatenate(levels), scale, zero_point, bits, size)


def block_size(columns: int, bits: int, largest: int) -> int:
    """Of the sizes up to `largest`, powers of two from 16, that which stores rows of `columns` in the fewest bytes.

    MatMulNBits fills the last block up: 288 columns would take 384 levels in blocks of 128, and 288 in blocks of 32.
    """
    sizes = [size for size in (256, 128, 64, 32, 16) if size <= largest]
    bits_of_parameters = 32 + (bits if bits == 4 else 0)
    return min(sizes, key=lambda size: -(-columns // size) * (size * bits + bits_of_parameters))


def pack(levels: Bytes, bits: int) -> Bytes:
    """[N, K] into [N, ceil(K * bits / 8)]; an odd last level of 4 bits has zeros beside it."""
    if bits == 8:
        return levels
    even = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    return np.asarray(even[:, ::2] | (even[:, 1::2] << 4), np.uint8)


def unpack(packed: Bytes, bits: int, columns: int) -> Bytes:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(len(packed), -1)[:, :columns]


def along_rows(parameters: NDArray[_Kind], size: int, columns: int) -> NDArray[_Kind]:
    """[N, blocks] as [N, K]: every weight's own."""
    return np.repeat(parameters, size, axis=1)[:, :columns]


def _levels(weight: Floats, scale: Floats, zero_point: Bytes, bits: int, size: int, rounding: Rounding) -> Bytes:
    columns = weight.shape[1]
    zero = along_rows(zero_point, size, columns).astype(np.float32)
    # 8 bits leave out the lowest level, as all symmetric weights here do.
    low, high = (-zero, 15 - zero) if bits == 4 else (np.asarray(-127.0), np.asarray(127.0))
    levels = rounding(weight, along_rows(scale, size, columns), low, high)
    return np.asarray(levels + zero, np.uint8)


def _parameters(weight: Floats, bits: int, size: int) -> tuple[Floats, Bytes]:
    rows, columns = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -columns % size))).reshape(rows, -1, size)
    if bits == 8:
        scale = np.abs(blocks).max(axis=2) / np.float32(127)
        return usable_scale(scale), np.full(scale.shape, 128, np.uint8)
    extent = usable_scale(np.abs(blocks).max(axis=2))
    blocks = blocks / extent[:, :, None]
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    best, zero_point = _of_range(low, high)
    least = _error(blocks, best, zero_point)
    for cut in _CUTS:
        scale, zero = _of_range(low * cut, high * cut)
        error = _error(blocks, scale, zero)
        better = error < least
        best, zero_point = np.where(better, scale, best), np.where(better, zero, zero_point)
        least = np.minimum(least, error)
    return usable_scale(best * extent), zero_point.astype(np.uint8)


def _of_range(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    scale = usable_scale((high - low) / np.float32(15))
    return scale, np.clip(np.rint(-low / scale), 0, 15)


def usable_scale(scale: Floats) -> Floats:
    """Scales as they are, but never too small to divide by, and 1 where there is nothing but zeros."""
    return np.where(scale > 0, np.maximum(scale, np.float32(MIN_SCALE)), np.float32(1))


def _error(blocks: Floats, scale: Floats, zero_point: Floats) -> Floats:
    zero = zero_point[:, :, None]
    levels = nearest(blocks, scale[:, :, None], -zero, 15 - zero)
    return np.asarray(np.square(levels * scale[:, :, None] - blocks).sum(axis=2), np.float32)
