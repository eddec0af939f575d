"""Layer-wise reconstruction: one block after the other is fitted to the original's values at the block's end.

The inputs of a block come from the student with all blocks before it fitted, so that a block also corrects their errors
(as in AdaRound, Nagel et al., arXiv:2004.10568, and in channel pruning by reconstruction, He et al., arXiv:1707.06168).
Where channels were cut, each of the student's is compared with the channel of the original that it correlates with. The
last block is fitted to the outputs, with the loss of the outputs.

A block's inputs and targets are computed once and held in memory, at most 256 MiB; no gradient passes through more than
one block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from modelpress_compression.executor import Executor
from modelpress_compression.graph.blocks import Block, find_blocks
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.watch import Taps, taps
from modelpress_compression.inputs import Array, Feeds, values_bytes
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.losses import ValueLoss, relative_mse
from modelpress_compression.passes.distill.matching import Indices, common_values, corresponding, cut_axis
from modelpress_compression.passes.distill.objective import Objective
from modelpress_compression.passes.distill.samples import Feed
from modelpress_compression.passes.distill.task import DistillationResult, DistillationTask
from modelpress_compression.passes.distill.teacher import Outputs
from modelpress_compression.passes.distill.training import Augment, Trainer, TrainingHistory

BLOCK_BYTES = 256 * 1024**2  # 256 MiB
_MATCHING_FEEDS = 8  # channels are matched by their values for these
_Picked = tuple[Indices, int] | None  # channels and their axis; None: all
_MASK = "attention_mask"  # a name under which `counted_positions` finds a mask among the inputs


@dataclass(frozen=True)
class _Stored(Feed):
    """A feed of a block, and the outputs that the block should have for it."""

    targets: Outputs


@dataclass(frozen=True)
class _BlockSamples:
    """A block's samples (see `TrainingSamples`), and their targets (see `Targets`)."""

    train: Sequence[_Stored]
    validation: Sequence[_Stored]
    feeds_a_batch: int

    @property
    def steps(self) -> int:
        return -(-len(self.train) // self.feeds_a_batch)

    def batches(self, generator: np.random.Generator) -> Iterator[list[Feed]]:
        order = generator.permutation(len(self.train))
        for start in range(0, len(order), self.feeds_a_batch):
            yield [self.train[place] for place in order[start : start + self.feeds_a_batch]]

    def validation_feeds(self) -> Iterator[Feed]:
        return iter(self.validation)

    def __call__(self, feed: Feed) -> Outputs:
        return feed.targets if isinstance(feed, _Stored) else {}

    def uncached(self, inputs: Feeds) -> Outputs:
        raise NotImplementedError("a block's inputs were changed when they were stored")


def train(task: DistillationTask) -> DistillationResult:
    """Raises NotExecutableError, ModelNotRunnableError."""
    student = task.student.clone()
    names = common_values(task.original, student, task.trainable)
    blocks = find_blocks(student, task.trainable, set(names))
    rows: list[dict[str, str | int | float]] = []
    warnings: list[str] = []
    count = 0
    for number, block in enumerate(blocks):
        now = time.monotonic()
        if now > task.stop_at:
            warnings.append(f"The time limit ended training after {number} of {len(blocks)} blocks; these were kept.")
            break
        end = block.target or "outputs"
        task.context.progress(number / len(blocks), f"block {number + 1} of {len(blocks)}: {end}")
        stop_at = now + (task.stop_at - now) / (len(blocks) - number)
        history = _fit(task, student, block, stop_at) if block.weights else None
        if history is not None and math.isfinite(history.first_loss):
            rows.append({"block": end, "loss_before": history.first_loss, "loss_after": history.best_loss})
            warnings += [f"Block {end!r}: {warning}" for warning in history.warnings]
            count += len(block.weights)
    improved = any(row["loss_after"] != row["loss_before"] for row in rows)
    changes = {"blocks": len(blocks), "blocks_fitted": len(rows)}
    return DistillationResult(student, count, improved, changes, tuple(rows), tuple(warnings))


def _fit(task: DistillationTask, student: Model, block: Block, stop_at: float) -> TrainingHistory | None:
    """Fits a block's weights in place; None where the block's end has no counterpart in the original."""
    targets = [block.target] if block.target else list(task.objective.output_names)
    with taps(student, [*block.inputs, *targets]) as mine, taps(task.original, targets) as theirs:
        matched = _match(task, block, mine, theirs)
        if matched is None:
            return None
        objective, picked = matched
        recorder = _Recorder(block, mine, theirs, picked)
        validation = recorder.record(task.samples.validation_feeds(), None)
        batches = task.samples.batches(np.random.default_rng([task.config.seed, 2]))
        train = recorder.record((feed for batch in batches for feed in batch), task.augment)
    feeds_a_batch = max(1, round(task.config.batch_size / len(validation[0].indices)))
    samples = _BlockSamples(train, validation, feeds_a_batch)
    executor = Executor(
        student,
        trainable=lambda value: value in block.weights,
        outputs=objective.output_names,
        inputs=block.inputs,
        device=task.device,
    )
    history = Trainer(executor, objective, samples, samples, task.config, None, stop_at).train()
    if history.improved:
        executor.write_back(student)
    return history


def _match(task: DistillationTask, block: Block, mine: Taps, theirs: Taps) -> tuple[Objective, _Picked] | None:
    """The block's loss, and the channels of the original that it is compared with."""
    if not block.target:
        return task.objective, None
    feeds = [feed.inputs for feed in islice(task.samples.validation_feeds(), _MATCHING_FEEDS)]
    here, there = ([observe(feed)[block.target] for feed in feeds] for observe in (mine, theirs))
    picked: _Picked = None
    if here[0].shape != there[0].shape:
        axis = cut_axis(here[0].shape, there[0].shape)
        channels = None if axis is None else corresponding(here, there, axis)
        if axis is None or channels is None:
            return None
        picked = (channels, axis)
    return Objective((ValueLoss(block.target, "mse", relative_mse(_pick(there[0], picked))),)), picked


@dataclass
class _Recorder:
    """Runs both models and keeps a block's inputs and targets, until the memory for them is full."""

    block: Block
    mine: Taps
    theirs: Taps
    picked: _Picked
    room: int = BLOCK_BYTES

    def record(self, feeds: Iterable[Feed], augment: Augment | None) -> list[_Stored]:
        """As many feeds as fit, at least one, each changed by `augment`."""
        stored: list[_Stored] = []
        for feed in feeds:
            inputs, keeps_labels = (feed.inputs, True) if augment is None else augment(feed.inputs)
            made, here = self.theirs(inputs), self.mine(inputs)
            given = {name: here[name] for name in self.block.inputs}
            if (mask := counted_positions(inputs)) is not None:
                given[_MASK] = mask.astype(np.int64)
            targets = {self.block.target: _pick(made[self.block.target], self.picked)} if self.block.target else made
            self.room -= values_bytes(given) + values_bytes(targets)
            if self.room < 0 and stored:
                break
            labels = feed.labels if keeps_labels and not self.block.target else None
            stored.append(_Stored(feed.indices, given, labels, targets))
        return stored


def _pick(array: Array, picked: _Picked) -> Array:
    return array if picked is None else np.take(array, *picked)
