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

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.passes.integers.products import Summation

LARGEST_ACTIVATION = 255
LARGEST_LEVEL = 127  # of weights, either side of zero
_Number = TypeVar("_Number", np.int16, np.float64)
# Levels of one sign that a pair may sum up to: 255 * 128 = 32640 is the last multiple of 255 within 16 bits.
PAIR_LIMIT = 128


@dataclass(frozen=True)
class SumBounds:
    """The most that products of these weights with any activations can reach: [slices, outputs of a slice].

    `low`, `high`: sums of one pair. `total`: magnitude of the 32-bit sum, its correction for the zero point included.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    total: NDArray[np.int64]

    @property
    def saturates(self) -> NDArray[np.bool_]:
        """Which outputs can leave 16 bits."""
        limits = np.iinfo(np.int16)
        return np.asarray((self.low < limits.min) | (self.high > limits.max))


def bounds(levels: NDArray[np.int8], summation: Summation) -> SumBounds:
    """The bounds of int8 weights. `low` and `high` are attained by some activations."""
    low, high, total = [], [], []
    for _, index in summation.chunks(levels.shape):
        part = summation.pairs(levels[index]).astype(np.int16)
        pairs = part.reshape(len(part), -1, summation.pair_count(levels.shape), 2)
        # A sum over an axis of two takes ten times as long as adding its halves.
        low.append(_sum_of_pairs(np.minimum(pairs, 0)).min(axis=2, initial=0))
        high.append(_sum_of_pairs(np.maximum(pairs, 0)).max(axis=2, initial=0))
        # x * w, and zero_point * sum(w)
        total.append(2 * np.abs(pairs).sum(axis=(2, 3), dtype=np.int64))
    return SumBounds(*(LARGEST_ACTIVATION * np.concatenate(parts).astype(np.int64) for parts in (low, high, total)))


def _sum_of_pairs(pairs: NDArray[_Number]) -> NDArray[_Number]:
    """Over the last axis, which is two long."""
    total: NDArray[_Number] = pairs[..., 0] + pairs[..., 1]
    return total


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
        sums = np.maximum(_sum_of_pairs(np.maximum(pairs, 0)), -_sum_of_pairs(np.minimum(pairs, 0)))
        sums = -np.sort(-sums, axis=1)
        terms = np.count_nonzero(pairs, axis=(1, 2))[:, None]  # zeros are exact at any scale
        moved = np.arange(1, sums.shape[1] + 1)
        candidates = PAIR_LIMIT * np.cumsum(sums, axis=1) / (terms / 6 + PAIR_LIMIT**2 * moved)
        scale[part] = candidates.max(axis=1, initial=0.0)
    return scale


def within_limit(
    levels: NDArray[np.int8], scale: NDArray[np.float32], weight: NDArray[np.float32], summation: Summation
) -> NDArray[np.int8]:
    """Levels of `weight` in which each pair that saturates has moved to the nearest that does not.

    `scale`: one number, or [slices].
    """
    values = levels.copy()
    scale = np.broadcast_to(scale.reshape(-1), summation.slices(values.shape))
    for part, index in summation.chunks(values.shape):
        pairs = summation.pairs(values[index]).astype(np.int16)
        beyond = (_sum_of_pairs(np.abs(pairs)) > PAIR_LIMIT) & (pairs[..., 0] * pairs[..., 1] > 0)
        if not beyond.any():
            continue
        aim = np.abs(summation.pairs(weight[index])[beyond]) / scale[part][np.nonzero(beyond)[0], None]
        first = np.rint((PAIR_LIMIT + aim[:, 0] - aim[:, 1]) / 2)
        first = np.clip(first, PAIR_LIMIT - LARGEST_LEVEL, LARGEST_LEVEL)
        pairs[beyond] = np.sign(pairs[beyond]) * np.stack([first, PAIR_LIMIT - first], axis=1).astype(np.int16)
        values[index] = summation.restore(pairs, values[index].shape)
    return values
