"""Metrics of single answers: classes (top1, top5, f1) and values (mse, mae, cosine).

- top1, top5: share of right answers. The output is [N, C] or [N, T, C]; labels are class indices [N] or [N, T], of
  which negative ones are left out, or scores of the output's shape, whose largest element is the class. One-hot labels,
  integers or floats, are such scores also where no metric is given.
- f1: the mean of the F1 scores of all classes that occur in labels or answers ("macro"); labels as for top1.
- mse, mae: mean over all elements. Labels are numbers of the output's shape; axes of extent 1 do not matter.
- cosine: mean over samples of the cosine between output and label; labels as for mse.

NaN counts as a wrong answer, and makes mse and mae infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array
from modelpress_compression.measure.metrics.base import Batch, Floats, Integers, squeezed

CLASSES = ("top1", "top5", "f1")
VALUES = ("mse", "mae", "cosine")
_ONE_HOT_ROWS = 4096


@dataclass
class Mean:
    """The mean of what `score` finds in one output: the sum over some samples, and how many there were."""

    output: str
    score: Callable[[Array, Array], tuple[float, int]]
    total: float = 0.0
    weight: int = 0

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        added, count = self.score(batch.outputs[self.output], batch.labels)
        self.total, self.weight = self.total + added, self.weight + count

    def value(self) -> float | None:
        """As `Meter`."""
        return self.total / self.weight if self.weight else None


@dataclass
class MacroF1:
    """The mean of 2 TP / (2 TP + FP + FN) over the classes that occur."""

    output: str
    right: Integers | None = None
    answered: Integers | None = None
    labelled: Integers | None = None

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        scores, classes = _usable(batch.outputs[self.output], batch.labels)
        count = scores.shape[-1]
        # What holds NaN answers no class.
        found = np.where(np.isnan(scores).any(axis=-1), count, np.argmax(scores, axis=-1))
        sums = [np.bincount(kept, minlength=count)[:count] for kept in (found[found == classes], found, classes)]
        before = (self.right, self.answered, self.labelled)
        self.right, self.answered, self.labelled = (
            new if old is None else old + new for old, new in zip(before, sums, strict=True)
        )

    def value(self) -> float | None:
        """As `Meter`."""
        if self.right is None or self.answered is None or self.labelled is None or not self.labelled.any():
            return None
        both = self.answered + self.labelled
        return float(np.mean(2 * self.right[both > 0] / both[both > 0]))


def answer_meter(metric: str, output: str) -> Mean | MacroF1:
    """What measures one of CLASSES and VALUES on the output of this name."""
    return MacroF1(output) if metric == "f1" else Mean(output, _SCORES[metric])


def is_one_hot(labels: Array, axis: int = -1) -> bool:
    """Whether the labels hold two numbers only, and the larger one once along the axis: 0 and 1, or smoothed ones.

    Looks at the first `_ONE_HOT_ROWS` samples.
    """
    head = np.asarray(labels[:_ONE_HOT_ROWS])
    if head.ndim < 2 or head.shape[axis] < 2 or head.dtype.kind not in "biuf":
        return False
    low, high = head.min(), head.max()
    hot = head == high
    return bool(low < high and (hot | (head == low)).all() and (np.count_nonzero(hot, axis=axis) == 1).all())


def fit_answers(outputs: Mapping[str, Array], labels: Array, count: int, metric: str | None) -> tuple[str, str]:
    """The metric, and the first output that the labels fit for it. Raises InvalidDataError.

    `metric` None: top1 for class indices and one-hot labels, else mse.
    """
    one_hot = metric is None and is_one_hot(labels)
    integers = labels.dtype.kind in "iub"
    candidates = (metric,) if metric else ("top1",) if one_hot else ("top1", "mse") if integers else ("mse",)
    sample_shape = labels.shape[1:]
    for candidate in candidates:
        fits = _fits_classes if candidate in CLASSES else _fits_values
        for name, output in outputs.items():
            scores = metric is not None or one_hot
            if output.dtype.kind in "biuf" and fits(output, sample_shape, count, integers, scores):
                _check_classes(candidate, name, output, labels)
                _refuse_planes(candidate, metric, labels)
                return candidate, name
    shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
    raise InvalidDataError(
        f"The evaluation data: labels of shape {labels.shape} ({labels.dtype}) fit no output for "
        f"{metric or 'top1 or mse'}. Outputs for {count} sample(s): {shapes}. For top1, top5 and f1 give one class "
        f"index per sample (or per position of [N, T, C]); for mse, mae and cosine one array of the output's sample "
        f"shape. Masks, boxes, texts and embeddings have metrics of their own: --metric iou, map, cer, retrieval."
    )


def scores_as_labels(output: tuple[int, ...], labels: tuple[int, ...]) -> bool:
    """Whether labels have a number for each class, not one for each sample."""
    return labels[-1:] == output[-1:] and squeezed(labels[1:]) == squeezed(output[1:])


def _fits_classes(output: Array, sample_shape: tuple[int, ...], count: int, integers: bool, scores: bool) -> bool:
    """`scores`: labels of the output's own shape are scores of classes."""
    if output.ndim not in (2, 3) or output.shape[-1] < 2 or output.shape[0] != count:
        return False
    if scores_as_labels(output.shape, (count, *sample_shape)):
        return scores
    return integers and squeezed(sample_shape) == squeezed(output.shape[1:-1])


