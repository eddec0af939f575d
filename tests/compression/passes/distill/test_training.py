"""How fast weights move: the schedule, and a learning rate that nobody gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.distill import training
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.training import LESS_RATE, Pace
from onnx import helper

Run = Callable[..., PassResult]


@given(steps=st.integers(1, 300), warmup=st.sampled_from([0.0, 0.05, 0.3]))
def test_the_rate_rises_once_and_falls_to_nearly_nothing(steps: int, warmup: float) -> None:
    """Whatever the number of steps, it is never above the full rate, rises before it falls, and ends near zero."""
    pace = Pace(DistillConfig(learning_rate=1.0, warmup=warmup), steps, clock=lambda: 0.0)
    rates = [pace.next_rate() for _ in range(steps)]
    peak = int(np.argmax(rates))
    assert max(rates) <= 1.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] <= 4 * (math.pi / (steps + 1)) ** 2 + 0.51 * (steps < 3)


def test_a_run_that_ends_early_has_the_whole_schedule() -> None:
    """Of 10,000 steps there is time for ten: the rate falls as if there had been ten."""
    seconds = count()
    pace = Pace(DistillConfig(learning_rate=1.0, warmup=0.0), 10_000, stop_at=10.0, clock=lambda: float(next(seconds)))
    rates = [pace.next_rate() for _ in range(10)]
    np.testing.assert_allclose(rates, [0.5 * (1 + math.cos(math.pi * share / 10)) for share in range(1, 11)])


def test_slower_after_a_rate_that_was_too_high() -> None:
    """A quarter of what the last step had, also while that was still rising; it rises no more."""
    pace = Pace(DistillConfig(learning_rate=1.0, warmup=0.5), 99, clock=lambda: 0.0)
    last = [pace.next_rate() for _ in range(10)][-1]
    pace.slow_down()
    after = [pace.next_rate() for _ in range(20)]
    assert after[0] <= LESS_RATE * last
    assert after == sorted(after, reverse=True)


@pytest.fixture
def brittle(channel_model: Callable[..., Model]) -> Callable[[float], Model]:
    """x [N, 64] @ weights of 0.001 or less, of inputs of about 1,000; the argument is what is added to them."""

    def build(change: float) -> Model:
        generator = np.random.default_rng(5)
        first = generator.normal(0, 1e-3, (64, 32)).astype(np.float32)
        second = generator.normal(0, 0.2, (32, 8)).astype(np.float32)
        noise = np.random.default_rng(6).normal(0, 1, first.shape).astype(np.float32)
        nodes = [
            helper.make_node("MatMul", ["x", "first"], ["inner"], name="first product"),
            helper.make_node("Relu", ["inner"], ["positive"]),
            helper.make_node("MatMul", ["positive", "second"], ["y"], name="second product"),
        ]
        weights = {"first": first + np.float32(change) * noise, "second": second}
        return channel_model(nodes, weights, ["n", 64], ["n", 8])

    return build


def test_a_rate_that_nobody_gave_fits_the_model(brittle: Callable[[float], Model], distill: Run) -> None:
    """1e-3 is as much as the weights are. Given, it brings nothing; found, the error falls to a half at most."""
    arrays = {"x": (1000 + 300 * np.random.default_rng(7).normal(size=(128, 64))).astype(np.float32)}
    options: dict[str, Any] = {"epochs": 15, "batch_size": 16, "feature_weight": 0.0}
    given_rate = distill(brittle(0.0), brittle(1e-4), arrays, learning_rate=1e-3, **options)
    found = distill(brittle(0.0), brittle(1e-4), arrays, **options)
    assert not given_rate.changed
    assert found.changes["loss_after"] < found.changes["loss_before"] / 2
    assert 0 < found.changes["learning_rate"] <= 1e-3


def test_a_rate_without_finite_answers_is_left(
    conv_net: Model, images: Any, perturbed: Any, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first rate that ends in numbers that are none is divided until one does not, and training goes on."""
    monkeypatch.setitem(training.FIRST_RATES, "adamw", 1e30)
    monkeypatch.setattr(training, "LESS_RATE", 1e-11)
    result = distill(conv_net, perturbed(conv_net), {"x": images(64)}, epochs=12, batch_size=16, warmup=0.0)
    assert result.changes["loss_after"] < result.changes["loss_before"]
    assert result.changes["learning_rate"] < 1
    assert not any("diverged" in warning for warning in result.warnings)
