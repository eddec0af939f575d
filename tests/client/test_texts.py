"""What people write and read: inputs, recipes, names, reports, errors, figures."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_client import errors, names, recipes
from modelpress_client.cli import units
from modelpress_client.cli.progress import describe
from modelpress_client.cli.report_markdown import to_markdown
from modelpress_client.cli.report_rows import changes_text, fidelity_lines
from modelpress_client.cli.report_text import print_report
from modelpress_client.errors import INPUT_REASONS, InvalidRecipeError, ModelpressError, ServerError, UsageError
from modelpress_client.inputs import format_input, parse_input, parse_inputs
from modelpress_client.jsonable import to_json
from modelpress_client.report import Report, StepReport
from modelpress_client.resources import job_event
from modelpress_protos.v1 import common_pb2
from modelpress_protos.v1.job_service_pb2 import JOB_STATE_FAILED, JOB_STATE_RUNNING, Job, Progress
from modelpress_protos.v1.server_service_pb2 import Preset
from rich.console import Console

# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["x:float32[batch,1,28,28]", "ids:int64[N,?]", "step:int64[]", "a/b:0:bool[1]", "serving.x:bfloat16[0]"]
)
def test_inputs_round_trip(text: str) -> None:
    """The text that was read is the text that is written."""
    assert format_input(parse_input(text)) == text


def test_inputs_may_have_blanks() -> None:
    """Blanks around the parts do not matter."""
    assert format_input(parse_input(" x : float32 [ batch , 3 ] ")) == "x:float32[batch,3]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x", "write NAME:DTYPE"),
        ("x:float32", "write NAME:DTYPE"),
        ("x:float33[1]", "'float33' is not an element type"),
        ("x:float32[-1]", "'-1' is not a dimension"),
        ("x:float32[1,,2]", "an empty text is not a dimension"),
        ("x:float32[99999999999999999999]", "too large"),
        ("x:float32[" + ",".join("1" * 40) + "]", "40 dimensions"),
    ],
)
def test_wrong_inputs(text: str, complaint: str) -> None:
    """The message says which part is wrong."""
    with pytest.raises(UsageError, match=complaint.replace("[", r"\[")):
        parse_input(text)


def test_inputs_come_once() -> None:
    """Two inputs of one name are a mistake."""
    with pytest.raises(UsageError, match="given twice"):
        parse_inputs(["x:float32[1]", "x:int64[1]"])


@given(st.text(max_size=40))
def test_any_text_is_an_input_or_refused(text: str) -> None:
    """Nothing but UsageError is raised, and what is read can be written and read again."""
    try:
        spec = parse_input(text)
    except UsageError:
        return
    assert parse_input(format_input(spec)) == spec


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("version: 1\nversion: 1\n", "line 2, column 1: the key 'version' is given twice"),
        ("steps: [}", "is not YAML: line 1"),
        ("- a\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: 2024-99-99", "is not YAML"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, text: str, complaint: str) -> None:
    """Each says what is wrong, with the line where there is one."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InvalidRecipeError, match=complaint):
        recipes.load_yaml(tmp_path / "r.yaml")


def test_recipe_files_have_a_limit(tmp_path: Path) -> None:
    """A file that is far too large is not parsed."""
    (tmp_path / "r.yaml").write_bytes(b"#" * 300_000)
    with pytest.raises(UsageError, match="256 KiB"):
        recipes.load_yaml(tmp_path / "r.yaml")


