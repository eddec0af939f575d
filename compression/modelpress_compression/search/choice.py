"""Which of the measured candidates a goal takes.

    balanced   the least product of size and time, never more than 5 % slower than the original
    smallest   the least size
    fastest    the least time
    accurate   the least error; candidates that nobody could tell from the original count as equal

Each objective is a list of figures that decide one after the other. A figure keeps the candidates that it cannot tell
from its best: files within 1 % are as large, latencies are as long where the interval of their ratio, taken round by
round, leaves no more than 2 % between them and its median no more than 5 %, and products of size and time within 3 %
are as good.
So noise decides nothing that a measured difference in size or in error can decide, and the same model gets the same
choice again, on a busy machine too.

The limits of a goal come first. Where no candidate holds them all, the one that misses them by the least is taken, and
the choice says which limits are not met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from modelpress_compression.measure.latency import SESSION_SPREAD, Speedup, Times, ratio_interval
from modelpress_compression.recipe import ACCURATE, BALANCED, FASTEST, SMALLEST

# Of the original's time: what `balanced` never takes more than; and what may be measured for that, since measured again
# a ratio comes out otherwise by up to the spread of sessions.
MAX_SLOWDOWN = 1.05
MEASURED_SLOWDOWN = MAX_SLOWDOWN / (1 + SESSION_SPREAD)
# A run may take this much longer whatever its share: where a session lies in memory is worth as much, and of a network
# that runs in ten microseconds more than the bound above.
UNFELT_S = 0.5e-6
SAME_TIME = 0.02
# However wide the interval is: on a busy machine a model 11 % slower than the original could not be told from it.
MOST_SAME_TIME = 0.05
SAME_PRODUCT = 0.03
# How far a few rounds may be off: what misses a bound by no more is timed in all rounds before it is left.
FEW_ROUNDS_SLACK = 1.05
# How far all rounds may be: a figure this close to a bound may be on its other side the next time.
ALL_ROUNDS_SLACK = 1.02
SAME_SIZE = 0.01
# Share of the signal's power, -40 dB: what rounds to the same answer in nearly all cases.
NEGLIGIBLE_ERROR = 1e-4


@dataclass(frozen=True, eq=False)
class Figures:
    """What was measured of one candidate.

    `times_s` [rounds]: the geometric mean over batch sizes; two that have so many rounds have run the first of them
    together. `error`: the share of the outputs' power that is error, of the worst output. `drop`: of the task's metric,
    or of the accuracy that the original expects of itself; 0 where it is not known. `refusal`: why its answers cannot
    stand for the original's; empty: they can. `kernels`: equal where two are the same computation once they are loaded,
    as with weights that are only stored otherwise; empty: not known.
    """

    name: str
    size_bytes: int
    times_s: Times
    error: float
    drop: float = 0.0
    refusal: str = ""
    kernels: str = ""

    @property
    def time_s(self) -> float:
        """Its usual time."""
        return float(np.median(self.times_s))

    def times_of(self, other: Figures) -> Speedup:
        """How many times the other's time it takes, with the interval; in the rounds that both ran."""
        rounds = min(len(self.times_s), len(other.times_s))
        return ratio_interval(self.times_s[:rounds] / other.times_s[:rounds])


@dataclass(frozen=True)
class Limits:
    """What the result must hold; None: no demand. `max_drop` is the judge's, who refuses candidates for it."""

    max_size_bytes: int | None = None
    min_ratio: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None

    def excesses(self, figures: Figures, original: Figures) -> dict[str, float]:
        """By the limit's name, the factor by which the candidate misses each limit that it does not hold."""
        speedup = original.time_s / figures.time_s
        wanted = {
            "max_size_bytes": self.max_size_bytes and figures.size_bytes / self.max_size_bytes,
            "min_ratio": self.min_ratio and self.min_ratio * figures.size_bytes / original.size_bytes,
            "max_latency_ms": self.max_latency_ms and figures.time_s * 1e3 / self.max_latency_ms,
            "min_speedup": self.min_speedup and self.min_speedup / speedup,
        }
        return {name: factor for name, factor in wanted.items() if factor is not None and factor > 1.0}


@dataclass(frozen=True)
class Choice:
    """`taken`: its place among the candidates. `reasons`: why each of the others was not, "" for the one that was.

    `unmet`: by the limit's name, the factor by which the one that was taken misses it.
    """

    taken: int
    reasons: tuple[str, ...]
    unmet: Mapping[str, float]


