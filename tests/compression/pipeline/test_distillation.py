"""Recipes that train: pruned and quantized models brought back from the file alone."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from modelpress_compression import EvaluationData, InputData, Model, Recipe, compress
from modelpress_compression.passes.distill import training

EXAMPLE = Path(__file__).parents[3] / "examples" / "mnist"


@pytest.fixture
def many_digits(digits: Model) -> InputData:
    """8,000 digits without labels."""
    with np.load(EXAMPLE / "digits.npz") as arrays:
        images = arrays["images_train"].astype(np.float32).reshape(-1, 1, 28, 28) / 255
    # As examples/mnist/train.py normalizes them.
    return InputData.from_arrays({"x": (images - 0.1307) / 0.3081}, digits.inputs)


@pytest.fixture
def all_labelled(digits: Model) -> EvaluationData:
    """2,000 other digits with labels."""
    with np.load(EXAMPLE / "eval.npz") as arrays:
        return EvaluationData.from_arrays(dict(arrays), digits.inputs)


def recipe(*steps: dict[str, object]) -> Recipe:
    return Recipe.from_dict({"version": 1, "steps": list(steps), "benchmark": {"rounds": 5}})


@pytest.mark.slow
def test_half_of_the_channels_gone_costs_little(
    digits: Model, many_digits: InputData, all_labelled: EvaluationData
) -> None:
    """Without labels, a digit classifier with half of its channels, and a quarter of its parameters, comes back to
    within 1.5 points of its top-1."""
    steps = (
        {"prune": {"structure": "channel", "sparsity": 0.5, "criterion": "activation"}},
        {"distill": {"epochs": 10, "learning_rate": 3e-3}},
    )
    report = compress(digits, recipe(*steps), data=many_digits, eval_data=all_labelled).report
    assert report["steps"][0]["changes"]["parameters_removed_share"] > 0.6
    assert report["accuracy"]["drop"] <= 0.015


def test_quantized_and_trained_in_one_recipe(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """Coarse static quantization and then training: the file stays in eight bits, and comes nearer to the original."""
    coarse = {"scheme": "static", "per_channel": False, "calibration": "minmax", "rounding": "nearest"}
    coarse |= {"smooth_quant": False, "bias_correction": False}
    steps = ({"quantize": coarse}, {"distill": {"epochs": 6, "learning_rate": 1e-4}})
    result = compress(digits, recipe(*steps), data=samples, eval_data=labelled)
    before, after = result.report["steps"]
    assert after["changes"]["quantized_weights_trained"] > 0
    assert after["changes"]["loss_after"] < after["changes"]["loss_before"]
    assert after["size_bytes"] == pytest.approx(before["size_bytes"], rel=0.01)
    assert result.report["accuracy"]["drop"] < 0.01


def test_factorized_and_trained_in_one_recipe(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """Half of the multiplications gone: the factors are trained like any weight, and the answers come nearer."""
    steps = (
        {"fuse": {}},
        {"factorize": {"budget": 0.5}},
        {"distill": {"epochs": 3}},
        {"quantize": {"scheme": "dynamic"}},
    )
    report = compress(digits, recipe(*steps), data=samples, eval_data=labelled).report
    _, factorized, trained, quantized = report["steps"]
    assert factorized["changes"]["macs_removed_share"] >= 0.5
    assert trained["changes"]["loss_after"] < trained["changes"]["loss_before"]
    assert quantized["size_bytes"] < factorized["size_bytes"]
    assert report["accuracy"]["drop"] < 0.03


def test_time_limit_gives_the_best_so_far(digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose time would not do for all epochs ends with what it has, and the rest of the job goes on."""
    late_s = 0.0

    def passes(stage: str, index: int, count: int, fraction: float, message: str) -> None:
        nonlocal late_s
        if "epoch 4 of 40: loss" in message:
            late_s = 1e6

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_s))
    steps = (
        {"prune": {"structure": "channel", "sparsity": 0.5, "criterion": "l2"}},
        {"distill": {"epochs": 40}},
    )
    report = compress(digits, recipe(*steps), data=samples, time_limit_s=1e5, on_progress=passes).report
    assert any("time limit ended training in epoch 5 of 40" in warning for warning in report["warnings"])
    assert report["steps"][1]["changes"]["loss_after"] < report["steps"][1]["changes"]["loss_before"]
    assert report["fidelity"]["samples"] == len(samples)


def test_progress_never_falls(digits: Model, samples: InputData) -> None:
    """Progress of a recipe with training rises from start to end."""
    told: list[float] = []
    steps = ({"prune": {"structure": "channel", "sparsity": 0.3}}, {"distill": {"epochs": 2}})
    compress(digits, recipe(*steps), data=samples, on_progress=lambda *event: told.append(event[3]))
    assert told == sorted(told)
    assert told[-1] == 1.0
