"""The pass as a whole: what it recovers, what it never does, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression import Recipe, compress
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.distill import training
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.distill import Distill
from onnx import helper

Run = Callable[..., PassResult]


def test_recovers_a_perturbed_model(
    conv_net: Model, images: Any, perturbed: Any, distill: Run, outputs_of: Callable[[Model, Any], Any]
) -> None:
    """Trained on unlabelled inputs, a disturbed model comes nearer to the original on inputs it has never seen: the
    squared error falls to a fifth at most."""
    student, fresh = perturbed(conv_net), images(64, seed=9)
    result = distill(conv_net, student, {"x": images(256)}, epochs=20, batch_size=16, learning_rate=1e-2)
    expected = outputs_of(conv_net, fresh)
    before, after = (np.square(outputs_of(m, fresh) - expected).mean() for m in (student, result.model))
    assert after < before / 5
    assert result.changes["loss_after"] < result.changes["loss_before"]
    assert result.changes["weights_trained"] == 6
    assert [row["epoch"] for row in result.details] == list(range(1, len(result.details) + 1))


def test_never_worse_than_the_start(conv_net: Model, images: Any, perturbed: Any, distill: Run) -> None:
    """A learning rate that wrecks every step leaves the model as it was, and a warning says so."""
    student = perturbed(conv_net, 0.05)
    result = distill(conv_net, student, {"x": images(64)}, learning_rate=1e3, optimizer="sgd", epochs=3)
    assert result.model is student
    assert not result.changed
    assert any("stays as it was" in warning for warning in result.warnings)


def test_divergence_ends_with_the_best_state(conv_net: Model, images: Any, perturbed: Any, distill: Run) -> None:
    """A loss that is not finite ends training at once, with a warning that tells the epoch and what to do."""
    result = distill(conv_net, perturbed(conv_net), {"x": images(64)}, learning_rate=1e30, epochs=5)
    assert not result.changed
    assert any("diverged in epoch 1 of 5" in warning and "learning_rate" in warning for warning in result.warnings)
    assert all(np.isfinite(list(row.values())).all() for row in result.details)


def test_reproducible_by_seed(conv_net: Model, images: Any, perturbed: Any, distill: Run, weights_of: Any) -> None:
    """The same seed gives the same weights to the last bit; another seed gives others."""
    student, arrays = perturbed(conv_net), {"x": images(64)}
    first, second, other = (
        weights_of(distill(conv_net, student, arrays, epochs=2, augment=(), seed=seed).model) for seed in (3, 3, 4)
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert any((array != other[name]).any() for name, array in first.items())


def test_the_original_itself_has_nothing_to_learn(conv_net: Model, images: Any, distill: Run) -> None:
    """A model that answers as the original does is not trained."""
    result = distill(conv_net, conv_net, {"x": images(32)}, epochs=2)
    assert not result.changed


def test_time_limit_keeps_the_best_so_far(
    conv_net: Model, images: Any, perturbed: Any, context_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time is up, training ends with what it has, and a warning, instead of failing."""
    late_s = 0.0

    def passes(share: float, message: str) -> None:
        nonlocal late_s
        if "epoch 4 of 40: loss" in message:
            late_s = 1e6

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_s))
    context = context_of(conv_net, {"x": images(64)}, deadline=time.monotonic() + 1e5, progress=passes)
    result = Distill(DistillConfig(epochs=40))(perturbed(conv_net), context)
    assert result.changed
    assert any("time limit ended training in epoch 5 of 40" in warning for warning in result.warnings)
    assert result.changes["loss_after"] < result.changes["loss_before"]


def test_progress_tells_epoch_and_loss(conv_net: Model, images: Any, perturbed: Any, context_of: Any) -> None:
    """Progress rises to 1 and speaks of epochs and losses."""
    told: list[tuple[float, str]] = []
    context = context_of(conv_net, {"x": images(64)}, progress=lambda share, text: told.append((share, text)))
    Distill(DistillConfig(epochs=2))(perturbed(conv_net), context)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert any("epoch 2 of 2: loss" in text for _, text in told)


def test_too_few_samples_to_hold_out(conv_net: Model, images: Any, perturbed: Any, distill: Run) -> None:
    """With a handful of samples all are trained on, and the report says that they judged as well."""
    result = distill(conv_net, perturbed(conv_net), {"x": images(5)}, epochs=5)
    assert any("too few to hold some out" in warning for warning in result.warnings)
    assert result.changed


