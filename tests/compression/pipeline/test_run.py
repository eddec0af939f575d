"""A recipe run from end to end on a real model, in-process."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
from modelpress_compression import EvaluationData, InputData, Model, Recipe, compress
from modelpress_compression.errors import InvalidDataError, TimeLimitError
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.pipeline import stages_of
from modelpress_compression.report.build import report_schema
from modelpress_compression.runtime import run, session_of
from modelpress_compression.search import steps


def recipe(*entries: dict, **sections: object) -> Recipe:
    return Recipe.from_dict({"version": 1, "steps": list(entries), "benchmark": {"rounds": 5}, **sections})


def outputs(model: Model, samples: InputData) -> np.ndarray:
    with session_of(model) as session:
        return next(iter(run(session, next(samples.feeds(64))).values()))


@pytest.mark.usefixtures("timed_by_size")
def test_the_whole_way(digits: Model, samples: InputData, labelled: EvaluationData, tmp_path: Path) -> None:
    """The default preset gives a model that still reads digits, and a report that fits its schema."""
    result = compress(digits, Recipe.preset("default"), data=samples, eval_data=labelled, job="j")
    report = result.report
    jsonschema.validate(report, report_schema())
    assert report["accuracy"]["original"] >= 0.97
    assert report["accuracy"]["drop"] <= 0.01
    assert report["fidelity"]["data"] == "provided"
    names = [step["name"] for step in report["steps"]]
    assert (names[0], names[-1]) == ("fuse", "quantize")
    (chosen,) = [candidate for candidate in result.candidates if candidate["chosen"]]
    assert "quantize " in chosen["name"]
    assert any(candidate["name"].startswith("prune ") for candidate in result.candidates)
    assert report["size_ratio"] > 4
    written = {artifact.kind: artifact.files for artifact in result.write(tmp_path)}
    assert json.loads(written["report.json"][0].read_text()) == report
    content = written["model"][0].read_bytes()
    assert report["optimized"]["sha256"] == sha256(content).hexdigest()
    assert report["optimized"]["size_bytes"] == len(content)
    assert "<html" in written["report.html"][0].read_text()


def test_a_metric_without_labels_is_not_forgotten(digits: Model, samples: InputData) -> None:
    """It was asked for, and needs them; cosine compares the outputs themselves."""
    for metric, warned in (("top1", True), ("cosine", False)):
        asked = recipe({"fuse": {}}, constraints={"metric": metric})
        warnings = compress(digits, asked, data=samples).report["warnings"]
        assert any("top1 was not measured" in text for text in warnings) is warned


def test_labels_beside_the_data_do_not_judge(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """They are for training; who gave them in the hope of a metric is told where they belong."""
    given = {**samples.head(32).arrays, "labels": np.zeros(32, np.int64)}
    for judge, warned in ((None, True), (labelled, False)):
        report = compress(digits, recipe({"fuse": {}}), data=given, eval_data=judge).report
        assert any("training alone" in text for text in report["warnings"]) is warned


def test_the_original_is_not_touched(digits: Model, samples: InputData) -> None:
    """The model that was given answers exactly as before."""
    before = outputs(digits, samples)
    compress(digits, recipe({"prune": {"sparsity": 0.9}}, {"quantize": {"scheme": "dynamic"}}), data=samples)
    np.testing.assert_array_equal(outputs(digits, samples), before)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "model.onnx"}, "model must be a Model, as load(PATH) gives it; it is of type str"),
        ({"recipe": "default"}, "recipe must be a Recipe"),
        ({"data": np.zeros((4, 1, 28, 28), np.float32)}, "data must be a mapping of names to arrays"),
        ({"eval_data": "eval.npz"}, "eval_data must be a mapping of names to arrays"),
    ],
)
def test_arguments_of_other_types(digits: Model, changed: dict[str, Any], told: str) -> None:
    """What each has to be, and what makes it."""
    given = {"model": digits, "recipe": recipe(), **changed}
    with pytest.raises(TypeError) as caught:
        compress(given.pop("model"), given.pop("recipe"), **given)
    assert told in str(caught.value)


def test_no_steps_only_convert_and_measure(digits: Model, samples: InputData) -> None:
    """An empty recipe gives the model back, measured against itself."""
    report = compress(digits, recipe(), data=samples).report
    assert report["steps"] == []
    # The exporter's debug metadata is not written again.
    assert report["size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert report["fidelity"]["agreement"] == 1.0


def test_progress_never_falls_and_reaches_one(digits: Model, samples: InputData) -> None:
    """Stages come in the order that was announced, and the fraction only rises."""
    seen: list[tuple[str, int, float]] = []
    asked = recipe({"fuse": {}}, {"quantize": {"scheme": "dynamic"}})
    compress(
        digits,
        asked,
        data=samples,
        on_progress=lambda stage, index, count, fraction, message: seen.append((stage, index, fraction)),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == list(stages_of(asked))
    fractions = [fraction for _, _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.usefixtures("timed_by_size")
def test_without_data_inputs_are_synthetic(digits: Model) -> None:
    """The report says so, and auto does not trust static ranges that nothing vouches for."""
    result = compress(digits, Recipe.preset("default"))
    assert result.report["fidelity"]["data"] == "synthetic"
    static = [candidate for candidate in result.candidates if "static" in candidate["name"]]
    assert not any(candidate["chosen"] for candidate in static)
    assert any("--data" in candidate["reason"] for candidate in static)


def test_static_on_synthetic_inputs_warns(digits: Model) -> None:
    """Asked for by name, static is done without data, and a warning says what that means."""
    report = compress(digits, recipe({"quantize": {"scheme": "static"}})).report
    assert any("synthetic" in warning for warning in report["warnings"])


@pytest.mark.usefixtures("timed_by_size")  # a pruned model that seemed slower, and is no smaller, would not come back
@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        ({"max_drop": 0.001}, "max_drop"),
        ({"max_size_bytes": 100}, "max_size_bytes"),
        ({"max_latency_ms": 1e-9}, "max_latency_ms"),
    ],
)
def test_constraints_that_are_not_met_are_named(
    digits: Model, samples: InputData, labelled: EvaluationData, constraints: dict[str, float], said: str
) -> None:
    """The result is delivered, and the report names each constraint that it misses."""
    asked = recipe({"prune": {"sparsity": 0.97}}, constraints=constraints)
    constraints_of = compress(digits, asked, data=samples, eval_data=labelled).report["constraints"]
    assert not constraints_of["met"]
    assert any(said in violation for violation in constraints_of["violations"])


def test_data_that_does_not_fit_is_refused(digits: Model) -> None:
    """Arrays are checked before anything runs."""
    with pytest.raises(InvalidDataError):
        compress(digits, recipe(), data={"x": np.zeros((3, 2, 28, 28), np.float32)})


def test_time_limit(digits: Model, samples: InputData) -> None:
    """A job without time ends in TimeLimitError."""
    with pytest.raises(TimeLimitError):
        compress(digits, recipe({"fuse": {}}), data=samples, time_limit_s=0.0)


class Ruin:
    """A pass that breaks the model: every weight times `factor`."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, model: Model, context: Context) -> PassResult:
        work = model.clone()
        for value in work.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self._factor), name=value.name)
        return PassResult(work, {"ruined": 1})


