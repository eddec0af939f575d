"""Layer-wise reconstruction: one block after the other is fitted to what the original has at the block's end.

Each block takes what the student, as far as it is fitted, hands it, so that a block also makes good for the errors of
those before (as in AdaRound, Nagel et al., arXiv:2004.10568, and in channel pruning by reconstruction, He et al.,
arXiv:1707.06168). Where channels were cut, the student's stand for those of the original that they correlate with. The
last block is fitted to the outputs with the loss that they have.

What a block needs is computed once and held in memory, at most 256 MiB of it; no gradient passes more than one block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from modelpress_compression.executor import Executor
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.watch import Taps, taps
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.blocks import Block, find_blocks
from modelpress_compression.passes.distill.correspondence import Indices, corresponding, cut_axis
from modelpress_compression.passes.distill.end_to_end import Taught
from modelpress_compression.passes.distill.lesson import Lesson
from modelpress_compression.passes.distill.losses import ValueLoss, relative_mse
from modelpress_compression.passes.distill.matching import common_values
from modelpress_compression.passes.distill.objective import Objective
from modelpress_compression.passes.distill.samples import Feed
from modelpress_compression.passes.distill.teacher import Answers
from modelpress_compression.passes.distill.training import Augment, Trained, Trainer

BLOCK_BYTES = 256 * 1024**2  # 256 MiB of activations
_MATCHING_FEEDS = 8  # show which channels are which
_Picked = tuple[Indices, int] | None  # channels and their axis; None: all
_MASK = "attention_mask"  # under this name the loss finds a mask among a block's inputs


@dataclass(frozen=True)
class _Stored(Feed):
    """What a block takes at once, and what it should make of it."""

    answers: Answers


@dataclass(frozen=True)
class _Samples:
    """A block's samples, and their teacher."""

    train: Sequence[_Stored]
    judge: Sequence[_Stored]
    feeds_a_batch: int

    @property
    def steps(self) -> int:
        return -(-len(self.train) // self.feeds_a_batch)

    def batches(self, generator: np.random.Generator) -> Iterator[list[Feed]]:
        order = generator.permutation(len(self.train))
        for start in range(0, len(order), self.feeds_a_batch):
            yield [self.train[place] for place in order[start : start + self.feeds_a_batch]]

    def judging(self) -> Iterator[Feed]:
        return iter(self.judge)

    def __call__(self, feed: Feed) -> Answers:
        return feed.answers if isinstance(feed, _Stored) else {}

    def changed(self, inputs: Feeds) -> Answers:
        raise NotImplementedError("a block's inputs were changed when they were stored")


def teach(lesson: Lesson) -> Taught:
    """Raises NotExecutableError, ModelNotRunnableError."""
    student = lesson.student.clone()
    selector = lesson.selector
    names = common_values(lesson.original, student, selector)
    blocks = find_blocks(student, selector, set(names))
    rows: list[dict[str, str | int | float]] = []
    warnings: list[str] = []
    count = 0
    for number, block in enumerate(blocks):
        now = time.monotonic()
        if now > lesson.stop_at:
            warnings.append(f"The time limit ended training after {number} of {len(blocks)} blocks; these were kept.")
            break
        end = block.target or "outputs"
        lesson.context.progress(number / len(blocks), f"block {number + 1} of {len(blocks)}: {end}")
        stop_at = now + (lesson.stop_at - now) / (len(blocks) - number)
        trained = _fit(lesson, student, block, stop_at) if block.weights else None
        if trained is not None and math.isfinite(trained.first_loss):
            rows.append({"block": end, "loss_before": trained.first_loss, "loss_after": trained.best_loss})
            warnings += [f"Block {end!r}: {warning}" for warning in trained.warnings]
            count += len(block.weights)
    improved = any(row["loss_after"] != row["loss_before"] for row in rows)
    changes = {"blocks": len(blocks), "blocks_fitted": len(rows)}
    return Taught(student, count, improved, changes, tuple(rows), tuple(warnings))


def _fit(lesson: Lesson, student: Model, block: Block, stop_at: float) -> Trained | None:
    """Fits a block's weights in place; None where what it ends with cannot be matched with the original."""
    targets = [block.target] if block.target else list(lesson.objective.output_names)
    with taps(student, [*block.inputs, *targets]) as mine, taps(lesson.original, targets) as theirs:
        matched = _match(lesson, block, mine, theirs)
        if matched is None:
            return None
        objective, picked = matched
        recorder = _Recorder(block, mine, theirs, picked)
        judge = recorder.record(lesson.samples.judging(), None)
        batches = lesson.samples.batches(np.random.default_rng([lesson.config.seed, 2]))
        train = recorder.record((feed for batch in batches for feed in batch), lesson.augment)
    samples = _Samples(train, judge, max(1, round(lesson.config.batch_size / len(judge[0].indices))))
    executor = Executor(
        student,
        trainable=lambda value: value in block.weights,
        outputs=objective.output_names,
        inputs=block.inputs,
        device=lesson.device,
    )
    trained = Trainer(executor, objective, samples, samples, lesson.config, None, stop_at).train()
    if trained.improved:
        executor.write_back(student)
    return trained


def _match(lesson: Lesson, block: Block, mine: Taps, theirs: Taps) -> tuple[Objective, _Picked] | None:
    """The block's loss, and which of the original's channels it is held against."""
    if not block.target:
        return lesson.objective, None
    feeds = [feed.inputs for feed in islice(lesson.samples.judging(), _MATCHING_FEEDS)]
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
    """Runs both models and keeps what a block takes and should make, until the memory for it is full."""

    block: Block
    mine: Taps
    theirs: Taps
    picked: _Picked
    room: int = BLOCK_BYTES

    def record(self, feeds: Iterable[Feed], augment: Augment | None) -> list[_Stored]:
        """At least one of the feeds, changed by `augment`."""
        stored: list[_Stored] = []
        for feed in feeds:
            inputs, keeps_labels = (feed.inputs, True) if augment is None else augment(feed.inputs)
            made, here = self.theirs(inputs), self.mine(inputs)
            given = {name: here[name] for name in self.block.inputs}
            if (mask := counted_positions(inputs)) is not None:
                given[_MASK] = mask.astype(np.int64)
            answers = {self.block.target: _pick(made[self.block.target], self.picked)} if self.block.target else made
            self.room -= sum(array.nbytes for array in (*given.values(), *answers.values()))
            if self.room < 0 and stored:
                break
            labels = feed.labels if keeps_labels and not self.block.target else None
            stored.append(_Stored(feed.indices, given, labels, answers))
        return stored


def _pick(array: Array, picked: _Picked) -> Array:
    return array if picked is None else np.take(array, *picked)
