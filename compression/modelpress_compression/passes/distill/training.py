"""The training loop: AdamW or SGD, warm-up and cosine schedule, early stop, the best state kept.

The best state has the smallest validation loss. The state before training takes part, so that training never ends worse
than it began. With a learning rate of the recipe's, a loss that is not finite ends training at once. The time limit
always does; the schedule goes by epochs or by the time, whichever is further: a rate that has not fallen when training
ends leaves the weights where the last steps happened to throw them (Li et al., arXiv:1905.04753).

Without a learning rate in the recipe, it is found: an epoch that leaves the model several times further from the
original than it was before training is taken back, and training goes on from the best state with a quarter of the rate.
The largest that a model bears differs by more than ten times from one to the next: of a text recognizer without a
quarter of its time, two epochs at 1e-3 quadrupled the loss, and at 1e-4 took a fifth of it away.
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

# Where the recipe gives none.
FIRST_RATES = {"adamw": 1e-3, "sgd": 1e-2}
# AdamW moves every number by about its rate. Of weights that are smaller than this in the root mean square, a found
# rate is as much smaller, but for a floor (as in Shazeer and Stern, arXiv:1804.04235): one kernel of 0.003 was enough
# to spoil a text recognizer.
USUAL_SIZE, LEAST_SIZE = 0.1, 1e-3
# A rate that leaves the model so many times further from the original than it was is too high. On the way to something
# nearer the loss may well rise: of small networks to twice as much.
FAR = 4.0
LESS_RATE = 0.25
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
    """How a run went. `first_loss`, `best_loss`: the validation loss before training, and that of the best state.
    `learning_rate`: the last one, at its full value."""

    first_loss: float
    best_loss: float
    best_epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    learning_rate: float = 0.0
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
        pace = Pace(self.config, self.samples.steps * self.config.epochs, self.stop_at)
        optimizer, finds_rate = self._optimizer(), self.config.learning_rate is None
        generator = np.random.default_rng([self.config.seed, 1])
        for epoch in range(1, self.config.epochs + 1):
            mean, problem = self._epoch(epoch, optimizer, pace, generator)
            loss = self.validate() if problem is None or problem == _TIME else math.nan
            history.epochs.append({"epoch": epoch, "training_loss": mean, "held_out_loss": loss})
            if loss < history.best_loss:
                history.best_loss, history.best_epoch, best = loss, epoch, _state(parameters)
            self.progress(epoch / self.config.epochs, f"epoch {epoch} of {self.config.epochs}: loss {loss:.4g}")
            if problem is None and not math.isfinite(loss):
                problem = _DIVERGED
            if problem == _DIVERGED and finds_rate:
                problem = None
            if problem is not None:
                history.warnings.append(problem.format(epoch=epoch, epochs=self.config.epochs))
                break
            if epoch - history.best_epoch >= self.config.patience:
                break
            if finds_rate and not loss <= FAR * first:  # nor if it is no number
                _restore(parameters, best)
                pace.slow_down()
                optimizer = self._optimizer()  # its averages are of another state's gradients
        _restore(parameters, best)
        history.learning_rate = pace.rate
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
        pace: Pace,
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
            rate = pace.next_rate()
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
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

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        relative = config.learning_rate is None and config.optimizer == "adamw"
        groups = [
            {
                "params": [parameter],
                # Biases and scales of normalization layers are exempt from weight decay, as usual.
                "weight_decay": config.weight_decay if parameter.dim() > 1 else 0.0,
                "scale": _share_of_rate(parameter) if relative else 1.0,
            }
            for parameter in self._trained()
        ]
        # Each step sets its rate.
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
        return torch.optim.AdamW(groups, lr=0.0)


def _share_of_rate(parameter: nn.Parameter) -> float:
    """What a weight takes of the rate; biases and scales take all of it."""
    if parameter.dim() <= 1:
        return 1.0
    size = float(parameter.detach().square().mean().sqrt())
    return min(1.0, max(size, LEAST_SIZE) / USUAL_SIZE)


@dataclass
class Pace:
    """The learning rate: a linear warm-up, then half a cosine down to zero, by the share of the run that is over.

    `steps`: of the whole run, which may end earlier at `stop_at`, on `clock`. `rate`: the full one.
    """

    config: DistillConfig
    steps: int
    stop_at: float = math.inf
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.rate = self.config.learning_rate or FIRST_RATES[self.config.optimizer]
        self._warmup = self.config.warmup
        self._began, self._step, self._rising = self.clock(), 0, 0.0

    def next_rate(self) -> float:
        """Of one more step."""
        self._step += 1
        time_over = (self.clock() - self._began) / max(self.stop_at - self._began, 1e-9)
        over, warmup = min(1.0, max(self._step / (self.steps + 1), time_over)), self._warmup
        if over < warmup:
            self._rising = over / warmup
            return self.rate * self._rising
        self._rising = 1.0
        return self.rate * 0.5 * (1 + math.cos(math.pi * (over - warmup) / (1 - warmup)))

    def slow_down(self) -> None:
        """The rate of the last step was too high. Where it was still rising, it rises no more."""
        self.rate *= LESS_RATE * self._rising
        self._warmup = 0.0


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


def _state(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _restore(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
