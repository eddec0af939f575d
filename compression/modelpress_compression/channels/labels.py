"""Labels: a number for every index of every axis that may be cut, and which of them stand or fall together.

Labels are made in runs (`fresh`), tied pairwise (`unify`) and frozen, all as arrays. `solve` computes the classes of
tied labels: larger roots are hooked under smaller ones and paths are halved, for all pairs at once, so that the time is
a small multiple of the number of labels and ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# Labels of one axis, one for each index; None: a plain axis (batch, time, space) that is never cut.
AxisLabels = Ints | None
# Those of all axes of a value.
ValueLabels = tuple[AxisLabels, ...]

NOT_FROZEN = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Reason:
    """Why labels are frozen: at which node (its label), and one sentence."""

    node: str
    text: str


@dataclass(frozen=True)
class Classes:
    """`root`: the smallest label of each label's class. `reason`: by label, the number of the first reason why its
    class is frozen, or NOT_FROZEN."""

    root: Ints
    reason: Ints

    def free(self, labels: Ints) -> NDArray[np.bool_]:
        """Which of the labels may be cut."""
        mask: NDArray[np.bool_] = self.reason[labels] == NOT_FROZEN
        return mask

    def count_free(self, labels: Ints) -> int:
        """How many different classes that may be cut the labels belong to."""
        return int(np.unique(self.root[labels][self.free(labels)]).size)


class Labels:
    """All labels of one model."""

    def __init__(self) -> None:
        self._count = 0
        self._root: Ints = np.zeros(0, np.int64)
        self._ties: list[tuple[Ints, Ints]] = []
        self._frozen: list[tuple[Ints, int]] = []
        self.reasons: list[Reason] = []

    def fresh(self, count: int) -> Ints:
        """New labels, tied to nothing."""
        start, self._count = self._count, self._count + count
        return np.arange(start, self._count, dtype=np.int64)

    def unify(self, one: Ints, other: Ints) -> None:
        """Ties labels pairwise; both have the same length."""
        if one.shape != other.shape:
            raise ValueError(f"labels of {one.shape} cannot be tied to labels of {other.shape}")
        if one is not other and one.size:
            self._ties.append((one, other))

    def freeze(self, labels: Ints, node: str, text: str) -> None:
        """These labels, and all that are tied to them, are not cut."""
        if not labels.size:
            return
        if not self.reasons or (self.reasons[-1].node, self.reasons[-1].text) != (node, text):
            self.reasons.append(Reason(node, text))
        self._frozen.append((labels, len(self.reasons) - 1))

    def solve(self) -> Classes:
        """The classes by all ties so far."""
        self._root = np.concatenate([self._root, np.arange(self._root.size, self._count, dtype=np.int64)])
        if self._ties:
            one = np.concatenate([tie[0] for tie in self._ties])
            other = np.concatenate([tie[1] for tie in self._ties])
            self._ties = []
            self._root = _hook(self._root, one, other)
        by_root = np.full(self._count, NOT_FROZEN, np.int64)
        if self._frozen:
            labels = np.concatenate([entry[0] for entry in self._frozen])
            reasons = np.repeat([entry[1] for entry in self._frozen], [entry[0].size for entry in self._frozen])
            np.minimum.at(by_root, self._root[labels], reasons)
        return Classes(self._root, by_root[self._root])


def _hook(root: Ints, one: Ints, other: Ints) -> Ints:
    """Roots after further ties; `root` points at roots directly, and so does the result."""
    while True:
        left, right = root[one], root[other]
        apart = left != right
        if not apart.any():
            return root
        one, other, left, right = one[apart], other[apart], left[apart], right[apart]
        root = root.copy()
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped
