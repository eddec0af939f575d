"""Latency of two or more models, measured so that what disturbs one disturbs the others.

All models have a session with equal options in one process. Every round times each of them once, in random order, on
the same inputs. The speedup is the median over rounds of original / optimized: a machine that slows down for a while
slows all parts of a round. Its 95 % interval is the exact one for a median, from binomial order statistics: nothing
is assumed about how times are distributed. Six rounds are the fewest for which such an interval exists (1 - 2 / 2**6 =
96.9 %), so there are never fewer.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.inputs import Feeds, InputData
from modelpress_compression.measure.feeds import batches, true_batch_size
from modelpress_compression.runtime import EXECUTION_PROVIDER, open_session, run

Times = np.ndarray[Any, np.dtype[np.float64]]

MIN_ROUNDS = 6
CONFIDENCE = 0.95
DEFAULT_BUDGET_S = 60.0
# Distinct feeds that the rounds go through in turn: times may depend on the values.
FEEDS = 8
# A timing shorter than this is repeated within the round, so that neither the clock nor the call itself matters.
MIN_TIMING_S = 1e-3  # 1 ms
MAX_RUNS_PER_ROUND = 200
WARM_UP_SHARE = 0.2
WARM_UP_MAX_S = 3.0
WARM_UP_MAX_RUNS = 50
# Warm-up ends when the last runs lie this close together.
STABLE_SPREAD = 0.05


@dataclass(frozen=True)
class Quantiles:
    """Times of one model over the rounds, in milliseconds for one run of the whole batch."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float


@dataclass(frozen=True)
class Speedup:
    """original / optimized: over 1 is faster. `low` and `high` are the 95 % interval of the median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Times of several models from interleaved rounds, in seconds for one run of the whole batch, [models, rounds].

    `batch_size`, `runs_per_round`: as in `LatencyRow`.
    """

    batch_size: int
    runs_per_round: int
    times_s: Times

    @property
    def rounds(self) -> int:
        return int(self.times_s.shape[1])

    def quantiles(self, model: int) -> Quantiles:
        """Of the model at this place in the order they were given in."""
        return _quantiles(self.times_s[model])

    def speedup(self, before: int, after: int) -> Speedup:
        """The time of model `before` over that of model `after`, round by round."""
        return median_interval((self.times_s[before] / self.times_s[after]).tolist())


@dataclass(frozen=True)
class LatencyRow:
    """One row of the report's `latency`. `rounds` and `batch_size` are those that were run, not those asked for.

    `runs_per_round`: each timing is the mean of so many runs in a row; more than one for models under a millisecond.
    """

    execution_provider: str
    threads: int
    batch_size: int
    rounds: int
    runs_per_round: int
    original: Quantiles
    optimized: Quantiles
    speedup: Speedup

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in report.json."""
        return asdict(self)


def compare_latency(
    original: Path,
    optimized: Path,
    data: InputData,
    *,
    threads: int,
    batch_size: int,
    rounds: int,
    seed: int = 0,
    budget_s: float = DEFAULT_BUDGET_S,
) -> LatencyRow:
    """Times both models in interleaved rounds, within about `budget_s` seconds; see `time_interleaved`."""
    timings = time_interleaved(
        (original, optimized),
        data,
        threads=threads,
        batch_size=batch_size,
        rounds=rounds,
        seed=seed,
        budget_s=budget_s,
    )
    return LatencyRow(
        execution_provider=EXECUTION_PROVIDER,
        threads=threads,
        batch_size=timings.batch_size,
        rounds=timings.rounds,
        runs_per_round=timings.runs_per_round,
        original=timings.quantiles(0),
        optimized=timings.quantiles(1),
        speedup=timings.speedup(0, 1),
    )


def time_interleaved(
    models: Sequence[Path],
    data: InputData,
    *,
    threads: int,
    batch_size: int,
    rounds: int,
    seed: int = 0,
    budget_s: float = DEFAULT_BUDGET_S,
) -> Timings:
    """Times all models in interleaved rounds, within about `budget_s` seconds.

    Where time does not suffice there are fewer rounds, but at least six. Where a model cannot take batches of
    `batch_size` (its batch is fixed, or baked into a Reshape), all are timed with what it takes, and the result says
    so. Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    began = time.perf_counter()
    sessions = [open_session(path, threads=threads) for path in models]
    feeds, size = _accepted_feeds(sessions, data, batch_size)
    with _no_garbage_collection():
        warm_up_s = min(WARM_UP_MAX_S, budget_s * WARM_UP_SHARE / len(sessions))
        once_s = [_warm_up(session, feeds, warm_up_s) for session in sessions]
        runs = max(1, min(MAX_RUNS_PER_ROUND, math.ceil(MIN_TIMING_S / max(min(once_s), 1e-7))))
        remaining_s = budget_s - (time.perf_counter() - began)
        affordable = int(remaining_s / (sum(once_s) * runs))
        count = max(MIN_ROUNDS, min(rounds, affordable))
        shuffler = random.Random(seed)  # noqa: S311  # an order, not a secret
        times_s = _rounds(sessions, feeds, count, runs, shuffler=shuffler, deadline=began + budget_s)
    return Timings(size, runs, np.asarray(times_s))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Speedup:
    """Median and its exact distribution-free interval.

    The k-th smallest and k-th largest of n values enclose the true median with probability 1 - 2 P(Bin(n, 1/2) < k);
    taken is the largest k for which that is at least `confidence`. Fewer than six values: from smallest to largest.
    """
    ordered = sorted(values)
    rank = _interval_rank(len(ordered), (1 - confidence) / 2)
    return Speedup(median=float(np.median(ordered)), low=ordered[rank - 1], high=ordered[-rank])


