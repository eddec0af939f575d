"""report.json: its schema, and what its derived figures are."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest
from modelpress_compression.measure.accuracy import Accuracy
from modelpress_compression.measure.stats import LayerStats
from modelpress_compression.report.build import MAX_LAYERS, ReportInputs, build_report, layer_rows, report_schema
from modelpress_compression.report.environment import environment


@pytest.mark.parametrize("name", ["inputs", "bare_inputs"])
def test_reports_follow_their_schema(name: str, request: pytest.FixtureRequest) -> None:
    """A full report and a bare one validate, and are JSON as they stand."""
    report = build_report(request.getfixturevalue(name))
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_schema_refuses_what_is_missing(inputs: ReportInputs) -> None:
    """Every field of the contract is required, at the top and within the models."""
    schema = jsonschema.Draft202012Validator(report_schema())
    for field in ("schema_version", "job", "recipe", "size_ratio", "latency", "fidelity", "accuracy", "environment"):
        report = build_report(inputs)
        del report[field]
        assert not schema.is_valid(report), field
    for role in ("original", "optimized"):
        report = build_report(inputs)
        del report[role]["sha256"]
        assert not schema.is_valid(report), role


def test_derived_figures(inputs: ReportInputs) -> None:
    """The ratio is of ONNX sizes; constraints are met where nothing is violated; a warning stands once."""
    report = build_report(inputs)
    assert report["size_ratio"] == 4.0
    assert report["constraints"] == {"met": False, "violations": ["top1 falls by 0.02, more than max_drop 0.01"]}
    assert build_report(replace(inputs, violations=()))["constraints"]["met"] is True
    assert report["warnings"] == ["calibrated on synthetic inputs"]
    assert report["steps"][1]["skipped"][-1] == {"node": "head", "reason": "excluded"}


def test_what_is_not_finite_is_null(inputs: ReportInputs) -> None:
    """JSON has no infinity: such figures were not measured."""
    accuracy = Accuracy("mse", 3, 0.1, float("inf"), float("inf"), lower_is_better=True)
    report = build_report(replace(inputs, accuracy=accuracy, candidates=[{"name": "c", "drop": float("nan")}]))
    figures = {"metric": "mse", "samples": 3, "original": 0.1, "optimized": None, "drop": None}
    assert report["accuracy"] == figures | {"lower_is_better": True}
    assert report["candidates"] == [{"name": "c", "drop": None}]


def test_layers_belong_together_by_name(inputs: ReportInputs) -> None:
    """A suffix that a quantizer appends does not make another layer; a layer without partner has null."""
    rows = {row["name"]: row for row in build_report(inputs)["layers"]}
    assert (rows["conv_1"]["original_bytes"], rows["conv_1"]["optimized_bytes"]) == (4000, 1000)
    assert rows["conv_1"]["op_type"] == "Conv"
    assert (rows["fc"]["original_bytes"], rows["fc"]["optimized_bytes"]) == (80, None)


def test_layers_are_bounded() -> None:
    """The largest stand alone, the rest are summed: no byte is lost."""
    layers = [LayerStats(f"n{index}", "Conv", 1, index + 1, None) for index in range(100)]
    rows = layer_rows(layers, layers)
    assert len(rows) == MAX_LAYERS + 1
    assert rows[0]["original_bytes"] == 100
    assert rows[-1]["layers"] == 60
    assert sum(row["original_bytes"] for row in rows) == sum(range(101))


def test_environment_names_machine_and_versions() -> None:
    """CPU, cores and the versions of what was measured with."""
    found = environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["onnxruntime"][0].isdigit()
    assert isinstance(found["instructions"], list)
