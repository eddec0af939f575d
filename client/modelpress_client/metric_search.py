"""The search with a metric of the user's own: the server offers candidates, this machine scores them, in rounds.

Each round is a job like any other, whose recipe says what is known so far (`goal.client_metric.scores`). A round that
brings nothing to score has the answer, and its report. Whoever is interrupted begins again with the same command: jobs
that were done come from the server's cache, scores from this machine's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelpress_protos.v1.recipe_pb2 import Recipe

from modelpress_client.async_job import AsyncJob
from modelpress_client.errors import NotFoundError
from modelpress_client.own_metric import OwnMetric, Score, ScoreError
from modelpress_client.report import Report

MAX_ROUNDS = 8
DEFAULT_MAX_DROP = 0.01
ORIGINAL = "original"  # id of the candidate that is the original, as ONNX

Row = Mapping[str, Any]
# Runs one round: from its recipe to a job that has succeeded.
RunJob = Callable[[Recipe], Awaitable[AsyncJob]]
Tell = Callable[[str], None]

_PREFERENCES: dict[str, Callable[[Row], float]] = {
    "balanced": lambda row: row["size_bytes"] / row["speedup"]["median"],
    "smallest": lambda row: row["size_bytes"],
    "fastest": lambda row: 1 / row["speedup"]["median"],
    "accurate": lambda row: 1 - (row.get("cosine") or 0.0),
}


@dataclass
class MetricSearch:
    """`run_job`: one round. `tell`: a line for people. `time_s`: after so long no further round is begun."""

    metric: OwnMetric
    recipe: Recipe
    run_job: RunJob
    tell: Tell = lambda text: None
    time_s: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    async def run(self) -> tuple[AsyncJob, Report]:
        """The job whose result is the best that holds, and its report. Raises ScoreError, and what jobs raise."""
        began_s = time.monotonic()
        for number in range(MAX_ROUNDS):
            job = await self.run_job(self._recipe())
            report = await job.report()
            late = self.time_s is not None and time.monotonic() - began_s > self.time_s
            last = late or number == MAX_ROUNDS - 1
            if last or not await self._score(job, report.candidates):
                break
        return job, report

    def _recipe(self) -> Recipe:
        recipe = Recipe()
        recipe.CopyFrom(self.recipe)
        asked = recipe.goal.client_metric
        asked.name = self.metric.name
        for digest, score in self.scores.items():
            asked.scores[digest] = score.value
            asked.lower_is_better = score.lower_is_better
        return recipe

    async def _score(self, job: AsyncJob, rows: Iterable[Row]) -> bool:
        """Scores what may be better than the best so far; whether anything was new."""
        known = len(self.scores)
        offered = {row["id"]: row for row in rows if row.get("downloadable") and row.get("speedup")}
        if ORIGINAL not in offered:
            raise NotFoundError(f"{job.name} offers no candidates; the server is too old for a metric of your own.")
        original = await self._of(job, offered.pop(ORIGINAL))
        if original is None:
            raise ScoreError(f"{self.metric.name} cannot score the original, so nothing can be compared with it.")
        # The most welcome first: once one of them holds, the rest need no score. What leads further always does.
        for row in sorted(offered.values(), key=_PREFERENCES[self.recipe.goal.objective or "balanced"]):
            score = await self._of(job, row, original)
            if score is not None and self._holds(score, original):
                break
        for row in offered.values():
            if row.get("leads_further"):
                await self._of(job, row, original)
        return len(self.scores) > known

    def _holds(self, score: Score, original: Score) -> bool:
        for stated in (self.recipe.goal, self.recipe.constraints):
            if stated.HasField("max_drop"):
                return score.drop_from(original) <= stated.max_drop
        return score.drop_from(original) <= DEFAULT_MAX_DROP

    async def _of(self, job: AsyncJob, row: Row, original: Score | None = None) -> Score | None:
        """The score of a candidate; None where the metric gives none, which a line tells."""
        digest = row["sha256"]
        if digest in self.failed:
            return None
        if digest not in self.scores:
            try:
                self.scores[digest] = await self._fetched_and_scored(job, row)
            except ScoreError as error:
                if original is None:
                    raise
                self.failed.add(digest)
                self.tell(f"{row['id']} ({row['name']}): {error}")
                return None
            score = self.scores[digest]
            against = "" if original is None else f", original {original.value:.6g}"
            self.tell(f"{row['id']} ({row['name']}): {self.metric.name} {score.value:.6g}{against}")
        return self.scores[digest]

    async def _fetched_and_scored(self, job: AsyncJob, row: Row) -> Score:
        if (known := self.metric.known(row["sha256"])) is not None:
            return known
        with tempfile.TemporaryDirectory(prefix="modelpress-candidate-") as folder:
            path = Path(folder) / "model.onnx"
            await job.download(path, candidate=row["id"])
            return await self.metric.score(path, row["sha256"])
