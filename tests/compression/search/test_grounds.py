"""What judges a cut model without labels has seen nothing of what the model was fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import EvaluationData, Model, Recipe
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.measure.task import Labelled, Task
from modelpress_compression.passes.base import Context
from modelpress_compression.search.grounds import MIN_SAMPLES, grounds
from modelpress_compression.search.judge import Judge

MakeJudge = Callable[..., Judge]


def numbered(model: Model, count: int) -> InputData:
    """Samples that can be told apart by any of their pixels."""
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 1, 28, 28))
    return InputData.from_arrays({"x": images}, model.inputs)


@pytest.fixture
def make_judge(digits: Model, tmp_path: Path) -> MakeJudge:
    path = tmp_path / "digits.onnx"
    digits.save(path)

    def make(data: InputData, task: Task | None = None) -> Judge:
        return Judge(path, path, Context(data, tmp_path), Recipe.preset("default"), task, screens=True)

    return make


@pytest.mark.parametrize("count", [MIN_SAMPLES, 200])
def test_a_third_is_held_out(digits: Model, make_judge: MakeJudge, count: int) -> None:
    """Every sample is fitted to or judges, none does both."""
    found = grounds(make_judge(numbered(digits, count)))
    assert found is not None
    fitted = np.asarray(found.data.arrays["x"])[:, 0, 0, 0].tolist()
    held = np.asarray(found.judge.context.data.arrays["x"])[:, 0, 0, 0].tolist()
    assert sorted([*fitted, *held]) == list(range(count))
    assert len(held) == count // 3


def test_few_samples_are_not_split(digits: Model, make_judge: MakeJudge) -> None:
    """A judge of 29 samples would be none; and samples that are all the same say nothing."""
    assert grounds(make_judge(numbered(digits, MIN_SAMPLES - 1))) is None
    alike = InputData.from_arrays({"x": np.ones((200, 1, 28, 28), np.float32)}, digits.inputs)
    assert grounds(make_judge(alike)) is None


def test_labels_judge_in_place_of_samples(make_judge: MakeJudge, samples: InputData, labelled: EvaluationData) -> None:
    """Everything may be fitted to then."""
    judge = make_judge(samples, Labelled(labelled, "top1"))
    found = grounds(judge)
    assert found is not None
    assert found.judge is judge
    assert found.data is samples


@pytest.mark.parametrize(
    ("agreement", "sqnr_db", "kept"), [(0.98, 27.0, False), (0.991, 27.0, True), (1.0, 22.0, False)]
)
def test_answers_of_what_was_cut_must_not_change(
    make_judge: MakeJudge, samples: InputData, agreement: float, sqnr_db: float, kept: bool
) -> None:
    """Two changed answers in a hundred are too many, though the original thinks little of them, and so are outputs that
    have moved far, though no answer has changed; a judge of what was not fitted takes both."""
    usual = make_judge(samples)
    outputs = {"y": OutputFidelity(0.999, sqnr_db, 0.1)}
    fidelity = Fidelity("provided", 90, outputs, agreement, agreement, expected_top1=0.9, expected_drop=0.002)
    assert not usual._disagrees(fidelity)
    assert (not replace(usual, held_out=True)._disagrees(fidelity)) is kept


@pytest.mark.parametrize(("sqnr_db", "kept"), [(24.0, False), (27.0, True)])
def test_values_of_what_was_cut_stay_nearer(
    make_judge: MakeJudge, samples: InputData, sqnr_db: float, kept: bool
) -> None:
    """Without classes no agreement says more."""
    fidelity = Fidelity("provided", 90, {"y": OutputFidelity(0.999, sqnr_db, 0.1)}, None, 0.999)
    judge = make_judge(samples)
    assert not judge._disagrees(fidelity)
    assert (not replace(judge, held_out=True)._disagrees(fidelity)) is kept


@pytest.mark.parametrize(
    ("drop", "sqnr_db", "fitted", "kept"),
    [(0.005, 27.0, False, True), (0.005, 27.0, True, False), (0.003, 27.0, True, True), (0.003, 17.0, True, False)],
)
def test_what_was_fitted_is_flattered(
    make_judge: MakeJudge, samples: InputData, drop: float, sqnr_db: float, fitted: bool, kept: bool
) -> None:
    """The data that ranges and levels were fitted to says less of them."""
    outputs = {"y": OutputFidelity(0.99, sqnr_db, 0.1)}
    fidelity = Fidelity("provided", 90, outputs, 0.99, 0.99, expected_top1=0.9, expected_drop=drop)
    assert (not make_judge(samples)._disagrees(fidelity, fitted=fitted)) is kept
