"""Samples, one at a time, through the uncut and the cut model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

MAX_KEPT_BYTES = 512 * 1024**2  # 512 MiB of activations, of each of the two models
HELD_OUT = 5  # every fifth sample; of fewer than ten every fourth, third or second


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
    """Both models side by side. `names_full`, `names_cut`: what will be asked for, as often as it will be."""

    def __init__(
        self,
        full: Model,
        cut: Model,
        samples: InputData,
        names_full: Sequence[str],
        names_cut: Sequence[str],
        context: Context,
    ) -> None:
        self._samples = samples
        self.count = len(samples) // (samples.fixed_batch or 1)
        self._full, self._cut = (
            Wavefront(model, samples, names, MAX_KEPT_BYTES, context.check_time)
            for model, names in ((full, names_full), (cut, names_cut))
        )

    def advance(self, names_full: Sequence[str], names_cut: Sequence[str]) -> Iterator[Sample]:
        """Every sample; to be exhausted. Raises ModelNotRunnableError, TimeLimitError."""
        full, cut = self._full.advance(names_full), self._cut.advance(names_cut)
        for index, (feed, wanted, given) in enumerate(zip(self._samples.feeds(1), full, cut, strict=True)):
            yield Sample(index, is_held_out(index, self.count), wanted, given, counted_positions(feed))


def is_held_out(index: int, count: int) -> bool:
    """Whether this one of `count` samples says how good the fits are, and is not fitted to."""
    period = max(2, min(HELD_OUT, count // 2))
    return index % period == period - 1
