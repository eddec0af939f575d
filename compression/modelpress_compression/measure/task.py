"""What tells how good a model is at its task: labelled data with one of our metrics, or a metric of the user's own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import MetricError
from modelpress_compression.inputs import Array, EvaluationData
from modelpress_compression.measure.accuracy import Accuracy, Evaluation, accuracy_after, evaluate
from modelpress_compression.model import data_path_of

# The path of an ONNX file and the evaluation data, to a number; `lower_is_better` may be an attribute of it.
MetricFunction = Callable[[str, Mapping[str, Array] | None], float]


@dataclass(frozen=True)
class Labelled:
    """One of `metric_names.METRICS` on labelled data; None: the one that suits the labels."""

    data: EvaluationData
    metric: str | None = None

    def evaluate(self, path: Path, backend: Backend = CPU) -> Evaluation:
        """The figure of the model in `path`, run in the `backend`. Raises as `accuracy.evaluate`."""
        return evaluate(path, self.data, self.metric, backend=backend)


@dataclass(frozen=True)
class OwnMetric:
    """A metric that somebody else computes, in a runtime of their choice. `score`: from the path of an ONNX file to a
    number.

    A model is scored once: `known` has the scores by file.
    """

    name: str
    score: Callable[[Path], float]
    lower_is_better: bool = False
    known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, function: MetricFunction, evaluation: Mapping[str, Array] | None) -> OwnMetric:
        """From a function as the documentation describes it."""
        name = str(getattr(function, "__name__", type(function).__name__))
        lower = bool(getattr(function, "lower_is_better", False))
        return cls(name, lambda path: function(str(path), evaluation), lower)

    def evaluate(self, path: Path, backend: Backend = CPU) -> Evaluation:
        """The figure of the model in `path`. Raises MetricError where the metric fails or gives no finite number."""
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self.known:
            self.known[key] = self._scored(path)
        return Evaluation(self.name, self.known[key], None, self.lower_is_better)

    def _scored(self, path: Path) -> float:
        try:
            value: Any = self.score(path)
        except MetricError:
            raise
        except Exception as error:  # code of the user's: whatever it raises
            raise MetricError(f"The metric {self.name} raised {type(error).__name__}: {error}") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise MetricError(
                f"The metric {self.name} returned {value!r:.80}, a {type(value).__name__}; it must return a number."
            ) from None
        if not math.isfinite(number):
            raise MetricError(f"The metric {self.name} returned {number}; it must return a finite number.")
        return number


class NotScoredError(MetricError):
    """Who computes the metric has not seen this model yet."""


@dataclass(frozen=True)
class GivenScores:
    """A metric that was computed elsewhere. `scores`: by `model_digest`."""

    name: str
    scores: Mapping[str, float]
    lower_is_better: bool = False

    def evaluate(self, path: Path, backend: Backend = CPU) -> Evaluation:
        """The figure of the model in `path`. Raises NotScoredError."""
        score = self.scores.get(model_digest(path))
        if score is None:
            raise NotScoredError(f"{self.name} has not scored it yet")
        return Evaluation(self.name, score, None, self.lower_is_better)


Task = Labelled | OwnMetric | GivenScores


def compare_on_task(task: Task, original: Path, optimized: Path, backend: Backend = CPU) -> Accuracy | None:
    """The figures of the original in onnxruntime and of the optimized model in the `backend`; None where they are not
    scored yet. Raises as `evaluate` of the task."""
    try:
        return accuracy_after(task.evaluate(original), task.evaluate(optimized, backend))
    except NotScoredError:
        return None


def model_digest(path: Path) -> str:
    """SHA-256 of a model's file, and of its data file where it has one, in hexadecimal."""
    digest = hashlib.sha256()
    for part in (path, data_path_of(path)):
        if part.exists():
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
