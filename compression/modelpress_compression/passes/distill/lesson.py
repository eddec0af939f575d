"""Everything that a way of training needs: both models, the samples, the loss, and how long it may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from modelpress_compression.errors import InvalidRecipeError, Violation
from modelpress_compression.executor import Selector, device_for
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.labels import LabelLoss, label_loss
from modelpress_compression.passes.distill.losses import ValueLoss, output_losses
from modelpress_compression.passes.distill.objective import Objective
from modelpress_compression.passes.distill.samples import Samples
from modelpress_compression.passes.distill.teacher import Answers
from modelpress_compression.passes.distill.training import Augment

# Of the time that is left when training starts, what stays for proving and measuring the result.
RESERVE = 0.15
DEFAULT_LABEL_WEIGHT = 0.5


@dataclass
class Lesson:
    """`student` is in the form that is trained, and belongs to the pass; `original` is not changed.

    `objective` has no features. `augment` makes a batch's inputs new; None: as they are.
    """

    original: Model
    student: Model
    selector: Selector
    samples: Samples
    objective: Objective
    config: DistillConfig
    context: Context
    augment: Augment | None
    stop_at: float

    @property
    def device(self) -> torch.device:
        """Where the student runs."""
        return device_for(self.context.target.device)


def stop_time(context: Context) -> float:
    """When training must end, on `time.monotonic()`."""
    if context.deadline is None:
        return math.inf
    now = time.monotonic()
    return now + (context.deadline - now) * (1 - RESERVE)


def make_objective(
    original: Model, answers: Answers, samples: Samples, config: DistillConfig
) -> tuple[Objective, dict[str, str], list[str]]:
    """The loss at the outputs and against labels; why outputs have no loss; warnings. `answers`: the original's outputs
    for some samples.

    Raises InvalidRecipeError where no output has a loss.
    """
    losses, reasons = output_losses(original.graph, answers, config.loss, config.temperature)
    if not losses:
        listed = "; ".join(f"output {name!r}: {reason}" for name, reason in reasons.items())
        raise InvalidRecipeError(
            [
                Violation(
                    "distill",
                    f"the model has no output that could be trained towards ({listed}); leave this step out, or upload "
                    f"the model with its scores as an output",
                )
            ]
        )
    labels, weight, warnings = _labels(losses, answers, samples, config)
    return Objective(tuple(losses), labels=labels, label_weight=weight), reasons, warnings


def _labels(
    losses: list[ValueLoss], answers: Answers, samples: Samples, config: DistillConfig
) -> tuple[LabelLoss | None, float, list[str]]:
    given = samples.data.labels
    weight = DEFAULT_LABEL_WEIGHT if config.label_weight is None else config.label_weight
    if given is None:
        wanted = config.label_weight is not None and config.label_weight > 0
        return None, 0.0, ["label_weight has no effect: the data holds no labels."] if wanted else []
    if weight == 0:
        return None, 0.0, []
    found = label_loss(losses, answers, given)
    if found is None:
        return None, 0.0, [f"The labels of shape {given.shape} fit no output, so the original alone taught."]
    return found, weight, []