def test_yaml_of_a_recipe_is_a_recipe(tmp_path: Path) -> None:
    """What `recipes NAME` prints, --recipe takes."""
    document = {"version": 1, "steps": [{"fuse": {}}, {"prune": {"structure": "n:m", "exclude": ["*head*"]}}]}
    recipe = recipes.build(document)
    (tmp_path / "r.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.build(recipes.load_yaml(tmp_path / "r.yaml")) == recipe


def test_what_is_asked_for_replaces_the_limits_of_a_goal() -> None:
    """A goal in a file has limits of its own, which would count before those of the options."""
    document = {"version": 1, "goal": {"max_drop": 0.01, "max_size_bytes": 3000, "min_speedup": 2.0}}
    recipe = recipes.build(document, overrides=["constraints.max_size_bytes=9000"], max_drop=0.02)
    assert recipe.HasField("goal")
    assert not recipe.goal.HasField("max_drop")
    assert not recipe.goal.HasField("max_size_bytes")
    assert recipe.goal.min_speedup == 2.0
    assert (recipe.constraints.max_drop, recipe.constraints.max_size_bytes) == (0.02, 9000)
    assert recipes.build({"version": 1, "goal": {"max_drop": 0.01}}, max_drop=0.02).HasField("goal")


def test_a_step_that_a_goal_lacks() -> None:
    """Overriding one names the presets that have it, the one made for that first; no other preset is named."""
    presets = [
        Preset(name=name, recipe=recipes.build({"version": 1, **content}))
        for name, content in {
            "default": {"goal": {"objective": "balanced"}},
            "a-static": {"steps": [{"fuse": {}}, {"quantize": {}}]},
            "auto": {"steps": [{"fuse": {}}, {"quantize": {"scheme": "auto"}}]},
            "twice": {"steps": [{"quantize": {}}, {"quantize": {}}]},
        }.items()
    ]
    goal = {"version": 1, "goal": {"objective": "balanced"}}
    with pytest.raises(InvalidRecipeError) as caught:
        recipes.build(goal, overrides=["quantize.scheme=static"], presets=presets)
    assert "no quantize step; with --recipe auto there is one (also with a-static)" in str(caught.value)
    with pytest.raises(InvalidRecipeError, match=r"no prune step$"):
        recipes.build(goal, overrides=["prune.sparsity=0.5"], presets=presets)
    with pytest.raises(InvalidRecipeError, match="add one to its steps"):
        recipes.build({"version": 1, "steps": [{"fuse": {}}]}, overrides=["quantize.scheme=static"], presets=presets)


# --- names -------------------------------------------------------------------------------------------------------


def test_names() -> None:
    """The last part alone will do where the collection is known."""
    assert names.full_name("m1", "models", "p") == "projects/p/models/m1"
    assert names.full_name("models/m1", None, "p") == "projects/p/models/m1"
    assert names.full_name("projects/q/jobs/j", "jobs", "p") == "projects/q/jobs/j"
    for wrong in ("", "..", "a/b/c", "projects/p/models/m", "jobs/a b"):
        with pytest.raises(UsageError):
            names.full_name(wrong, "jobs", "p")


# --- reports -----------------------------------------------------------------------------------------------------


def test_report_is_typed_and_complete(fake_server: Any) -> None:
    """Fields are typed; to_dict is the document; what was not measured is None."""
    report = Report.from_json(json.dumps(fake_server.report))
    assert report.latency[0].speedup.median == 1.93
    assert report.optimized.macs is None
    assert report.fidelity is not None
    assert report.fidelity.outputs["y"].sqnr_db == 41.2
    assert report.to_dict() == fake_server.report


def test_report_without_the_optional_parts(fake_server: Any) -> None:
    """No labels, no constraints, no latency."""
    document = {**fake_server.report, "accuracy": None, "fidelity": None, "latency": [], "constraints": None}
    report = Report.from_dict(document)
    assert report.accuracy is None
    assert report.constraints.met
    assert to_markdown(report)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 2}', "null"])
def test_what_is_no_report(content: str) -> None:
    """A clear error instead of a KeyError."""
    with pytest.raises(ServerError, match="update the client"):
        Report.from_json(content)


def test_markdown_cannot_be_injected(fake_server: Any) -> None:
    """Names come from the model: nothing in them becomes markup."""
    fake_server.report["steps"][0]["skipped"] = [{"node": "<script>|`x`[a](b)", "reason": "r\n# title"}]
    text = to_markdown(Report.from_dict(fake_server.report))
    assert "<script>" not in text
    assert "\n# title" not in text
    assert r"\|\`x\`\[a\](b)" in text


def test_advice_is_code_in_markdown(fake_server: Any) -> None:
    """It can be copied: nothing in the command is escaped."""
    fake_server.report["advice"] = [{"text": "a_b", "command": "compress-client upload MODEL --max-drop 0.01 [a_b]"}]
    text = to_markdown(Report.from_dict(fake_server.report))
    assert r"- a\_b `compress-client upload MODEL --max-drop 0.01 [a_b]`" in text


def test_equal_outputs_are_identical(fake_server: Any) -> None:
    """As report.html says; one sample is no samples."""
    fake_server.report["fidelity"]["outputs"]["y"] = {"cosine": 1.0, "sqnr_db": 200.0, "max_abs_error": 0.0}
    fake_server.report["fidelity"]["samples"] = 1
    lines = fidelity_lines(Report.from_dict(fake_server.report))
    assert lines[0].startswith("measured on 1 sample of")
    assert lines[-1] == "y: identical"


def test_why_no_step_was_taken(fake_server: Any) -> None:
    """Where the original came back, what spoke against each candidate stands in no step."""
    rows = [{"id": f"c{number}", "name": f"way {number}", "reason": reason} for number, reason in enumerate("aab")]
    fake_server.report.update(steps=[], candidates=rows)
    report = Report.from_dict(fake_server.report)
    for text in (printed(report), to_markdown(report)):
        assert text.index("No step was taken") < text.index("2 candidates: a") < text.index("1 candidate: b (way 2)")


def printed(report: Report) -> str:
    console = Console(record=True, width=120, file=StringIO())
    print_report(console, report)
    return console.export_text(styles=True)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_narrow_terminals_show_all_figures(fake_server: Any, width: int) -> None:
    """The change is what people look for: other columns give way before it is cut off."""
    console = Console(record=True, width=width, file=StringIO())
    print_report(console, Report.from_dict(fake_server.report))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert all(words in text for words in ("(torchscript)", "3.64x smaller", "1.93x faster", "[1.80, 2.00]"))


