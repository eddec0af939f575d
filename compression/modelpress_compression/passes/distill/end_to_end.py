"""Training of the whole model at once, towards the original's outputs and what both have in common between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from modelpress_compression.executor import Executor
from modelpress_compression.graph.watch import taps
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.lesson import Lesson
from modelpress_compression.passes.distill.losses import ValueLoss, relative_mse
from modelpress_compression.passes.distill.matching import agreeing, common_values, spread
from modelpress_compression.passes.distill.teacher import Teacher
from modelpress_compression.passes.distill.training import PERFECT, Trainer


@dataclass(frozen=True)
class Taught:
    """The trained student, in the form in which it was trained. `weights`: how many tensors were trained; `improved`:
    whether training gained anything by its own account; `changes`, `details`, `warnings`: for the report."""

    student: Model
    weights: int
    improved: bool = False
    changes: Mapping[str, int | float] = field(default_factory=dict)
    details: tuple[Mapping[str, str | int | float], ...] = ()
    warnings: tuple[str, ...] = ()


def teach(lesson: Lesson) -> Taught:
    """Raises NotExecutableError, ModelNotRunnableError."""
    objective = replace(lesson.objective, features=_features(lesson), feature_weight=lesson.config.feature_weight)
    executor = Executor(lesson.student, trainable=lesson.selector, outputs=objective.names, device=lesson.device)
    if not executor.parameters_by_name:
        return Taught(lesson.student, 0)
    with taps(lesson.original, objective.names) as observe:
        trainer = Trainer(
            executor,
            objective,
            lesson.samples,
            Teacher(observe),
            lesson.config,
            lesson.augment,
            lesson.stop_at,
            lesson.context.progress,
        )
        trained = trainer.train()
    student = lesson.student.clone()
    executor.write_back(student)
    details = tuple(row for row in trained.epochs if all(map(math.isfinite, row.values())))
    changes = {
        "features_matched": len(objective.features),
        "epochs": len(trained.epochs),
        "best_epoch": trained.best_epoch,
    }
    weights = len(executor.parameters_by_name)
    if trained.first_loss <= PERFECT:
        trained.warnings.append("The model answers as the original does already: there was nothing to learn.")
    return Taught(student, weights, trained.improved, changes, details, tuple(trained.warnings))


def _features(lesson: Lesson) -> tuple[ValueLoss, ...]:
    if not lesson.config.feature_weight:
        return ()
    names = common_values(lesson.original, lesson.student, lesson.selector)
    inputs = next(iter(lesson.samples.judging())).inputs
    arrays = agreeing(lesson.original, lesson.student, names, inputs)
    return tuple(ValueLoss(name, "mse", relative_mse(arrays[name])) for name in spread(list(arrays)))
