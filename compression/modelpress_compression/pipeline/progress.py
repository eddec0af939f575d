"""Progress of a job: stages in order, one fraction that never falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelpress_compression.recipe import Recipe
from modelpress_compression.target import DEVICES
from modelpress_compression.techniques import TECHNIQUES

# stage, stage_index, stage_count, fraction of the whole job, one line for people
ProgressListener = Callable[[str, int, int, float, str], None]

# Shares of the whole; loading was done before. Those of the steps stand in the table of techniques.
_WEIGHTS = {"load": 1.0, "search": 12.0, "build": 12.0, "measure": 3.0, "report": 0.2} | {
    name: row.weight for name, row in TECHNIQUES.items()
}
_FAR = 5.0  # a far search is so many times the work of one for a balance; what comes after is the same


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of a job's stages, in order. Loading comes before `compress` and is the caller's to report."""
    build = ["build"] if DEVICES[recipe.target.device].built else []
    if build and not recipe.steps:
        return ("load", "fuse", *build, "measure", "report")
    searches = recipe.goal is not None and not recipe.steps
    steps = ["search"] if searches else [step.technique for step in recipe.steps]
    return ("load", *steps, *build, "measure", "report")


def weights_of(recipe: Recipe) -> list[float]:
    """What each of a job's stages counts for, beside each other."""
    return [_WEIGHTS[stage] * (_FAR if stage == "search" and recipe.searches_far else 1) for stage in stages_of(recipe)]


@dataclass
class Progress:
    """Turns progress within a stage into progress of the whole job."""

    stages: Sequence[str]
    weights: Sequence[float]
    listener: ProgressListener | None = None
    _index: int = 0
    _fraction: float = 0.0

    def enter_next(self, message: str) -> None:
        """Enters the next stage. The first one, loading, is over when `compress` begins."""
        self._index += 1
        self.update(0.0, message)

    def update(self, share: float, message: str) -> None:
        """`share`: how much of the current stage is done, 0 to 1."""
        done = sum(self.weights[: self._index]) + self.weights[self._index] * min(max(share, 0.0), 1.0)
        self._fraction = max(self._fraction, done / sum(self.weights))
        if self.listener is not None:
            self.listener(self.stages[self._index], self._index, len(self.stages), self._fraction, message)
