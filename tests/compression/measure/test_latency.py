"""What a latency row says about itself. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from itertools import pairwise
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression import runtime
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.inputs import InputData
from modelpress_compression.measure import latency
from modelpress_compression.measure.latency import (
    MIN_ROUNDS,
    Samples,
    Speedup,
    Timings,
    _runs_per_round,
    compare_latency,
    median_interval,
    ratio_interval,
    robust_timings,
    time_interleaved,
)
from modelpress_compression.specs import parse_specs

RELU = "g (float[batch,4] x) => (float[batch,4] y) { y = Relu(x) }"


@pytest.fixture
def relu(save_model: Callable[..., Path]) -> Path:
    """The smallest model."""
    return save_model(RELU)


@pytest.fixture
def four(samples: Callable[..., InputData]) -> InputData:
    """Three samples for it."""
    return samples("x:float32[batch,4]", np.ones((3, 4), np.float32))


def test_a_row_has_the_shape_of_the_report(relu: Path, four: InputData) -> None:
    """The fields of report.json, ordered quantiles, and an interval around the median; JSON without NaN."""
    row = compare_latency(relu, relu, four, threads=1, batch_size=1, rounds=12).to_dict()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {"execution_provider", "threads", "batch_size", "rounds", "original", "optimized", "speedup"} <= row.keys()
    assert (row["threads"], row["batch_size"], row["rounds"]) == (1, 1, 12)
    for role in ("original", "optimized"):
        times = row[role]
        assert 0 < times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
    assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]


def test_tiny_models_run_several_times_a_round() -> None:
    """A model of microseconds is timed over several runs, so that the clock's resolution does not matter; on several
    threads all timings take as long as the slowest model's."""
    assert _runs_per_round((2e-6, 5e-3), alike=False) == (50, 1)
    assert _runs_per_round((1e-3, 5e-3), alike=True) == (5, 1)


def test_samples_are_repeated_to_fill_a_batch(relu: Path, four: InputData) -> None:
    """Three samples make a batch of eight."""
    assert compare_latency(relu, relu, four, threads=1, batch_size=8, rounds=6).batch_size == 8


