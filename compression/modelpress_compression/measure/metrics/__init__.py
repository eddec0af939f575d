"""The metrics of tasks; docs/metrics.md says how the evaluation data of each is laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array, EvaluationData
from modelpress_compression.measure.metric_names import METRICS
from modelpress_compression.measure.metrics.answers import answer_meter, fit_answers
from modelpress_compression.measure.metrics.base import Meter, Task
from modelpress_compression.measure.metrics.boxes import average_precision
from modelpress_compression.measure.metrics.embeddings import retrieval, spearman
from modelpress_compression.measure.metrics.masks import iou
from modelpress_compression.measure.metrics.sequences import error_rate

# What looks at more than one output, or at more than one sample at a time.
_TASKS: dict[str, Callable[[Task], Meter]] = {
    "spearman": spearman,
    "retrieval": retrieval,
    "iou": iou,
    "cer": error_rate,
    "wer": error_rate,
    "map": average_precision,
    "map50": average_precision,
}


def meter_for(outputs: Mapping[str, Array], data: EvaluationData, count: int, metric: str | None) -> tuple[str, Meter]:
    """The metric and what measures it. `outputs`: of the first `count` samples. `metric` None: what suits the labels.

    Raises InvalidDataError where the labels fit no output.
    """
    if metric is not None and metric not in METRICS:
        raise InvalidDataError(f"There is no metric {metric!r}; use one of {', '.join(METRICS)}.")
    if metric in _TASKS:
        return metric, _TASKS[metric](Task(metric, outputs, data, count))
    chosen, output = fit_answers(outputs, data.labels, count, metric)
    return chosen, answer_meter(chosen, output)
