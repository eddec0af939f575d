"""What calibration remembers of a tensor: a histogram, and the range that each method takes from it.

The bins lie over [-R, R) with R a power of two that doubles when a value falls outside; doubling merges bins in pairs.
Scaling by a power of two is exact in floating point, so the histogram equals the one that a single look at all the data
would have given, whatever the order of the samples. Each sample's activations are counted and let go: memory holds the
model, the activations of one sample or a portion of them, and the histograms (64 KiB an activation), however many
samples there are.

- minmax: the smallest and the largest value.
- percentile: cuts the outermost `1 - PERCENTILE / 100` of the values on either side.
- moving_average: the mean over samples of each sample's extremes, exponentially weighted (Jacob et al.,
  arXiv:1712.05877): one odd sample does not stretch the range for all.
- mse: the range of the least expected squared error, rounding inside and clipping outside.
- entropy: the clipping threshold whose quantized distribution is nearest to the observed one in Kullback-Leibler
  divergence (Migacz, "8-bit inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.watch import Listener, stream
from modelpress_compression.graph.watch.portions import portions
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.rounding.affine import Range

# Ranges settle within some tens of samples on the models tried; more only takes time.
MAX_SAMPLES = 256
BINS = 8192
_HALF = BINS // 2
_CHUNK = 1 << 20  # elements: bounds the temporary arrays
_LARGE = 2.0**100
# On PP-OCR, EfficientNet-Lite and a ResNet the best mean of 99.99, 99.999, 99.9999 and 100: 99.99 costs PP-OCR 5 dB.
PERCENTILE = 99.999
_ENTROPY_STEP = 32  # bins between two thresholds that are tried
_TINY = 1e-9
_MOMENTUM = 0.9  # of the moving average
_LEVELS = 255
# Shares of the extremes that the search of mse goes through.
_SHARES = np.linspace(0.1, 1.0, 46)


class Histogram:
    """Counts of a tensor's values over all samples, with their exact extremes. Non-finite values are counted apart."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.radius = 0.0  # R; 0: nothing but zeros so far
        self.low = np.inf
        self.high = -np.inf
        self.non_finite = 0
        self.average: Range | None = None  # of the samples' extremes
        self._zeros = 0  # of the time before there was a radius

    @property
    def total(self) -> int:
        """How many finite values were seen."""
        return int(self.counts.sum()) + self._zeros

    @property
    def bin_width(self) -> float:
        return 2 * self.radius / BINS

    def observe(self, values: NDArray[np.generic]) -> None:
        """Adds an array of any shape: one sample's."""
        flat = np.asarray(values).reshape(-1)
        found = [
            self._observe_chunk(flat[start : start + _CHUNK].astype(np.float32, copy=False))
            for start in range(0, flat.size, _CHUNK)
        ]
        ranges = [item for item in found if item is not None]
        if ranges:
            self._average(Range(min(item.low for item in ranges), max(item.high for item in ranges)))

    def _average(self, sample: Range) -> None:
        old = self.average or sample
        self.average = Range(*(_MOMENTUM * a + (1 - _MOMENTUM) * b for a, b in zip(old, sample, strict=True)))

    def _observe_chunk(self, chunk: NDArray[np.float32]) -> Range | None:
        """Counts the values and returns their extremes; None: none is finite."""
        low, high = float(chunk.min()), float(chunk.max())  # NaN comes through both
        if not np.isfinite(low) or not np.isfinite(high):
            finite = chunk[np.isfinite(chunk)]
            self.non_finite += chunk.size - finite.size
            if not finite.size:
                return None
            chunk, low, high = finite, float(finite.min()), float(finite.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if largest == 0 and not self.radius:
            self._zeros += chunk.size
            return Range(low, high)
        self._grow(float(2.0 ** np.frexp(largest)[1]) if largest else 0.0)
        factor = _HALF / self.radius
        # A power of two loses nothing in float32 where nothing gets so small that it vanishes, nor the factor infinite.
        scaled = chunk * (np.float32(factor) if 1 <= factor < _LARGE else np.float64(factor))
        index = np.floor(scaled, out=scaled).astype(np.int64)
        index += _HALF
        self.counts += np.bincount(index, minlength=BINS)
        return Range(low, high)

    def _grow(self, radius: float) -> None:
        if not self.radius:
            self.radius = radius
            self.counts[_HALF], self._zeros = self._zeros, 0
        while self.radius < radius:
            merged = self.counts.reshape(_HALF, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[_HALF // 2 : _HALF // 2 + _HALF] = merged
            self.radius *= 2


def minmax(histogram: Histogram) -> Range:
    """The extremes."""
    return Range(histogram.low, histogram.high) if histogram.total else Range(0.0, 0.0)


def moving_average(histogram: Histogram) -> Range:
    """The averaged extremes."""
    return histogram.average or Range(0.0, 0.0)


def mse(histogram: Histogram) -> Range:
    """Of the ranges between shares of the extremes, the one of the least error.

    Rounding costs `step^2 / 12` a value (zeros, which are exact, nothing), clipping the squared distance to the edge.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if not histogram.radius or not high > low:
        return minmax(histogram)
    centres = (np.arange(BINS) - _HALF + 0.5) * histogram.bin_width
    counts = histogram.counts.astype(np.float64)
    counts[_HALF] = 0.0
    # What each side loses by being cut at each share, independent of the other side.
    below = np.asarray([_clipping(counts, low * share - centres) for share in _SHARES])
    above = np.asarray([_clipping(counts, centres - high * share) for share in _SHARES])
    width = high * _SHARES[None, :] - low * _SHARES[:, None]
    error = below[:, None] + above[None, :] + counts.sum() * (width / _LEVELS) ** 2 / 12
    first, last = np.unravel_index(int(np.argmin(error)), error.shape)
    return Range(low * float(_SHARES[first]), high * float(_SHARES[last]))


def _clipping(counts: NDArray[np.float64], beyond: NDArray[np.float64]) -> float:
    return float(counts @ np.square(np.maximum(beyond, 0.0)))


def percentile(histogram: Histogram, percent: float = PERCENTILE) -> Range:
    """Outer edges of the bins that hold the two quantiles, never beyond the extremes: at most a bin too wide."""
    if not histogram.radius:
        return minmax(histogram)
    cumulative = np.cumsum(histogram.counts)
    cut = (1 - percent / 100) * cumulative[-1]
    first = int(np.searchsorted(cumulative, cut, side="right"))
    last = int(np.searchsorted(cumulative, cumulative[-1] - cut, side="left"))
    edge = histogram.bin_width
    return Range(
        max(histogram.low, (first - _HALF) * edge),
        min(histogram.high, (last + 1 - _HALF) * edge),
    )


def entropy(histogram: Histogram) -> Range:
    """Clips at the threshold of the least divergence; one-sided tensors have twice the levels on their side."""
    if not histogram.radius:
        return minmax(histogram)
    magnitudes = histogram.counts[_HALF:] + histogram.counts[:_HALF][::-1]
    # Zeros (of a ReLU, or padding) are exact at any threshold; their spike would only ever favour the smallest one.
    magnitudes[0] = magnitudes[1]
    levels = 128 if histogram.low < 0 < histogram.high else 256
    used = int(np.flatnonzero(magnitudes)[-1]) + 1 if magnitudes.any() else 1
    thresholds = [*range(levels, used, _ENTROPY_STEP), used]
    best = min(thresholds, key=lambda bins: _divergence(magnitudes, bins, levels))
    threshold = best * histogram.bin_width
    return Range(max(histogram.low, -threshold), min(histogram.high, threshold))


def _divergence(magnitudes: NDArray[np.int64], bins: int, levels: int) -> float:
    """KL divergence between the values clipped at `bins` and the same quantized to `levels` steps."""
    reference = magnitudes[:bins].astype(np.float64)
    kept = reference.copy()
    # What is clipped counts in the reference, in its last bin, and not in the levels: so clipping makes them differ.
    reference[-1] += magnitudes[bins:].sum()
    level = np.minimum(np.arange(bins) * levels // max(bins, levels), levels - 1)
    sums = np.bincount(level, weights=kept, minlength=levels)
    # Each level's count is shared by the bins that had any; empty ones stay so, as in the paper.
    filled = np.bincount(level, weights=kept > 0, minlength=levels)
    quantized = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0.0)
    p = reference / max(reference.sum(), _TINY)
    q = quantized / max(quantized.sum(), _TINY)
    mask = p > 0
    return float(np.sum(p[mask] * np.log(p[mask] / np.maximum(q[mask], _TINY))))


METHODS: Mapping[str, Callable[[Histogram], Range]] = MappingProxyType(
    {
        "minmax": minmax,
        "moving_average": moving_average,
        "percentile": percentile,
        "entropy": entropy,
        "mse": mse,
    }
)


def observe(
    model: Model, values: Sequence[onnx_ir.Value], context: Context, done: Listener | None = None
) -> dict[str, Histogram]:
    """A histogram for each of these values of the main graph, by name.

    Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError if time is up.
    """
    histograms = {value.name: Histogram() for value in values if value.name}
    names, samples = list(histograms), context.data.spread(MAX_SAMPLES)
    parts = list(portions(model, [(name,) for name in names], samples))
    for number, part in enumerate(parts):
        seen = [names[place] for place in part]
        share = None if done is None else partial(_tell, done, number, len(parts))
        for tensors in stream(model, seen, samples, context.check_time, share, padding=False):
            for name in seen:
                histograms[name].observe(tensors[name])
    return histograms


def _tell(done: Listener, part: int, parts: int, share: float) -> None:
    """The share of all parts, of one part's."""
    done((part + share) / parts)