def test_a_fixed_batch_is_used_and_said(save_model: Callable[..., Path], samples: Callable[..., InputData]) -> None:
    """A model for batches of two is timed with two, whatever was asked for."""
    path = save_model("g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
    data = samples("x:float32[2,4]", np.ones((4, 4), np.float32))
    assert compare_latency(path, path, data, threads=1, batch_size=8, rounds=6).batch_size == 2


def test_a_baked_batch_falls_back_to_one(save_model: Callable[..., Path], samples: Callable[..., InputData]) -> None:
    """A Reshape to [1, 4] refuses batches; the row says that one sample was timed."""
    path = save_model("g (float[batch,4] x) => (float[1,4] y) { y = Reshape(x, s) }", {"s": np.int64([1, 4])})
    data = samples("x:float32[batch,4]", np.ones((9, 4), np.float32))
    assert compare_latency(path, path, data, threads=1, batch_size=4, rounds=6).batch_size == 1


def test_whole_feeds_count_as_one(save_model: Callable[..., Path]) -> None:
    """Samples that are feeds of their own cannot be put together."""
    path = save_model("g (float[a,4] x, float k) => (float[a,4] y) { y = Mul(x, k) }")
    specs = parse_specs(["x:float32[a,4]", "k:float32[]"])
    data = InputData.from_arrays({"x": np.ones((3, 2, 4), np.float32), "k": np.ones(3, np.float32)}, specs)
    assert compare_latency(path, path, data, threads=1, batch_size=8, rounds=6).batch_size == 1


def test_the_budget_bounds_the_rounds(relu: Path, four: InputData) -> None:
    """With hardly any time there are as few rounds as an interval needs, and the row says how many."""
    row = compare_latency(relu, relu, four, threads=1, batch_size=1, rounds=100_000, budget_s=0.01)
    assert MIN_ROUNDS <= row.rounds < 100_000


def test_garbage_collection_comes_back(relu: Path, four: InputData) -> None:
    """It is off while timing only, also where timing fails."""
    compare_latency(relu, relu, four, threads=1, batch_size=1, rounds=MIN_ROUNDS)
    assert gc.isenabled()


def test_any_number_of_models_share_the_rounds(relu: Path, four: InputData) -> None:
    """Three models have one time each in every round, and each can be held against each."""
    timings = time_interleaved((relu, relu, relu), four, threads=1, batch_size=2, rounds=9)
    assert timings.times_s.shape == (3, 9)
    assert (timings.rounds, timings.batch_size) == (9, 2)
    assert (timings.times_s > 0).all()
    assert timings.speedup(1, 1).median == 1.0


def test_speedups_are_taken_round_by_round() -> None:
    """A machine that turns ten times slower for some rounds does not move the ratio of two models."""
    disturbance = np.array([1, 10, 1, 10, 1, 10, 1], np.float64)
    timings = Timings(1, (1, 1), np.stack([2.0 * disturbance, 1.0 * disturbance]))
    assert timings.speedup(0, 1).low == timings.speedup(0, 1).high == 2.0
    assert timings.speedup(1, 0).median == 0.5
    assert timings.quantiles(1).p50_ms == 1e3


def _preempted(busy_s: np.ndarray, slice_s: float, seed: int) -> np.ndarray:
    """Wall times of runs of these CPU times, of which the longer are preempted the more often, for `slice_s` each."""
    rng = np.random.default_rng(seed)
    return np.asarray(busy_s + slice_s * rng.poisson(busy_s / 4e-3))


def test_preemption_does_not_move_the_speedup() -> None:
    """Runs of 3 and 1 ms beside other work: the slow one is preempted three times as often, so that means of wall times
    say far more than 3; what is reported is 3 to within 2 %, by the CPU clock, and that the machine was busy."""
    rng = np.random.default_rng(1)
    cpu_s = np.stack([rng.normal(mean, 0.02 * mean, 200) for mean in (3e-3, 1e-3)])
    wall_s = np.stack([_preempted(row, 8e-3, seed) for seed, row in enumerate(cpu_s)])
    timings = robust_timings(Samples(wall_s, cpu_s, np.ones(200, bool)), 1, (1, 1), threads=1)
    assert timings.clock == "cpu"
    assert timings.contention > 2
    assert timings.speedup(0, 1).median == pytest.approx(3.0, rel=0.02)


def test_a_quiet_machine_is_timed_by_the_wall_clock() -> None:
    """Where both clocks agree to 5 % the figures are wall times, as a user's stopwatch would have them."""
    cpu_s = np.full((2, 12), 1e-3)
    timings = robust_timings(Samples(cpu_s * 1.02, cpu_s, np.zeros(12, bool)), 1, (1, 1), threads=1)
    assert timings.clock == "wall"
    assert timings.quantiles(0).p50_ms == pytest.approx(1.02)


def test_rounds_that_were_preempted_are_left_out_on_several_threads() -> None:
    """Three of nine rounds were disturbed: six remain, and the contention tells of the three."""
    wall_s = np.full((2, 9), 1e-3)
    wall_s[:, :3] *= 10
    preempted = np.arange(9) < 3
    timings = robust_timings(Samples(wall_s, wall_s * 4, preempted), 1, (1, 1), threads=4)
    assert timings.rounds == 6
    assert timings.quantiles(1).p99_ms == pytest.approx(1.0)
    assert timings.contention == pytest.approx(4.0)


def test_disturbed_rounds_stay_where_there_are_too_few_others() -> None:
    """Without six quiet rounds all are kept, and the figures are not to be trusted."""
    wall_s = np.full((2, 9), 1e-3)
    wall_s[:, :2] *= 10
    timings = robust_timings(Samples(wall_s, wall_s, np.arange(9) < 4), 1, (1, 1), threads=2)
    assert timings.rounds == 9
    assert timings.contention > 1.05


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1.2, 1.1, 1.3), "faster"), ((0.8, 0.7, 0.9), "slower"), ((1.0, 0.9, 1.1), "not distinguishable")],
)
def test_the_verdict_follows_the_interval(interval: tuple[float, float, float], verdict: str) -> None:
    """Only an interval that leaves 1 out says faster or slower."""
    assert Speedup(*interval).verdict == verdict
    assert Speedup(*interval).to_dict()["verdict"] == verdict


