"""Times all points of a model in one process, and says of each of theirs whether one of ours matches it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from frontier_ours import OURS
from frontier_verdict import DAMAGE, Place, Point, front, hypervolume, surely_matched, verdict
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.feeds import batches
from modelpress_compression.measure.latency import time_interleaved
from modelpress_compression.measure.task import model_digest
from modelpress_compression.model import file_size_bytes
from modelpress_compression.runtime import open_session, run

FLOAT = "float32"
MINE = (OURS, FLOAT)  # the float model is everybody's
# All points run in so many rounds, then those that could still be decided otherwise in as many as there is time for.
FIRST_ROUNDS = 20
FIRST_SHARE = 0.3  # of the budget
# How often all sessions are opened anew: where one happens to lie in memory was worth 1.4 times the time of a small
# model among 140 others, as long as the session lived. The interval sees it, since it goes by blocks of rounds.
FIRST_OPENINGS, OPENINGS = 2, 8
Row = dict[str, Any]
Ask = Callable[[Row], Row]  # from an outcome to the same with its metric


def figures_of(
    outcomes: Sequence[Row], data: InputData, rounds: int, budget_s: float, memory_bytes: int, ask: Ask
) -> Row:
    """`outcomes`: the float model first, then ours. Gives `points`, the rows of the table, and the two volumes.

    `memory_bytes`: what all sessions may take. Where they would take more, the models take turns (latency.py).

    Points with the same file are one point, of whoever comes first. A point of theirs may come without a metric: it
    counts as if it lost nothing, and where one of ours does not match it even so, `ask` is asked.
    """
    rows = [dict(outcome) for outcome in outcomes]
    files = _distinct(rows, data)
    load_before = os.getloadavg()[0]
    together = len(files) * max(map(file_size_bytes, files.values())) <= memory_bytes
    first = _timed(rows, files, data, FIRST_ROUNDS, budget_s * FIRST_SHARE, FIRST_OPENINGS, together=together)
    _ask(rows, first.undecided(), ask)
    first = first.with_metrics_of(rows)
    closer = {digest: files[digest] for digest in first.undecided()}
    second = _timed(rows, closer, data, rounds, budget_s * (1 - FIRST_SHARE), OPENINGS, together=together)
    shown = [_shown(row, second if row.get("digest") in closer else first) for row in rows]
    places = [Place(**row["place"]) for row in shown if "place" in row]
    on_front = iter(front(places))
    for row in shown:
        if "place" in row:
            row["front"] = next(on_front)
    return {
        "load": [load_before, os.getloadavg()[0]],
        "together": together,
        "rounds": [first.rounds, second.rounds],
        "points": shown,
        "hypervolume": {
            "ours": hypervolume([Place(**row["place"]) for row in shown if "place" in row and row["tool"] in MINE]),
            "theirs": hypervolume([Place(**row["place"]) for row in shown if "place" in row and row["tool"] != OURS]),
        },
    }


def _ask(rows: list[Row], undecided: Sequence[str], ask: Ask) -> None:
    """Metrics of those that may not be matched, into their rows."""
    for row in rows:
        if row.get("digest") in undecided and row["metric"] is None:
            row.update(ask(row))
            if row["outcome"] != "ok":
                del row["digest"]


def _distinct(rows: list[Row], data: InputData) -> dict[str, Path]:
    """The files to time, by digest. Rows get their digest, and why they are not timed where they are not."""
    files: dict[str, Path] = {}
    feed = batches(data, 1, 1)[0]
    for row in rows:
        if row["outcome"] != "ok":
            continue
        path = Path(row["file"])
        digest = model_digest(path)
        if digest not in files:
            try:
                run(open_session(path), feed)
            except CompressionError as error:
                row |= {"outcome": "does not run", "error": error.message[:300]}
                continue
            files[digest] = path
        row["digest"] = digest
    return files


@dataclass(frozen=True)
class _Race:
    """Points by digest, all from the same rounds."""

    points: Mapping[str, Point]
    rounds: int

    @cached_property
    def original(self) -> Point:
        return next(point for point in self.points.values() if point.side == FLOAT)

    @cached_property
    def mine(self) -> list[Point]:
        return [point for point in self.points.values() if point.side in MINE]

    def with_metrics_of(self, rows: Sequence[Row]) -> _Race:
        """Without the points that turned out not to run."""
        metrics = {row["digest"]: row["metric"] for row in rows if row.get("metric") is not None and "digest" in row}
        alive = {row["digest"] for row in rows if "digest" in row}
        points = {
            digest: replace(point, metric=metrics.get(digest, point.metric))
            for digest, point in self.points.items()
            if digest in alive
        }
        return _Race(points, self.rounds)

    def undecided(self) -> list[str]:
        """The float model, ours, and what is neither surely matched by ours nor another model."""
        least = self.original.metric - DAMAGE
        return [
            digest
            for digest, point in self.points.items()
            if point.side in MINE or (point.metric >= least and not surely_matched(point, self.mine, self.original))
        ]


def _timed(
    rows: Sequence[Row],
    files: Mapping[str, Path],
    data: InputData,
    rounds: int,
    budget_s: float,
    openings: int,
    *,
    together: bool,
) -> _Race:
    """In so many rounds altogether, with new sessions for each of the `openings`."""
    if not together:
        openings = 1  # every turn is one
    times_s = np.concatenate(
        [
            time_interleaved(
                list(files.values()),
                data,
                threads=1,
                batch_size=1,
                rounds=-(-rounds // openings),
                seed=seed,
                budget_s=budget_s / openings,
                together=together,
            ).times_s
            for seed in range(openings)
        ],
        axis=1,
    )
    times = dict(zip(files, times_s, strict=True))
    original_metric = rows[0]["metric"]
    points: dict[str, Point] = {}
    for row in rows:
        digest = row.get("digest")
        if digest in times and digest not in points:
            metric = original_metric if row["metric"] is None else row["metric"]
            points[digest] = Point(row["tool"], row["name"], row["size_bytes"], metric, times[digest])
    return _Race(points, times_s.shape[1])


def _shown(row: Row, race: _Race) -> Row:
    """The row of the table: `place`, `time_ms`, and for theirs `by`, the point of ours that answers it."""
    kept = ("tool", "name", "job", "chosen", "outcome", "error", "samples", "wall_s", "metric", "size_bytes")
    shown = {key: row[key] for key in kept if key in row}
    point = race.points.get(row.get("digest", ""))
    if point is None:
        return shown
    shown |= {"time_ms": 1e3 * point.time_s, "time": asdict(point.time_over(race.original))}
    shown |= {"place": asdict(Place.of(point, race.original))}
    if row["tool"] in MINE:
        return shown
    if point.metric < race.original.metric - DAMAGE:
        return shown | {"standing": "another model"}
    found = verdict(point, race.mine, race.original)
    standing = "beaten" if found.beaten else "matched" if found.matched else "not matched"
    by = {"name": found.by.name, "time": asdict(found.time), "misses": list(found.misses)}
    return shown | {"standing": standing, "by": by}
