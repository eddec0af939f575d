"""A metric of the user's own decides what a goal takes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnxruntime as ort
import pytest
from modelpress_compression import InputData, Model, Recipe, compress
from modelpress_compression.errors import MetricError
from modelpress_compression.report.build import report_schema
from modelpress_compression.search import search_time
from modelpress_compression.search.family import FamilyMember

pytestmark = pytest.mark.usefixtures("timed_by_size")


def goal(**options: Any) -> Recipe:
    """A recipe with nothing but a goal; few rounds, since nothing here asserts on time."""
    return Recipe.from_dict({"version": 1, "goal": options, "benchmark": {"rounds": 5}})


class Score:
    """Calls with the files' sizes; what it says comes from `values`, the last one for all later files."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.sizes: list[int] = []

    def __call__(self, path: str, evaluation: Any) -> Any:
        self.sizes.append(Path(path).stat().st_size)
        value = self.values[min(len(self.sizes), len(self.values)) - 1]
        if isinstance(value, Exception):
            raise value
        return value


def mean_answer(path: str, evaluation: Any) -> float:
    """Share of the evaluation's samples on which class 0 is not the answer."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"x": evaluation["pictures"]})
    return float((np.argmax(answers, axis=-1) != 0).mean())


def test_it_decides_and_is_reported(digits: Model, samples: InputData) -> None:
    """It gets a file that runs, and the arrays as they were given; its figures and its name stand in the report."""
    pictures = next(iter(samples.feeds(8)))["x"]
    report = compress(digits, goal(), metric=mean_answer, eval_data={"pictures": pictures}).report
    jsonschema.validate(report, report_schema())
    accuracy = report["accuracy"]
    assert (accuracy["metric"], accuracy["samples"]) == ("mean_answer", None)
    assert abs(accuracy["drop"]) <= 0.01
    assert report["size_ratio"] > 2


def test_what_it_refuses_is_not_taken(digits: Model) -> None:
    """All candidates lose a tenth: the original comes back, and each row says what it lost."""
    report = compress(digits, goal(max_drop=0.05), metric=Score(0.9, 0.8)).report
    assert report["size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert report["accuracy"]["drop"] == 0.0
    reasons = [row["reason"] for row in report["candidates"]]
    assert any("Score falls by 0.1000, more than 0.05" in reason for reason in reasons)


def test_lower_may_be_better(digits: Model) -> None:
    """A figure that falls is a gain where the function says so."""
    score = Score(0.9, 0.8)
    score.lower_is_better = True  # type: ignore[attr-defined]
    report = compress(digits, goal(max_drop=0.05), metric=score).report
    assert report["size_ratio"] > 3
    assert report["accuracy"]["drop"] == pytest.approx(-0.1)
    assert report["accuracy"]["lower_is_better"] is True


def test_each_model_is_scored_once(digits: Model) -> None:
    """Scores are dear: the original and the result are not scored again for the report."""
    score = Score(0.9)
    report = compress(digits, goal(), metric=score).report
    assert len(score.sizes) == len(set(score.sizes))
    assert score.sizes.count(report["optimized"]["size_bytes"]) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (ValueError("no such file"), "raised ValueError: no such file"),
        (math.nan, "returned nan; it must return a finite number"),
        ("good", "returned 'good', a str; it must return a number"),
        (None, "returned None, a NoneType"),
    ],
)
def test_what_cannot_score_the_original_is_refused(digits: Model, value: Any, said: str) -> None:
    """Before any candidate is built."""
    score = Score(value)
    with pytest.raises(MetricError, match=said):
        compress(digits, goal(), metric=score)
    assert len(score.sizes) == 1


def test_a_failure_on_a_candidate_is_that_candidates(digits: Model) -> None:
    """The first candidate fails, the search goes on with the others."""
    report = compress(digits, goal(), metric=Score(0.9, RuntimeError("bad operator"), 0.9)).report
    reasons = [row["reason"] for row in report["candidates"]]
    assert sum("raised RuntimeError: bad operator" in reason for reason in reasons) == 1
    assert report["size_ratio"] > 2


def test_it_cannot_make_a_broken_model_pass(digits: Model) -> None:
    """A metric that likes everything: no candidate with a cosine under 0.95 is taken all the same."""
    report = compress(digits, goal(objective="smallest"), metric=Score(0.0, 1.0)).report
    (taken,) = [row for row in report["candidates"] if row["chosen"]]
    assert taken["cosine"] >= 0.95
    assert not report["damage"]


def test_time_is_kept_for_cuts(digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores take nearly all of a search: some of its time is for cut models all the same, and then for what is left of
    quantization."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(search_time, "time", SimpleNamespace(monotonic=lambda: now.s))

    def slow(path: str, evaluation: Any) -> float:
        now.s += 4
        return 0.9

    report = compress(digits, goal(objective="fastest", search_time_s=24), data=samples, metric=slow).report
    names = [row["name"] for row in report["candidates"]]
    assert any(name.startswith("prune") for name in names)
    assert any(name.startswith("quantize") for name in names)


def test_a_missing_score_is_no_reason_where_it_changes_nothing(digits: Model, samples: InputData) -> None:
    """With the metric on another machine: what is larger than the smallest that holds needs no score, and the report
    says that another is smaller; what is smaller still waits for its own."""

    def candidates(**scores: float) -> list[FamilyMember]:
        asked = goal(objective="smallest", techniques=["quantize"], client_metric={"name": "words", "scores": scores})
        result = compress(digits, asked, data=samples)
        return sorted(result.candidates, key=lambda row: row["size_bytes"])

    offered = candidates()
    waiting = [row for row in offered if row["reason"] == "words has not scored it yet"]
    assert len(waiting) >= 3
    (original,) = [row for row in offered if row["id"] == "original"]
    rows = candidates(**{original["sha256"]: 0.9, waiting[1]["sha256"]: 0.9})
    taken = next(place for place, row in enumerate(rows) if row["chosen"])
    assert rows[taken]["sha256"] == waiting[1]["sha256"]
    assert "words has not scored it yet" in [row["reason"] for row in rows[:taken]]
    assert "words has not scored it yet" not in [row["reason"] for row in rows[taken:]]
    assert "another is smaller" in [row["reason"] for row in rows[taken:]]
