"""Lists and single jobs on the terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from modelpress_client.cli.report_rows import main_rows
from modelpress_client.cli.tables import print_job, print_jobs, print_models
from modelpress_client.report import Report
from modelpress_client.resources import Model
from modelpress_protos.v1 import common_pb2 as common
from modelpress_protos.v1 import job_service_pb2 as jobs
from modelpress_protos.v1 import model_service_pb2 as models
from rich.console import Console

ULID = "01m8jrdkm0ejmh2h7g98ahv9zp"


def job(state: int = jobs.JOB_STATE_SUCCEEDED, **summary: Any) -> jobs.Job:
    """A job; where it succeeded, from 89.8 to 21.9 kB."""
    made = jobs.Job(name=f"projects/default/jobs/{ULID}")
    made.state = state  # type: ignore[assignment]  # plain numbers are fine
    made.spec.model = f"projects/default/models/{ULID}"
    made.create_time.FromSeconds(1_700_000_000)
    if state == jobs.JOB_STATE_SUCCEEDED:
        sizes = {"original_size_bytes": 89_800, "optimized_size_bytes": 21_900, "constraints_met": True}
        made.summary.CopyFrom(jobs.ReportSummary(**{**sizes, **summary}))
    return made


def measured(speedup: float, low: float, high: float, verdict: str, **more: Any) -> jobs.Job:
    number = jobs.SpeedVerdict.Value(f"SPEED_VERDICT_{verdict}")
    return job(speedup=speedup, speedup_low=low, speedup_high=high, speed_verdict=number, **more)


def shown(width: int, render: Any, what: Any) -> list[str]:
    console = Console(file=(stream := StringIO()), width=width, color_system=None)
    render(console, what)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("made", "result"),
    [
        (measured(1.69, 1.62, 1.75, "FASTER"), "89.8 → 21.9 kB, 1.69x faster"),
        (measured(0.8, 0.78, 0.81, "SLOWER"), "89.8 → 21.9 kB, 1.25x slower"),
        (measured(0.98, 0.95, 1.02, "NOT_DISTINGUISHABLE"), "89.8 → 21.9 kB, as fast"),
        (job(speedup=0.98), "89.8 → 21.9 kB, 0.98 times the speed"),
        (job(), "89.8 → 21.9 kB"),
        (job(original_size_bytes=1_200_000), "1.2 MB → 21.9 kB"),
        (job(constraints_met=False), "89.8 → 21.9 kB; a constraint is not met"),
    ],
)
def test_a_list_has_a_word_beside_each_speed(made: jobs.Job, result: str) -> None:
    """The verdict of the interval decides it; a job of an older server has its figure."""
    assert shown(200, print_jobs, [made])[1].endswith(f"11-14 22:13  {result}")


def test_lists_fit_80_columns() -> None:
    """Full names, and the usual result in one line; the rest wraps."""
    running = job(jobs.JOB_STATE_RUNNING)
    running.progress.stage, running.progress.fraction = "search", 0.45
    failed = job(jobs.JOB_STATE_FAILED)
    failed.error.message = "The model could not be read: it is not one of the formats that this server takes."
    listed = shown(80, print_jobs, [measured(1.69, 1.6, 1.7, "FASTER"), running, failed])
    assert max(map(len, listed)) <= 80
    assert all(ULID in line for line in listed[1:3])
    model = models.Model(name=f"projects/default/models/{ULID}", display_name="a_model_with_a_rather_long_name.onnx")
    model.state, model.format = models.Model.STATE_PROCESSING, common.MODEL_FORMAT_TORCH_EXPORT
    model.create_time.FromSeconds(1_700_000_000)
    assert max(map(len, shown(80, print_models, [Model(model)]))) <= 80
    assert "TORCH_EXPORT" in shown(120, print_models, [Model(model)])[1]
    assert f"{ULID}  11-14" in shown(120, print_jobs, [running])[1]


def test_a_job_shows_the_interval() -> None:
    """With a warning where other work on the machine disturbed the measurement."""
    quiet = "\n".join(shown(80, print_job, measured(0.98, 0.95, 1.02, "NOT_DISTINGUISHABLE", trusted=True)))
    assert "Speed    as fast; round by round 0.98 [0.95, 1.02]" in quiet
    assert "Size     89.8 → 21.9 kB, 4.10x smaller" in quiet
    assert "relied" not in quiet
    busy = shown(200, print_job, measured(2.0, 1.5, 9.0, "FASTER", trusted=False, contention=3.2))
    assert any(line.endswith("not to be relied on: wall time was 3.2 times CPU time") for line in busy)
    assert not any(line.startswith(("Size", "Speed")) for line in shown(80, print_job, job(jobs.JOB_STATE_QUEUED)))


def test_a_report_says_which_figure_its_word_is_of(fake_server: Any) -> None:
    """Where the medians of all rounds contradict the median round, "round by round" stands beside the latter."""
    row = fake_server.report["latency"][0]
    row["speedup"] = {"median": 0.95, "low": 0.93, "high": 0.97}
    assert "1.05x slower round by round [0.93, 0.97]" in [
        item.change for item in main_rows(Report.from_dict(fake_server.report))
    ]
    row["optimized"]["p50_ms"] = 0.22
    assert "1.05x slower [0.93, 0.97]" in [item.change for item in main_rows(Report.from_dict(fake_server.report))]


@pytest.mark.parametrize(("lower", "change"), [(False, "-0.0200"), (True, "+0.0200")])
def test_a_metric_moves_the_way_its_figures_do(fake_server: Any, lower: bool, change: str) -> None:
    """A drop of 0.02 is a fall of top1, and a rise of an error rate; both are for the worse."""
    fake_server.report["accuracy"] |= {"drop": 0.02, "lower_is_better": lower}
    row = main_rows(Report.from_dict(fake_server.report))[-1]
    assert (row.change, row.good) == (change, False)
