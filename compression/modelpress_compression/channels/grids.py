"""Grids: an axis that a Reshape splits into, or merges from, several factors.

    whole [n] = factor 0 [a] x factor 1 [b] x ...       index i * b + j belongs to i of factor 0 and j of factor 1

After a cut the whole must still be a full grid, so one factor alone can be cut; the others are frozen. Heads of an
attention (outer factor; the inner one is frozen by the product of queries and keys), channels of a channel shuffle,
groups of a convolution are all chosen this way: first where one factor is left, then the one that other grids have
chosen already, then the one with the most units, the outer one first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpress_compression.channels.labels import AxisLabels, Classes, Ints, Labels


@dataclass(frozen=True)
class Grid:
    """`factors`: labels, or None with the extent in `extents` for a plain factor. `node`: where it arose."""

    whole: Ints
    factors: tuple[AxisLabels, ...]
    extents: tuple[int, ...]
    node: str

    def along(self, factor: int) -> Ints:
        """Labels of the whole as [extent of the factor, rest]."""
        moved = np.moveaxis(self.whole.reshape(self.extents), factor, 0)
        return np.ascontiguousarray(moved).reshape(self.extents[factor], -1)


class Resolution:
    """Chooses a factor for each grid until nothing is open. `chosen` holds the labels of chosen factors."""

    def __init__(self, labels: Labels, grids: list[Grid]) -> None:
        self._labels = labels
        self._open = list(grids)
        self._chosen: list[Ints] = []

    def run(self) -> Classes:
        """The classes once all grids are resolved."""
        while True:
            classes = self._labels.solve()
            if not self._open:
                return classes
            if not (self._forced(classes) or self._following(classes)):
                self._free(classes)

    def _forced(self, classes: Classes) -> bool:
        """Grids with one factor left, or none."""
        before, remaining = len(self._open), []
        for grid in self._open:
            candidates = _candidates(grid, classes)
            if not candidates:
                self._freeze(grid)
            elif len(candidates) == 1:
                self._choose(grid, candidates[0])
            else:
                remaining.append(grid)
        self._open = remaining
        return len(remaining) < before

    def _following(self, classes: Classes) -> bool:
        """Grids with exactly one factor that another grid has chosen."""
        if not self._chosen:
            return False
        roots = np.unique(classes.root[np.concatenate(self._chosen)])
        before, remaining = len(self._open), []
        for grid in self._open:
            taken = [f for f in _candidates(grid, classes) if np.isin(classes.root[_labels_of(grid, f)], roots).any()]
            if len(taken) == 1:
                self._choose(grid, taken[0])
            else:
                remaining.append(grid)
        self._open = remaining
        return len(remaining) < before

    def _free(self, classes: Classes) -> None:
        """The first open grid, by the number of units that each choice leaves."""
        grid = self._open.pop(0)
        units = {factor: _units(grid, factor, classes) for factor in _candidates(grid, classes)}
        best = max(units, key=lambda factor: units[factor])
        self._choose(grid, best)

    def _choose(self, grid: Grid, chosen: int) -> None:
        for factor, labels in enumerate(grid.factors):
            if labels is not None and factor != chosen:
                self._labels.freeze(
                    labels, grid.node, "Another factor of the axis that is split or merged here is cut."
                )
        labels = _labels_of(grid, chosen)
        rows = grid.along(chosen)
        self._labels.unify(rows.reshape(-1), np.repeat(labels, rows.shape[1]))
        self._chosen.append(labels)

    def _freeze(self, grid: Grid) -> None:
        reason = "The axis is split or merged here, and none of its factors can be cut."
        for labels in (grid.whole, *grid.factors):
            if labels is not None:
                self._labels.freeze(labels, grid.node, reason)


def _labels_of(grid: Grid, factor: int) -> Ints:
    labels = grid.factors[factor]
    if labels is None:
        raise ValueError("a plain factor has no labels")
    return labels


def _candidates(grid: Grid, classes: Classes) -> list[int]:
    """Factors of which a part can be cut; none when the whole is frozen."""
    if classes.count_free(grid.whole) < 2:
        return []
    return [
        factor
        for factor, labels in enumerate(grid.factors)
        if labels is not None and classes.count_free(labels) >= 2 and _units(grid, factor, classes) >= 2
    ]


def _units(grid: Grid, factor: int, classes: Classes) -> int:
    """How many free classes the factor has once the whole is tied to it."""
    rows = classes.root[grid.along(factor)]
    own = classes.root[_labels_of(grid, factor)]
    every, numbers = np.unique(np.concatenate([rows.reshape(-1), own]), return_inverse=True)
    trial = Labels()
    trial.fresh(every.size)
    numbers = numbers.reshape(-1).astype(np.int64)
    tied, mine = numbers[: rows.size].reshape(rows.shape), numbers[rows.size :]
    trial.unify(tied.reshape(-1), np.repeat(mine, rows.shape[1]))
    trial.freeze(np.flatnonzero(~classes.free(every)), "", "")
    return trial.solve().count_free(mine)
