"""A metric of the user's own: run in a process of its own, kept between commands, and asked in rounds."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_client.errors import UsageError
from modelpress_client.metric_search import MetricSearch
from modelpress_client.own_metric import OwnMetric, Score, ScoreError
from modelpress_protos.v1.recipe_pb2 import Recipe

METRICS = """
import sys, time
from pathlib import Path

def bytes_of(path, evaluation):
    print("this goes to nobody")
    with open(Path(__file__).with_name("calls"), "a") as calls:
        calls.write("x")
    return Path(path).stat().st_size + (0 if evaluation is None else float(evaluation["bonus"]))

bytes_of.lower_is_better = True

def raises(path, evaluation):
    return {}["missing"]

def nothing(path, evaluation):
    return "0.5"

def nan(path, evaluation):
    return float("nan")

def hangs(path, evaluation):
    while True:
        time.sleep(1)

def leaves(path, evaluation):
    sys.exit("enough")

def dies(path, evaluation):
    import os
    print("a last word", flush=True)
    os._exit(9)
"""


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of metrics, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "metrics.py"
    path.write_text(METRICS)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Any file will do: only metrics look into it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"0123456789")
    return path


async def test_it_gets_path_and_arrays(metrics: Path, model: Path, tmp_path: Path) -> None:
    """The score, and which way it points."""
    assert await OwnMetric(f"{metrics}:bytes_of").score(model, "a") == Score(10.0, lower_is_better=True)
    np.savez(tmp_path / "eval.npz", bonus=np.float32(0.5))
    assert (await OwnMetric(f"{metrics}:bytes_of", tmp_path / "eval.npz").score(model, "a")).value == 10.5


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", r"it raised KeyError: 'missing' \(metrics.py, line 14\)"),
        ("nothing", "it returned '0.5', a str; it must return a number"),
        ("nan", "it returned nan"),
        ("hangs", "it took more than 1 s"),
        ("leaves", "it raised SystemExit: enough"),
        ("dies", "ended with code 9; the last that it printed: a last word"),
        ("absent", "it raised AttributeError"),
    ],
)
async def test_what_gives_no_number_says_why(metrics: Path, model: Path, function: str, said: str) -> None:
    """One sentence each; nothing but the score is lost."""
    with pytest.raises(ScoreError, match=said):
        await OwnMetric(f"{metrics}:{function}", timeout_s=1.0 if function == "hangs" else 60.0).score(model, "a")


def test_scores_are_kept_until_the_metric_changes(metrics: Path, model: Path) -> None:
    """Whoever comes back does not score a model twice."""
    metric = OwnMetric(f"{metrics}:bytes_of")
    assert metric.known("a") is None
    score = asyncio.run(metric.score(model, "a"))
    assert OwnMetric(f"{metrics}:bytes_of").known("a") == score
    metrics.write_text(METRICS + "\n# changed")
    assert OwnMetric(f"{metrics}:bytes_of").known("a") is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent.py:score", "no file absent.py"),
        ("absent_module.x:score", "no module absent_module.x"),
        ("metrics.py:not a name", "write FILE.py:FUNCTION"),
        (":score", "write FILE.py:FUNCTION"),
    ],
)
def test_slips_are_found_before_anything_is_sent(metrics: Path, spec: str, said: str) -> None:
    """Usage errors, with what there is not."""
    assert OwnMetric.names_one(spec)
    with pytest.raises(UsageError, match=said):
        OwnMetric(spec).check()
    assert not OwnMetric.names_one("top1")


def test_a_file_without_the_function_is_found_before_anything_is_sent(metrics: Path, tmp_path: Path) -> None:
    """Nothing in the file is run for it; where the function may come from elsewhere, its turn decides."""
    with pytest.raises(UsageError, match="has no function bytes_off; it has bytes_of, raises"):
        OwnMetric(f"{metrics}:bytes_off").check()
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ndef f(:")
    with pytest.raises(UsageError, match=r"broken.py, line 2 cannot be read as Python"):
        OwnMetric(f"{broken}:f").check()
    broken.write_text("from elsewhere import *\nraise SystemExit")
    OwnMetric(f"{broken}:f").check()
    OwnMetric(f"{metrics}:bytes_of").check()


class Server:
    """Jobs of three candidates, each a file of its name; more is offered once the pruned one has scored."""

    def __init__(self) -> None:
        self.asked: list[dict[str, float]] = []

    async def run_job(self, recipe: Recipe) -> Any:
        scores = dict(recipe.goal.client_metric.scores)
        self.asked.append(scores)
        rows = [row("original", 100), row("stored", 30), row("static", 20), row("pruned", 60, leads_further=True)]
        if "pruned" in scores:
            rows.append(row("pruned more", 10))
        return Job(rows)


class Job:
    """Has ended well."""

    name = "projects/p/jobs/j"

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.candidates = rows

    async def report(self) -> Job:
        """Its candidates."""
        return self

    async def download(self, path: Path, *, candidate: str) -> None:
        """A file that holds the candidate's name."""
        await asyncio.to_thread(path.write_text, candidate)


def row(name: str, size_bytes: int, **more: Any) -> dict[str, Any]:
    """A candidate on offer."""
    return {"id": name, "name": name, "sha256": name, "size_bytes": size_bytes, "downloadable": True,
            "speedup": {"median": 1.0}, "cosine": 1.0} | more  # fmt: skip


def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **scores: str) -> OwnMetric:
    """A metric that knows each file's score by its content."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = {name.replace("_", " "): value for name, value in scores.items()}
    (tmp_path / "score.py").write_text(
        f"def score(path, evaluation):\n    value = {known!r}[open(path).read()]\n    return eval(value)\n"
    )
    return OwnMetric(f"{tmp_path}/score.py:score")


async def test_rounds_go_on_while_there_is_something_to_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most welcome first: once it holds, worse ones are not scored, but what leads further is."""
    metric = scorer(tmp_path, monkeypatch, original="0.9", static="0.895", pruned="0.9", pruned_more="0.5")
    server, lines = Server(), []
    await MetricSearch(metric, Recipe(), server.run_job, lines.append).run()
    assert [sorted(scores) for scores in server.asked] == [
        [],
        ["original", "pruned", "static"],
        ["original", "pruned", "pruned more", "static"],
    ]
    assert any("score.py:score 0.895, original 0.9" in line for line in lines)


async def test_a_candidate_that_cannot_be_scored_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is asked, and the failure told once."""
    metric = scorer(tmp_path, monkeypatch, original="0.9", static="1 / 0", stored="0.9", pruned="0.2", pruned_more="0")
    server, lines = Server(), []
    await MetricSearch(metric, Recipe(), server.run_job, lines.append).run()
    assert "stored" in server.asked[1]
    assert all("static" not in scores for scores in server.asked)
    assert sum("ZeroDivisionError" in line for line in lines) == 1


async def test_an_original_that_cannot_be_scored_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to compare with."""
    metric = scorer(tmp_path, monkeypatch, original="1 / 0")
    with pytest.raises(ScoreError, match="ZeroDivisionError"):
        await MetricSearch(metric, Recipe(), Server().run_job).run()


async def test_time_ends_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No round is begun after it; the one that runs counts."""
    metric = scorer(tmp_path, monkeypatch, original="0.9", static="0.9", pruned="0.9")
    server = Server()
    began_s = time.monotonic()
    await MetricSearch(metric, Recipe(), server.run_job, time_s=-1.0).run()
    assert server.asked == [{}]
    assert time.monotonic() >= began_s
