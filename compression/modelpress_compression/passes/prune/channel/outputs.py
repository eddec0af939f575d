"""How near a model's outputs are to those of another, over samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.padding import without_padding
from modelpress_compression.inputs import Array

# A channel that varies by less than this share of its energy is constant but for rounding.
_NOTHING = 1e-12
# With fewer, a variance says nothing: the error is then a share of the energy.
_LEAST_ROWS = 8


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
