"""The training loop: AdamW or SGD, warm-up and cosine schedule, early stop, the best state kept.

The best state has the smallest validation loss. The state before training takes part, so that training never ends worse
than it began. A loss that is not finite ends training at once, and so does the time limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from modelpress_compression.executor import Executor
from modelpress_compression.inputs import Feeds
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.objective import Objective, mask_of, tensors
from modelpress_compression.passes.distill.samples import Feed
from modelpress_compression.passes.distill.teacher import Outputs

MOMENTUM = 0.9
MAX_GRADIENT_NORM = 1.0
PERFECT = 1e-12  # a loss that nothing is left to learn from

# A batch's inputs, changed at random, and whether its labels still hold.
Augment = Callable[[Feeds], tuple[Feeds, bool]]


class TrainingSamples(Protocol):
    """`steps`: batches of an epoch."""

    @property
    def steps(self) -> int: ...

    def batches(self, generator: np.random.Generator) -> Iterator[list[Feed]]:
        """All training samples once, in a new order."""
        ...

    def validation_feeds(self) -> Iterator[Feed]:
        """The samples for validation, always in the same order."""
        ...


class Targets(Protocol):
    """The outputs that training aims at, for samples as they are and for changed inputs: those of a teacher."""

    def __call__(self, feed: Feed) -> Outputs: ...

    def uncached(self, inputs: Feeds) -> Outputs: ...


@dataclass
class TrainingHistory:
    """How a run went. `first_loss`, `best_loss`: the validation loss before training, and that of the best state."""

    first_loss: float
    best_loss: float
    best_epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        return self.best_loss < self.first_loss


@dataclass
class Trainer:
    """One run. `stop_at`: when it must end, on `time.monotonic()`; `progress`: share done and a line for people."""

    executor: Executor
    objective: Objective
    samples: TrainingSamples
    teacher: Targets
    config: DistillConfig
    augment: Augment | None = None
    stop_at: float = math.inf
    progress: Callable[[float, str], None] = lambda share, message: None

    def train(self) -> TrainingHistory:
        """Trains the executor's parameters and leaves the best state in them. Raises ModelNotRunnableError."""
        parameters = self.executor.parameters_by_name
        first = self.validate()
        history, best = TrainingHistory(first, first), _state(parameters)
        if not math.isfinite(first):
            history.warnings.append("The model's answers are not finite on the samples held out; nothing trained.")
            return history
        if first <= PERFECT:
            return history
        optimizer, schedule = self._optimizer()
        generator = np.random.default_rng([self.config.seed, 1])
        for epoch in range(1, self.config.epochs + 1):
            mean, problem = self._epoch(epoch, optimizer, schedule, generator)
            loss = self.validate() if problem is None or problem == _TIME else math.nan
            history.epochs.append({"epoch": epoch, "training_loss": mean, "held_out_loss": loss})
            if loss < history.best_loss:
                history.best_loss, history.best_epoch, best = loss, epoch, _state(parameters)
            self.progress(epoch / self.config.epochs, f"epoch {epoch} of {self.config.epochs}: loss {loss:.4g}")
            if problem is None and not math.isfinite(loss):
                problem = _DIVERGED
            if problem is not None:
                history.warnings.append(problem.format(epoch=epoch, epochs=self.config.epochs))
                break
            if epoch - history.best_epoch >= self.config.patience:
                break
        _restore(parameters, best)
        return history

    def validate(self) -> float:
        """The validation loss; NaN or infinite where the outputs are."""
        return validation_loss(self.samples.validation_feeds(), self.teacher, self.objective, self._run)

    def _run(self, inputs: Feeds) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return dict(self.executor(inputs))

    def _epoch(
        self,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        generator: np.random.Generator,
    ) -> tuple[float, str | None]:
        """(mean loss, why training must end)."""
        total, steps = 0.0, 0
        for batch in self.samples.batches(generator):
            if time.monotonic() > self.stop_at:
                return total / max(1, steps), _TIME
            optimizer.zero_grad(set_to_none=True)
            loss = sum(self._backward(feed, len(batch)) for feed in batch)
            norm = nn.utils.clip_grad_norm_(self._trained(), MAX_GRADIENT_NORM)
            if not math.isfinite(loss) or not math.isfinite(float(norm)):
                return math.nan, _DIVERGED
            optimizer.step()
            schedule.step()
            total, steps = total + loss, steps + 1
            if steps % _TELL_EVERY == 0:
                done = (epoch - 1 + steps / self.samples.steps) / self.config.epochs
                self.progress(done, f"epoch {epoch} of {self.config.epochs}: training loss {total / steps:.4g}")
        return total / max(1, steps), None

    def _backward(self, feed: Feed, parts: int) -> float:
        """Adds the gradients of one feed; returns its share of the batch's loss."""
        inputs, labels = feed.inputs, feed.labels
        if self.augment is None:
            targets = self.teacher(feed)
        else:
            inputs, keeps_labels = self.augment(inputs)
            labels = labels if keeps_labels else None
            targets = self.teacher.uncached(inputs)
        device = self.executor.device
        student = self.executor(inputs)
        mask = mask_of(inputs, device)
        loss = self.objective.training_loss(student, tensors(targets, device), mask, labels) / parts
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotations there
        return float(loss.detach())

    def _trained(self) -> list[nn.Parameter]:
        return list(self.executor.parameters_by_name.values())

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        config = self.config
        # Biases and scales of normalization layers are exempt from weight decay, as usual.
        groups = [
            {"params": [item for item in self._trained() if item.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [item for item in self._trained() if item.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        steps = self.samples.steps * config.epochs
        factor = _warm_cosine(steps, round(steps * config.warmup))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


_TELL_EVERY = 20  # steps
_TIME = (
    "The time limit ended training in epoch {epoch} of {epochs}; the best state so far was kept. Give the job more "
    "time, or fewer epochs."
)
_DIVERGED = (
    "Training diverged in epoch {epoch} of {epochs} (the loss was no finite number) and was stopped; the best state "
    "before was kept. Try a lower learning_rate."
)


def validation_loss(
    feeds: Iterable[Feed], teacher: Targets, objective: Objective, run: Callable[[Feeds], Mapping[str, Tensor]]
) -> float:
    """Mean loss over all samples of what `run` makes of them."""
    total, count = 0.0, 0
    for feed in feeds:
        student = run(feed.inputs)
        device = next(iter(student.values())).device
        targets = tensors(teacher(feed), device)
        with torch.no_grad():
            loss = float(objective.validation_loss(student, targets, mask_of(feed.inputs, device), feed.labels))
        total, count = total + loss * len(feed.indices), count + len(feed.indices)
    return total / max(1, count)


def _warm_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step: linear warm-up, then half a cosine down to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def _state(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _restore(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
