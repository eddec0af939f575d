"""The figure of a task's metric on labelled data, of one model or of two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.inputs import EvaluationData, InputData
from modelpress_compression.measure.metric_names import LOWER_IS_BETTER
from modelpress_compression.measure.metrics import meter_for
from modelpress_compression.measure.metrics.answers import fit_answers, scores_as_labels
from modelpress_compression.measure.metrics.base import Batch, Meter
from modelpress_compression.parallel import map_in_order
from modelpress_compression.runtime import open_session, run


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

    @property
    def loss(self) -> str:
        """How much worse the optimized model is, in words: `top1 falls by 0.0210`, `cer rises by 0.0210`."""
        return f"{self.metric} {'rises' if self.lower_is_better else 'falls'} by {self.drop:.4f}"

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


def evaluate(
    path: Path, data: EvaluationData, metric: str | None = None, *, batch_size: int = 1, backend: Backend = CPU
) -> Evaluation:
    """The metric of one model on all samples. `metric` None: top1 for class indices and one-hot labels, else mse.
    `backend`: what the model runs in.

    Raises InvalidDataError where the labels fit no output, ModelNotRunnableError, UnsupportedOperatorError.
    """
    runner = backend.open(path, comparable=True)
    labels = data.labels
    size = _samples_of_a_feed(data.inputs, batch_size)
    meter: Meter | None = None
    chosen, start = "", 0
    feeds = data.inputs.feeds(batch_size)
    for outputs, mask in zip(map_in_order(runner.run, feeds), _masks(data.inputs, batch_size), strict=True):
        stop = min(start + size, len(labels))
        if meter is None:
            chosen, meter = meter_for(outputs, data, stop - start, metric)
        meter.add(Batch(outputs, np.asarray(labels[start:stop]), mask))
        start = stop
    value = None if meter is None else meter.value()
    if value is None:
        raise InvalidDataError(f"The evaluation data: no sample has a usable label{_hint(chosen)}.")
    return Evaluation(chosen, value, start, chosen in LOWER_IS_BETTER)


def check_labels(path: Path, data: EvaluationData, metric: str | None) -> str:
    """How the labels are understood, where that is not plain; found in one run of the model.

    Raises InvalidDataError where they fit no output, as `evaluate` would.
    """
    feed = next(data.inputs.feeds(1))
    outputs = run(open_session(path), feed)
    size = _samples_of_a_feed(data.inputs, 1)
    if metric is not None:
        meter_for(outputs, data, size, metric)
        return ""
    chosen, output = fit_answers(outputs, data.labels, size, metric)
    if chosen != "top1" or not scores_as_labels(outputs[output].shape, data.labels.shape):
        return ""
    return (
        f"The labels {list(data.labels.shape)} are one-hot: they are read as classes, the place of the largest of each "
        f"{data.labels.shape[-1]}, and measured with {chosen}."
    )


def _samples_of_a_feed(inputs: InputData, batch_size: int) -> int:
    return 1 if inputs.whole_feeds else inputs.fixed_batch or batch_size


def _masks(inputs: InputData, batch_size: int) -> Iterator[NDArray[np.bool_] | None]:
    """The positions that count of each feed."""
    return (counted_positions(feed) for feed in inputs.feeds(batch_size))


def _hint(metric: str) -> str:
    if metric == "spearman":
        return ": all are the same, or there is one alone"
    if metric == "retrieval":
        return ": each needs another of its group"
    return "; class indices start at 0"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
