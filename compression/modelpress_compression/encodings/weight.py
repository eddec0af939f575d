"""A quantized weight apart from its format, where a graph keeps it, and levels packed into bytes.

real = scale * (level - zero_point)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.inputs import Array

Levels = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class QuantizedWeight:
    """`levels`: whole numbers of `bits` bits in the weight's own shape, in a type of 8 bits or more.

    `scale` and `zero_point` are one number for all; or [extent of `axis`]; or of the levels' rank, with an extent of 1
    where all share a number. Where `block` is not 0, each number along `axis` belongs to as many levels. Zero points
    are whole numbers but in files from elsewhere. `reduced`: how many slices gave up resolution so that their products
    do not saturate.
    """

    levels: Levels
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int | None = None
    block: int = 0
    bits: int = 8
    reduced: int = 0

    @property
    def stored_bytes(self) -> int:
        """What levels, scales and zero points take in a file; one zero point for all takes nothing."""
        parameters = int(self.scale.nbytes) + (self.zero_point.size * self.bits // 8 if self.zero_point.ndim else 0)
        return self.levels.size * self.bits // 8 + parameters

    @property
    def signed(self) -> bool:
        return self.levels.dtype.kind == "i"

    def spread(self, parameter: NDArray[Any]) -> NDArray[Any]:
        """A scale or zero point so that it broadcasts against the levels."""
        rank = self.levels.ndim
        if self.axis is None or not parameter.ndim:
            return parameter
        if self.block:
            kept = [slice(None)] * rank
            kept[self.axis] = slice(self.levels.shape[self.axis])
            return np.repeat(parameter, self.block, axis=self.axis)[tuple(kept)]
        if parameter.ndim < rank:
            return parameter.reshape([-1 if axis == self.axis % rank else 1 for axis in range(rank)])
        return parameter

    def dequantize(self) -> NDArray[np.float32]:
        """The real numbers, in the weight's own shape."""
        # 32-bit levels, those of biases, are more exact than float32.
        kind = np.float32 if self.bits <= 16 else np.float64
        centred = self.levels.astype(kind) - self.spread(self.zero_point).astype(kind)
        return np.asarray(centred * self.spread(self.scale), np.float32)

    def filled(self, levels: Levels) -> Levels:
        """Levels [N, K] of a weight in blocks along its rows, with zero points behind them up to a whole block."""
        whole = np.repeat(self.zero_point, self.block, axis=1).astype(levels.dtype)
        whole[:, : levels.shape[1]] = levels
        return whole

    @property
    def is_consistent(self) -> bool:
        """Whether scale and zero point have shapes that go with the levels'; files from elsewhere may say anything."""
        shape = list(self.levels.shape)
        if self.axis is not None and self.block:
            shape[self.axis] = -(-shape[self.axis] // self.block)
        by_channel = () if self.axis is None or self.block else tuple(shape[self.axis :][:1])
        return all(
            given in ((), by_channel)
            or (len(given) == len(shape) and all(own in (1, whole) for own, whole in zip(given, shape, strict=True)))
            for given in (self.scale.shape, self.zero_point.shape)
        )

    def nonzero(self) -> int:
        """How many elements do not stand for 0."""
        return int(np.count_nonzero(self.levels != self.spread(self.zero_point)))


def as_they_are(levels: Levels) -> Array:
    """The `pack` of a format that stores levels in the weight's own shape."""
    return levels


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in a graph. `values`: the constant that holds its levels, which `pack` brings into its layout.

    The other constants are None where the format has none. `order`: of which group each row is.
    """

    weight: QuantizedWeight
    values: onnx_ir.Value
    scale: onnx_ir.Value | None = None
    zero_point: onnx_ir.Value | None = None
    order: onnx_ir.Value | None = None
    pack: Callable[[Levels], Array] = as_they_are

    @property
    def parameters(self) -> tuple[onnx_ir.Value, ...]:
        """The constants beside the levels."""
        return tuple(value for value in (self.scale, self.zero_point, self.order) if value is not None)

    def operands(self, name: str = "w") -> dict[str, onnx_ir.Value | None]:
        """By the names that they have in `encodings.operands`, for the weight of this name."""
        values = (self.values, self.scale, self.zero_point, self.order)
        return dict(zip((name, f"{name}_scale", f"{name}_zero", f"{name}_order"), values, strict=True))


def pack(levels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """[..., K] into [..., ceil(K * bits / 8)], the first level in the lowest bits; zeros fill the last byte up."""
    count = 8 // bits
    filled = np.pad(levels.astype(np.uint8), [(0, 0)] * (levels.ndim - 1) + [(0, -levels.shape[-1] % count)])
    parts = filled.reshape(*filled.shape[:-1], -1, count) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(parts, axis=-1), np.uint8)


def unpack(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: [..., bytes] into [..., bytes * 8 / bits], with what filled up the last byte."""
    whole = packed.astype(np.uint8, copy=False)
    if bits == 8:
        return whole
    levels = (whole[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
    return levels.reshape(*whole.shape[:-1], -1)