def test_integer_outputs_are_refused(channel_model: Callable[..., Model], images: Any, distill: Run) -> None:
    """An output that no loss fits is refused with its name and its type."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("GlobalMaxPool", ["c"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=7),
    ]
    weights = {"w": np.ones((4, 3, 3, 3))}
    model = channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 4, 1, 1])
    model.graph.outputs[0].dtype = onnx_ir.DataType.INT64
    with pytest.raises(InvalidRecipeError, match=r"output 'y': values of type int64 have no gradient"):
        distill(model, model, {"x": images(16)})


def test_exclude_leaves_weights_alone(
    conv_net: Model, images: Any, perturbed: Any, distill: Run, weights_of: Any
) -> None:
    """Weights of excluded nodes, by the node's or the weight's name, stay as they were; others change."""
    student = perturbed(conv_net)
    result = distill(conv_net, student, {"x": images(64)}, epochs=2, exclude=("conv1", "b3"))
    before, after = weights_of(student), weights_of(result.model)
    for name in ("w1", "b1", "b3"):
        np.testing.assert_array_equal(before[name], after[name])
    assert (before["w2"] != after["w2"]).any()


def test_fixed_batches_are_run_as_often_as_it_takes(
    channel_model: Callable[..., Model], conv_net: Model, images: Any, perturbed: Any, distill: Run
) -> None:
    """A model that takes exactly two samples trains on batches of several feeds."""
    fixed = conv_net.clone()
    fixed.graph.inputs[0].shape = type(fixed.graph.inputs[0].shape)([2, 3, 8, 8])
    result = distill(fixed, perturbed(fixed), {"x": images(33)}, epochs=3, batch_size=8)
    assert result.changes["loss_after"] < result.changes["loss_before"]


def test_pruned_and_distilled_in_one_recipe(conv_net: Model, images: Any) -> None:
    """In a recipe the teacher is the model as it was given, and rounds are steps that come again: each prunes what
    stands by its share. (By magnitude and without repair, so that training has something to bring back.)"""
    prune = {"sparsity": 0.25, "round_to": 1, "min_channels": 1, "criterion": "l2", "repair": "none"}
    step = {"prune": {"structure": "channel", **prune}}
    train = {"distill": {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3}}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "steps": [step, train, step, train],
            "benchmark": {"rounds": 5},
        }
    )
    result = compress(conv_net, recipe, data={"x": images(128)})
    prunings = [row["changes"]["channels_removed"] for row in result.report["steps"] if row["name"] == "prune"]
    assert prunings == [4, 4]
    for row in result.report["steps"][1::2]:
        assert row["changes"]["loss_after"] < row["changes"]["loss_before"]


def test_needs_the_original(conv_net: Model, images: Any, context_of: Any) -> None:
    """A context without the original is a mistake of the caller."""
    context = context_of(conv_net, {"x": images(16)})
    with pytest.raises(ValueError, match="original"):
        Distill(DistillConfig())(conv_net, Context(context.data, context.work_directory))


def test_labels_teach_beyond_the_original(
    conv_net: Model, images: Any, perturbed: Any, distill: Run, outputs_of: Callable[[Model, Any], Any]
) -> None:
    """Where the data has labels, they count: a model that starts as the original itself gets more of them right, on
    inputs it has never seen."""
    teacher = perturbed(conv_net, 0.8)
    data, fresh = images(512), images(256, seed=9)
    labels, truth = (outputs_of(conv_net, x).argmax(1) for x in (data, fresh))
    arrays = {"x": data, "labels": labels}
    result = distill(teacher, teacher, arrays, epochs=20, batch_size=16, learning_rate=5e-3, label_weight=0.9)
    right = [float((outputs_of(model, fresh).argmax(1) == truth).mean()) for model in (teacher, result.model)]
    assert right[1] > right[0] + 0.05


def test_labels_that_fit_nothing_are_left_out(conv_net: Model, images: Any, perturbed: Any, distill: Run) -> None:
    """Labels of another shape than any output do not stop the step, and a warning says that they were not used."""
    arrays = {"x": images(32), "labels": np.zeros((32, 3), np.int64)}
    result = distill(conv_net, perturbed(conv_net), arrays, epochs=2)
    assert any("fit no output" in warning for warning in result.warnings)


def test_label_weight_without_labels_is_told(conv_net: Model, images: Any, perturbed: Any, distill: Run) -> None:
    """Asking for labels that are not there gives a warning."""
    result = distill(conv_net, perturbed(conv_net), {"x": images(32)}, epochs=2, label_weight=0.5)
    assert any("holds no labels" in warning for warning in result.warnings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which the warning is not about")
@pytest.mark.parametrize(
    "step",
    [
        {"distill": {"epochs": 1}},
        {"prune": {"structure": "channel", "sparsity": 0.25, "criterion": "taylor", "round_to": 1}},
    ],
)
def test_a_gpu_that_is_not_there_is_told(conv_net: Model, images: Any, step: Any) -> None:
    """With the device cuda and no GPU the CPU computes, to the same result, and the report says so."""
    reports = {}
    for device in ("cpu", "cuda"):
        recipe = Recipe.from_dict(
            {"version": 1, "steps": [step], "target": {"device": device}, "benchmark": {"rounds": 5}}
        )
        reports[device] = compress(conv_net, recipe, data={"x": images(64)}).report
    assert any("ran on the CPU" in warning for warning in reports["cuda"]["warnings"])
    assert not any("ran on the CPU" in warning for warning in reports["cpu"]["warnings"])
    assert reports["cuda"]["optimized"]["sha256"] == reports["cpu"]["optimized"]["sha256"]