def choose(candidates: Sequence[Figures], original: int, objective: str, limits: Limits | None = None) -> Choice:
    """The candidate that the objective prefers. `original`: place of the model as it was given, which is never refused.

    Raises ValueError for an unknown objective.
    """
    first = candidates[original]
    reasons = {place: one.refusal for place, one in enumerate(candidates)}
    reasons[original] = ""
    left = _decided(_deciders(objective), candidates, original, objective, limits or Limits(), reasons)
    taken = left[0]
    for place in left[1:]:
        reasons[place] = f"the same as {candidates[taken].name}"
    reasons[taken] = ""
    unmet = (limits or Limits()).excesses(candidates[taken], first)
    return Choice(taken, tuple(reasons[place] for place in range(len(candidates))), unmet)


def contenders(candidates: Sequence[Figures], original: int, objective: str, limits: Limits) -> list[int]:
    """The places that times of more rounds may decide between; one alone: they are enough.

    Those at the edge of a bound are among them, which the noise of a few rounds would decide; under a limit on time all
    that are not refused. Where the original alone would be left, so is the best of those that seem too slow: nothing
    comes back unchanged for the noise of a few rounds. Raises ValueError for an unknown objective.
    """
    deciders = _deciders(objective)
    reasons = {place: one.refusal for place, one in enumerate(candidates)}
    reasons[original] = ""
    if limits.max_latency_ms is not None or limits.min_speedup is not None:
        return [place for place, reason in reasons.items() if not reason]
    last = max(number for number, decider in enumerate(deciders) if decider in (_TIME, _PRODUCT))

    def left(slower: float) -> list[int]:
        slack = _Slack(slower, FEW_ROUNDS_SLACK)
        return _decided(deciders[: last + 1], candidates, original, objective, limits, dict(reasons), slack)

    # The bound lies at several places: what is on its nearer side at one of them may be what outdoes all the others.
    places = {place for power in (-1.0, -0.5, 0.0, 0.5, 1.0) for place in left(FEW_ROUNDS_SLACK**power)}
    if places == {original}:
        places.update(left(math.inf))
    return sorted(places)


def settled(candidates: Sequence[Figures], original: int, objective: str, limits: Limits) -> bool:
    """Whether the same is taken where ratios of times are as far off as their intervals permit, so that times of more
    rounds would hardly change the choice. Raises ValueError for an unknown objective."""
    reasons = {place: "" if place == original else one.refusal for place, one in enumerate(candidates)}

    def taken(factor: float) -> int:
        slack = _Slack(factor, factor)
        return _decided(_deciders(objective), candidates, original, objective, limits, dict(reasons), slack)[0]

    return taken(ALL_ROUNDS_SLACK) == taken(1.0) == taken(1 / ALL_ROUNDS_SLACK)


def _deciders(objective: str) -> Sequence[tuple[str, _Keep]]:
    if objective not in _DECIDERS:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(_DECIDERS)}")
    return _DECIDERS[objective]


@dataclass(frozen=True)
class _Slack:
    """By which factors ratios of times may be off, in favour of the candidate that they are of; below 1 against it.

    They are off by more where their intervals say so. `slower`: of the ratio to the original's time that `balanced`
    looks at, `product`: of those in products of size and time.
    """

    slower: float = 1.0
    product: float = 1.0


_EXACTLY = _Slack()


def _with(slack: float, ratio: Speedup) -> float:
    if slack == 1.0:
        return ratio.median
    return min(ratio.low, ratio.median / slack) if slack > 1.0 else max(ratio.high, ratio.median / slack)


def _decided(
    deciders: Sequence[tuple[str, _Keep]],
    candidates: Sequence[Figures],
    original: int,
    objective: str,
    limits: Limits,
    reasons: dict[int, str],
    slack: _Slack = _EXACTLY,
) -> list[int]:
    """The places that limits and deciders leave; `reasons` gets why each of the others is not among them."""
    first = candidates[original]
    left = [place for place, reason in reasons.items() if not reason]
    left = _within_limits(left, candidates, first, limits, reasons)
    if objective == BALANCED:
        left = _not_slower(left, candidates, original, reasons, slack.slower)
    for what, keep in deciders:
        kept = set(keep([candidates[place] for place in left], first, slack.product))
        for place in left:
            if candidates[place] not in kept:
                reasons[place] = what
        left = [place for place in left if candidates[place] in kept]
    return left


