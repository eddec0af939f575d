"""The k smallest of many scores that never lie in memory together, exactly.

Scores are non-negative float32 numbers, whose bit patterns order like the numbers themselves. A histogram over the
upper 16 bits, then one over the lower 16 bits inside of the bin where the k-th smallest lies, give its exact value in
two passes and 512 KiB; scores equal to it are taken in order until k are reached (a radix selection). So the share is
exact, and zeros, which are smallest, go first: pruning twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

_Key = Callable[[NDArray[np.uint32]], NDArray[np.integer[Any]]]

_BINS = 1 << 16
_CHUNK = 1 << 20  # elements that are looked at together


@dataclass
class Selector:
    """Takes scores below `threshold`, and as many that equal it as are left in `ties`; call in the same order."""

    threshold: int
    ties: int

    def take(self, scores: Scores) -> Mask:
        """The mask of what is selected, of the same shape."""
        bits = _bits(scores)
        chosen: Mask = bits < self.threshold
        equal = np.flatnonzero(bits == self.threshold)[: self.ties]
        chosen[equal] = True
        self.ties -= len(equal)
        return chosen.reshape(scores.shape)


def smallest(k: int, scores: Callable[[], Iterable[Scores]]) -> Selector:
    """A selector of the k smallest; `scores` starts a fresh pass, and is called twice."""
    if k <= 0:
        return Selector(threshold=0, ties=0)
    upper = _histogram(scores(), lambda bits: bits >> 16)
    high, below = _bin_of(upper, k)
    lower = _histogram(scores(), lambda bits: bits[(bits >> 16) == high] & 0xFFFF)
    low, below_low = _bin_of(lower, k - below)
    return Selector(threshold=(high << 16) | low, ties=k - below - below_low)


def _bits(scores: Scores) -> NDArray[np.uint32]:
    return np.ascontiguousarray(scores, dtype=np.float32).reshape(-1).view(np.uint32)


def _histogram(passes: Iterable[Scores], key: _Key) -> NDArray[np.int64]:
    counts = np.zeros(_BINS, np.int64)
    for scores in passes:
        bits = _bits(scores)
        for start in range(0, bits.size, _CHUNK):
            counts += np.bincount(key(bits[start : start + _CHUNK]), minlength=_BINS)
    return counts


def _bin_of(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest, and how many lie in the bins below it."""
    totals = np.cumsum(counts)
    index = int(np.searchsorted(totals, k))
    return index, int(totals[index] - counts[index])
