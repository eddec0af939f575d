"""How near a model's outputs are to those of another, over samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.inputs import Array


class OutputErrors:
    """Sums, output by output; adds in place. Outputs that are not floating-point do not count."""

    def __init__(self) -> None:
        self._errors: dict[str, float] = {}
        self._moments: dict[str, NDArray[np.float64]] = {}  # count, sum, sum of squares

    def add(
        self, expected: Mapping[str, Array], got: Mapping[str, Array], positions: NDArray[np.bool_] | None
    ) -> None:
        """One sample; of an output [positions, ...] only the `positions` that count."""
        for name, array in expected.items():
            if array.dtype.kind != "f" or got[name].shape != array.shape:
                continue
            one, other = (_counting(values, positions).astype(np.float64) for values in (array, got[name]))
            self._errors[name] = self._errors.get(name, 0.0) + float(np.square(one - other).sum())
            moments = np.array([one.size, one.sum(), np.square(one).sum()])
            self._moments[name] = self._moments.get(name, np.zeros(3)) + moments

    def relative(self) -> float:
        """The mean over outputs of the squared error as a share of the variance; infinite where not finite."""
        shares = []
        for name, error in self._errors.items():
            count, total, squares = self._moments[name]
            spread = squares - total * total / max(1.0, count)
            if spread > 0:
                shares.append(error / spread)
        mean = float(np.mean(shares)) if shares else 0.0
        return mean if np.isfinite(mean) else np.inf


def _counting(values: Array, positions: NDArray[np.bool_] | None) -> Array:
    if positions is None or values.size == 0 or values.ndim < 2 or values.size // values.shape[-1] != positions.size:
        return values
    return values.reshape(positions.size, -1)[positions]
