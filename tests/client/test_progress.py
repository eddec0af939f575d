"""What a watcher is told: where a job stands, and how much time is left."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_client.cli import progress as displays
from modelpress_client.cli.compressing import _tell_warnings
from modelpress_client.cli.eta import SHOWN_AFTER_S, Eta, left_text
from modelpress_client.cli.progress import Bars, Display, Lines, describe, describe_inspection
from modelpress_client.errors import ModelpressError
from modelpress_client.resources import JobEvent, Model, job_event
from modelpress_client.transfers import TransferProgress
from modelpress_protos.v1 import job_service_pb2 as jobs
from modelpress_protos.v1 import model_service_pb2 as models
from rich.console import Console


class Time:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def event(state: int, **progress: Any) -> JobEvent:
    return job_event("progress", 1, state, jobs.Progress(**progress))


# --- the time left -----------------------------------------------------------------------------------------------


def seen(updates: list[tuple[float, float]]) -> tuple[Eta, Time]:
    """An estimate that has seen (seconds since the start, fraction)."""
    time = Time()
    eta, began_s = Eta(time), time.now_s
    for at_s, fraction in updates:
        time.now_s = began_s + at_s
        eta.update(fraction)
    return eta, time


def test_an_even_pace_is_exact() -> None:
    """At a quarter after 10 s, 30 s are left; they pass as the time does."""
    eta, time = seen([(second, second / 40) for second in range(11)])
    assert eta.left_s() == pytest.approx(30)
    time.now_s += 12
    assert eta.left_s() == pytest.approx(18)


def test_it_begins_where_the_watcher_came_in() -> None:
    """A job that is half done when somebody begins to watch has no pace yet; then its pace since counts."""
    eta, _ = seen([(0, 0.5)])
    assert eta.left_s() is None
    eta, _ = seen([(0, 0.5), (10, 0.75)])
    assert eta.left_s() == pytest.approx(10)


def test_nothing_is_said_too_early_or_at_the_end() -> None:
    """Not within the first second, nor of a hundredth, nor of what is done."""
    assert seen([(0, 0), (SHOWN_AFTER_S / 2, 0.5)])[0].left_s() is None
    assert seen([(0, 0), (50, 0.01)])[0].left_s() is None
    assert seen([(0, 0), (50, 1.0)])[0].left_s() is None


def test_standstill_never_reaches_zero() -> None:
    """While nothing comes the time left falls, then slowly grows: it waits for what is known to be missing."""
    eta, time = seen([(0, 0), (10, 0.5)])
    left_s = []
    for _ in range(30):
        time.now_s += 1
        left_s.append(eta.left_s() or 0)
    assert min(left_s) > 3
    assert left_s[:5] == pytest.approx([9, 8, 7, 6, 5])
    assert left_s[-1] > left_s[10]


def test_a_leap_does_not_make_it_jump() -> None:
    """A stage that takes a tenth of its share moves the figure by a part of the difference."""
    eta, time = seen([(second, second / 100) for second in range(21)])
    before_s = eta.left_s()
    time.now_s += 0.2
    eta.update(0.5)
    assert before_s == pytest.approx(80)
    assert 70 < (eta.left_s() or 0) < 80


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1)), min_size=1, max_size=30))
def test_it_is_finite_and_positive(steps: list[tuple[float, float]]) -> None:
    """Whatever comes, back and forth, at once or late."""
    time = Time()
    eta = Eta(time)
    for delay_s, fraction in steps:
        time.now_s += delay_s
        eta.update(fraction)
        left_s = eta.left_s()
        assert left_s is None or 0 <= left_s < 1e6
        assert len(left_text(left_s)) <= 22


@pytest.mark.parametrize(
    ("left_s", "text"),
    [
        (None, ""),
        (0.2, "about 1 s left"),
        (9.2, "about 10 s left"),
        (41, "about 45 s left"),
        (61, "about 1 min 30 s left"),
        (120, "about 2 min left"),
        (3000, "about 50 min left"),
        (7200, "about 2.0 h left"),
    ],
)
def test_time_left_comes_in_steps(left_s: float | None, text: str) -> None:
    """Rounded up, the more coarsely the longer it is."""
    assert left_text(left_s) == text


# --- states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "progress", "text"),
    [
        (jobs.JOB_STATE_QUEUED, {}, "Queued"),
        (jobs.JOB_STATE_QUEUED, {"queue_position": 1}, "Queued, 1 job ahead"),
        (jobs.JOB_STATE_QUEUED, {"queue_position": 3}, "Queued, 3 jobs ahead"),
        (jobs.JOB_STATE_RUNNING, {}, "Preparing"),
        (jobs.JOB_STATE_RUNNING, {"stage": "start_worker"}, "Starting a worker"),
        (jobs.JOB_STATE_RUNNING, {"stage": "search", "stage_index": 1, "stage_count": 4}, "Search (2/4)"),
        (jobs.JOB_STATE_CANCELLING, {}, "Cancelling"),
    ],
)
def test_each_kind_of_waiting_has_its_words(state: int, progress: dict[str, Any], text: str) -> None:
    """The queue with the place in it, the start of a worker, and the stages of the work are told apart."""
    assert describe(event(state, **progress)) == text


@pytest.mark.parametrize(
    ("stage", "ahead", "text"),
    [
        (models.INSPECTION_STAGE_QUEUED, 2, "Queued for inspection, 2 models ahead"),
        (models.INSPECTION_STAGE_QUEUED, 0, "Queued for inspection"),
        (models.INSPECTION_STAGE_STARTING_WORKER, None, "Starting a worker"),
        (models.INSPECTION_STAGE_RUNNING, None, "Inspecting"),
        (models.INSPECTION_STAGE_UNSPECIFIED, None, "Inspecting"),
    ],
)
def test_inspections_too(stage: Any, ahead: int | None, text: str) -> None:
    """A server that does not tell the stage inspects, as far as is known."""
    assert describe_inspection(Model(models.Model(inspection_stage=stage, inspections_ahead=ahead))) == text


# --- displays ----------------------------------------------------------------------------------------------------

WORK = [
    event(jobs.JOB_STATE_QUEUED, queue_position=2),
    event(jobs.JOB_STATE_RUNNING, stage="start_worker", message="its process loads the libraries"),
    event(jobs.JOB_STATE_RUNNING, stage="load", stage_count=4, message="loading the model"),
    event(
        jobs.JOB_STATE_RUNNING,
        stage="search",
        stage_index=1,
        stage_count=4,
        fraction=0.5,
        message="candidate 4 of 9: 61 % smaller, 1.8x",
    ),
]


def show(display: Display, time: Time) -> None:
    """The events, five seconds apart."""
    for item in WORK:
        display.event(item)
        time.now_s += 5


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere than on a terminal: one line each, with what is tried and the time left."""
    time = Time()
    show(Lines(time), time)
    assert capsys.readouterr().err.splitlines() == [
        "Queued, 2 jobs ahead",
        "Starting a worker, its process loads the libraries",
        "Load (1/4): 0 %, loading the model",
        "Search (2/4): 50 %, candidate 4 of 9: 61 % smaller, 1.8x, about 5 s left",
    ]


