"""Training of the whole model at once, towards the original's outputs and the inner values that both have in common."""

from __future__ import annotations

import math
from dataclasses import replace

from modelpress_compression.executor import Executor
from modelpress_compression.graph.watch import taps
from modelpress_compression.passes.distill.losses import ValueLoss, relative_mse
from modelpress_compression.passes.distill.matching import agreeing, common_values, spread
from modelpress_compression.passes.distill.task import DistillationResult, DistillationTask
from modelpress_compression.passes.distill.teacher import Teacher
from modelpress_compression.passes.distill.training import PERFECT, Trainer


def train(task: DistillationTask) -> DistillationResult:
    """Raises NotExecutableError, ModelNotRunnableError."""
    objective = replace(task.objective, features=_features(task), feature_weight=task.config.feature_weight)
    executor = Executor(task.student, trainable=task.trainable, outputs=objective.names, device=task.device)
    if not executor.parameters_by_name:
        return DistillationResult(task.student, 0)
    with taps(task.original, objective.names) as observe:
        trainer = Trainer(
            executor,
            objective,
            task.samples,
            Teacher(observe),
            task.config,
            task.augment,
            task.stop_at,
            task.context.progress,
        )
        history = trainer.train()
    student = task.student.clone()
    executor.write_back(student)
    details = tuple(row for row in history.epochs if all(map(math.isfinite, row.values())))
    changes = {
        "features_matched": len(objective.features),
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "learning_rate": history.learning_rate,
    }
    weights = len(executor.parameters_by_name)
    if history.first_loss <= PERFECT:
        history.warnings.append("The model answers as the original does already: there was nothing to learn.")
    return DistillationResult(student, weights, history.improved, changes, details, tuple(history.warnings))


def _features(task: DistillationTask) -> tuple[ValueLoss, ...]:
    if not task.config.feature_weight:
        return ()
    names = common_values(task.original, task.student, task.trainable)
    inputs = next(iter(task.samples.validation_feeds())).inputs
    arrays = agreeing(task.original, task.student, names, inputs)
    return tuple(ValueLoss(name, "mse", relative_mse(arrays[name])) for name in spread(list(arrays)))
