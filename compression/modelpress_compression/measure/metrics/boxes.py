"""map and map50: average precision of boxes as COCO computes it, the mean over the labelled classes.

`map` is the mean over thresholds of intersection over union from 0.50 to 0.95, `map50` is that at 0.50. Boxes are
corners (x1, y1, x2, y2); labels are [N, M, 5]: corners and class, filled up with rows of class -1. Outputs are

- boxes [K, 4] or [N, K, 4] with scores [K] or [N, K] and classes of the same shape (integers, or named so);
- the same boxes with scores [K, C] or [N, K, C] of every class, which must be comparable between boxes; or
- rows [K, 6] or [N, K, 6]: corners, score, class, or class, score, corners.

They are taken as they come, so that the model must have left out what overlaps. Of a sample the 300 best boxes count,
100 of a class. What is not finite is no box. Precision is read at 101 recalls, as pycocotools does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array
from modelpress_compression.measure.metrics.base import Batch, Floats, Integers, Task

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST, _MOST_OF_CLASS = 300, 100
MAX_BOXES = 10_000  # labelled in a sample; each is held against each that was found
_CLASS_NAME = re.compile(r"class|label|categ", re.IGNORECASE)


@dataclass(frozen=True)
class Detections:
    """Boxes [K, 4], scores [K] and classes [K] of one sample."""

    boxes: Floats
    scores: Floats
    classes: Integers


@dataclass(frozen=True)
class Layout:
    """Where detections stand. `classes` empty: `scores` has one of every class; `scores` empty: `boxes` are rows of
    six. `batched`: the first axis is that of samples."""

    boxes: str
    scores: str
    classes: str
    batched: bool

    def samples(self, outputs: Mapping[str, Array]) -> Iterator[Detections]:
        """The detections of each sample, at most 300."""
        arrays = [outputs[name] for name in (self.boxes, self.scores, self.classes) if name]
        for index in range(len(arrays[0]) if self.batched else 1):
            mine = [array[index] if self.batched else array for array in arrays]
            yield _best(*self._columns([array.astype(np.float64) for array in mine]))

    def _columns(self, arrays: list[Floats]) -> tuple[Floats, Floats, Floats]:
        if not self.scores:
            (rows,) = arrays
            first = _class_first(rows)
            return (rows[:, 2:], rows[:, 1], rows[:, 0]) if first else (rows[:, :4], rows[:, 4], rows[:, 5])
        if self.classes:
            boxes, scores, classes = arrays
            return boxes, scores, classes
        boxes, scores = arrays
        every = np.nan_to_num(scores, nan=-np.inf).reshape(-1)
        kept = np.argpartition(-every, _MOST)[:_MOST] if every.size > _MOST else np.arange(every.size)
        width = scores.shape[1]
        return boxes[kept // width], every[kept], (kept % width).astype(np.float64)


@dataclass
class AveragePrecision:
    """`thresholds`: of intersection over union, at which a box is right."""

    layout: Layout
    thresholds: Floats
    scores: dict[int, list[Floats]] = field(default_factory=lambda: defaultdict(list))
    right: dict[int, list[NDArray[np.bool_]]] = field(default_factory=lambda: defaultdict(list))
    labelled: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        for found, labels in zip(self.layout.samples(batch.outputs), batch.labels, strict=True):
            self._add_sample(found, _with_class(labels))

    def _add_sample(self, found: Detections, labels: Floats) -> None:
        wanted = labels[:, 4].astype(np.int64)
        for each in np.union1d(found.classes, wanted).tolist():
            mine = np.flatnonzero(found.classes == each)
            mine = mine[np.argsort(-found.scores[mine], kind="stable")][:_MOST_OF_CLASS]
            truth = labels[wanted == each, :4]
            self.labelled[each] += len(truth)
            self.scores[each].append(found.scores[mine])
            self.right[each].append(_matches(found.boxes[mine], truth, self.thresholds))

    def value(self) -> float | None:
        """As `Meter`."""
        of_classes = [self._of_class(each) for each, count in self.labelled.items() if count]
        return float(np.mean(of_classes)) if of_classes else None

    def _of_class(self, each: int) -> float:
        order = np.argsort(-np.concatenate(self.scores[each]), kind="stable")
        right = np.concatenate(self.right[each])[order]
        if not len(right):
            return 0.0
        hits = np.cumsum(right, axis=0)
        precision = hits / np.arange(1, len(right) + 1)[:, None]
        # The best precision that is to be had at this recall or beyond.
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        return float(np.mean([_area(hits[:, i] / self.labelled[each], envelope[:, i]) for i in range(right.shape[1])]))


def average_precision(task: Task) -> AveragePrecision:
    """The meter of map or map50 for a model and its labels. Raises InvalidDataError."""
    layout = _layout(task)
    labels = task.labels
    if layout is None or labels.ndim != 3 or labels.shape[2] != 5:
        raise task.misfit(
            "Give boxes [N, M, 5] (x1, y1, x2, y2, class), filled up with rows of class -1, for a detector that gives "
            "boxes [N, K, 4] with scores and classes [N, K] (or scores [N, K, C]), or rows [N, K, 6]; N may be missing."
        )
    if labels.shape[1] > MAX_BOXES:
        raise InvalidDataError(
            f"The evaluation data: room for {labels.shape[1]} boxes in each sample is more than {task.metric} takes "
            f"({MAX_BOXES}). Leave out rows of class -1 that no sample needs."
        )
    _check_labels(labels)
    return AveragePrecision(layout, THRESHOLDS[:1] if task.metric == "map50" else THRESHOLDS)


def _check_labels(labels: Array) -> None:
    boxes = _with_class(labels)
    if not np.isfinite(boxes).all() or (boxes[:, 4] != np.floor(boxes[:, 4])).any():
        raise InvalidDataError("The evaluation data: labels of boxes must be finite, and their classes whole numbers.")
    if (boxes[:, 2:4] < boxes[:, :2]).any():
        raise InvalidDataError(
            "The evaluation data: labels hold boxes whose x2 or y2 is less than x1 or y1. Give corners (x1, y1, x2, "
            "y2), not width and height."
        )


def _with_class(labels: Array) -> Floats:
    """The rows that are boxes, not what fills the array up."""
    numbers = labels.astype(np.float64)
    return numbers[numbers[..., 4] >= 0]


def _layout(task: Task) -> Layout | None:
    """How the model gives its detections; None: as none that is read here."""
    numbers = {name: array for name, array in task.outputs.items() if array.dtype.kind in "iuf"}
    for name, array in numbers.items():
        batched = array.ndim == 3 and array.shape[0] == task.count
        if array.shape[-1:] not in ((4,), (6,)) or not (batched or (array.ndim == 2 and task.count == 1)):
            continue
        if array.shape[-1] == 6:
            return Layout(name, "", "", batched)
        rest = {other: found for other, found in numbers.items() if other != name}
        if (found := _scores_of(array.shape[:-1], rest)) is not None:
            return Layout(name, *found, batched)
    return None


def _scores_of(places: tuple[int, ...], outputs: Mapping[str, Array]) -> tuple[str, str] | None:
    """The names of scores and classes for boxes in these places; that of the classes may be empty."""
    single = [name for name, array in outputs.items() if array.shape == places]
    classes = [name for name in single if outputs[name].dtype.kind in "iu"] or [
        name for name in single if _CLASS_NAME.search(name)
    ]
    scores = [name for name in single if name not in classes and outputs[name].dtype.kind == "f"]
    if scores and classes:
        return scores[0], classes[0]
    every = [name for name, array in outputs.items() if array.shape[:-1] == places and array.dtype.kind == "f"]
    return (every[0], "") if every else None


def _class_first(rows: Floats) -> bool:
    """Whether rows are class, score, corners: the first column then holds whole numbers, and the last one does not."""

    def classes(column: int, score: int) -> bool:
        whole = bool((rows[:, column] == np.floor(rows[:, column])).all())
        return whole and bool(((rows[:, score] >= 0) & (rows[:, score] <= 1)).all())

    return classes(0, 1) and not classes(5, 4)


def _best(boxes: Floats, scores: Floats, classes: Floats) -> Detections:
    known = np.isfinite(boxes).all(axis=1) & np.isfinite(scores) & np.isfinite(classes)
    boxes, scores, classes = boxes[known], scores[known], classes[known]
    kept = np.argsort(-scores, kind="stable")[:_MOST]
    return Detections(boxes[kept], scores[kept], np.clip(np.rint(classes[kept]), -1, 2**31).astype(np.int64))


def _matches(boxes: Floats, truth: Floats, thresholds: Floats) -> NDArray[np.bool_]:
    """[boxes, thresholds]: whether each box, the best first, finds a labelled box that no better one has found."""
    right = np.zeros((len(boxes), len(thresholds)), bool)
    if not len(truth):
        return right
    overlaps = _overlaps(boxes, truth)
    for column, threshold in enumerate(thresholds):
        free = np.ones(len(truth), bool)
        for row in np.flatnonzero(overlaps.max(axis=1) >= threshold):
            place = int(np.where(free, overlaps[row], -1.0).argmax())
            if free[place] and overlaps[row, place] >= threshold:
                free[place], right[row, column] = False, True
    return right


def _overlaps(boxes: Floats, truth: Floats) -> Floats:
    """Intersection over union of every box with every labelled one."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas = [np.prod(np.maximum(each[:, 2:] - each[:, :2], 0.0), axis=1) for each in (boxes, truth)]
    union = areas[0][:, None] + areas[1][None] - both
    found: Floats = np.where(union > 0, both / np.where(union > 0, union, 1.0), 0.0)
    return found


def _area(recall: Floats, precision: Floats) -> float:
    """The mean precision at 101 recalls, 0 where a recall is not reached."""
    places = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[places].mean())
