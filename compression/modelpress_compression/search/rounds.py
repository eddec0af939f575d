"""`prune: {rounds: N}`: the share goes a part at a time, and the model is trained towards the original in between.

    round k of N    prune      what is left of the parts of rounds 1 to k, repaired in closed form
                    distill    the cut model towards the original, for `epochs`

Each round takes the same share of what is left, 1 - (1 - sparsity)^(1/N), so that the last ones, which hurt most, are
the smallest (Han et al., arXiv:1506.02626). What an earlier round could not take, since channels go in multiples, later
ones take too. Importance is judged anew in each round, on the model that training has left.

The original is the teacher of every round, so that errors do not add up from round to round. Where the job has a time
limit, half of what is left is for training, in equal parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelpress_compression.errors import TimeLimitError, UnsupportedOperatorError
from modelpress_compression.measure.task import Task
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.recipe import Recipe, Step
from modelpress_compression.search.recovery import recovery
from modelpress_compression.search.steps import StepRecord, apply_step, scaled

# Of the time left, for all training.
_TRAINING_SHARE = 0.5
# Of a round's progress, for its cut.
_CUT = 0.3
_REMOVED = {
    "channels": "channels_removed_share",
    "parameters": "parameters_removed_share",
    "macs": "macs_removed_share",
}


def prune_in_rounds(
    step: Step,
    model: Model,
    path: Path,
    context: Context,
    target: Path,
    *,
    recipe: Recipe,
    original: Path,
    task: Task | None,
) -> StepRecord:
    """The record of all rounds, in the file of the last; `recipe`, `original` and `task` decide nothing here.

    Raises what the passes raise; training that cannot be done is left out, with a warning.
    """
    began = time.monotonic()
    config: PruneConfig = step.config
    rounds = _Rounds(step, context, target)
    record = StepRecord(step, model, path)
    gone = 0.0
    for number in range(1, config.rounds + 1):
        due = 1 - (1 - config.sparsity) ** (number / config.rounds)
        share = max(0.0, (due - gone) / (1 - gone))
        cut = rounds.cut(record, number, share)
        record = rounds.joined(record, cut, number)
        if not cut.changes:
            continue
        gone = 1 - (1 - gone) * (1 - _removed(cut.changes, config.sparsity_of))
        if config.epochs:
            record = rounds.joined(record, rounds.trained(record, number), number)
    if record.changes:
        record = replace(record, changes={**record.changes, _REMOVED[config.sparsity_of]: gone})
    return replace(record, duration_s=time.monotonic() - began)


class _Rounds:
    """The steps of the rounds. `target`: the file of the last one's model; others lie beside it."""

    def __init__(self, step: Step, context: Context, target: Path) -> None:
        self._config: PruneConfig = step.config
        self._context, self._target = context, target

    def cut(self, record: StepRecord, number: int, share: float) -> StepRecord:
        """The record's model without a share of it."""
        # An override is a sparsity of its own, and goes in the same number of parts.
        overrides = tuple(
            (name, 1 - (1 - sparsity) ** (1 / self._config.rounds)) for name, sparsity in self._config.overrides
        )
        config = replace(self._config, sparsity=share, overrides=overrides, rounds=1)
        return self._applied(Step("prune", config), record, number, 0.0, _CUT, self._context)

    def trained(self, record: StepRecord, number: int) -> StepRecord:
        """The record's model after training towards the original."""
        context = self._context
        step = recovery(record.model, context.data, self._config.epochs, self._config.epochs)
        if context.time_left_s is not None:
            left_s = _TRAINING_SHARE * context.time_left_s / (self._config.rounds - number + 1)
            context = replace(context, deadline=context.clock() + left_s)
        try:
            return self._applied(step, record, number, _CUT, 1.0, context)
        except (UnsupportedOperatorError, TimeLimitError) as error:
            self._context.check_time()
            return StepRecord(step, record.model, record.path, warnings=(f"Not trained: {error.message}",))

    def _applied(
        self, step: Step, record: StepRecord, number: int, start: float, stop: float, context: Context
    ) -> StepRecord:
        """The step on the record's model, with progress for a part of the round."""
        count = self._config.rounds
        progress = scaled(context.progress, (number - 1 + start) / count, (number - 1 + stop) / count)
        told = replace(context, progress=lambda share, text: progress(share, f"round {number} of {count}: {text}"))
        target = self._target.parent / f"round-{number}-{step.technique}" / self._target.name
        return apply_step(step, record.model, record.path, told, target)

    @staticmethod
    def joined(record: StepRecord, last: StepRecord, number: int) -> StepRecord:
        """The record with what the next step did to its model; what is said of nodes is said once."""
        details = tuple({"round": number, **row} for row in last.details)
        return replace(
            record,
            model=last.model,
            path=last.path,
            changes=_sum(record.changes, last.changes),
            skipped=tuple(dict.fromkeys((*record.skipped, *last.skipped))),
            warnings=tuple(dict.fromkeys((*record.warnings, *last.warnings))),
            details=(*record.details, *details),
            notes=tuple(dict.fromkeys((*record.notes, *last.notes))),
        )


def _removed(changes: Mapping[str, int | float], unit: str) -> float:
    """The share of the channels, parameters or MACs that one cut has taken."""
    if unit == "channels":
        return changes["channels_removed"] / max(1, changes["channels"])
    return float(changes.get(_REMOVED[unit], changes["parameters_removed_share"]))


def _sum(before: Mapping[str, int | float], after: Mapping[str, int | float]) -> dict[str, Any]:
    """Of what rounds have removed; of all else what the last said."""
    joined = {**before, **after}
    for name in before.keys() & after.keys():
        if name == "channels_removed":
            joined[name] = before[name] + after[name]
        elif name.endswith("_removed_share"):
            joined[name] = 1 - (1 - before[name]) * (1 - after[name])
        elif name == "channels":
            joined[name] = before[name]
    return joined
