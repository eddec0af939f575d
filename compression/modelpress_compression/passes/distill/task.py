"""One distillation: what a method of training is given, and what it gives back."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from modelpress_compression.executor import Selector, device_for
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.objective import Objective
from modelpress_compression.passes.distill.samples import DataSplit
from modelpress_compression.passes.distill.training import Augment

# The share of the time left that training leaves to the proof and the measuring of the result.
RESERVE = 0.15


@dataclass(frozen=True)
class DistillationTask:
    """`original`: the teacher. `student`: in the form that is trained; methods train a clone of it.

    `trainable`: which of the student's constants are trained. `objective` has no features. `augment`: changes a batch's
    inputs at random; None: they stay as they are. `stop_at`: when training must end, on `time.monotonic()`.
    """

    original: Model
    student: Model
    trainable: Selector
    samples: DataSplit
    objective: Objective
    config: DistillConfig
    context: Context
    augment: Augment | None
    stop_at: float

    @property
    def device(self) -> torch.device:
        """Where the student runs."""
        return device_for(self.context.target.device)


@dataclass(frozen=True)
class DistillationResult:
    """The trained student, in the form in which it was trained. `weights`: how many tensors were trained; `improved`:
    whether the validation loss fell; `changes`, `details`, `warnings`: for the report."""

    student: Model
    weights: int
    improved: bool = False
    changes: Mapping[str, int | float] = field(default_factory=dict)
    details: tuple[Mapping[str, str | int | float], ...] = ()
    warnings: tuple[str, ...] = ()


def stop_time(context: Context) -> float:
    """When training must end, on `time.monotonic()`."""
    left_s = context.time_left_s
    return math.inf if left_s is None else time.monotonic() + left_s * (1 - RESERVE)
