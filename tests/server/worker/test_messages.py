"""Messages of the API to the engine's types and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.inspection import Finding, Inspection
from modelpress_compression.loaders.formats import FORMATS
from modelpress_compression.measure.latency import Speedup
from modelpress_compression.recipe import Recipe, presets
from modelpress_compression.specs import DTYPES, TensorSpec
from modelpress_protos import recipe as recipe_language
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2
from modelpress_server.worker import messages

dims = st.one_of(st.integers(0, 2**62), st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.none())
specs = st.builds(TensorSpec, st.text(min_size=1, max_size=20), st.sampled_from(DTYPES), st.lists(dims).map(tuple))


@given(specs)
def test_specs_survive(spec: TensorSpec) -> None:
    """Name, type, fixed, dynamic and unknown dimensions, and scalars come back as they were."""
    assert messages.spec_from_proto(messages.spec_to_proto(spec)) == spec


@pytest.mark.parametrize("name", [row.name for row in FORMATS])
def test_every_format_has_its_number(name: str) -> None:
    """The engine's names and the API's enum agree."""
    assert messages.format_from_proto(messages.format_to_proto(name)) == name


def test_the_enum_has_no_format_that_the_engine_lacks() -> None:
    """And the other way round."""
    values = [value for value in common_pb2.ModelFormat.values() if value]
    assert {messages.format_from_proto(value) for value in values} == {row.name for row in FORMATS}


@pytest.mark.parametrize("name", list(presets()))
def test_recipes_arrive_as_they_are(name: str) -> None:
    """A preset that travelled as a message is the preset."""
    recipe = Recipe.preset(name)
    assert messages.recipe_from_proto(recipe_language.from_dict(recipe.to_dict())) == recipe


def test_provenance_is_the_uploaded_file() -> None:
    """What the client converted keeps its own format and digest."""
    source = model_service_pb2.SourceFile(format=common_pb2.MODEL_FORMAT_SAFETENSORS)
    source.digest.sha256, source.digest.size_bytes = bytes(range(32)), 17
    found = messages.provenance_from_proto(source)
    assert (found.format, found.sha256, found.size_bytes) == ("safetensors", bytes(range(32)).hex(), 17)


@pytest.mark.parametrize("macs", [None, 0, 10**12])
def test_an_inspection_keeps_what_is_unknown_unset(macs: int | None) -> None:
    """MACs that could not be counted are not zero."""
    findings = (Finding("WARNING", "LOADER", "careful"), Finding("BLOCKING", "X", "no"), Finding("INFO", "Y", "so"))
    spec = TensorSpec("x", "float32", ("batch", 3))
    message = messages.inspection_to_proto(
        Inspection((spec,), (spec,), {"Conv": 2}, 5, 20, macs, 20, "pytorch 2", findings)
    )
    assert message.HasField("macs") == (macs is not None)
    assert message.op_counts["Conv"] == 2
    assert [item.severity for item in message.findings] == [2, 3, 1]
    assert messages.spec_from_proto(message.inputs[0]) == spec


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    """No labels, no accuracy; no classes, no agreement: unset, not zero."""
    report: dict[str, Any] = {
        "original": {"onnx_size_bytes": 100}, "optimized": {"size_bytes": 25}, "latency": [], "accuracy": None,
        "fidelity": {"top1_agreement": None}, "constraints": {"met": False, "violations": ["too slow"]},
    }  # fmt: skip
    summary = messages.summary_from_report(report)
    assert (summary.original_size_bytes, summary.optimized_size_bytes) == (100, 25)
    assert not summary.HasField("speedup")
    assert summary.speed_verdict == job_service_pb2.SPEED_VERDICT_UNSPECIFIED
    assert not summary.HasField("trusted")
    assert not summary.HasField("accuracy_drop")
    assert not summary.HasField("top1_agreement")
    assert not summary.constraints_met


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.1, 1.3, job_service_pb2.SPEED_VERDICT_FASTER),
        (0.9, 1.3, job_service_pb2.SPEED_VERDICT_NOT_DISTINGUISHABLE),
        (0.9, 0.95, job_service_pb2.SPEED_VERDICT_SLOWER),
    ],
)
def test_a_summary_says_what_the_interval_allows(low: float, high: float, verdict: int) -> None:
    """The speed-up comes with its interval, the engine's own verdict, and whether other work disturbed it."""
    report: dict[str, Any] = {
        "original": {"onnx_size_bytes": 100}, "optimized": {"size_bytes": 25}, "accuracy": None,
        "latency": [{"speedup": Speedup((low + high) / 2, low, high).to_dict()}], "fidelity": None,
        "measurement": {"contention": 1.5, "trusted": True}, "constraints": {"met": True, "violations": []},
    }  # fmt: skip
    summary = messages.summary_from_report(report)
    assert (summary.speedup_low, summary.speedup_high, summary.speed_verdict) == (low, high, verdict)
    assert (summary.contention, summary.trusted) == (1.5, True)
