"""Pruning in rounds: the share goes a part at a time, each round repaired and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from modelpress_compression import InputData, Model, Recipe
from modelpress_compression.errors import TimeLimitError, UnsupportedOperatorError
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.recipe import Step
from modelpress_compression.search import rounds
from modelpress_compression.search.rounds import prune_in_rounds
from modelpress_compression.search.steps import StepRecord
from modelpress_compression.techniques import TECHNIQUES

Prune = Callable[..., StepRecord]


@pytest.fixture
def prune(digits: Model, samples: InputData, tmp_path: Path) -> Prune:
    """Channels of the digit classifier, in rounds."""
    digits.save(tmp_path / "digits.onnx")

    def pruned(data: InputData = samples, **options: Any) -> StepRecord:
        step = Step("prune", {"structure": "channel", "scope": "global", "criterion": "activation", **options})
        context = Context(data, tmp_path, original=digits)
        assert TECHNIQUES["prune"].chooser_for(step.config) is prune_in_rounds
        return prune_in_rounds(
            step,
            digits,
            tmp_path / "digits.onnx",
            context,
            tmp_path / "out" / "model.onnx",
            recipe=Recipe(),
            original=tmp_path / "digits.onnx",
            task=None,
        )

    return pruned


class Bench:
    """In place of the passes: a cut takes what it is asked for, in steps of `grain`; training does nothing but say
    that it `helps`, or that it does not."""

    def __init__(self, grain: float = 0.0, why_not_trained: Exception | None = None, helps: bool = True) -> None:
        self.asked: list[tuple[str, float]] = []
        self.grain, self.why_not_trained, self.helps = grain, why_not_trained, helps

    def apply(self, step: Step, model: Model, path: Path, context: Context, target: Path) -> StepRecord:
        record = StepRecord(step, model, target, skipped=(Skip("head", "It is the head."),))
        if step.technique == "distill":
            self.asked.append(("distill", float(step.config.epochs)))
            if self.why_not_trained is not None:
                raise self.why_not_trained
            return replace(record, changes={"loss_before": 2.0, "loss_after": 1.0} if self.helps else {})
        share = step.config.sparsity
        self.asked.append(("prune", share))
        gone = share if share >= self.grain else 0.0
        if not gone:
            return record
        changes = {"channels": 1000, "channels_removed": 1000 * gone, "parameters_removed_share": gone}
        return replace(record, changes={**changes, "macs_removed_share": gone}, details=({"group": "a"},))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What outputs keep in dB: of one cut of all under "once", of what rounds have made under "rounds"."""
    kept = {"once": 10.0, "rounds": 20.0}

    def compare(original: Path, path: Path, data: InputData, known: object) -> Fidelity:
        sqnr_db = kept["once" if path.parent.name == "once" else "rounds"]
        return Fidelity("provided", len(data), {"y": OutputFidelity(0.99, sqnr_db, 0.0)}, None, None)

    monkeypatch.setattr(rounds, "compare_outputs", compare)
    return kept


@pytest.mark.usefixtures("judged")
def test_each_round_takes_the_same_share_of_what_is_left(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds for 48.8 % take a fifth each; what was removed is what was asked for, and nodes are skipped once."""
    bench = Bench()
    monkeypatch.setattr(rounds, "apply_step", bench.apply)
    record = prune(sparsity=0.488, sparsity_of="macs", rounds=3, epochs=7)
    assert [technique for technique, _ in bench.asked] == [*["prune", "distill"] * 3, "prune"]
    shares = [share for technique, share in bench.asked if technique == "prune"]
    assert shares == pytest.approx([*[0.2] * 3, 0.488])  # the last: all at once, which errs more here
    assert {epochs for technique, epochs in bench.asked if technique == "distill"} == {7.0}
    assert record.changes["macs_removed_share"] == pytest.approx(0.488)
    assert record.changes["channels_removed"] == pytest.approx(600)
    assert (record.changes["loss_before"], record.changes["loss_after"]) == (2.0, 1.0)
    assert [row["round"] for row in record.details] == [1, 2, 3]
    assert record.skipped == (Skip("head", "It is the head."),)


@pytest.mark.usefixtures("judged")
def test_later_rounds_take_what_earlier_ones_could_not(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first of four parts is less than a channel, the second round takes both; it alone is trained."""
    bench = Bench(grain=0.2)
    monkeypatch.setattr(rounds, "apply_step", bench.apply)
    record = prune(sparsity=0.5, rounds=4)
    assert [technique for technique, _ in bench.asked] == [
        *["prune", "prune", "distill"] * 2,
        "prune",
    ]
    assert record.changes["channels_removed_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("error", [UnsupportedOperatorError("no gradient"), TimeLimitError("time is up")])
def test_what_cannot_be_trained_is_cut_all_the_same(
    prune: Prune, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An operator without gradient, or too little time for training, is a warning."""
    monkeypatch.setattr(rounds, "apply_step", Bench(why_not_trained=error).apply)
    record = prune(sparsity=0.5, rounds=2)
    assert record.changes["channels_removed_share"] == pytest.approx(0.5)
    assert any(warning.startswith("Not trained: ") for warning in record.warnings)


def test_where_training_brings_nothing_the_whole_model_is_cut_again(
    prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of cuts into cuts would add up: each round cuts all that is due by then."""
    bench = Bench(helps=False)
    monkeypatch.setattr(rounds, "apply_step", bench.apply)
    record = prune(sparsity=0.488, sparsity_of="macs", rounds=3, overrides={"head": 0.488})
    shares = [share for technique, share in bench.asked if technique == "prune"]
    assert shares == pytest.approx([0.2, 0.36, 0.488])
    assert record.changes["macs_removed_share"] == pytest.approx(0.488)
    assert [row["round"] for row in record.details] == [3]


def test_where_nothing_can_go_the_reasons_stay(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round finds the same, and it is said once."""
    monkeypatch.setattr(rounds, "apply_step", Bench(grain=1.0).apply)
    record = prune(sparsity=0.5, rounds=3)
    assert not record.changes
    assert record.skipped == (Skip("head", "It is the head."),)


def test_one_cut_is_taken_where_it_errs_less(
    prune: Prune, judged: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured on samples that training has not seen; the record says so."""
    monkeypatch.setattr(rounds, "apply_step", Bench().apply)
    judged["once"] = 30.0
    record = prune(sparsity=0.5, rounds=2)
    assert record.path.parent.name == "once"
    assert record.changes["channels_removed_share"] == pytest.approx(0.5)
    assert any("errs less" in note for note in record.notes)


@pytest.mark.slow
def test_on_a_real_model(prune: Prune) -> None:
    """Half of the MACs of a digit classifier go, the last training brings the answers nearer, and rows tell rounds
    apart."""
    record = prune(sparsity=0.5, sparsity_of="macs", rounds=2, epochs=15, round_to=4)
    assert record.changes["macs_removed_share"] == pytest.approx(0.5, abs=0.06)
    assert 0 < record.changes["loss_after"] < record.changes["loss_before"]
    assert {row["round"] for row in record.details} == {1, 2}
    assert record.path.exists()