def _interval_rank(count: int, tail: float) -> int:
    """The largest k with P(Bin(count, 1/2) < k) <= tail, at least 1."""
    cumulative, rank = 0.0, 0
    for successes in range(count // 2 + 1):
        log_ways = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
        cumulative += math.exp(log_ways - count * math.log(2))
        if cumulative > tail:
            break
        rank = successes + 1
    return max(rank, 1)


def _accepted_feeds(
    sessions: Sequence[ort.InferenceSession], data: InputData, batch_size: int
) -> tuple[list[Feeds], int]:
    """Feeds of the batch size asked for, or of one sample where a model refuses that; and their size."""
    size = true_batch_size(data, batch_size)
    feeds = batches(data, size, FEEDS)
    try:
        for session in sessions:
            run(session, feeds[0])
    except ModelNotRunnableError:
        if size == 1 or data.fixed_batch:
            raise
        return _accepted_feeds(sessions, data, 1)
    return feeds, size


def _warm_up(session: ort.InferenceSession, feeds: Sequence[Feeds], limit_s: float) -> float:
    """Runs until times are stable, the limit is reached or there were 50 runs; returns the usual time of one run."""
    began = time.perf_counter()
    times_s: list[float] = []
    while len(times_s) < WARM_UP_MAX_RUNS:
        times_s.append(_time_s(session, feeds[len(times_s) % len(feeds)], 1))
        last = times_s[-4:]
        stable = len(last) == 4 and max(last) - min(last) <= STABLE_SPREAD * min(last)
        if stable or time.perf_counter() - began > limit_s:
            break
    return float(np.median(times_s[-4:]))


def _rounds(
    sessions: Sequence[ort.InferenceSession],
    feeds: Sequence[Feeds],
    count: int,
    runs: int,
    *,
    shuffler: random.Random,
    deadline: float,
) -> list[list[float]]:
    """Seconds of one run of each session, round by round; stops early when the time is up and there are enough."""
    times_s: list[list[float]] = [[] for _ in sessions]
    order = list(range(len(sessions)))
    for index in range(count):
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        shuffler.shuffle(order)
        feed = feeds[index % len(feeds)]
        for which in order:
            times_s[which].append(_time_s(sessions[which], feed, runs))
    return times_s


def _time_s(session: ort.InferenceSession, feed: Feeds, runs: int) -> float:
    names = {value.name for value in session.get_inputs()}
    taken = {name: array for name, array in feed.items() if name in names}
    began = time.perf_counter_ns()
    for _ in range(runs):
        session.run(None, taken)
    return (time.perf_counter_ns() - began) / runs / 1e9


def _quantiles(times_s: Times) -> Quantiles:
    times_ms = times_s * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    return Quantiles(p50_ms=p50, p90_ms=p90, p99_ms=p99, mean_ms=float(times_ms.mean()))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection within a timing would be charged to whichever model runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
