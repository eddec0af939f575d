"""`prune: {rounds: N}`: the share goes a part at a time, and the model is trained towards the original in between.

    round k of N    prune      what is left of the parts of rounds 1 to k, repaired in closed form
                    distill    the cut model towards the original, for `epochs`

Each round takes the same share of what is left, 1 - (1 - sparsity)^(1/N), so that the last ones, which hurt most, are
the smallest (Han et al., arXiv:1506.02626). What an earlier round could not take, since channels go in multiples, later
ones take too. Importance is judged anew in each round, on the model that training has left.

Where training left the model as it was, the next cut is made into what the last training has left, or the whole model:
repair knows the answers of the model that it cuts, and errors of cuts into cuts add up. A text recognizer without 30 %
of its multiplications so read 8 points fewer words than after one cut. For the same reason the last word is measured:
where one cut of the whole model, repaired, errs less on samples that training has not seen, that is the result.

The original is the teacher of every round, so that errors do not add up from round to round. Where the job has a time
limit, half of what is left is for training, in equal parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modelpress_compression.errors import TimeLimitError, UnsupportedOperatorError
from modelpress_compression.holding_out import random_share
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import KnownOutputs, compare_outputs
from modelpress_compression.measure.task import Task
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.recipe import Recipe, Step
from modelpress_compression.search.recovery import recovery
from modelpress_compression.search.steps import StepRecord, apply_step, scaled

# Of the time left, for all training.
_TRAINING_SHARE = 0.5
# Of a round's progress, for its cut.
_CUT = 0.3
_ONCE = (
    "One cut of the whole model errs less on samples that training has not seen than cuts in rounds with training in "
    "between; it was taken."
)
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
    """The record of all rounds, in the file of the last; `recipe` and `task` decide nothing here.

    Raises what the passes raise; training that cannot be done is left out, with a warning.
    """
    began = time.monotonic()
    config: PruneConfig = step.config
    rounds = _Rounds(step, context, target, original)
    whole = StepRecord(step, model, path)
    # What is cut next, the last round that has trained it, and the share that has gone by then.
    base, last, before = whole, 0, 0.0
    record, gone = base, 0.0
    for number in range(1, config.rounds + 1):
        due = 1 - (1 - config.sparsity) ** (number / config.rounds)
        share = max(0.0, (due - before) / (1 - before))
        cut = rounds.cut(base, number, share, number - last)
        if not cut.changes:
            record = rounds.told(record, cut)
            continue
        record = rounds.joined(base, cut, number)
        gone = 1 - (1 - before) * (1 - _removed(cut.changes, config.sparsity_of))
        trained = rounds.trained(record, number) if config.epochs else None
        if trained is not None:
            record = rounds.joined(record, trained, number)
            if trained.changes:
                base, last, before = record, number, gone
    if last:
        once = rounds.once(whole)
        if once.changes and rounds.sqnr_db(once) > rounds.sqnr_db(record):
            record = replace(rounds.joined(whole, once, 1), notes=(*once.notes, _ONCE))
            gone = _removed(once.changes, config.sparsity_of)
    if record.changes:
        record = replace(record, changes={**record.changes, _REMOVED[config.sparsity_of]: gone})
    return replace(record, duration_s=time.monotonic() - began)


class _Rounds:
    """The steps of the rounds. `target`: the file of the last one's model; others lie beside it. `original`: the file
    of the model whose answers count."""

    def __init__(self, step: Step, context: Context, target: Path, original: Path) -> None:
        self._config: PruneConfig = step.config
        self._context, self._target, self._original = context, target, original
        self._known = KnownOutputs()

    def cut(self, record: StepRecord, number: int, share: float, parts: int) -> StepRecord:
        """The record's model without a share of it, which is due in so many rounds' parts."""
        # An override is a sparsity of its own, and goes in the same number of parts.
        overrides = tuple(
            (name, 1 - (1 - sparsity) ** (parts / self._config.rounds)) for name, sparsity in self._config.overrides
        )
        config = replace(self._config, sparsity=share, overrides=overrides, rounds=1)
        return self._applied(Step("prune", config), record, number, 0.0, _CUT, self._context)

    def once(self, whole: StepRecord) -> StepRecord:
        """The whole model without all that shall go, in one cut."""
        step = Step("prune", replace(self._config, rounds=1))
        return self._applied(step, whole, self._config.rounds, 1.0, 1.0, self._context, "once")

    def sqnr_db(self, record: StepRecord) -> float:
        """What the outputs of the record's model keep on samples that training does not see."""
        return compare_outputs(self._original, record.path, self._unseen, known=self._known).sqnr_db

    @cached_property
    def _unseen(self) -> InputData:
        data = self._context.data
        _, held = random_share(data, DistillConfig().hold_out, DistillConfig().seed)
        return data.only(sorted({int(index) // data.feed_size for index in held}))

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
        self, step: Step, record: StepRecord, number: int, start: float, stop: float, context: Context, name: str = ""
    ) -> StepRecord:
        """The step on the record's model, with progress for a part of the round. `name`: of its folder."""
        count = self._config.rounds
        progress = scaled(context.progress, (number - 1 + start) / count, (number - 1 + stop) / count)
        told = replace(context, progress=lambda share, text: progress(share, f"round {number} of {count}: {text}"))
        target = self._target.parent / (name or f"round-{number}-{step.technique}") / self._target.name
        return apply_step(step, record.model, record.path, told, target)

    @staticmethod
    def joined(record: StepRecord, last: StepRecord, number: int) -> StepRecord:
        """The record with what the next step did to its model; what is said of nodes is said once."""
        details = tuple({"round": number, **row} for row in last.details)
        return replace(
            _Rounds.told(record, last),
            model=last.model,
            path=last.path,
            changes=_sum(record.changes, last.changes),
            details=(*record.details, *details),
        )

    @staticmethod
    def told(record: StepRecord, last: StepRecord) -> StepRecord:
        """The record with what another step says, each thing once."""
        return replace(
            record,
            skipped=tuple(dict.fromkeys((*record.skipped, *last.skipped))),
            warnings=tuple(dict.fromkeys((*record.warnings, *last.warnings))),
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
