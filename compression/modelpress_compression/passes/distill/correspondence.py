"""Which of the teacher's channels a student's channels stand for, where channels were cut.

A cut keeps the order of what stays, so that the student's channels are a rising selection of the teacher's. Of all such
selections that of the largest sum of correlations is taken, by dynamic programming over (student, teacher) channels:

    best[i, j] = max(best[i, j - 1], best[i - 1, j - 1] + correlation[i, j])

Correlations are those of the activations on some samples, so that nothing needs to be known about how the cut was made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.inputs import Array

# Below this mean correlation the channels cannot be told from each other.
LEAST_CORRELATION = 0.4
_MAX_POSITIONS = 4096
Indices = NDArray[np.int64]


def cut_axis(student: tuple[int, ...], teacher: tuple[int, ...]) -> int | None:
    """The one axis on which the student's value has fewer channels; None where the shapes tell of something else."""
    if len(student) != len(teacher):
        return None
    different = [axis for axis, pair in enumerate(zip(student, teacher, strict=True)) if pair[0] != pair[1]]
    if len(different) != 1 or different[0] == 0 or student[different[0]] > teacher[different[0]]:
        return None
    return different[0]


def corresponding(student: Sequence[Array], teacher: Sequence[Array], axis: int) -> Indices | None:
    """For each of the student's channels along `axis` the index of the teacher's, rising; None where they do not
    correlate. The values are those of the same feeds."""
    mine, theirs = (
        np.concatenate([_channels(array, axis) for array in arrays], axis=1) for arrays in (student, teacher)
    )
    correlation = _normalized(mine) @ _normalized(theirs).T
    selection = rising_selection(correlation)
    mean = float(correlation[np.arange(len(selection)), selection].mean())
    return selection if mean >= LEAST_CORRELATION else None


def rising_selection(gain: NDArray[np.float64]) -> Indices:
    """Columns j(0) < j(1) < ... of the largest sum of gain[i, j(i)]; `gain` is [rows, columns], rows <= columns."""
    rows, columns = gain.shape
    best = np.zeros(columns + 1)
    taken = np.empty((rows, columns), np.bool_)
    for row in range(rows):
        candidates = best[:-1] + gain[row]
        candidates[:row] = -np.inf  # so many columns are needed by the rows before
        running = np.maximum.accumulate(candidates)
        taken[row] = candidates == running
        best = np.concatenate([[-np.inf], running])
    selection = np.empty(rows, np.int64)
    end = columns
    for row in reversed(range(rows)):
        # The last column up to here at which the running best was reached anew.
        end = int(np.flatnonzero(taken[row, :end])[-1])
        selection[row] = end
    return selection


def _channels(array: Array, axis: int) -> NDArray[np.float64]:
    """[channels, positions], with no more positions than it takes."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    step = max(1, rows.shape[1] // _MAX_POSITIONS)
    return rows[:, ::step].astype(np.float64)


def _normalized(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = np.nan_to_num(rows - rows.mean(axis=1, keepdims=True))
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(norms > 0, norms, 1))
