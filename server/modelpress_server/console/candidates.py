"""The candidates of a goal as a plot: size against speed, or against agreement where speed was not measured.

The report comes from a worker that has read a stranger's model, so that nothing in it is taken for granted: what is not
a number where one belongs is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_REPORT_BYTES = 8 * 1024 * 1024
MAX_CANDIDATES = 200
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44


@dataclass(frozen=True)
class Candidate:
    """One row. Figures that were not measured are None."""

    name: str
    chosen: bool
    pareto: bool
    reason: str
    size_bytes: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    agreement: float | None
    cosine: float | None
    drop: float | None


@dataclass(frozen=True)
class Tick:
    """A mark of an axis, at so many units from the left or the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A candidate in the plot; `low` and `high`: the ends of its interval, as `y`."""

    x: float
    y: float
    low: float | None
    high: float | None
    candidate: Candidate


@dataclass(frozen=True)
class Plot:
    """All that the template draws."""

    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def read_candidates(content: bytes) -> list[Candidate]:
    """The candidates of a report.json; none where it holds none, or is none."""
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return []
    rows = report.get("candidates") if isinstance(report, dict) else None
    rows = rows if isinstance(rows, list) else []
    return [_candidate(row) for row in rows[:MAX_CANDIDATES] if isinstance(row, dict)]


def plot(candidates: Sequence[Candidate]) -> Plot | None:
    """The plot; None where fewer than two candidates have both figures."""
    by_speed = sum(item.size_bytes is not None and item.speedup is not None for item in candidates) >= 2
    rows = [
        (item, item.size_bytes, item.speedup if by_speed else item.agreement)
        for item in candidates
        if item.size_bytes is not None
    ]
    known = [(item, size, value) for item, size, value in rows if size is not None and value is not None]
    if len(known) < 2:
        return None
    unit, divisor = _unit(max(size for _, size, _ in known))
    ends = [end for item, _, _ in known for end in (item.speedup_low, item.speedup_high) if end and by_speed]
    x_axis = _Axis([size / divisor for _, size, _ in known], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([*(value for _, _, value in known), *ends], HEIGHT - BOTTOM, TOP)
    points = [
        Point(
            x_axis.at(size / divisor),
            y_axis.at(value),
            y_axis.at(item.speedup_low) if by_speed and item.speedup_low is not None else None,
            y_axis.at(item.speedup_high) if by_speed and item.speedup_high is not None else None,
            item,
        )
        for item, size, value in known
    ]
    points.sort(key=lambda point: point.candidate.chosen)  # the chosen one lies on top
    title = "speed-up over the original" if by_speed else "agreement with the original"
    return Plot(f"size in {unit}", title, x_axis.ticks(), y_axis.ticks(), tuple(points))


class _Axis:
    """From figures to places, with round ticks."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self._low, self._high = low - margin, high + margin
        self._first, self._last = first, last

    def at(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(self._first + share * (self._last - self._first), 1)

    def ticks(self) -> tuple[Tick, ...]:
        span = self._high - self._low
        step = 10 ** math.floor(math.log10(span / 3))
        step *= next(factor for factor in (5, 2, 1) if span / (step * factor) >= 3 or factor == 1)
        first = math.ceil(self._low / step)
        digits = min(max(0, -math.floor(math.log10(step))), 6)
        marks = [index * step for index in range(first, first + 20) if index * step <= self._high]
        return tuple(Tick(self.at(mark), f"{mark:,.{digits}f}") for mark in marks)


def _unit(size_bytes: float) -> tuple[str, float]:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= divisor:
            return unit, divisor
    return "B", 1.0


def _candidate(row: Mapping[str, Any]) -> Candidate:
    speedup = row.get("speedup")
    speedup = speedup if isinstance(speedup, dict) else {}
    return Candidate(
        name=_text(row.get("name")),
        chosen=row.get("chosen") is True,
        pareto=row.get("pareto") is True,
        reason=_text(row.get("reason")),
        size_bytes=_number(row.get("size_bytes")),
        speedup=_number(speedup.get("median")),
        speedup_low=_number(speedup.get("low")),
        speedup_high=_number(speedup.get("high")),
        agreement=_number(row.get("agreement")),
        cosine=_number(row.get("cosine")),
        drop=_number(row.get("drop")),
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e18 else None


def _text(value: Any) -> str:
    return value[:500] if isinstance(value, str) else ""
