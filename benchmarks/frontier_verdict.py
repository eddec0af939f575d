"""Whether a point of theirs is matched by one of ours, and how much of the space each side's points cover.

A point is a model file: its size in bytes, its time in rounds that all points share, and its task metric, higher is
better. One of ours matches one of theirs if all of these hold at once:

- size: at most SAME_SIZE larger;
- metric: at most SAME_METRIC lower. A metric above the float model's counts as the float model's: the rest is luck;
- time: the 95 % interval of our time over theirs, widened by SESSION_SPREAD, does not lie above 1.

It beats it if it is at least as good in all three by the figures themselves, without any tolerance. What loses more
than DAMAGE of the metric is another model, and needs no match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from modelpress_compression.measure.latency import SESSION_SPREAD, Speedup, ratio_interval
from modelpress_compression.search.candidates import SAME_SIZE

SAME_METRIC = 0.001
DAMAGE = 0.1
SURELY = 1.25
# Where the volume ends: nothing larger than the float model or slower than this many times its time counts, and nothing
# that loses more than DAMAGE.
WORST_TIME = 1.5
# A point of the metric counts as much as so large a share of size or time, where the nearest of ours is looked for.
SHARE_OF_A_POINT = 0.1
Times = np.ndarray


@dataclass(frozen=True, eq=False)
class Point:
    """`side`: ours, float32, or a tool's name. `times_s`: [rounds]; two points' times compare round by round."""

    side: str
    name: str
    size_bytes: int
    metric: float
    times_s: Times

    @cached_property
    def time_s(self) -> float:
        return float(np.median(self.times_s))

    def time_over(self, other: Point) -> Speedup:
        """The time of this point over the other's, in the rounds that both have."""
        rounds = min(len(self.times_s), len(other.times_s))
        return ratio_interval(self.times_s[:rounds] / other.times_s[:rounds])


@dataclass(frozen=True)
class Verdict:
    """`by`: the point of ours that matches, or comes nearest. `misses`: what keeps that one from a match, as text."""

    by: Point
    time: Speedup
    beaten: bool
    misses: tuple[str, ...] = ()

    @property
    def matched(self) -> bool:
        return not self.misses


def verdict(theirs: Point, ours: Sequence[Point], float_point: Point) -> Verdict:
    """The best that one of ours does against this point: beats it, matches it, or comes near it."""
    found = [_against(theirs, one, float_point) for one in ours]
    return min(found, key=lambda one: (not one.beaten, not one.matched, _distance(one, theirs, float_point)))


def _against(theirs: Point, one: Point, float_point: Point) -> Verdict:
    time = one.time_over(theirs)
    metric = min(theirs.metric, float_point.metric)
    misses = []
    if one.size_bytes > theirs.size_bytes * (1 + SAME_SIZE):
        misses.append(f"{one.size_bytes / theirs.size_bytes:.3f} times the size")
    if one.metric < metric - SAME_METRIC - 1e-9:
        misses.append(f"metric {metric - one.metric:.4f} lower")
    if time.widened(SESSION_SPREAD).low > 1:
        misses.append(f"{time.median:.2f} times the time")
    beaten = one.size_bytes <= theirs.size_bytes and one.metric >= theirs.metric and time.median <= 1
    return Verdict(one, time, beaten, tuple(misses))


def _distance(one: Verdict, theirs: Point, float_point: Point) -> float:
    lower = min(theirs.metric, float_point.metric) - one.by.metric
    return max(one.by.size_bytes / theirs.size_bytes - 1, one.time.median - 1, 100 * lower * SHARE_OF_A_POINT)


def surely_matched(theirs: Point, ours: Sequence[Point], float_point: Point) -> bool:
    """Whether more rounds can change nothing: one of ours matches it, and is faster by far beyond the interval."""
    found = (_against(theirs, one, float_point) for one in ours)
    return any(one.matched and one.time.high * SURELY < 1 for one in found)


@dataclass(frozen=True)
class Place:
    """Where a point lies, lower is better everywhere: `size` and `time` over the float model's, `loss` of the metric.

    The loss of a point that is better than the float model is 0.
    """

    size: float
    time: float
    loss: float

    @classmethod
    def of(cls, point: Point, float_point: Point) -> Place:
        """`float_point` in the rounds of the point."""
        return cls(
            point.size_bytes / float_point.size_bytes,
            point.time_over(float_point).median,
            max(0.0, float_point.metric - point.metric),
        )

    def covers(self, other: Place) -> bool:
        """Whether it is at least as good in all three."""
        return self.size <= other.size and self.time <= other.time and self.loss <= other.loss


def front(places: Sequence[Place]) -> list[bool]:
    """For each whether no other covers it; of equal ones the first counts."""
    return [
        not any(other.covers(mine) and (other != mine or earlier < index) for earlier, other in enumerate(places))
        for index, mine in enumerate(places)
    ]


def hypervolume(places: Sequence[Place]) -> float:
    """The share of the box from nothing to (the float model's size, WORST_TIME of its time, a loss of DAMAGE) that
    these cover. 0 to 1; 1 would be a model of no size and no time that loses nothing.
    """
    corners = sorted((place.loss / DAMAGE, place.size, place.time / WORST_TIME) for place in places)
    corners = [corner for corner in corners if max(corner) < 1]
    volume = 0.0
    for index, (loss, _, _) in enumerate(corners):
        following = corners[index + 1][0] if index + 1 < len(corners) else 1.0
        volume += (following - loss) * _area([(size, time) for _, size, time in corners[: index + 1]])
    return volume


def _area(corners: Sequence[tuple[float, float]]) -> float:
    """Of the unit square, the share that lies above and right of one of the corners."""
    area, height = 0.0, 1.0
    for x, y in sorted(corners):
        if y < height:
            area += (1 - x) * (height - y)
            height = y
    return area
