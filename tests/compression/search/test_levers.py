"""How far a lever goes is found by measuring, and training comes where the answers were lost by a little."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.errors import UnsupportedOperatorError
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.recipe import BALANCED, SMALLEST, Step
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.levers import MOST, Cut, LeverSearch
from modelpress_compression.search.steps import StepRecord


@pytest.fixture
def start(digits: Model, tmp_path: Path) -> tuple[StepRecord, ...]:
    digits.save(tmp_path / "digits.onnx")
    return (StepRecord(Step("fuse", FuseConfig()), digits, tmp_path / "digits.onnx"),)


class Bench:
    """A lever on a model whose answers are lost where more than `limit` of it is gone; training adds `gain` to that."""

    def __init__(self, samples: InputData, folder: Path, limit: float, gain: float = 0.0) -> None:
        self.context = Context(samples, folder)
        self.limit, self.gain = limit, gain
        self.unit = 0.0  # of what can go
        self.asked: list[tuple[str, float]] = []
        self.left_s = math.inf

    def apply(self, before: StepRecord, context: Context) -> StepRecord:
        """No model, but a file of its own and a record that knows what has gone in all."""
        left = 1 - _gone(before)
        if before.step.technique == "prune":
            left *= 1 - before.step.config.sparsity
        if self.unit:
            left = 1 - self.unit * round((1 - left) / self.unit)
        path = self.context.work_directory / f"{before.step.technique} {left}.onnx"
        path.write_text(path.name)
        return replace(before, path=path, changes={"done": 1}, details=({"gone": 1 - left},))

    def judge(self, candidate: Candidate) -> Candidate:
        trained, share = candidate.technique == "distill", _gone(candidate.record)
        self.asked.append((candidate.technique, share))
        lost = share > self.limit + (self.gain if trained else 0.0)
        return replace(candidate, reason="lost" if lost else "")

    def cuts(self, start: tuple[StepRecord, ...], *, trains: bool = False, cuts: int = 5) -> list[Cut]:
        search = LeverSearch(
            "prune",
            BALANCED,
            self.context,
            apply=self.apply,
            judge=self.judge,
            left_s=lambda: self.left_s,
            trains=trains,
            cuts=cuts,
        )
        return list(search.cuts(start))


def _gone(record: StepRecord) -> float:
    return float(record.details[0]["gone"]) if record.details else 0.0


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.62, 0.9])
def test_it_comes_near_to_what_the_answers_permit(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, limit: float
) -> None:
    """The largest share that is kept is within a tenth of the limit, after five models; kept shares only rise."""
    found = Bench(samples, tmp_path, limit).cuts(start)
    kept = [_gone(cut.candidate.record) for cut in found if not cut.candidate.reason]
    assert len(found) <= 5
    assert kept == sorted(kept)
    assert max(kept, default=0.0) == pytest.approx(min(limit, MOST), abs=0.1)


def test_training_wins_back_what_was_lost_by_a_little(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the cut alone has lost; and the chain of what is kept then ends with the training."""
    monkeypatch.setattr(Candidate, "cosine", property(lambda self: 0.9))
    bench = Bench(samples, tmp_path, limit=0.3, gain=0.2)
    found = bench.cuts(start, trains=True)
    trained = [cut for cut in found if cut.candidate.technique == "distill" and not cut.candidate.reason]
    assert trained
    names = [record.step.technique for record in trained[-1].chain]
    assert names == ["prune", "distill"] * (len(names) // 2)
    assert all(share > 0.3 for technique, share in bench.asked if technique == "distill")
    # Each round cuts what the one before has left.
    assert len(names) > 2
    assert 0.4 < _gone(trained[-1].candidate.record) <= 0.5


def test_the_same_model_is_trained_once(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few channels several shares give the same: it is one candidate, whose answers are known."""
    monkeypatch.setattr(Candidate, "cosine", property(lambda self: 0.9))
    bench = Bench(samples, tmp_path, limit=0.05, gain=0.04)
    bench.unit = 0.2
    bench.cuts(start, trains=True)
    assert [share for technique, share in bench.asked if technique == "distill"] == pytest.approx([0.2])
    assert [share for technique, share in bench.asked if technique == "prune"] == pytest.approx([0.2, 0.0])


def test_a_ruin_is_not_trained(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not resemble the original any more would take longer than anybody waits."""
    monkeypatch.setattr(Candidate, "cosine", property(lambda self: 0.1))
    bench = Bench(samples, tmp_path, limit=0.1, gain=0.5)
    bench.cuts(start, trains=True)
    assert all(technique == "prune" for technique, _ in bench.asked)


def test_it_ends_with_the_time(start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path) -> None:
    """No further model is begun."""
    bench = Bench(samples, tmp_path, limit=0.5)
    bench.left_s = 0.0
    assert bench.cuts(start) == []


@pytest.mark.parametrize("change", [lambda record: replace(record, changes={}), None])
def test_where_nothing_can_go_it_ends(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, change: Callable[[StepRecord], StepRecord] | None
) -> None:
    """A lever that moves nothing is not pulled again; one that does, is."""
    bench = Bench(samples, tmp_path, limit=0.5)
    if change is not None:
        bench.apply = lambda before, context: change(before)  # type: ignore[method-assign]
    assert bool(bench.cuts(start)) == (change is None)


def test_parameters_count_for_the_smallest(start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path) -> None:
    """Channels go by what they take in the file there, by their multiplications elsewhere."""
    steps = []

    def apply(before: StepRecord, context: Context) -> StepRecord:
        steps.append(before.step)
        return replace(before, changes={"done": 1})

    bench = Bench(samples, tmp_path, limit=0.5)
    for objective in (SMALLEST, BALANCED):
        lever = LeverSearch(
            "prune",
            objective,
            bench.context,
            apply=apply,
            judge=bench.judge,
            left_s=lambda: math.inf,
            trains=False,
            cuts=1,
        )
        list(lever.cuts(start))
    assert [step.config.normalize for step in steps] == ["parameters", "parameters", "macs", "macs"]


@pytest.mark.parametrize("better", ["taylor", "activation"])
def test_the_first_share_tells_how_importance_is_judged(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, better: str
) -> None:
    """It is cut both ways, and both are shown; all further cuts are made in the way that keeps more."""
    bench, asked = Bench(samples, tmp_path, limit=0.6), list[str]()

    def apply(before: StepRecord, context: Context) -> StepRecord:
        asked.append(before.step.config.criterion)
        record = bench.apply(before, context)
        path = tmp_path / f"{asked[-1]} {record.path.name}"
        path.write_text(path.name)
        return replace(record, path=path)

    def judge(candidate: Candidate) -> Candidate:
        cosine = 0.99 if candidate.record.path.name.startswith(better) else 0.98
        output = OutputFidelity(cosine, 20.0, 0.0)
        fidelity = Fidelity("provided", 30, {"y": output}, None, None)
        return replace(bench.judge(candidate), fidelity=fidelity)

    lever = LeverSearch(
        "prune", BALANCED, bench.context, apply=apply, judge=judge, left_s=lambda: math.inf, trains=False, cuts=4
    )
    found = list(lever.cuts(start))
    assert asked == ["taylor", "activation", *[better] * 3]
    assert lever.nearest is not None
    assert lever.nearest.config.criterion == better
    assert len(found) == 5
    assert ("by gradients" in found[-1].candidate.name) == (better == "taylor")


@pytest.mark.parametrize("asked_of_all", [False, True])
def test_outputs_alone_do_not_decide_on_what_is_lost(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path, asked_of_all: bool
) -> None:
    """A share that is lost both ways tells which way goes on where the task was asked of both; else the next one does,
    and the way whose outputs were further away may be the one that keeps the answers."""
    asked = list[tuple[str, float]]()

    def apply(before: StepRecord, context: Context) -> StepRecord:
        config = before.step.config
        asked.append((config.criterion, config.sparsity))
        path = tmp_path / f"{config.criterion} {config.sparsity}.onnx"
        path.write_text(path.name)
        return replace(before, path=path, changes={"done": 1})

    def judge(candidate: Candidate) -> Candidate:
        config = candidate.record.step.config
        by_activations = config.criterion == "activation"
        fidelity = Fidelity("provided", 30, {"y": OutputFidelity(0.7 + 0.1 * by_activations, 5.0, 0.0)}, None, None)
        lost = config.sparsity > (0.1 if by_activations else 0.2)
        drop = 0.1 * config.sparsity if asked_of_all or not lost else None
        return replace(candidate, fidelity=fidelity, drop=drop, reason="lost" if lost else "")

    context = Context(samples, tmp_path)
    lever = LeverSearch(
        "prune", BALANCED, context, apply=apply, judge=judge, left_s=lambda: math.inf, trains=False, cuts=3
    )
    found = list(lever.cuts(start))
    criteria = [criterion for criterion, _ in asked]
    if asked_of_all:
        assert criteria == ["taylor", "activation", "taylor", "taylor"]
    else:
        assert criteria == ["taylor", "activation", "taylor", "activation", "taylor"]
    assert any("by gradients" in cut.candidate.name and not cut.candidate.reason for cut in found)
    assert lever.nearest is not None
    assert lever.nearest.config.criterion == "taylor"


def test_a_model_without_gradients_is_cut_by_its_activations(
    start: tuple[StepRecord, ...], samples: InputData, tmp_path: Path
) -> None:
    """An operator that passes none leaves the other way; where that does not work either, the error is the user's."""
    bench = Bench(samples, tmp_path, limit=0.6)
    refused = {"taylor"}

    def apply(before: StepRecord, context: Context) -> StepRecord:
        if before.step.config.criterion in refused:
            raise UnsupportedOperatorError("no gradient")
        return bench.apply(before, context)

    lever = LeverSearch(
        "prune", BALANCED, bench.context, apply=apply, judge=bench.judge, left_s=lambda: math.inf, trains=False, cuts=2
    )
    assert [cut.candidate.record.step.config.criterion for cut in lever.cuts(start)] == ["activation"] * 2
    refused.add("activation")
    with pytest.raises(UnsupportedOperatorError):
        list(lever.cuts(start))
