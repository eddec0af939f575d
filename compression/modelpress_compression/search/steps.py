"""One step of a recipe: run the pass, prove that its result runs, or keep the model as it was and say why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from modelpress_compression.backends import backends_of
from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.compact import compacted
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.parallel import map_in_order
from modelpress_compression.passes.base import Context, PassResult, Skip
from modelpress_compression.recipe import Step
from modelpress_compression.techniques import TECHNIQUES

# On so many feeds every intermediate model must give finite outputs.
CHECK_FEEDS = 2


@dataclass(frozen=True)
class StepRecord:
    """The outcome of one step: a row of the report. `model`, with its file `path`, goes into the next step."""

    step: Step
    model: Model
    path: Path
    changes: dict[str, int | float] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    warnings: tuple[str, ...] = ()
    duration_s: float = 0.0
    candidates: tuple[dict[str, Any], ...] = ()
    details: tuple[Mapping[str, str | int | float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def result(self) -> PassResult:
        """What the pass gave, as far as it was kept."""
        return PassResult(self.model, self.changes, self.skipped, self.warnings, self.details, self.notes)


def apply_step(step: Step, model: Model, path: Path, context: Context, target: Path) -> StepRecord:
    """Runs the step's pass on `model`, whose file is `path`; the result's file is `target`.

    A result that does not load or does not answer with finite numbers is dropped: the model stays as it was.
    """
    began = time.monotonic()
    context.check_time()
    with context.span("pass", step.technique):
        result = TECHNIQUES[step.technique].make_pass(step.config)(model, context)
        record = keep(StepRecord(step, model, path), result, context, target)
    return replace(record, duration_s=time.monotonic() - began)


def keep(record: StepRecord, result: PassResult, context: Context, target: Path) -> StepRecord:
    """The record with the result of a pass, in the file `target`; without it where the result does not run."""
    record = replace(record, skipped=result.skipped, warnings=result.warnings)
    if not result.changed:
        return record
    model = save(result.model, target)
    backends = backends_of(context.target)
    problem = next(filter(None, (broken(target, context.data, record.path, one) for one in backends)), None)
    if problem is not None:
        warning = f"{record.step.technique} was undone: {problem}"
        context.log(warning)
        return replace(record, warnings=(*record.warnings, warning))
    return replace(
        record,
        model=model,
        path=target,
        changes=dict(result.changes),
        details=result.details,
        notes=result.notes,
    )


def save(model: Model, path: Path, *, weights: bool = True) -> Model:
    """Writes the model, compacted, into a folder of its own, so that external data never meets another model's.

    The same model, not compacted, which holds large weights in that file rather than in memory. `weights`: as for
    `compacted`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return model.saved(path, compacted(model, weights=weights))


def broken(path: Path, data: InputData, reference: Path, backend: Backend = CPU) -> str | None:
    """Why the model in `path` cannot be used; None where it runs in the `backend`, and is finite wherever `reference`
    is."""
    feeds = list(data.feeds(1, limit=CHECK_FEEDS * data.feed_size))
    try:
        finite = [_finite(outputs) for outputs in map_in_order(backend.open(path).run, feeds)]
    except (ModelNotRunnableError, UnsupportedOperatorError) as error:
        return error.message
    if all(finite):
        return None
    expected = map_in_order(backend.open(reference).run, feeds)
    # A model may be made to give infinities, for masked positions say: only new ones count.
    if all(_finite(output) for output in expected):
        return "its outputs hold NaN or infinite values where the model's did not."
    return None


def _finite(outputs: dict[str, Any]) -> bool:
    return all(value.dtype.kind != "f" or bool(np.isfinite(value).all()) for value in outputs.values())


def scaled(progress: Callable[[float, str], None], start: float, stop: float) -> Callable[[float, str], None]:
    """A listener for a part of a stage: its 0 to 1 is `start` to `stop` of the whole."""
    return lambda share, message: progress(start + (stop - start) * share, message)
