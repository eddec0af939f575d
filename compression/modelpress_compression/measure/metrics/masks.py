"""iou: intersection over union of masks, the mean over the classes that occur in labels or answers.

Outputs are scores [N, C, H, W], class indices [N, H, W] or [N, 1, H, W], or one channel [N, 1, H, W] of probabilities
or logits of class 1; labels are class indices [N, H, W], of which negative ones are left out. One channel is taken for
probabilities (from 0.5 on) if all that it ever holds lies between 0 and 1, else for logits (from 0 on).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array
from modelpress_compression.measure.metrics.base import Batch, Integers, Task, squeezed, whole_numbers

MAX_CLASSES = 65_536


@dataclass
class _Areas:
    """Counts of pixels by class."""

    both: Integers
    answered: Integers
    labelled: Integers

    def add(self, found: Integers, labels: Integers) -> None:
        size = len(self.both)
        self.both += np.bincount(found[found == labels], minlength=size)[:size]
        self.answered += np.bincount(found, minlength=size)[:size]
        self.labelled += np.bincount(labels, minlength=size)[:size]

    def mean(self) -> float | None:
        if not self.labelled.any():
            return None
        union = self.answered + self.labelled - self.both
        return float(np.mean(self.both[union > 0] / union[union > 0]))


def _areas(classes: int) -> _Areas:
    return _Areas(*(np.zeros(classes, np.int64) for _ in range(3)))


@dataclass
class MeanIou:
    """`classes`: how many there may be. `kind`: "scores" on axis 1, "classes", or "channel", which is one number."""

    output: str
    kind: str
    classes: int
    areas: _Areas = field(init=False)
    as_logits: _Areas = field(init=False)
    beyond: bool = False  # the channel holds what is no probability

    def __post_init__(self) -> None:
        self.areas, self.as_logits = _areas(self.classes), _areas(self.classes)

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        output = batch.outputs[self.output]
        wanted = np.asarray(whole_numbers(batch.labels)).reshape(-1)
        usable = wanted >= 0
        for areas, found in self._answers(output):
            areas.add(found.reshape(-1)[usable], wanted[usable])

    def _answers(self, output: Array) -> list[tuple[_Areas, Integers]]:
        """The class of each pixel; `self.classes`, which is none, for NaN and what is out of range."""
        none = self.classes
        if self.kind == "scores":
            unknown = np.isnan(output).any(axis=1) if output.dtype.kind == "f" else np.zeros(1, bool)
            return [(self.areas, np.where(unknown, none, output.argmax(axis=1)))]
        numbers = output.astype(np.float64)
        if self.kind == "classes":
            known = np.nan_to_num(numbers, nan=-1.0, posinf=-1.0, neginf=-1.0)
            whole = (known >= 0) & (known < none) & (known == np.floor(known))
            return [(self.areas, np.where(whole, known, none).astype(np.int64))]
        unknown = np.isnan(numbers)
        self.beyond |= bool(((numbers < 0) | (numbers > 1)).any())
        return [
            (areas, np.where(unknown, none, numbers >= threshold))
            for areas, threshold in ((self.areas, 0.5), (self.as_logits, 0.0))
        ]

    def value(self) -> float | None:
        """As `Meter`."""
        return (self.as_logits if self.beyond else self.areas).mean()


def iou(task: Task) -> MeanIou:
    """The meter for a model and its labels. Raises InvalidDataError."""
    labels = task.labels
    plane = squeezed(labels.shape[1:])
    if labels.dtype.kind not in "iub" or labels.ndim not in (3, 4):
        raise task.misfit(_IOU)
    scores = task.first(
        lambda array: array.ndim == 4 and array.shape[1] > 1 and _plane(array, 2) == plane and _mine(array, task)
    )
    flat = task.first(lambda array: array.ndim in (3, 4) and _plane(array, 1) == plane and _mine(array, task))
    name = scores or flat
    if name is None:
        raise task.misfit(_IOU)
    output = task.outputs[name]
    kind = "scores" if scores else "classes" if whole_numbers(output) is not None and output.ndim == 3 else "channel"
    if output.dtype.kind != "f" and kind == "channel":
        kind = "classes"
    largest = int(labels.max())
    classes = output.shape[1] if kind == "scores" else 2 if kind == "channel" else MAX_CLASSES
    if largest >= classes:
        raise InvalidDataError(
            f"The evaluation data: label {largest} does not fit output {name!r}, whose {classes} classes are 0 to "
            f"{classes - 1}. Pixels without a label are -1."
        )
    return MeanIou(name, kind, classes)


_IOU = (
    "Give class indices [N, H, W], negative where there is none, of the height and width of the output, which is "
    "[N, C, H, W], [N, 1, H, W] or [N, H, W]; resize the labels where the model answers on a coarser grid."
)


def _plane(array: Array, first: int) -> tuple[int, ...]:
    return squeezed(array.shape[first:])


def _mine(array: Array, task: Task) -> bool:
    return bool(array.shape[0] == task.count)
