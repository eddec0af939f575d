"""The arithmetic of 8 bits, and of weights in 4: `real = scale * (integer - zero_point)`.

Activations are asymmetric over the observed range, widened to hold zero, so that padding and ReLU are exact. Weights
are symmetric: their zero point is the middle of the type, per tensor or per slice of one axis. onnxruntime's
convolution takes only one zero point for all channels, and a constant middle costs half a bit of range at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.encodings.weight import QuantizedWeight
from modelpress_compression.passes.integers.saturation import LARGEST_LEVEL
from modelpress_compression.passes.quantize.rounding.rounder import Rounding, nearest

# Smallest scale: below it 1 / scale is no longer a normal float32 with some room.
MIN_SCALE = 1e-30
_LEVELS = 255
_LARGEST_INT8 = 127
LARGEST_4_BIT_LEVEL = 7
_BLOCK_NUMBERS = 1 << 20  # 4 MiB of float32
_CUTS = tuple(percent / 100 for percent in range(100, 45, -5))


class Range(NamedTuple):
    """The values that shall be represented; what lies outside is clipped."""

    low: float
    high: float


@dataclass(frozen=True)
class ActivationParameters:
    """Scale and zero point of one tensor, `dtype` uint8 or int8."""

    scale: np.float32
    zero_point: int
    dtype: np.dtype[np.generic]

    def fake_quantize(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is left of `values` after a round trip through 8 bits."""
        smallest = _smallest(self.dtype)
        levels = np.clip(np.rint(values / self.scale) + self.zero_point, smallest, smallest + _LEVELS)
        return np.asarray((levels - self.zero_point) * self.scale, np.float32)

    @property
    def symmetric(self) -> ActivationParameters:
        """Those of int8 without a zero point whose range holds this one: up to half of the levels go unused."""
        smallest = _smallest(self.dtype) - self.zero_point
        largest = max(-smallest, smallest + _LEVELS) / _LARGEST_INT8
        return ActivationParameters(np.float32(self.scale * largest), 0, np.dtype(np.int8))


def activation_parameters(value_range: Range, dtype: str) -> ActivationParameters:
    """Parameters whose range holds `value_range` and zero; a range of nothing but zero gets scale 1."""
    kind = np.dtype(dtype)
    low, high = min(value_range.low, 0.0), max(value_range.high, 0.0)
    smallest = _smallest(kind)
    if not high > low:
        return ActivationParameters(np.float32(1), smallest, kind)
    scale = np.float32(max((high - low) / _LEVELS, MIN_SCALE))
    zero_point = int(np.clip(np.rint(smallest - low / float(scale)), smallest, smallest + _LEVELS))
    return ActivationParameters(scale, zero_point, kind)


def quantize_weight(
    weight: NDArray[np.float32],
    axis: int | None,
    dtype: str,
    least_scale: NDArray[np.float64] | None = None,
    rounding: Rounding = nearest,
) -> QuantizedWeight:
    """Symmetric, with one zero point for all slices of the axis: 8 bits to the largest magnitude, 4 bits (`int4`) to
    the share of it that errs least.

    `least_scale`: a lower bound, per slice, that a bias may ask for.
    """
    bits = 4 if dtype == "int4" else 8
    kind, largest_level = (np.dtype(np.int8), LARGEST_4_BIT_LEVEL) if bits == 4 else (np.dtype(dtype), LARGEST_LEVEL)
    middle = 128 if kind == np.uint8 else 0
    others = tuple(other for other in range(weight.ndim) if other != axis) if axis is not None else None
    largest = np.maximum(weight.max(axis=others), -weight.min(axis=others)).astype(np.float64)
    scale = np.where(largest > 0, largest / largest_level, 1.0)
    if bits == 4:
        scale = scale * _best_cut(weight, scale, others)
    if least_scale is not None:
        bound = least_scale if axis is not None else least_scale.max(initial=0.0)
        scale = np.maximum(scale, bound)
    scale = np.maximum(scale, MIN_SCALE).astype(np.float32)
    divisor = _along(scale, axis, weight.ndim)
    limits = np.asarray(-float(largest_level)), np.asarray(float(largest_level))
    levels = np.empty(weight.shape, kind)
    # Other ways of rounding look at the whole weight.
    for rows in _blocks(weight) if rounding is nearest else (slice(None),):
        levels[rows] = rounding(weight[rows], _rows_of(divisor, rows), *limits) + middle
    return QuantizedWeight(levels, np.asarray(scale), np.asarray(middle, kind), axis, bits=bits)


def _best_cut(weight: NDArray[np.float32], scale: NDArray[np.float64], others: tuple[int, ...] | None) -> Any:
    """The share of each slice's extent that is represented, the rest being clipped, with the least squared error."""
    best, least = np.ones_like(scale), np.full_like(scale, np.inf)
    axis = None if others is None else next(a for a in range(weight.ndim) if a not in others)
    for cut in _CUTS:
        step = _along(np.maximum(scale * cut, MIN_SCALE), axis, weight.ndim).astype(np.float32)
        bound = np.asarray(float(LARGEST_4_BIT_LEVEL))
        error = np.zeros_like(scale)
        for rows in _blocks(weight):
            own = _rows_of(step, rows)
            lost = np.square(nearest(weight[rows], own, -bound, bound) * own - weight[rows])
            error[rows if axis == 0 else ...] += lost.sum(axis=others, dtype=np.float64)
        best, least = np.where(error < least, cut, best), np.minimum(error, least)
    return best


def _blocks(weight: NDArray[Any]) -> Iterator[slice]:
    """Rows of a weight, so many at a time that what is computed of them stays small: an embedding table may be nearly
    the whole of a large model."""
    step = max(1, _BLOCK_NUMBERS * len(weight) // max(1, weight.size))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _rows_of(scale: NDArray[Any], rows: slice) -> NDArray[Any]:
    """Of scales that broadcast against a weight those of some of its rows."""
    return scale[rows] if scale.ndim and scale.shape[0] > 1 else scale


def _along(scale: NDArray[Any], axis: int | None, rank: int) -> NDArray[Any]:
    """Scales so that they broadcast against a weight of this rank."""
    return np.asarray(scale if axis is None else scale.reshape([-1 if a == axis else 1 for a in range(rank)]))


def _smallest(dtype: np.dtype[np.generic]) -> int:
    return -128 if dtype == np.int8 else 0