def test_the_interval_sees_drifts() -> None:
    """Ratios that wander by 10 % from second to second leave an interval as wide, though each second is exact."""
    ratios = np.repeat([1.9, 2.1, 1.95, 2.05, 1.9, 2.1, 2.0, 2.0], 40)
    drifting = ratio_interval(ratios)
    steady = ratio_interval(np.tile(ratios[::40], 40))
    assert drifting.low < 1.95
    assert drifting.high > 2.05
    assert steady.high - steady.low < drifting.high - drifting.low


def test_a_model_that_does_not_run_is_named(save_model: Callable[..., Path], four: InputData) -> None:
    """A model that refuses the data raises, and is not timed as very fast."""
    path = save_model("g (float[batch,5] x) => (float[batch,5] y) { y = Relu(x) }")
    with pytest.raises(ModelNotRunnableError):
        compare_latency(path, path, four, threads=1, batch_size=1, rounds=6)


@given(st.integers(6, 300))
def test_the_interval_is_the_exact_one(count: int) -> None:
    """By the binomial distribution in whole numbers: the ranks enclose at least 95 %, and one further in would not."""
    found = median_interval([float(value) for value in range(1, count + 1)])
    rank = int(found.low)
    assert found.high == count + 1 - rank

    def outside(k: int) -> float:
        return 2 * sum(comb(count, i) for i in range(k)) / 2**count

    assert outside(rank) <= 0.05 + 1e-9
    assert outside(rank + 1) > 0.05 - 1e-9


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60))
def test_the_interval_encloses_the_median(values: list[float]) -> None:
    """low <= median <= high, all within the data."""
    found = median_interval(values)
    assert all(
        left <= right for left, right in pairwise([min(values), found.low, found.median, found.high, max(values)])
    )


def test_models_that_do_not_fit_together_take_turns(
    save_model: Callable[..., Path], samples: Callable[..., InputData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session at a time, as many rounds as asked for, and the batch that all of them take."""
    monkeypatch.setattr(runtime, "SPARE_BYTES", -(10**9))
    relu = save_model(RELU)
    baked = save_model("g (float[batch,4] x) => (float[1,4] y) { y = Reshape(x, s) }", {"s": np.int64([1, 4])}, "baked")
    data = samples("x:float32[batch,4]", np.ones((3, 4), np.float32))
    timings = time_interleaved([relu, relu, relu], data, threads=1, batch_size=2, rounds=20)
    assert (timings.rounds, timings.batch_size, timings.times_s.shape) == (20, 2, (3, 20))
    assert (timings.times_s > 0).all()
    timings = time_interleaved([relu, baked], data, threads=2, batch_size=2, rounds=6)
    assert timings.batch_size == 1
    assert gc.isenabled()


def test_models_run_in_the_same_rounds_where_the_caller_has_the_memory(
    save_model: Callable[..., Path], samples: Callable[..., InputData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`together` opens all at once, whatever their size is held to allow."""
    monkeypatch.setattr(runtime, "SPARE_BYTES", -(10**9))
    monkeypatch.setattr(latency, "_time_in_turn", lambda *plan: pytest.fail("took turns"))
    data = samples("x:float32[batch,4]", np.ones((3, 4), np.float32))
    timings = time_interleaved([save_model(RELU)] * 2, data, threads=1, batch_size=1, rounds=6, together=True)
    assert timings.times_s.shape == (2, 6)
