"""cer and wer of what a CTC network reads: edits over the length of the labels, in characters and in words.

Outputs are scores [N, T, C] or [T, N, C], [T, C] for one sample; the best class at each step, repetitions and blanks
left out, is the text. Labels are class indices [N, L], filled up with -1.

`labels_blank`, one number beside the labels, is the blank's class. Without it the blank is class 0, or the last one
where labels hold a 0. `labels_space` is the class of the space between words, which wer needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array
from modelpress_compression.measure.metrics.base import Batch, Integers, Task

MAX_LENGTH = 10_000  # steps; the time for an edit distance grows with its square


@dataclass
class EditRate:
    """`samples_axis` of the output; None: it has none. `space` None: characters are counted, not words."""

    output: str
    samples_axis: int | None
    blank: int
    space: int | None
    edits: int = 0
    length: int = 0

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        output = batch.outputs[self.output]
        lines = output[None] if self.samples_axis is None else np.moveaxis(output, self.samples_axis, 0)
        for scores, labels in zip(lines, batch.labels, strict=True):
            _check_length(len(scores))
            read = self._units(greedy(scores, self.blank))
            wanted = self._units([int(label) for label in labels if label >= 0])
            self.edits += edit_distance(read, wanted)
            self.length += len(wanted)

    def value(self) -> float | None:
        """As `Meter`."""
        return self.edits / self.length if self.length else None

    def _units(self, classes: Sequence[int]) -> Sequence[object]:
        if self.space is None:
            return classes
        return [tuple(word) for is_space, word in groupby(classes, lambda each: each == self.space) if not is_space]


def error_rate(task: Task) -> EditRate:
    """The meter of cer or wer for a model and its labels. Raises InvalidDataError."""
    labels = task.labels
    place = next(_places(task), None)
    if place is None or labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise task.misfit(
            "Give class indices [N, L], filled up with -1, for an output of CTC scores [N, T, C] or [T, N, C]."
        )
    name, axis = place
    classes = task.outputs[name].shape[-1]
    _check_length(max(labels.shape[1], task.outputs[name].shape[0 if axis in (None, 1) else 1]))
    if int(labels.max()) >= classes:
        raise InvalidDataError(
            f"The evaluation data: label {int(labels.max())} does not fit output {name!r}, whose {classes} classes are "
            f"0 to {classes - 1}."
        )
    return EditRate(name, axis, _blank(task, classes), _space(task, classes))


def greedy(scores: Array, blank: int) -> list[int]:
    """The best class of each step of [T, C], repetitions and blanks left out. A step with NaN is a blank."""
    best = scores.argmax(axis=-1)
    if scores.dtype.kind == "f":
        best = np.where(np.isnan(scores).any(axis=-1), blank, best)
    return [int(each) for each, _ in groupby(best.tolist()) if each != blank]


def edit_distance(read: Sequence[object], wanted: Sequence[object]) -> int:
    """How many insertions, deletions and replacements turn one into the other (Levenshtein), by rows."""
    numbers: dict[object, int] = {}
    first, second = ([numbers.setdefault(each, len(numbers)) for each in text] for text in (read, wanted))
    target = np.asarray(second, np.int64)
    places = np.arange(len(target) + 1)
    row: Integers = places.copy()
    for count, each in enumerate(first, start=1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (target != each))])
        # An insertion costs one for each place to the right: the least that any place to the left leads to.
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def _places(task: Task) -> Iterator[tuple[str, int | None]]:
    """Outputs that may be CTC scores, with the axis of their samples."""
    for name, array in task.outputs.items():
        if array.dtype.kind not in "iuf" or array.shape[-1:] == () or array.shape[-1] < 2:
            continue
        if array.ndim == 3 and task.count in array.shape[:2]:
            # Of two axes of this extent the first.
            yield name, 0 if array.shape[0] == task.count else 1
        elif array.ndim == 2 and task.count == 1:
            yield name, None


def _blank(task: Task, classes: int) -> int:
    given = _setting(task, "labels_blank", classes)
    if given is None:
        return classes - 1 if bool((task.labels == 0).any()) else 0
    if bool((task.labels == given).any()):
        raise InvalidDataError(f"The evaluation data: labels hold {given}, which 'labels_blank' says is the blank.")
    return given


def _space(task: Task, classes: int) -> int | None:
    if task.metric != "wer":
        return None
    given = _setting(task, "labels_space", classes)
    if given is None:
        raise InvalidDataError(
            "The evaluation data: wer needs an array 'labels_space', one number: the class of the space between words."
        )
    return given


def _setting(task: Task, name: str, classes: int) -> int | None:
    value = task.data.settings.get(name)
    if value is not None and not 0 <= value < classes:
        raise InvalidDataError(f"The evaluation data: {name!r} is {value}, but the classes are 0 to {classes - 1}.")
    return value


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise InvalidDataError(
            f"The evaluation data: a text of {length} steps or labels is more than cer and wer take ({MAX_LENGTH}). "
            f"Give shorter pieces."
        )