def _refuse_planes(candidate: str, metric: str | None, labels: Array) -> None:
    """A mean of squares says nothing of one-hot classes [N, C, H, W], and top1 does not take them."""
    if metric is None and candidate not in CLASSES and labels.ndim > 2 and is_one_hot(labels, axis=1):
        raise InvalidDataError(
            f"The evaluation data: the labels {list(labels.shape)} are one-hot along their second axis, which no "
            f"metric here takes for classes. Give top1 outputs and labels with classes on the last axis, iou labels of "
            f"class indices [N, H, W], or name the metric (--metric mse) if their values are meant."
        )


def _fits_values(output: Array, sample_shape: tuple[int, ...], count: int, integers: bool, scores: bool) -> bool:
    # Whole feeds may answer without a batch axis: then all of the output belongs to the one sample.
    mine = output.shape[1:] if output.ndim and output.shape[0] == count else output.shape if count == 1 else None
    return mine is not None and squeezed(mine) == squeezed(sample_shape)


def _check_classes(metric: str, name: str, output: Array, labels: Array) -> None:
    if metric not in CLASSES:
        return
    classes = output.shape[-1]
    if metric == "top5" and classes <= 5:
        raise InvalidDataError(f"Output {name!r} has {classes} classes: top5 says nothing there; use top1.")
    given = not scores_as_labels(output.shape, labels.shape)
    if given and labels.size and int(labels.max()) >= classes:
        raise InvalidDataError(
            f"The evaluation data: label {int(labels.max())} does not fit output {name!r}, whose {classes} classes are "
            f"0 to {classes - 1}."
        )


def _usable(output: Array, labels: Array) -> tuple[Floats, Integers]:
    """Scores [answers, C] and classes [answers] of what has a label."""
    scores = output.astype(np.float64).reshape(-1, output.shape[-1])
    # Scores as labels (one-hot, or a teacher's): their largest element is the class.
    indices = np.argmax(labels, axis=-1) if labels.size == output.size else labels
    classes = indices.reshape(-1).astype(np.int64)
    usable = classes >= 0
    return scores[usable], classes[usable]


def _top(output: Array, labels: Array, k: int) -> tuple[float, int]:
    scores, classes = _usable(output, labels)
    largest = np.argmax(scores, axis=-1)[:, None] if k == 1 else np.argpartition(-scores, k - 1, axis=-1)[:, :k]
    right = (largest == classes[:, None]).any(axis=-1) & ~np.isnan(scores).any(axis=-1)
    return float(np.count_nonzero(right)), len(classes)


def _values(output: Array, labels: Array) -> tuple[Floats, Floats]:
    """Output and labels as [samples, elements] in float64."""
    count = len(labels)
    return output.astype(np.float64).reshape(count, -1), labels.astype(np.float64).reshape(count, -1)


def _error_score(error: Callable[[Floats], Floats]) -> Callable[[Array, Array], tuple[float, int]]:
    def score(output: Array, labels: Array) -> tuple[float, int]:
        got, wanted = _values(output, labels)
        total = float(error(got - wanted).sum())
        return (total if math.isfinite(total) else math.inf), got.size

    return score


def _cosine(output: Array, labels: Array) -> tuple[float, int]:
    got, wanted = _values(output, labels)
    return float(cosines(got, wanted).sum()), len(got)


def cosines(left: Floats, right: Floats) -> Floats:
    """The cosine of each pair of rows; 0 where one of them is zero, or not finite."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    dots = (left * right).sum(axis=1)
    found: Floats = np.nan_to_num(np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), 0.0), nan=0.0)
    return found


_SCORES: dict[str, Callable[[Array, Array], tuple[float, int]]] = {
    "top1": lambda output, labels: _top(output, labels, 1),
    "top5": lambda output, labels: _top(output, labels, 5),
    "mse": _error_score(np.square),
    "mae": _error_score(np.abs),
    "cosine": _cosine,
}