@pytest.mark.parametrize("display", [Lines, Bars])
def test_what_is_past_is_not_shown(display: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever comes late sees where the job stands, not its history at once, which says nothing of its pace."""
    time = Time()
    with display(time) as shown:
        shown.event(job_event("snapshot", 0, jobs.JOB_STATE_RUNNING, jobs.Progress(stage="search", fraction=0.5)))
        for item in WORK:
            shown.event(replace(item, is_past=True))
        time.now_s += 2
        shown.event(event(jobs.JOB_STATE_RUNNING, stage="search", fraction=0.6, message="on it"))
        assert shown._etas["job"].left_s() == pytest.approx(8)
    assert "Queued" not in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's line has stage, share and time left, the one below what is tried; neither leaves the terminal."""
    stream, at_once, time = StringIO(), StringIO(), Time()
    terminal = Console(file=stream, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(displays, "stderr_console", lambda: terminal)
    with Bars(time) as bars:
        show(bars, time)
        time.now_s -= 5
        bars.transfer(TransferProgress("upload", Path("a_model_with_a_long_name.optimized.onnx"), 1, 5))
        bars.event(WORK[-1])
        Console(file=at_once, width=width, color_system=None).print(bars._progress)
    lines = at_once.getvalue().splitlines()
    assert len(lines) == 3
    assert all(len(line.rstrip()) <= width for line in lines)
    if width >= 80:
        assert re.match(r"Search \(2/4\) .* 50 % \d:\d\d:\d\d about 5 s left", lines[0])
    assert lines[-1].strip() == "candidate 4 of 9: 61 % smaller, 1.8x"
    assert "✓ start a worker 5.0 s" in stream.getvalue()


# --- warnings ----------------------------------------------------------------------------------------------------


class Logged:
    """A job with a log, whose stream breaks off in the end."""

    async def logs(self, *, follow: bool) -> Any:
        assert follow
        for severity, text in (("INFO", "loading"), ("WARNING", "all samples are the same"), ("INFO", "timing")):
            yield jobs.StreamJobLogsResponse(severity=severity, text=text)
        raise ModelpressError("The server went away.")


async def test_warnings_of_a_job_are_told_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    """Those alone; a log that cannot be read to its end fails nothing."""
    await _tell_warnings(Logged(), Lines())
    assert capsys.readouterr().err == "Warning: all samples are the same\n"
