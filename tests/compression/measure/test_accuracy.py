"""Metrics by hand, and labels that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import EvaluationData
from modelpress_compression.measure.accuracy import check_labels, evaluate
from modelpress_compression.measure.task import Labelled, compare_on_task
from modelpress_compression.specs import parse_specs

IDENTITY = "g (float[batch,6] x) => (float[batch,6] y) { y = Identity(x) }"
NEGATED = "g (float[batch,6] x) => (float[batch,6] y) { y = Neg(x) }"
SCORES = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
BEST = SCORES.argmax(1)
Save = Callable[..., Path]


def labelled(labels: np.ndarray, array: np.ndarray = SCORES, spec: str = "x:float32[batch,6]") -> EvaluationData:
    return EvaluationData.from_arrays({"x": array, "labels": labels}, parse_specs([spec]))


def test_top1_and_top5(save_model: Save) -> None:
    """Every other label is the worst class: half of top1 is right, and of top5, which leaves out one of six."""
    labels = np.where(np.arange(40) % 2 == 0, BEST, SCORES.argmin(1))
    path = save_model(IDENTITY)
    assert evaluate(path, labelled(labels)).value == 0.5
    assert evaluate(path, labelled(labels), "top5").value == 0.5
    assert evaluate(path, labelled(SCORES.argsort(1)[:, -3]), "top5").value == 1.0


def test_batches_do_not_change_the_figure(save_model: Save) -> None:
    """A last batch that is not full counts too."""
    path = save_model(IDENTITY)
    assert evaluate(path, labelled(BEST), batch_size=7).value == 1.0


def test_negative_labels_are_left_out(save_model: Save) -> None:
    """-100 marks positions without a label."""
    labels = np.where(np.arange(40) < 30, BEST, -100)
    assert evaluate(save_model(IDENTITY), labelled(labels)).value == 1.0


def test_scores_as_labels(save_model: Save) -> None:
    """One-hot labels name the class of their largest element."""
    assert evaluate(save_model(IDENTITY), labelled(np.eye(6)[BEST]), "top1").value == 1.0


@pytest.mark.parametrize(
    "labels",
    [np.eye(6)[BEST], np.eye(6, dtype=np.int64)[BEST], 0.9 * np.eye(6)[BEST] + 0.02, np.eye(6, dtype=bool)[BEST]],
    ids=["floats", "integers", "smoothed", "bools"],
)
def test_one_hot_labels_are_classes(save_model: Save, labels: np.ndarray) -> None:
    """Without a metric they are measured with top1, never with a mean of squares, and a note says so."""
    path = save_model(IDENTITY)
    found = evaluate(path, labelled(labels))
    assert (found.metric, found.value) == ("top1", 1.0)
    assert "read as classes" in check_labels(path, labelled(labels), None)
    assert evaluate(path, labelled(labels), "mse").metric == "mse"


@pytest.mark.parametrize("labels", [SCORES, BEST, (SCORES > 0).astype(np.int64), SCORES.round().astype(np.int64)])
def test_other_labels_need_no_note(save_model: Save, labels: np.ndarray) -> None:
    """Values, class indices, several ones a row and whole numbers are what they are."""
    path = save_model(IDENTITY)
    assert check_labels(path, labelled(labels), None) == ""
    assert evaluate(path, labelled(labels)).metric == ("top1" if labels is BEST else "mse")


def test_one_hot_planes_are_refused(save_model: Save) -> None:
    """Classes along the second axis of [N, C, H, W] fit no metric but by their values, which must be asked for."""
    path = save_model("g (float[batch,3,2,2] x) => (float[batch,3,2,2] y) { y = Identity(x) }")
    array = np.random.default_rng(0).standard_normal((8, 3, 2, 2)).astype(np.float32)
    labels = np.moveaxis(np.eye(3)[array.argmax(1)], -1, 1)
    data = labelled(labels, array, "x:float32[batch,3,2,2]")
    with pytest.raises(InvalidDataError, match="one-hot along their second axis"):
        evaluate(path, data)
    assert evaluate(path, data, "mse").metric == "mse"


def test_a_class_for_each_position(save_model: Save) -> None:
    """[N, T, C] takes labels [N, T]."""
    path = save_model("g (float[batch,2,3] x) => (float[batch,2,3] y) { y = Identity(x) }")
    array = SCORES.reshape(40, 2, 3)
    data = labelled(array.argmax(-1), array, "x:float32[batch,2,3]")
    assert evaluate(path, data).value == 1.0


def test_values(save_model: Save) -> None:
    """mse and mae of x against x + 2, cosine of x against 3 x (rtol 1e-6)."""
    path = save_model(IDENTITY)
    assert evaluate(path, labelled(SCORES + 2)).value == pytest.approx(4.0, rel=1e-6)
    assert evaluate(path, labelled(SCORES + 2), "mae").value == pytest.approx(2.0, rel=1e-6)
    assert evaluate(path, labelled(SCORES * 3), "cosine").value == pytest.approx(1.0, rel=1e-6)


def test_axes_of_extent_one_do_not_matter(save_model: Save) -> None:
    """Labels [N] fit an output [N, 1]."""
    path = save_model("g (float[batch,6] x) => (float[batch,1] y) { y = ReduceSum(x, a) }", {"a": np.int64([1])})
    assert evaluate(path, labelled(SCORES.sum(1))).value == pytest.approx(0.0, abs=1e-10)


def test_the_first_output_that_fits(save_model: Save) -> None:
    """An output of another shape is passed over."""
    text = "g (float[batch,6] x) => (float[batch,1] s, float[batch,6] y) { s = ReduceSum(x, a)  y = Identity(x) }"
    assert evaluate(save_model(text, {"a": np.int64([1])}), labelled(BEST), "top1").value == 1.0


def test_whole_feeds(save_model: Save) -> None:
    """A sample that is a feed of its own has its own label."""
    path = save_model("g (float[1,6] x) => (float[1,6] y) { y = Identity(x) }")
    data = labelled(BEST, SCORES[:, None], "x:float32[1,6]")
    assert evaluate(path, data).value == 1.0


@pytest.mark.parametrize(("metric", "labels"), [("top1", BEST), ("mse", SCORES), ("mae", SCORES), ("cosine", SCORES)])
def test_drop_is_over_zero_where_it_got_worse(save_model: Save, metric: str, labels: np.ndarray) -> None:
    """Whichever way the metric points; the other way round the drop is negative."""
    good, bad = save_model(IDENTITY), save_model(NEGATED, name="bad")
    worse = compare_on_task(Labelled(labelled(labels), metric), good, bad)
    assert worse.drop > 0
    assert compare_on_task(Labelled(labelled(labels), metric), bad, good).drop == pytest.approx(-worse.drop)
    assert worse.samples == 40
    assert worse.to_dict()["metric"] == metric


def test_outputs_that_are_not_finite(save_model: Save) -> None:
    """NaN is a wrong answer; for mse the drop is infinite, and null in the report."""
    path, broken = (
        save_model(IDENTITY),
        save_model("g (float[batch,6] x) => (float[batch,6] y) { y = Log(x) }", name="b"),
    )
    assert evaluate(broken, labelled(BEST)).value == (SCORES > 0).all(1).mean()
    found = compare_on_task(Labelled(labelled(SCORES), "mse"), path, broken)
    assert math.isinf(found.drop)
    assert found.to_dict()["optimized"] is None
    assert found.to_dict()["drop"] is None


@pytest.mark.parametrize(
    ("labels", "metric", "says"),
    [
        (np.full(40, 6), "top1", "6 classes are 0 to 5"),
        (np.zeros((40, 4)), None, r"y \[1, 6\].*one class index"),
        (BEST, "mse", "fit no output for mse"),
        (np.full(40, -1), None, "no sample has a usable label"),
        (BEST, "bleu", "use one of top1"),
    ],
)
def test_labels_that_do_not_fit_say_what_would(
    save_model: Save, labels: np.ndarray, metric: str | None, says: str
) -> None:
    """The message names shapes, and what to give instead."""
    with pytest.raises(InvalidDataError, match=says):
        evaluate(save_model(IDENTITY), labelled(labels), metric)