class Inflate:
    """A pass that makes a model larger: layers that do nothing to the input."""

    def __call__(self, model: Model, context: Context) -> PassResult:
        work = model.clone()
        value = work.graph.inputs[0]
        users = list(value.uses())
        current = value
        rng = np.random.default_rng(1)
        for index in range(30):
            # Too small to change a sum, and nothing that a file could hold in fewer bytes.
            dust = (1e-30 * rng.random((1, 1, 28, 28))).astype(np.float32)
            zeros = ir.Value(name=f"zeros_{index}", const_value=ir.tensor(dust, name=f"zeros_{index}"))
            work.graph.register_initializer(zeros)
            node = ir.node(
                "Max" if index % 2 else "Add", [current, current if index % 2 else zeros], name=f"idle_{index}"
            )
            node.outputs[0].name = f"idle_{index}"
            work.graph.insert_before(users[0][0], node)
            current = node.outputs[0]
        for user, position in users:
            user.replace_input_with(position, current)
        return PassResult(work, {"inflated": 1})


def replace_technique(monkeypatch: pytest.MonkeyPatch, made: object) -> None:
    monkeypatch.setattr(steps, "TECHNIQUES", {"fuse": SimpleNamespace(make_pass=lambda config: made)})


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_step_that_breaks_the_model_is_undone(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are not finite undo the step; the model stays as it was and a warning says so."""
    replace_technique(monkeypatch, Ruin(float("inf")))
    result = compress(digits, recipe({"fuse": {}}), data=samples)
    np.testing.assert_array_equal(outputs(result.model, samples), outputs(digits, samples))
    assert result.report["steps"][0]["changes"] == {}
    assert any("undone" in warning for warning in result.report["warnings"])


@pytest.mark.usefixtures("timed_by_size")
def test_a_worse_model_is_not_given_back(digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower and not smaller: the model comes back as it was, and a warning says so."""
    replace_technique(monkeypatch, Inflate())
    result = compress(digits, recipe({"fuse": {}}), data=samples)
    assert result.report["size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert any("returned as it was" in warning for warning in result.report["warnings"])


def test_auto_holds_the_task_metric(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """With labels, a candidate that loses more of the metric than allowed is dropped with the figure."""
    wrong = replace(labelled, labels=run_labels(digits, labelled))
    asked = recipe({"quantize": {"scheme": "auto"}}, constraints={"max_drop": 0.0})
    report = compress(digits, asked, data=samples, eval_data=wrong).report
    assert report["accuracy"]["original"] == 1.0
    assert report["constraints"]["met"]


def run_labels(model: Model, data: EvaluationData) -> np.ndarray:
    """The model's own answers as labels, so that any change of class is a fall of the metric."""
    with session_of(model) as session:
        return np.concatenate([next(iter(run(session, feed).values())).argmax(1) for feed in data.inputs.feeds(100)])
