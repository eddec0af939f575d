"""Latency of two or more models, measured so that the ratio holds on a machine that does other work as well.

All models are open in one process, in the same runtime with equal options. Every round times each of them once, in
random order, on the same inputs.

- One thread: a timing is a single run, for a run is charged with at most its own share of what else the machine does.
  (Bursts of the same *count* of runs are not: the slower model's burst is longer and is preempted more often.) The
  thread's CPU time is read beside the wall clock. The two part where the run was preempted; the ratio of their sums is
  the `contention`. Where it is noticeable, the figures are those of the CPU clock, which preemption does not move.
- Several threads: CPU time says nothing there, for waiting threads spin. A timing is a burst of runs of about the same
  *duration* for every model, so that all are preempted alike, and rounds in which the process was preempted are left
  out while enough others remain.

Where a session happens to lie in memory moves the times of a small model by more than its rounds scatter. So the rounds
are split into blocks, and all sessions are opened anew for each, as often as that takes a small part of the time: the
median and the interval see several of them.

Models too large to be in memory at once (`runtime.fit_together`) take turns instead: in each of some blocks, every
model has a session for as many timings in a row. Round i is made of the i-th timing of each, so that its timings are
further apart and drifts of the machine weigh more; the interval sees them.

Runs that the clock cannot resolve are repeated, again for the same duration. The speedup is the median over rounds of
original / optimized: a machine that slows down for a while slows all parts of a round. Its 95 % interval encloses
two: the exact one for a median, from binomial order statistics, and that of the medians of blocks of successive rounds,
which also sees slow drifts. Six rounds are the fewest for which the first exists (1 - 2 / 2**6 = 96.9 %). A report's
interval reaches further by what no round can see (`SESSION_SPREAD`): measured again, the ratio comes out otherwise.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.base import Backend, Runner
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.inputs import Feeds, InputData
from modelpress_compression.measure.feeds import batches, true_batch_size
from modelpress_compression.model import file_size_bytes
from modelpress_compression.runtime import fit_together, open_together

Times = NDArray[np.float64]

MIN_ROUNDS = 6
CONFIDENCE = 0.95
DEFAULT_BUDGET_S = 60.0
# Distinct feeds that the rounds go through in turn: times may depend on the values.
FEEDS = 8
# A timing shorter than this is repeated within the round, so that neither the clock nor the call itself matters, nor
# that the other models have emptied the caches before the first run.
MIN_TIMING_S = 1e-3  # 1 ms
MAX_RUNS_PER_ROUND = 50
# Wall time over CPU time beyond which the machine counts as busy. Reading two clocks and cold caches make 1 or 2 %.
BUSY = 1.05
# What the rounds of one measurement cannot see, since all have the same sessions: where each happens to lie in memory
# moves the ratio by up to this share from one measurement to the next, by more where others empty the caches.
SESSION_SPREAD, BUSY_SPREAD = 0.02, 0.03
# Blocks of successive rounds whose medians tell how far the ratio drifts, and the fewest rounds of one.
BLOCKS, MIN_BLOCK_ROUNDS = 8, 3
_T_975 = 2.365  # 97.5 % quantile of Student's t with BLOCKS - 1 degrees of freedom
# Blocks of rounds with sessions of their own, at most; opening them may take this share of the time. Of a net of 80 kB
# that takes 0.1 ms, the ratio moves by 3 % from one opening to the next, whatever the rounds of each say.
OPENINGS, OPENING_SHARE = 24, 0.1
WARM_UP_SHARE = 0.2
WARM_UP_MAX_S = 3.0
WARM_UP_MAX_RUNS = 50
# Blocks in which models that do not fit into memory together take turns, and runs before the first timing of each.
TURNS, WARM_UP_RUNS = 3, 2
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

    @property
    def verdict(self) -> str:
        """What the interval allows to say: faster, slower or not distinguishable."""
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "not distinguishable"

    def widened(self, share: float) -> Speedup:
        """With an interval that reaches by this share further on both sides."""
        return Speedup(self.median, self.low / (1 + share), self.high * (1 + share))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in report.json."""
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Timings:
    """Times of several models from interleaved rounds, in seconds for one run of the whole batch, [models, rounds].

    `batch_size`, `runs_per_round`, `contention`, `clock`: as in `LatencyRow`.
    """

    batch_size: int
    runs_per_round: tuple[int, ...]
    times_s: Times
    contention: float = 1.0
    clock: str = "wall"

    @property
    def rounds(self) -> int:
        return int(self.times_s.shape[1])

    def quantiles(self, model: int) -> Quantiles:
        """Of the model at this place in the order they were given in."""
        return _quantiles(self.times_s[model])

    def speedup(self, before: int, after: int) -> Speedup:
        """The time of model `before` over that of model `after`, round by round."""
        return ratio_interval(self.times_s[before] / self.times_s[after])


