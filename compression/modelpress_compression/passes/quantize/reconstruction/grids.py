"""From the scales that a scheme chose to levels that were learned for them.

`GridRecorder` rounds as another rounder does and notes the grid of every weight while a scheme writes a model that no
one keeps. `LearnedRounder` then gives the levels that were learned, wherever the same weight meets the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.passes.quantize.rounding.rounder import Numbers, Rounder, Rounding, weight_name

Levels = NDArray[np.int16]


@dataclass(frozen=True)
class Grid:
    """The numbers of a weight, `scale`, `low` and `high` that broadcast against them, and the `levels` that it has."""

    weight: NDArray[np.float32]
    scale: NDArray[np.float32]
    low: Levels
    high: Levels
    levels: Levels

    def real(self, levels: Levels) -> NDArray[np.float32]:
        """The weight that these levels stand for."""
        return levels.astype(np.float32) * self.scale

    def equals(self, scale: Numbers, low: Numbers, high: Numbers) -> bool:
        """Whether it is the grid of these scales and bounds."""
        pairs = ((self.scale, scale), (self.low, low), (self.high, high))
        return all(mine.shape == theirs.shape and np.array_equal(mine, theirs) for mine, theirs in pairs)


class GridRecorder:
    """Rounds as `base` does. `grids`: by the weight's name, one for each grid that it met."""

    def __init__(self, base: Rounder) -> None:
        self._base = base
        self.grids: dict[str, list[Grid]] = {}

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        rounding, name = self._base.rounding(node), weight_name(node)

        def recorded(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
            levels = rounding(weight, scale, low, high)
            grid = Grid(
                np.asarray(weight, np.float32),
                np.asarray(scale, np.float32),
                np.asarray(low, np.int16),
                np.asarray(high, np.int16),
                levels.astype(np.int16),
            )
            known = self.grids.setdefault(name, [])
            if not any(other.equals(scale, low, high) for other in known):
                known.append(grid)
            return levels

        return recorded


class LearnedRounder:
    """`learned`: by the weight's name, a grid and the levels on it. All others are rounded by `base`."""

    def __init__(self, base: Rounder, learned: Mapping[str, tuple[Grid, Levels]]) -> None:
        self._base, self._learned = base, learned

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """What was learned, where the grid is the one that it was learned for."""
        found = self._learned.get(weight_name(node))
        if found is None:
            return self._base.rounding(node)
        grid, learned = found

        def rounding(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
            if weight.shape == learned.shape and grid.equals(np.asarray(scale), np.asarray(low), np.asarray(high)):
                return learned.astype(np.float32)
            return self._base.rounding(node)(weight, scale, low, high)

        return rounding