def _within_limits(
    places: list[int], candidates: Sequence[Figures], original: Figures, limits: Limits, reasons: dict[int, str]
) -> list[int]:
    """Those that hold all limits; where none does, those that miss them by the least."""
    excess = {place: max(limits.excesses(candidates[place], original).values(), default=1.0) for place in places}
    least = min(excess.values())
    for place in places:
        if excess[place] > least:
            missed = limits.excesses(candidates[place], original)
            reasons[place] = f"misses {', '.join(missed)}"
    return [place for place in places if excess[place] <= least]


def _not_slower(
    places: list[int], candidates: Sequence[Figures], original: int, reasons: dict[int, str], slack: float
) -> list[int]:
    """Without the candidates that take more time than the original.

    What is the same computation as one that stays, or as the original, stays: on a busy machine weights that are only
    stored otherwise may seem 8 % slower. Where that leaves the original alone, so does what cannot be told from it, and
    the model does not come back as it was.
    """
    most = max(MEASURED_SLOWDOWN, 1 + UNFELT_S / candidates[original].time_s)
    slowdowns = {place: candidates[place].times_of(candidates[original]) for place in places if place != original}
    as_fast = {place for place, slowdown in slowdowns.items() if _with(slack, slowdown) <= most}
    alike = {candidates[place].kernels for place in (original, *as_fast)} - {""}
    as_fast |= {place for place in slowdowns if candidates[place].kernels in alike}
    as_fast = as_fast or {place for place, slowdown in slowdowns.items() if slowdown.low <= 1}
    for place in slowdowns.keys() - as_fast:
        reasons[place] = f"{slowdowns[place].median:.2f} times the original's time"
    # Where limits left nothing else, a slow candidate is what was asked for.
    return [place for place in places if place == original or place in as_fast] or places


_Keep = Callable[[Sequence[Figures], Figures, float], Sequence[Figures]]  # of candidates, original and slack


def _least_size(candidates: Sequence[Figures], original: Figures, slack: float) -> Sequence[Figures]:
    most = min(one.size_bytes for one in candidates) * (1 + SAME_SIZE)
    return [one for one in candidates if one.size_bytes <= most]


def _least_time(candidates: Sequence[Figures], original: Figures, slack: float) -> Sequence[Figures]:
    """Those that cannot be told from the best, and those that compute as one of them does."""
    best = min(candidates, key=lambda one: one.time_s)

    def as_fast(one: Figures) -> bool:
        ratio = one.times_of(best)
        return ratio.low <= 1 + SAME_TIME and ratio.median <= 1 + MOST_SAME_TIME

    fast = [one for one in candidates if as_fast(one)]
    alike = {one.kernels for one in fast} - {""}
    return [one for one in candidates if one in fast or one.kernels in alike]


def _least_product(candidates: Sequence[Figures], original: Figures, slack: float) -> Sequence[Figures]:
    """Those that are as good as the best to within `SAME_PRODUCT`, and not worse than the original."""
    best = min(candidates, key=lambda one: one.size_bytes * one.time_s)
    same = 1 + SAME_PRODUCT

    def over(one: Figures, other: Figures) -> float:
        # In the end not by the interval, which is wide on a busy machine: more would count as equal there, and the
        # choice be another.
        return _with(slack, one.times_of(other)) * one.size_bytes / other.size_bytes

    return [one for one in candidates if one is best or (over(one, best) <= same and over(one, original) <= 1)]


def _least_error(candidates: Sequence[Figures], original: Figures, slack: float) -> Sequence[Figures]:
    least = min(one.error for one in candidates)
    return [one for one in candidates if one.error <= least]


def _hardly_an_error(candidates: Sequence[Figures], original: Figures, slack: float) -> Sequence[Figures]:
    most = max(NEGLIGIBLE_ERROR, min(one.error for one in candidates))
    return [one for one in candidates if one.error <= most]


_SIZE = ("another is smaller", _least_size)
_TIME = ("another is faster", _least_time)
_PRODUCT = ("another is better in size and time together", _least_product)
_ERROR = ("another is as good and closer to the original", _least_error)
# What decides, one after the other, with what is said of those that it leaves behind.
_DECIDERS: Mapping[str, Sequence[tuple[str, _Keep]]] = MappingProxyType(
    {
        BALANCED: (_PRODUCT, _SIZE, _ERROR),
        SMALLEST: (_SIZE, _TIME, _ERROR),
        FASTEST: (_TIME, _SIZE, _ERROR),
        ACCURATE: (("another is closer to the original", _hardly_an_error), _PRODUCT, _SIZE, _ERROR),
    }
)
