"""What 8-bit products become on CPUs without VNNI, and weights for which that is exact.

There, unsigned activations and signed weights are multiplied by PMADDUBSW, which adds products in pairs and saturates:

    min(max(x[k] w[k] + x[k+1] w[k+1], -32768), 32767),    k even,  0 <= x <= 255,  -127 <= w <= 127

VNNI adds four products in 32 bits at once. The two agree for every input if and only if no pair of weights can leave
16 bits: the positive ones of a pair sum up to 128 at most, and so do the negative ones. x is the stored byte, not
x - zero_point (that correction is added apart, in 32 bits), and a quantized tensor may hold any byte, so that nothing
tighter than 255 can be proved.

A channel with a pair beyond that gets a larger scale, a smaller share of its pairs a correction, or both; see
`least_squares_scale`. Halving the range of all weights (reduce_range) would cost 6 dB instead.

References: Intel's manual, PMADDUBSW and VPDPBUSD; the kernels of onnxruntime's MLAS: QgemmU8X8KernelAvx2,
QgemmU8X8KernelAvx512Core, QgemvU8S8KernelAvx2, ConvSymKernelAvx2, ConvSymKernelAvx512Core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.passes.quantize.affine import QuantizedWeight

LARGEST_ACTIVATION = 255
# Levels of one sign that a pair may sum up to: 255 * 128 = 32640 is the last multiple of 255 within 16 bits.
PAIR_LIMIT = 128
_LARGEST_LEVEL = 127
_CHUNK = 1 << 21  # elements: bounds the temporary arrays


@dataclass(frozen=True)
class Summation:
    """Which axes of a weight a kernel sums over, slowest first, and the axis that has a scale for each slice.

    `axis` None: one scale for all. Terms 0 and 1 of the sum make a pair, 2 and 3, and so on; an odd one stays alone.
    """

    summed: tuple[int, ...]
    axis: int | None = None

    def slices(self, shape: tuple[int, ...]) -> int:
        """How many scales there are."""
        return 1 if self.axis is None else shape[self.axis]

    def pairs(self, weight: NDArray[Any]) -> NDArray[Any]:
        """[slices, pairs, 2]; an odd rest is paired with zero."""
        terms = math.prod(weight.shape[axis] for axis in self.summed)
        rows = weight.transpose(self._order(weight.ndim)).reshape(-1, terms)
        if terms % 2:
            rows = np.pad(rows, ((0, 0), (0, 1)))
        return rows.reshape(self.slices(weight.shape), -1, 2)

    def restore(self, pairs: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The inverse of `pairs`."""
        order = self._order(len(shape))
        terms = math.prod(shape[axis] for axis in self.summed)
        rows = pairs.reshape(-1, terms + terms % 2)[:, :terms]
        return rows.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    def chunks(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Slices of the scales, and the parts of the weight that belong to them, of bounded size."""
        count = self.slices(shape)
        step = max(1, _CHUNK * count // max(math.prod(shape), 1))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, tuple(part if axis == self.axis else slice(None) for axis in range(len(shape)))

    def _order(self, rank: int) -> tuple[int, ...]:
        first = () if self.axis is None else (self.axis,)
        others = tuple(axis for axis in range(rank) if axis not in (*first, *self.summed))
        return (*first, *others, *self.summed)


@dataclass(frozen=True)
class Bounds:
    """The most that a product of these weights with any activations can reach, for each slice.

    `low`, `high`: sums of one pair. `total`: magnitude of the 32-bit sum, its correction for the zero point included.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    total: NDArray[np.int64]

    @property
    def saturates(self) -> NDArray[np.bool_]:
        limits = np.iinfo(np.int16)
        return np.asarray((self.low < limits.min) | (self.high > limits.max))


def bounds(levels: NDArray[np.int8], summation: Summation) -> Bounds:
    """The bounds of int8 weights; each is attained by some activations, but for the correction in `total`."""
    count = summation.slices(levels.shape)
    low, high, total = (np.zeros(count, np.int64) for _ in range(3))
    terms = math.prod(levels.shape[axis] for axis in summation.summed)
    for part, index in summation.chunks(levels.shape):
        pairs = summation.pairs(levels[index]).astype(np.int32)
        low[part] = np.minimum(pairs, 0).sum(axis=2).min(axis=1, initial=0)
        high[part] = np.maximum(pairs, 0).sum(axis=2).max(axis=1, initial=0)
        rows = np.abs(pairs).reshape(len(pairs), -1, terms + terms % 2).sum(axis=2, dtype=np.int64)
        total[part] = 2 * rows.max(axis=1, initial=0)  # x * w, and zero_point * sum(w)
    return Bounds(low * LARGEST_ACTIVATION, high * LARGEST_ACTIVATION, total * LARGEST_ACTIVATION)


def least_squares_scale(weight: NDArray[np.float32], summation: Summation) -> NDArray[np.float64]:
    """For each slice the scale s of the least squared error among weights whose pairs do not saturate.

    Rounding costs s^2 / 12 a weight; a pair whose magnitudes of one sign sum up to T > 128 s is moved to the limit,
    which costs (T - 128 s)^2 / 2. The sum is convex in s. Where its n largest pairs lie beyond, its minimum is

        s = 128 (T_1 + ... + T_n) / (K / 6 + 128^2 n),

    which grows with n until n is right and shrinks from there: the largest of them is the one. For few terms K it is
    nearly T_1 / 128, that is, scaling alone; with thousands, outliers are moved and the others keep their resolution.
    """
    scale = np.zeros(summation.slices(weight.shape))
    for part, index in summation.chunks(weight.shape):
        pairs = summation.pairs(weight[index]).astype(np.float64)
        sums = np.maximum(np.maximum(pairs, 0).sum(axis=2), -np.minimum(pairs, 0).sum(axis=2))
        sums = -np.sort(-sums, axis=1)
        terms = np.count_nonzero(pairs, axis=(1, 2))[:, None]  # zeros are exact at any scale
        moved = np.arange(1, sums.shape[1] + 1)
        candidates = PAIR_LIMIT * np.cumsum(sums, axis=1) / (terms / 6 + PAIR_LIMIT**2 * moved)
        scale[part] = candidates.max(axis=1, initial=0.0)
    return scale


def within_limit(
    quantized: QuantizedWeight, weight: NDArray[np.float32], summation: Summation
) -> tuple[QuantizedWeight, NDArray[np.bool_]]:
    """Moves each pair that saturates to the nearest levels that do not; and in which slices there was one."""
    values = np.asarray(quantized.values, np.int8).copy()
    moved = np.zeros(summation.slices(values.shape), np.bool_)
    scale = np.broadcast_to(quantized.scale, moved.shape)
    for part, index in summation.chunks(values.shape):
        levels = summation.pairs(values[index]).astype(np.int16)
        beyond = (np.abs(levels).sum(axis=2) > PAIR_LIMIT) & (levels[..., 0] * levels[..., 1] > 0)
        if not beyond.any():
            continue
        moved[part] = beyond.any(axis=1)
        aim = np.abs(summation.pairs(weight[index])[beyond]) / scale[part][np.nonzero(beyond)[0], None]
        first = np.rint((PAIR_LIMIT + aim[:, 0] - aim[:, 1]) / 2)
        first = np.clip(first, PAIR_LIMIT - _LARGEST_LEVEL, _LARGEST_LEVEL)
        levels[beyond] = np.sign(levels[beyond]) * np.stack([first, PAIR_LIMIT - first], axis=1).astype(np.int16)
        values[index] = summation.restore(levels, values[index].shape)
    return (replace(quantized, values=values) if moved.any() else quantized), moved
