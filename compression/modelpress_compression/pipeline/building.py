"""Targets that run no ONNX files: what is built for them from the model, after the recipe's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from modelpress_compression.backends import backend_of
from modelpress_compression.backends.base import Builder, BuildRequest, Built
from modelpress_compression.measure.accuracy import accuracy_after
from modelpress_compression.measure.task import GivenScores, Task
from modelpress_compression.model import Model, read_ir
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.recipe import Constraints, Recipe, Step
from modelpress_compression.search.steps import StepRecord, save
from modelpress_compression.target import DEVICES


def steps_before(recipe: Recipe) -> Recipe:
    """The recipe, with a step that folds constants and BatchNormalization where it has none. What a goal asks for is
    held against the design; there are no candidates."""
    if recipe.steps or not DEVICES[recipe.target.device].built:
        return recipe
    return replace(recipe, steps=(Step("fuse", FuseConfig()),))


@dataclass(frozen=True)
class Building:
    """What was built: its record among the steps, with the model that answers as it does."""

    record: StepRecord
    built: Built


def build(
    model: Model, path: Path, context: Context, limits: Constraints, task: Task | None, original: Path
) -> Building:
    """Builds what the context's target runs from the `model` in `path`. `task` judges it beside the `original`. Raises
    as `base.Builder.build`."""
    builder = backend_of(context.target)
    if not isinstance(builder, Builder):
        raise TypeError(f"{builder.label} builds nothing")
    began = time.monotonic()
    folder = context.work_directory / "build"
    folder.mkdir()
    built = builder.build(
        BuildRequest(
            path=path,
            data=context.data,
            folder=folder,
            max_drop=limits.max_drop,
            drop_of=_drop_of(task, original),
            time_left_s=lambda: context.time_left_s,
            check_time=context.check_time,
            progress=context.progress,
            log=context.log,
        )
    )
    target = folder / "result" / "model.onnx"
    made = save(replace(model, ir=read_ir(built.model), warnings=()), target)
    record = StepRecord(
        Step(context.target.device, context.target),
        made,
        target,
        changes=dict(built.changes),
        warnings=built.warnings,
        details=built.details,
        notes=built.notes,
        duration_s=time.monotonic() - began,
    )
    return Building(record, built)


def _drop_of(task: Task | None, original: Path) -> Callable[[Path], float] | None:
    if task is None or isinstance(task, GivenScores):  # who gives scores has not seen what is not built yet
        return None
    before = cache(lambda: task.evaluate(original))
    return lambda path: accuracy_after(before(), task.evaluate(path)).drop
