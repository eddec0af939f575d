"""The uncut and the cut model side by side: what both make of each sample, and how near their outputs are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.watch.portions import sample_bytes
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

MAX_KEPT_BYTES = 512 * 1024**2  # 512 MiB of activations, of each of the two models
# A channel that varies by less than this share of its energy is constant but for rounding.
_NOTHING = 1e-12
# With fewer, a variance says nothing: the error is then a share of the energy.
_LEAST_ROWS = 8


@dataclass(frozen=True)
class Sample:
    """What one sample gives: `index` of it, whether it is `held_out` from all fits, values of the `full` and of the
    `cut` model, and the `mask` [N, T] of positions that count (None: all)."""

    index: int
    held_out: bool
    full: Mapping[str, Array]
    cut: Mapping[str, Array]
    mask: NDArray[np.bool_] | None


class Paired:
    """Both models side by side. `names_full`, `names_cut`: what will be asked for, as often as it will be.

    `held_out`: numbers of the samples that no fit sees. `bytes_full`, `bytes_cut`: of these values, what one sample
    makes of each.
    """

    def __init__(
        self,
        full: Model,
        cut: Model,
        samples: InputData,
        names_full: Sequence[str],
        names_cut: Sequence[str],
        held_out: Collection[int],
        context: Context,
    ) -> None:
        self._samples = samples
        self.count = samples.feed_count
        self.bytes_full, self.bytes_cut = (
            sample_bytes(model, set(names), samples) for model, names in ((full, names_full), (cut, names_cut))
        )
        self.held_out = held_out
        self._full, self._cut = (
            Wavefront(model, samples, names, MAX_KEPT_BYTES, context.check_time)
            for model, names in ((full, names_full), (cut, names_cut))
        )

    def advance(self, names_full: Sequence[str], names_cut: Sequence[str]) -> Iterator[Sample]:
        """Every sample; to be exhausted. Raises ModelNotRunnableError, TimeLimitError."""
        full, cut = self._full.advance(names_full), self._cut.advance(names_cut)
        for index, (feed, wanted, given) in enumerate(zip(self._samples.feeds(1), full, cut, strict=True)):
            yield Sample(index, index in self.held_out, wanted, given, counted_positions(feed))


@dataclass(frozen=True)
class Distance:
    """Shares of the variance of the expected outputs, means over outputs: `error`, the squared error; `lost`, what no
    shift and scaling of each channel brings back (1 - r^2), 0 where there are too few rows to tell.

    Outputs that are compared with each other, such as embeddings, suffer from what is lost alone: an error that is the
    same for all samples does them no harm.
    """

    error: float
    lost: float


class Moments:
    """Sums by output and channel, the last axis; adds in place. Outputs that are not floating-point do not count."""

    def __init__(self) -> None:
        self._moments: dict[str, NDArray[np.float64]] = {}  # [6, channels]

    def add(self, expected: Mapping[str, Array], got: Mapping[str, Array], mask: NDArray[np.bool_] | None) -> None:
        """One sample; of sequences only the positions that the `mask` [N, T] counts."""
        for name, array in expected.items():
            if array.dtype.kind == "f" and array.size and got[name].shape == array.shape:
                moments = _moments(*(_rows(without_padding(values, mask)) for values in (array, got[name])))
                self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def distance(self) -> Distance:
        """Over all samples; infinite where outputs are not finite."""
        found = [_distance(moments) for moments in self._moments.values()]
        if not found:
            return Distance(0.0, 0.0)
        return Distance(*(float(np.mean([getattr(one, name) for one in found])) for name in ("error", "lost")))


def _moments(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so, and is seen in the end
        sums = [part.sum(axis=0) for part in (a, b, a * a, b * b, a * b)]
    return np.stack([np.full(a.shape[1], float(len(a))), *sums])


def _distance(moments: NDArray[np.float64]) -> Distance:
    """Of one output."""
    if not np.isfinite(moments).all():
        return Distance(np.inf, np.inf)
    count, a, b, aa, bb, ab = moments
    spread, other, both = aa - a * a / count, bb - b * b / count, ab - a * b / count
    total = float(spread.sum())
    error = float((aa - 2 * ab + bb).sum())
    if count[0] < _LEAST_ROWS or total <= 0:
        return Distance(error / max(float(aa.sum()), np.finfo(np.float64).tiny), 0.0)
    told = np.divide(np.square(both), other, out=np.zeros_like(other), where=other > _NOTHING * bb)
    return Distance(error / total, float((spread - told).sum()) / total)


def _rows(values: Array) -> NDArray[np.float64]:
    return values.reshape(-1, values.shape[-1] if values.ndim else 1).astype(np.float64)
