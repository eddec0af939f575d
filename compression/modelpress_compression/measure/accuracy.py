"""A task metric on labelled data, of one model or of two.

- top1, top5: share of right answers. The output is [N, C] or [N, T, C]; labels are class indices [N] or [N, T], of
  which negative ones are left out, or scores of the output's shape, whose largest element is the class. One-hot labels,
  integers or floats, are such scores also where no metric is given.
- mse, mae: mean over all elements. Labels are numbers of the output's shape; axes of extent 1 do not matter.
- cosine: mean over samples of the cosine between output and label; labels as for mse.

The output is the first whose shape fits the labels. NaN counts as a wrong answer, and makes mse and mae infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array, EvaluationData
from modelpress_compression.runtime import open_comparable, open_session, run, run_all

Floats = NDArray[np.float64]

METRICS = ("top1", "top5", "mse", "mae", "cosine")
_ONE_HOT_ROWS = 4096
SHARES = ("top1", "top5")
LOWER_IS_BETTER = ("mse", "mae")


@dataclass(frozen=True)
class Accuracy:
    """The metric of both models. `drop` > 0: the optimized model is worse, whichever way the metric points.

    An infinite figure (mse of outputs that are not finite) makes `drop` infinite; in the report both are null.
    """

    metric: str
    samples: int | None
    original: float
    optimized: float
    drop: float
    lower_is_better: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report's `accuracy`."""
        return {
            "metric": self.metric,
            "samples": self.samples,
            "original": _finite(self.original),
            "optimized": _finite(self.optimized),
            "drop": _finite(self.drop),
            "lower_is_better": self.lower_is_better,
        }


def accuracy_after(before: Evaluation, after: Evaluation) -> Accuracy:
    """What has become of the original's metric."""
    lower = before.lower_is_better
    drop = after.value - before.value if lower else before.value - after.value
    # inf - inf is NaN: neither model gives finite outputs, so there is nothing to lose.
    # In floating point 0.97 - 0.96 is a little more than the 0.01 that somebody may allow.
    lost = 0.0 if math.isnan(drop) else round(drop, 12)
    return Accuracy(before.metric, before.samples, before.value, after.value, lost, lower)


@dataclass(frozen=True)
class Evaluation:
    """The metric of one model. `samples`: how many were looked at; None: who measured did not say."""

    metric: str
    value: float
    samples: int | None
    lower_is_better: bool = False


def evaluate(path: Path, data: EvaluationData, metric: str | None = None, *, batch_size: int = 1) -> Evaluation:
    """The metric of one model on all samples. `metric` None: top1 for class indices and one-hot labels, else mse.

    Raises InvalidDataError where the labels fit no output, ModelNotRunnableError, UnsupportedOperatorError.
    """
    if metric is not None and metric not in METRICS:
        raise InvalidDataError(f"There is no metric {metric!r}; use one of {', '.join(METRICS)}.")
    session = open_comparable(path)
    labels = data.labels
    size = 1 if data.inputs.whole_feeds else data.inputs.fixed_batch or batch_size
    chosen, output = metric, ""
    total, weight, start = 0.0, 0, 0
    for outputs in run_all(session, data.inputs.feeds(batch_size)):
        stop = min(start + size, len(labels))
        if not output:
            chosen, output = _fit(outputs, labels, stop - start, metric)
        assert chosen is not None  # noqa: S101  # set with the first output
        added, count = _SCORES[chosen](outputs[output], np.asarray(labels[start:stop]))
        total, weight, start = total + added, weight + count, stop
    if chosen is None or not weight:
        raise InvalidDataError("The evaluation data: no sample has a usable label; class indices start at 0.")
    return Evaluation(chosen, total / weight, start, chosen in LOWER_IS_BETTER)


def labels_note(path: Path, data: EvaluationData, metric: str | None) -> str:
    """How the labels are understood, where that is not plain; found in one run of the model.

    Raises InvalidDataError where they fit no output, as `evaluate` would.
    """
    feed = next(data.inputs.feeds(1))
    outputs = run(open_session(path), feed)
    size = 1 if data.inputs.whole_feeds else data.inputs.fixed_batch or 1
    chosen, output = _fit(outputs, data.labels, size, metric)
    if metric or chosen not in SHARES or not _scores_as_labels(outputs[output].shape, data.labels.shape):
        return ""
    return (
        f"The labels {list(data.labels.shape)} are one-hot: they are read as classes, the place of the largest of each "
        f"{data.labels.shape[-1]}, and measured with {chosen}."
    )


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


