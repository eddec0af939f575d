"""Learns the rounding of weights, one block of the graph after the other, from inputs alone.

    minimize over V   |B(x^; W~(V)) - B(x; W)|^2 / |B(x^; W0) - B(x; W)|^2  +  lambda f(V)

B: the block; x, W: what it reads and its weights in float32; x^: what it reads in the quantized model, whose earlier
blocks have their levels already; W0: the rounding that there is (GPTQ's); f: see `soft_rounding`.

    adaround    a block is one layer with its Relu or Clip (Nagel et al., arXiv:2004.10568); it learns from sums over
                what it reads (see `layer_sums`)
    brecq       a block ends where one value alone leads on: a residual block, or one layer of a chain (Li et al.,
                arXiv:2102.05426), and while it learns, half of the activations are not quantized (QDrop)

A part of the samples is held out (holding_out.py). A block's new levels are taken only where it errs less on these than
with W0, so that nothing gets worse by it, block by block. Memory holds the activations of one block (see `samples`) and
what the two `Wavefront`s need to go on; both models run once over the samples, however many blocks there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelpress_compression.executor import Executor, NotExecutableError, device_for
from modelpress_compression.graph.blocks import Block, find_blocks, layer_blocks
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.read import constant_tensor
from modelpress_compression.graph.watch.extract import extract
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.holding_out import held_out
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.reconstruction.dropping import add_dropping, at_random
from modelpress_compression.passes.quantize.reconstruction.grids import Grid, Levels
from modelpress_compression.passes.quantize.reconstruction.layer_sums import Layer, LayerReader
from modelpress_compression.passes.quantize.reconstruction.samples import (
    BATCH,
    Sample,
    Tensors,
    Values,
    batch_size,
    gathered,
    may_be_batched,
    together,
)
from modelpress_compression.passes.quantize.reconstruction.soft_rounding import Annealing, SoftRounding

MAX_SAMPLES = 256
MAX_KEPT_BYTES = 256 * 1024**2  # 256 MiB of activations, of each of the two models
DROPPED = 0.5  # of the activations, under brecq
MAX_BLOCKS = 128
# Of the time that is left, for all blocks together.
_SHARE_OF_TIME = 0.5
_SEED = 0
# Outputs of a batch and of its samples one by one differ by less than this share, or the graph has no free batch.
_SAME = 1e-3


@dataclass(frozen=True)
class Learned:
    """`levels`: by the name of each weight whose rounding was learned and taken, its grid and levels. `rows`: error of
    each block on what was held out, as a share of its answers' power. `reasons`: why weights kept theirs, by name.
    `held_out`: the samples that nothing was learned from.
    """

    held_out: InputData
    levels: Mapping[str, tuple[Grid, Levels]] = field(default_factory=dict)
    rows: tuple[Mapping[str, str | int | float], ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


def learn(
    original: Model, student: Model, grids: Mapping[str, Sequence[Grid]], context: Context, method: str, steps: int
) -> Learned:
    """`student`: the float model `original` with its activations quantized, where they are, and its weights in float32;
    it is used up. `grids`: by the names of weights. Raises ModelNotRunnableError, TimeLimitError.
    """
    samples = context.data.spread(MAX_SAMPLES)
    unseen = held_out(samples)
    work = _Work(original, student, _usable(student, grids), samples, unseen, context, method, steps)
    work.run()
    return Learned(samples.only(sorted(unseen)), work.levels, tuple(work.rows), work.reasons)


def _usable(student: Model, grids: Mapping[str, Sequence[Grid]]) -> dict[str, tuple[onnx_ir.Value, Grid]]:
    """Weights of one grid whose numbers the model holds as the scheme saw them."""
    values = {value.name: value for graph in student.graphs() for value in graph.initializers.values()}
    values.update({node.outputs[0].name: node.outputs[0] for node in student.nodes() if node.op_type == "Constant"})
    found = {}
    for name, known in grids.items():
        value = values.get(name)
        tensor = constant_tensor(value)
        if value is None or tensor is None or len(known) != 1 or tuple(tensor.shape.numpy()) != known[0].weight.shape:
            continue
        found[name] = value, known[0]
    return found


@dataclass
class _Work:
    original: Model
    student: Model
    weights: dict[str, tuple[onnx_ir.Value, Grid]]
    samples: InputData
    unseen: frozenset[int]
    context: Context
    method: str
    steps: int
    levels: dict[str, tuple[Grid, Levels]] = field(default_factory=dict)
    rows: list[Mapping[str, str | int | float]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """All blocks, in order."""
        blocks = [block for block in self._blocks() if block.weights]
        learned = {value.name for block in blocks for value in block.weights}
        for name, (value, grid) in self.weights.items():
            if name not in learned:
                replace_numbers(value, grid.real(grid.levels))
                self.reasons[name] = "several blocks share it, or none that can be cut out"
        plain_names = _values_of(self.original)
        asks = [[name for name in block.inputs if name in plain_names] for block in blocks]
        targets = [self._targets(block) for block in blocks]
        fronts = [
            Wavefront(self.original, self.samples, _flat(asks, targets), MAX_KEPT_BYTES, self.context.check_time),
            Wavefront(
                self.student, self.samples, _flat([b.inputs for b in blocks]), MAX_KEPT_BYTES, self.context.check_time
            ),
        ]
        left = self.context.time_left_s
        stop_at = math.inf if left is None else time.monotonic() + _SHARE_OF_TIME * left
        for number, (block, ask, target) in enumerate(zip(blocks, asks, targets, strict=True)):
            self.context.progress(
                number / len(blocks), f"learning the rounding of block {number + 1} of {len(blocks)}: {target[0]}"
            )
            now = time.monotonic()
            if now > stop_at:
                self._leave(block, "the time for learning had run out")
                continue
            device = device_for(self.context.target.device)
            found = gathered(self._rows(fronts, block, ask, target), device)
            self._fit(block, target, found, now + (stop_at - now) / (len(blocks) - number))

    def _blocks(self) -> list[Block]:
        names = _values_of(self.original)

        def selector(value: onnx_ir.Value) -> bool:
            return value.name in self.weights and self.weights[value.name][0] is value

        if self.method == "adaround":
            return layer_blocks(self.student, selector, names)
        return find_blocks(self.student, selector, names, MAX_BLOCKS)

    def _targets(self, block: Block) -> list[str]:
        if block.target:
            return [block.target]
        return [
            value.name
            for value in self.student.graph.outputs
            if value.name and value.producer() is not None and value.dtype == onnx_ir.DataType.FLOAT
        ]

    def _rows(
        self, fronts: Sequence[Wavefront], block: Block, ask: Sequence[str], target: Sequence[str]
    ) -> Iterator[tuple[Values, Values, Values, NDArray[np.bool_] | None, bool]]:
        """Of each sample what `gathered` takes."""
        theirs, mine = fronts[0].advance([*ask, *target]), fronts[1].advance(block.inputs)
        for index, (feed, plain, given) in enumerate(zip(self.samples.feeds(1), theirs, mine, strict=True)):
            wanted = {name: plain[name] for name in target}
            yield given, {name: plain[name] for name in ask}, wanted, counted_positions(feed), index in self.unseen

    def _fit(self, block: Block, target: Sequence[str], samples: Sequence[Sample], stop_at: float) -> None:
        """Learns a block's levels, takes or leaves them, and puts what it has from now on into the student."""
        names = sorted(value.name or "" for value in block.weights)
        grids = {name: self.weights[name][1] for name in names}
        train, judged = ([item for item in samples if item.held_out == held] for held in (False, True))
        if not train or not judged or not target:
            self._leave(block, "too few samples have finite activations here")
            return
        try:
            layer = self._layer(block, samples)
            trial = _Trial.open(self.student, block, target, grids, self.method == "brecq", judged[0].given)
            trial.find_batching(train)
            before = trial.error(judged, {name: grid.levels for name, grid in grids.items()})
            annealing = Annealing(self.steps, stop_at, self.context.check_time)
            levels = trial.learn(train, annealing) if layer is None else _named_levels(names, layer.learn(annealing))
            after = trial.error(judged, levels) if levels is not None else math.inf
        except NotExecutableError as error:
            self._leave(block, f"it cannot be trained: {error}")
            return
        self.rows.append({"block": target[0], "weights": len(names), "error_before": before, "error_after": after})
        if levels is None or not after < before:
            told = f"{after:.3g} of the answers' power, {before:.3g} without" if levels is not None else "not finite"
            self._leave(block, f"on samples held out its error was not smaller with learned rounding ({told})")
            return
        for name in names:
            self.levels[name] = grids[name], levels[name]
            replace_numbers(self.weights[name][0], grids[name].real(levels[name]))

    def _layer(self, block: Block, samples: Sequence[Sample]) -> Layer | None:
        """The block, where it is a layer that can learn from sums."""
        if self.method != "adaround":
            return None
        (weight,) = block.weights
        reader = LayerReader.open(self.original, self.student, block, self.weights[weight.name or ""][1])
        return Layer(reader, samples) if reader is not None and all(map(reader.has, samples)) else None

    def _leave(self, block: Block, reason: str) -> None:
        for value in block.weights:
            grid = self.weights[value.name or ""][1]
            replace_numbers(value, grid.real(grid.levels))
            self.reasons[value.name or ""] = reason


