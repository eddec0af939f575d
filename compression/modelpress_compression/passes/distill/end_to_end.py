"""Training of the whole model at once, towards the original's outputs and what both have in common between."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modelpress_compression.analysis.streams import taps
from modelpress_compression.executor import Executor
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.lesson import Lesson
from modelpress_compression.passes.distill.losses import ValueLoss, relative_mse
from modelpress_compression.passes.distill.matching import agreeing, common_values, spread
from modelpress_compression.passes.distill.objective import Objective
from modelpress_compression.passes.distill.teacher import Teacher
from modelpress_compression.passes.distill.training import Trained, Trainer


@dataclass(frozen=True)
class Taught:
    """The trained student, in the form in which it was trained; `weights`: how many tensors were trained."""

    student: Model
    trained: Trained
    weights: int
    features: int = 0
    skipped: tuple[tuple[str, str], ...] = ()


def teach(lesson: Lesson) -> Taught:
    """Raises NotExecutableError, ModelNotRunnableError."""
    objective = replace(lesson.objective, features=_features(lesson), feature_weight=lesson.config.feature_weight)
    executor = Executor(lesson.student, trainable=lesson.selector, outputs=objective.names)
    if not executor.parameters_by_name:
        return Taught(lesson.student, Trained(0.0, 0.0), 0)
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
    return Taught(student, trained, len(executor.parameters_by_name), len(objective.features))


def _features(lesson: Lesson) -> tuple[ValueLoss, ...]:
    if not lesson.config.feature_weight:
        return ()
    names = common_values(lesson.original, lesson.student, lesson.selector)
    inputs = next(iter(lesson.samples.judging())).inputs
    arrays = agreeing(lesson.original, lesson.student, names, inputs)
    return tuple(ValueLoss(name, "mse", relative_mse(arrays[name])) for name in spread(list(arrays)))


__all__ = ["Objective", "Taught", "teach"]