def _fit(outputs: Mapping[str, Array], labels: Array, count: int, metric: str | None) -> tuple[str, str]:
    """The metric, and the first output that the labels fit for it. Raises InvalidDataError."""
    one_hot = metric is None and is_one_hot(labels)
    integers = labels.dtype.kind in "iub"
    candidates = (metric,) if metric else ("top1",) if one_hot else ("top1", "mse") if integers else ("mse",)
    sample_shape = labels.shape[1:]
    for candidate in candidates:
        fits = _fits_classes if candidate in SHARES else _fits_values
        for name, output in outputs.items():
            scores = metric is not None or one_hot
            if output.dtype.kind in "biuf" and fits(output, sample_shape, count, integers, scores):
                _check_classes(candidate, name, output, labels)
                _refuse_planes(candidate, metric, labels)
                return candidate, name
    shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
    raise InvalidDataError(
        f"The evaluation data: labels of shape {labels.shape} ({labels.dtype}) fit no output for "
        f"{metric or 'any metric'}. Outputs for {count} sample(s): {shapes}. For top1 and top5 give one class index "
        f"per sample (or per position of [N, T, C]); for mse, mae and cosine one array of the output's sample shape."
    )


def _fits_classes(output: Array, sample_shape: tuple[int, ...], count: int, integers: bool, scores: bool) -> bool:
    """`scores`: labels of the output's own shape are scores of classes."""
    if output.ndim not in (2, 3) or output.shape[-1] < 2 or output.shape[0] != count:
        return False
    if _scores_as_labels(output.shape, (count, *sample_shape)):
        return scores
    return integers and squeezed(sample_shape) == squeezed(output.shape[1:-1])


def _scores_as_labels(output: tuple[int, ...], labels: tuple[int, ...]) -> bool:
    """Whether labels have a number for each class, not one for each sample."""
    return labels[-1:] == output[-1:] and squeezed(labels[1:]) == squeezed(output[1:])


def _refuse_planes(candidate: str, metric: str | None, labels: Array) -> None:
    """A mean of squares says nothing of one-hot classes [N, C, H, W], and top1 does not take them."""
    if metric is None and candidate not in SHARES and labels.ndim > 2 and is_one_hot(labels, axis=1):
        raise InvalidDataError(
            f"The evaluation data: the labels {list(labels.shape)} are one-hot along their second axis, which no "
            f"metric here takes for classes. Give top1 outputs and labels with classes on the last axis, or name the "
            f"metric (--metric mse) if their values are meant."
        )


def _fits_values(output: Array, sample_shape: tuple[int, ...], count: int, integers: bool, scores: bool) -> bool:
    # Whole feeds may answer without a batch axis: then all of the output belongs to the one sample.
    mine = output.shape[1:] if output.ndim and output.shape[0] == count else output.shape if count == 1 else None
    return mine is not None and squeezed(mine) == squeezed(sample_shape)


def _check_classes(metric: str, name: str, output: Array, labels: Array) -> None:
    if metric not in SHARES:
        return
    classes = output.shape[-1]
    if metric == "top5" and classes <= 5:
        raise InvalidDataError(f"Output {name!r} has {classes} classes: top5 says nothing there; use top1.")
    given = not _scores_as_labels(output.shape, labels.shape)
    if given and labels.size and int(labels.max()) >= classes:
        raise InvalidDataError(
            f"The evaluation data: label {int(labels.max())} does not fit output {name!r}, whose {classes} classes are "
            f"0 to {classes - 1}."
        )


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of extent 1."""
    return tuple(extent for extent in shape if extent != 1)


def _top(output: Array, labels: Array, k: int) -> tuple[float, int]:
    scores = output.astype(np.float64).reshape(-1, output.shape[-1])
    # Scores as labels (one-hot, or a teacher's): their largest element is the class.
    indices = np.argmax(labels, axis=-1) if labels.size == output.size else labels
    classes = indices.reshape(-1).astype(np.int64)
    usable = classes >= 0
    scores, classes = scores[usable], classes[usable]
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
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    dots = (got * wanted).sum(axis=1)
    cosines = np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), 0.0)
    return float(np.nan_to_num(cosines, nan=0.0).sum()), len(got)


_SCORES: dict[str, Callable[[Array, Array], tuple[float, int]]] = {
    "top1": lambda output, labels: _top(output, labels, 1),
    "top5": lambda output, labels: _top(output, labels, 5),
    "mse": _error_score(np.square),
    "mae": _error_score(np.abs),
    "cosine": _cosine,
}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