@dataclass(frozen=True)
class LatencyRow:
    """One row of the report's `latency`. `rounds` and `batch_size` are those that were run, not those asked for.

    `runs_per_round`: each timing is the mean of so many runs in a row, of the original and of the optimized model.
    `contention`: wall time over CPU time, 1 on a machine that does nothing else; beyond 1.05 on one thread, the times
    are those of the CPU `clock`.
    """

    execution_provider: str
    threads: int
    batch_size: int
    rounds: int
    runs_per_round: tuple[int, int]
    contention: float
    clock: str
    original: Quantiles
    optimized: Quantiles
    speedup: Speedup

    @property
    def trusted(self) -> bool:
        """Whether other work on the machine left the figures alone."""
        return self.clock == "cpu" or self.contention <= BUSY

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in report.json."""
        return asdict(self) | {"runs_per_round": list(self.runs_per_round), "speedup": self.speedup.to_dict()}


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
    backend: Backend = CPU,
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
        backend=backend,
    )
    return LatencyRow(
        execution_provider=backend.label,
        threads=threads,
        batch_size=timings.batch_size,
        rounds=timings.rounds,
        runs_per_round=(timings.runs_per_round[0], timings.runs_per_round[1]),
        contention=timings.contention,
        clock=timings.clock,
        original=timings.quantiles(0),
        optimized=timings.quantiles(1),
        speedup=timings.speedup(0, 1).widened(BUSY_SPREAD if timings.contention > BUSY else SESSION_SPREAD),
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
    backend: Backend = CPU,
    together: bool = False,
) -> Timings:
    """Times all models in interleaved rounds in the `backend`, within about `budget_s` seconds.

    `together`: there is memory for all of them at once, however large they are.

    Where time does not suffice there are fewer rounds, but at least six. Where a model cannot take batches of
    `batch_size` (its batch is fixed, or baked into a Reshape), all are timed with what it takes, and the result says
    so. Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    if not together and not fit_together(map(file_size_bytes, models)):
        plan = _Plan(models, data, threads, batch_size, rounds, budget_s, backend)
        with _no_garbage_collection():
            return _time_in_turn(plan, random.Random(seed))  # noqa: S311  # an order, not a secret
    began = time.perf_counter()
    openers = [partial(backend.open, threads=threads)] * len(models)
    runners = open_together(models, openers)
    opened_s = time.perf_counter() - began
    feeds, size = _accepted_feeds(runners, data, batch_size)
    with _no_garbage_collection():
        warm_up_s = min(WARM_UP_MAX_S, budget_s * WARM_UP_SHARE / len(runners))
        once_s = [_warm_up(runner, feeds, warm_up_s) for runner in runners]
        runs = _runs_per_round(once_s, alike=threads > 1)
        count = _rounds_within(budget_s - (time.perf_counter() - began), once_s, runs, rounds)
        shuffler = random.Random(seed)  # noqa: S311  # an order, not a secret
        blocks = max(1, min(OPENINGS, count // MIN_BLOCK_ROUNDS, int(OPENING_SHARE * budget_s / opened_s)))
        timed: list[list[_Sample]] = []
        for block in range(blocks):
            if block:
                runners = open_together(models, openers)
                for runner, one_s in zip(runners, once_s, strict=True):
                    _warm_up(runner, feeds, one_s * WARM_UP_RUNS)
            timers = [_Timer(runner, feeds, times) for runner, times in zip(runners, runs, strict=True)]
            own = range(block * count // blocks, (block + 1) * count // blocks)
            timed += _rounds(timers, own, shuffler=shuffler, deadline=began + budget_s)
    return robust_timings(_samples(timed), size, runs, threads, elsewhere=backend.elsewhere)


@dataclass(frozen=True)
class _Plan:
    """What is asked of `time_interleaved`."""

    models: Sequence[Path]
    data: InputData
    threads: int
    batch_size: int
    rounds: int
    budget_s: float
    backend: Backend


def _time_in_turn(plan: _Plan, shuffler: random.Random) -> Timings:
    """One session at a time. The first look at each model, which says what it takes and how long, is not counted."""
    began = time.perf_counter()
    size = plan.batch_size
    once_s: list[float] = []
    while len(once_s) < len(plan.models):
        runner = plan.backend.open(plan.models[len(once_s)], threads=plan.threads)
        feeds, taken = _accepted_feeds([runner], plan.data, size)
        if once_s and taken != size:
            once_s.clear()  # those before were looked at with batches that this one refuses
        else:
            limit_s = min(WARM_UP_MAX_S, plan.budget_s * WARM_UP_SHARE / len(plan.models))
            once_s.append(_warm_up(runner, feeds, limit_s))
        size = taken
        del runner  # before the next one is there
    runs = _runs_per_round(once_s, alike=plan.threads > 1)
    count = _rounds_within(plan.budget_s - (time.perf_counter() - began), once_s, runs, plan.rounds)
    feeds = batches(plan.data, size, FEEDS)
    timed: list[list[_Sample]] = [[] for _ in plan.models]
    order = list(range(len(plan.models)))
    for block in range(TURNS):
        rounds = range(block * count // TURNS, (block + 1) * count // TURNS)
        shuffler.shuffle(order)
        for which in order:
            runner = plan.backend.open(plan.models[which], threads=plan.threads)
            _warm_up(runner, feeds, once_s[which] * WARM_UP_RUNS)
            timer = _Timer(runner, feeds, runs[which])
            timed[which] += [timer.time(index) for index in rounds]
            del runner, timer
    samples = _samples(list(zip(*timed, strict=True)))
    return robust_timings(samples, size, runs, plan.threads, elsewhere=plan.backend.elsewhere)


def _rounds_within(budget_s: float, once_s: Sequence[float], runs: Sequence[int], rounds: int) -> int:
    """As many of the rounds as there is time for, but the fewest that an interval needs."""
    round_s = sum(one_s * count for one_s, count in zip(once_s, runs, strict=True))
    return max(MIN_ROUNDS, min(rounds, int(budget_s / round_s)))


def _runs_per_round(once_s: Sequence[float], *, alike: bool) -> tuple[int, ...]:
    """How often each model runs in a round, so that the clock resolves a timing.

    `alike`: all timings take as long as the slowest model's, since only then preemption, which the wall clock cannot
    tell from work, meets each of them as often.
    """
    least_s = max(MIN_TIMING_S, max(once_s) if alike else 0.0)
    return tuple(max(1, min(MAX_RUNS_PER_ROUND, round(least_s / max(one_s, 1e-7)))) for one_s in once_s)


def robust_timings(
    samples: Samples, batch_size: int, runs: tuple[int, ...], threads: int, *, elsewhere: bool = False
) -> Timings:
    """The times that other work on the machine moves least. `elsewhere`: whether another device than the CPU computes,
    which this thread only waits for."""
    wall_s, cpu_s = samples.wall_s, samples.cpu_s
    if threads == 1 and not elsewhere:
        contention = float(wall_s.sum() / max(cpu_s.sum(), 1e-9))
        busy = contention > BUSY
        return Timings(batch_size, runs, cpu_s if busy else wall_s, contention, "cpu" if busy else "wall")
    quiet = ~samples.preempted
    kept_s = wall_s[:, quiet] if int(quiet.sum()) >= MIN_ROUNDS else wall_s
    # CPU time of a pool of spinning threads is no measure of work: what the machine adds is told from quiet rounds.
    usual_s = np.median(kept_s, axis=1, keepdims=True)
    return Timings(batch_size, runs, kept_s, float(max(1.0, (wall_s / usual_s).mean())), "wall")


def ratio_interval(ratios: Times) -> Speedup:
    """Median of the ratios of successive rounds with a 95 % interval that sees drifts too.

    It is the exact interval of `median_interval`, widened to that of the mean of the medians of successive blocks
    (Student's t on logarithms): what changes from one second to the next moves whole blocks, which the first, for which
    rounds are independent, takes for certainty.
    """
    exact = median_interval(ratios.tolist())
    if len(ratios) < BLOCKS * MIN_BLOCK_ROUNDS:
        return exact
    medians = np.log([float(np.median(block)) for block in np.array_split(ratios, BLOCKS)])
    reach = math.exp(_T_975 * float(medians.std(ddof=1)) / math.sqrt(BLOCKS))
    return Speedup(exact.median, min(exact.low, exact.median / reach), max(exact.high, exact.median * reach))


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


def _accepted_feeds(runners: Sequence[Runner], data: InputData, batch_size: int) -> tuple[list[Feeds], int]:
    """Feeds of the batch size asked for, or of one sample where a model refuses that; and their size."""
    size = true_batch_size(data, batch_size)
    feeds = batches(data, size, FEEDS)
    try:
        for runner in runners:
            runner.run(feeds[0])
    except ModelNotRunnableError:
        if size == 1 or data.fixed_batch:
            raise
        return _accepted_feeds(runners, data, 1)
    return feeds, size


def _warm_up(runner: Runner, feeds: Sequence[Feeds], limit_s: float) -> float:
    """Runs until times are stable, the limit is reached or there were 50 runs; returns the usual time of one run."""
    timer = _Timer(runner, feeds, 1)
    began = time.perf_counter()
    times_s: list[float] = []
    while len(times_s) < WARM_UP_MAX_RUNS:
        times_s.append(timer.time(len(times_s)).wall_s)
        last = times_s[-4:]
        stable = len(last) == 4 and max(last) - min(last) <= STABLE_SPREAD * min(last)
        if stable or time.perf_counter() - began > limit_s:
            break
    return float(np.min(times_s[-4:]))


@dataclass(frozen=True)
class _Sample:
    """One timing: seconds of one run by either clock, and how often the process was preempted meanwhile."""

    wall_s: float
    cpu_s: float
    preemptions: int


@dataclass(frozen=True)
class Samples:
    """Timings of all rounds: seconds [models, rounds], and whether any of a round's was preempted [rounds]."""

    wall_s: Times
    cpu_s: Times
    preempted: NDArray[np.bool_]


class _Timer:
    """Times one model, `runs` runs at a time, on each of the feeds in turn."""

    def __init__(self, runner: Runner, feeds: Sequence[Feeds], runs: int) -> None:
        self._calls, self._runs = [runner.prepared(feed) for feed in feeds], runs

    def time(self, index: int) -> _Sample:
        run_once = self._calls[index % len(self._calls)]
        preempted = _preemptions()
        # The wall clock lies outside: it may count the system calls that read the CPU clock, not the other way round.
        began_wall, began_cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(self._runs):
            run_once()
        cpu_ns, wall_ns = time.thread_time_ns() - began_cpu, time.perf_counter_ns() - began_wall
        return _Sample(wall_ns / self._runs / 1e9, cpu_ns / self._runs / 1e9, _preemptions() - preempted)


def _preemptions() -> int:
    """How often the kernel took a processor away from a thread of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _rounds(
    timers: Sequence[_Timer], indices: Sequence[int], *, shuffler: random.Random, deadline: float
) -> list[list[_Sample]]:
    """Times every model once a round; stops early when the time is up and there are enough rounds."""
    rounds: list[list[_Sample]] = []
    order = list(range(len(timers)))
    for index in indices:
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        shuffler.shuffle(order)
        timed = {which: timers[which].time(index) for which in order}
        rounds.append([timed[which] for which in range(len(timers))])
    return rounds


def _samples(rounds: Sequence[Sequence[_Sample]]) -> Samples:
    """Those of each round, one for each model."""
    return Samples(
        wall_s=np.asarray([[sample.wall_s for sample in row] for row in rounds]).T,
        cpu_s=np.asarray([[sample.cpu_s for sample in row] for row in rounds]).T,
        preempted=np.asarray([any(sample.preemptions for sample in row) for row in rounds]),
    )


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