def test_what_was_left_alone_is_counted(fake_server: Any) -> None:
    """One line for each reason, on the terminal and in Markdown; of single nodes the name; rare reasons as a number."""
    rows = [{"count": 12, "what": "node", "reason": "too small", "names": [f"conv_{index}" for index in range(12)]}]
    rows += [{"count": 1, "what": "candidate", "reason": f"reason {index}", "names": ["static"]} for index in range(5)]
    fake_server.report["steps"][0]["left_alone"] = rows
    report = Report.from_dict(fake_server.report)
    for text in (printed(report), to_markdown(report)):
        assert "12 nodes: too small" in text
        assert "1 candidate: reason 0 (static)" in text
        assert "2 other reasons: see the report" in text
        assert "conv" not in text.split("12 nodes")[1].split("1 candidate")[0]


def test_a_damaged_result_is_red(fake_server: Any) -> None:
    """Also where damage was allowed and every constraint is met."""
    fake_server.report["verdict"] = "3 times smaller"
    assert "\x1b[1;31m" not in printed(Report.from_dict(fake_server.report))
    fake_server.report["damage"] = "cosine 0.51"
    report = Report.from_dict(fake_server.report)
    assert "\x1b[1;31m3 times smaller" in printed(report).replace("\n", "")
    assert "no longer resembles the original: cosine 0.51" in to_markdown(report)


def test_notes_of_a_step_are_shown(fake_server: Any) -> None:
    """On the terminal and in Markdown; a report from before there were notes has none."""
    before = Report.from_dict(fake_server.report)
    assert before.steps[0].notes == ()
    fake_server.report["steps"][0]["notes"] = ["No saturation without VNNI: 3 of 3 layers certified"]
    report = Report.from_dict(fake_server.report)
    assert "3 of 3 layers certified" in to_markdown(report)
    console = Console(record=True, width=120, file=StringIO())
    print_report(console, report)
    assert "3 of 3 layers certified" in console.export_text()


# --- errors ------------------------------------------------------------------------------------------------------


def test_every_reason_has_an_exception() -> None:
    """A reason that the contract gains must be decided on here."""
    of_jobs_only = {"WORKER_OUT_OF_MEMORY", "WORKER_OUT_OF_DISK", "WORKER_TIMEOUT", "WORKER_CRASHED", "QUEUE_TIMEOUT"}
    by_retry_info = {"QUOTA_EXCEEDED", "QUEUE_FULL"}  # RESOURCE_EXHAUSTED says what they are
    all_names = common_pb2.ErrorReason.DESCRIPTOR.values_by_name
    reasons = {name.removeprefix("ERROR_REASON_") for name in all_names}
    assert reasons - {"UNSPECIFIED"} - of_jobs_only - by_retry_info == set(errors._BY_REASON)


def test_input_caused_reasons() -> None:
    """These make the CLI exit with 2."""
    assert {
        "UNSUPPORTED_FORMAT",
        "MODEL_REJECTED",
        "INVALID_INPUTS",
        "INVALID_DATA",
        "UNSUPPORTED_OPERATOR",
        "INVALID_FIELDS",
        "MODEL_NOT_RUNNABLE",
    } == INPUT_REASONS


def test_the_tree_stands_in_the_docstring() -> None:
    """Every exception is in the tree at the top of the module."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ModelpressError)]
    assert found
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in found)


def test_json_of_messages() -> None:
    """Numbers are numbers, enum values have no prefix, digests are hex."""
    job = Job(name="j", state=JOB_STATE_FAILED, attempt=2, last_sequence=2**60)
    job.error.code, job.error.message = 3, "bad"
    job.spec.data.sha256 = b"\x01\xff"
    job.labels["b"], job.labels["a"] = "1", "2"
    assert to_json(job) == {
        "name": "j",
        "spec": {"data": {"sha256": "01ff"}},
        "state": "FAILED",
        "error": {"code": "INVALID_ARGUMENT", "reason": "", "message": "bad", "details": {}},
        "attempt": 2,
        "labels": {"a": "2", "b": "1"},
        "last_sequence": 2**60,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (98_700, "98.7 kB"),
        (2.5e9, "2.5 GB"),
        (999_700, "1 MB"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    """Three digits and a decimal unit."""
    assert units.size(value) == text


def test_what_a_step_did() -> None:
    """Counts as whole numbers, shares and errors as fractions, what did not happen not at all."""
    changes = {"groups_cut": 6, "parameters_removed_share": 0.4661, "weights": 21_840, "layers": 0}
    step = StepReport("prune", {}, changes, (), None, None)
    assert changes_text(step) == "weights 21.8 k, groups cut 6, parameters removed share 0.466"
    assert changes_text(StepReport("fuse", {}, {}, (), None, None)) == "nothing to do"


def test_a_stage_of_two_words() -> None:
    """A technique's name in snake case reads as words where a job stands."""
    progress = Progress(stage="low_rank", stage_index=1, stage_count=4)
    assert describe(job_event("snapshot", 0, JOB_STATE_RUNNING, progress)) == "Low rank (2/4)"