def _named_levels(names: Sequence[str], levels: Levels | None) -> dict[str, Levels] | None:
    return None if levels is None else dict.fromkeys(names, levels)


def _values_of(model: Model) -> set[str]:
    """Names of what the main graph reads and computes."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name for value in values if value.name}


def _flat(*lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in lists for part in names for name in part]


class _Trial:
    """One block in torch, whose weights come from outside."""

    def __init__(
        self, executor: Executor, grids: Mapping[str, Grid], target: Sequence[str], threshold: str, drops: bool
    ) -> None:
        self._executor, self._grids, self._target = executor, grids, target
        self._threshold, self._drops = threshold, drops
        self._batched = False

    @classmethod
    def open(
        cls,
        student: Model,
        block: Block,
        target: Sequence[str],
        grids: Mapping[str, Grid],
        drops: bool,
        given: Tensors,
    ) -> _Trial:
        """Raises NotExecutableError."""
        made = {value.name for node in student.graph for value in node.outputs}
        part = extract(student, target, [name for name in block.inputs if name in made])
        threshold = add_dropping(part)
        read = {value.name for value in part.graph.inputs}
        inputs = [*(name for name in given if name in read), *grids, threshold]
        return cls(Executor(part, inputs=inputs, outputs=target), grids, target, threshold, drops)

    def find_batching(self, samples: Sequence[Sample]) -> None:
        """Whether samples can run as one batch: they can if two give the same together as one by one."""
        pair = list(samples[:2])
        if not may_be_batched(samples):
            return
        weights = {name: _tensor(grid.real(grid.levels), self._executor) for name, grid in self._grids.items()}
        try:
            with torch.no_grad():
                alone = [self._answers(item.given, weights, 1.0) for item in pair]
                joined = together(pair, batched=True)
                if len(joined) > 1:
                    return  # too large for two at once
                both = self._answers(joined[0].given, weights, 1.0)
        except Exception:  # noqa: BLE001 - whatever a graph of one fixed batch makes of two
            return
        self._batched = all(
            both[name].shape[:1] == (2,) and _close(both[name], torch.cat([item[name] for item in alone]))
            for name in self._target
            if alone[0][name].dim()
        )

    def error(self, samples: Sequence[Sample], levels: Mapping[str, Levels]) -> float:
        """Squared error over the answers' power, with every activation quantized that is in the finished model."""
        weights = {name: _tensor(grid.real(levels[name]), self._executor) for name, grid in self._grids.items()}
        errors, power = 0.0, 0.0
        with torch.no_grad():
            for item in self._in_batches(samples):
                answers = self._answers(item.given, weights, 1.0)
                errors += float(_squares(answers, item).sum())
                power += sum(float(value.double().square().sum()) for value in item.wanted.values())
        return errors / power if power else math.inf

    def learn(self, samples: Sequence[Sample], annealing: Annealing) -> dict[str, Levels] | None:
        """The levels that gradient descent arrives at; None: it met values that are not finite."""
        generator = np.random.default_rng(_SEED)
        device = self._executor.device
        soft = {name: SoftRounding(grid, device) for name, grid in self._grids.items()}
        base = {name: _tensor(grid.real(grid.levels), self._executor) for name, grid in self._grids.items()}
        scale = self._mean_error(samples, base)
        count = batch_size(samples)

        def pull() -> None:
            chosen = [samples[place] for place in generator.integers(len(samples), size=count)]
            weights = {name: item.weight() for name, item in soft.items()}
            parts = together(chosen, self._batched)
            for number, item in enumerate(parts):
                answers = self._answers(self._mixed(item), weights, DROPPED if self._drops else 1.0)
                # By number: a sample may have been drawn twice.
                again = number + 1 < len(parts)
                (_mean_squares(answers, item) / scale / len(parts)).backward(retain_graph=again)  # type: ignore[no-untyped-call]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            finite = annealing.run(list(soft.values()), pull)
        return {name: item.levels() for name, item in soft.items()} if finite else None

    def _mean_error(self, samples: Sequence[Sample], weights: Tensors) -> float:
        """What the loss is measured by: the mean error with the rounding that there is."""
        with torch.no_grad():
            errors = [
                float(_mean_squares(self._answers(item.given, weights, 1.0), item))
                for item in self._in_batches(samples[:BATCH])
            ]
        return max(float(np.mean(errors)), 1e-20)

    def _mixed(self, item: Sample) -> Tensors:
        """What the block reads: under QDrop, half of it as the float model has it."""
        if not self._drops:
            return item.given
        mixed = dict(item.given)
        for name, plain in item.plain.items():
            own = mixed[name]
            if own.is_floating_point() and own.shape == plain.shape:
                mixed[name] = torch.where(at_random(own, DROPPED), own, plain)
        return mixed

    def _in_batches(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        for start in range(0, len(samples), BATCH):
            yield from together(samples[start : start + BATCH], self._batched)

    def _answers(self, given: Tensors, weights: Mapping[str, Tensor], quantized: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._executor({**given, **weights, self._threshold: torch.tensor(quantized)})
        return found


def _squares(answers: Mapping[str, Tensor], item: Sample) -> Tensor:
    parts = [
        ((answers[name] - wanted) * item.counts[name]).double().square().sum() for name, wanted in item.wanted.items()
    ]
    return torch.stack(parts)


def _mean_squares(answers: Mapping[str, Tensor], item: Sample) -> Tensor:
    """Each answer's mean squared error, summed up."""
    parts = [
        ((answers[name] - wanted) * item.counts[name]).square().sum() / item.counts[name].sum().clamp(min=1)
        for name, wanted in item.wanted.items()
    ]
    return torch.stack(parts).sum()


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference = (one - other).double().square().sum().sqrt()
    return bool(difference <= _SAME * other.double().square().sum().sqrt() + 1e-12)


def _tensor(array: NDArray[np.float32], executor: Executor) -> Tensor:
    return torch.from_numpy(np.array(array)).to(executor.device)
