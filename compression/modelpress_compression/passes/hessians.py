"""H = X^T X of the inputs X of weights, streamed over the calibration data (the Hessian of a layer's squared error).

    X [g, R, K]: rows of inputs, a Conv's being its patches (graph/linear.py);   H [g, K, K], float64

A part of the samples can be held out (holding_out.py): what was fitted to an H errs less on it than on other data, and
only an H of other samples says by how much.

Samples go one at a time through the float model. Kept are the sums of as many weights at a time, in the order of the
graph, as fit into 512 MiB with what one sample makes of their inputs in `WATCHED_BYTES`; the data runs once for each
such batch, when its first sum is asked for. Weights that read the same input the same way (query, key and value) have
one H; a weight with several users has the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.linear import Convolution, Linear, Matrix, drawn, linear_of, pieces
from modelpress_compression.graph.read import constant_tensor, is_constant, is_op
from modelpress_compression.graph.watch import observable, stream
from modelpress_compression.graph.watch.portions import WATCHED_BYTES, sample_bytes
from modelpress_compression.holding_out import held_out
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

MAX_SAMPLES = 128
# Fewer that are held out say too little.
MIN_HELD_OUT = 4
MAX_SUMS_BYTES = 512 * 1024**2  # 512 MiB: of one batch
MAX_BYTES = 200 * 1024**2  # 200 MiB: of one H, 5120 inputs; with what factorizing takes, the largest stays in 1 GiB
_FACTORIZING_COPIES = 4
_WATCHED_COPIES = 2  # onnxruntime's, and what it hands out
# Rows for each input of a layer: more only takes time.
ROWS_PER_INPUT = 8
ROWS = (4096, 65536)  # fewest and most rows of a layer, where the data has as many
DEPTHWISE_ROWS = 1024  # fewest of each group of a depthwise layer: 40 for each of 5 x 5 inputs, of hundreds of groups
_CHUNK_BYTES = 4 * 1024**2  # 4 MiB: of rows that wait to be added up
_NO_SUCH_USER = "it multiplies no input that can be observed"

# The name of an input, and how it is read.
Reading = tuple[str, Linear]


@dataclass(frozen=True)
class _Job:
    """One H to gather."""

    readings: frozenset[Reading]
    groups: int
    inputs: int

    @property
    def size_bytes(self) -> int:
        return 8 * self.groups * self.inputs**2


def held_out_samples(data: InputData) -> InputData | None:
    """The samples of `data` that `Hessians` holds out; None where these are too few to judge by."""
    samples = data.spread(MAX_SAMPLES)
    feeds = _held_out(samples)
    return samples.only(sorted(feeds)) if feeds else None


def _held_out(samples: InputData) -> frozenset[int]:
    """The feeds that are; none where these are too few to judge by."""
    feeds = held_out(samples)
    return feeds if len(feeds) >= MIN_HELD_OUT else frozenset()


class Hessians:
    """Of the second inputs of a model's MatMul, Gemm and Conv nodes; the model may be changed once this is made.

    `held_bytes`: of memory at the most, while one batch is gathered or one H factorized.
    """

    def __init__(
        self, model: Model, context: Context, only: Collection[str] | None = None, *, holds_out: bool = False
    ) -> None:
        """`only`: names of the weights that will be asked for; None: any. `holds_out`: whether a part of the samples is
        kept for `held_out`, where there are enough."""
        self._context = context
        self._samples = context.data.spread(MAX_SAMPLES)
        self._unseen = _held_out(self._samples) if holds_out else frozenset[int]()
        self._reasons: dict[onnx_ir.Value, str] = {}
        self._linears: dict[onnx_ir.Value, Linear] = {}
        self._jobs: dict[onnx_ir.Value, _Job] = {}
        self._sums: dict[frozenset[Reading], tuple[Matrix, Matrix | None]] = {}
        users: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
        for node in model.graph:
            weight = node.inputs[1] if is_op(node, "MatMul", "Gemm", "Conv") else None
            if weight is not None and is_constant(weight) and (only is None or weight.name in only):
                users.setdefault(weight, []).append(node)
        for weight, nodes in users.items():
            self._plan(weight, nodes, model)
        copies = 2 if self._unseen else 1
        jobs = list({job.readings: job for job in self._jobs.values()}.values())
        read_bytes = sample_bytes(model, _names(jobs), context.data)
        self._batches = _batches(jobs, copies, read_bytes)
        self.held_bytes = max((_held_bytes(batch, copies, read_bytes) for batch in self._batches), default=0)
        self._model = model.clone()

    def _plan(self, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node], model: Model) -> None:
        readings: set[Reading] = set()
        for node in nodes:
            linear = linear_of(node)
            if isinstance(linear, str):
                self._reasons[weight] = linear
                return
            if observable(node.inputs[0], model) and node.inputs[0] is not None:
                readings.add((node.inputs[0].name or "", linear))
        if len({linear for _, linear in readings}) != 1:
            self._reasons[weight] = "its users multiply by it in different ways" if readings else _NO_SUCH_USER
            return
        ((_, linear),) = list(readings)[:1]
        groups, inputs = _extents(linear, weight)
        job = _Job(frozenset(readings), groups, inputs)
        if job.size_bytes > MAX_BYTES:
            self._reasons[weight] = f"the sums over its {inputs} inputs would take {job.size_bytes >> 20} MiB"
            return
        self._jobs[weight], self._linears[weight] = job, linear

    def linear(self, weight: onnx_ir.Value) -> Linear | str:
        """How the weight's users multiply by it, or why there is no H."""
        return self._linears.get(weight) or self._reasons.get(weight, _NO_SUCH_USER)

    def of(self, weight: onnx_ir.Value) -> Matrix:
        """H [g, K, K] of a weight for which `linear` gave one, without what is held out.

        Raises ModelNotRunnableError, TimeLimitError.
        """
        return self._of(weight)[0]

    def held_out(self, weight: onnx_ir.Value) -> Matrix | None:
        """The same of the samples held out; None where there are none. Raises as `of`."""
        return self._of(weight)[1]

    def _of(self, weight: onnx_ir.Value) -> tuple[Matrix, Matrix | None]:
        wanted = self._jobs[weight].readings
        if wanted not in self._sums:
            self._sums.clear()
            for batch in self._batches:
                if any(job.readings == wanted for job in batch):
                    self._sums = _gather(self._model, batch, self._samples, self._unseen, self._context)
        return self._sums[wanted]


def _extents(linear: Linear, weight: onnx_ir.Value) -> tuple[int, int]:
    """Groups g and inputs K."""
    tensor = constant_tensor(weight)
    if tensor is None:
        raise TypeError(f"the weight {weight.name!r} is not constant")
    shape = [int(extent) for extent in tensor.shape.numpy()]
    if isinstance(linear, Convolution):
        return linear.groups, int(np.prod(shape[1:]))
    return 1, tensor.size // linear.matrix(np.empty(shape, np.bool_)).shape[2]


def _names(jobs: Sequence[_Job]) -> list[str]:
    """Of all values that are read."""
    return sorted({name for job in jobs for name, _ in job.readings})


def _batches(jobs: Sequence[_Job], copies: int, read_bytes: Mapping[str, int]) -> list[list[_Job]]:
    """Those that are gathered together; `copies`: how many sums there are of each. `read_bytes`: of each value that is
    read, what one sample makes of it."""
    batches: list[list[_Job]] = []
    for job in jobs:
        batch = [*(batches[-1] if batches else ()), job]
        sums = sum(copies * one.size_bytes for one in batch)
        if batches and sums <= MAX_SUMS_BYTES and sum(read_bytes[name] for name in _names(batch)) <= WATCHED_BYTES:
            batches[-1] = batch
        else:
            batches.append([job])
    return batches


def _held_bytes(batch: Sequence[_Job], copies: int, read_bytes: Mapping[str, int]) -> int:
    """Of a batch: its sums, and what one sample makes of their inputs, or a factorization's copies of the largest H."""
    sums = copies * sum(job.size_bytes for job in batch)
    seen = _WATCHED_COPIES * sum(read_bytes[name] for name in _names(batch))
    return sums + max(seen, _FACTORIZING_COPIES * max(job.size_bytes for job in batch))


def _gather(
    model: Model, batch: Sequence[_Job], samples: InputData, unseen: frozenset[int], context: Context
) -> dict[frozenset[Reading], tuple[Matrix, Matrix | None]]:
    """Streams the samples through the model; the second sums are of the `unseen` ones."""
    count = max(1, samples.feed_count)
    sums = {job.readings: (_Sum(job, count), _Sum(job, count) if unseen else None) for job in batch}
    for index, found in enumerate(stream(model, _names(batch), samples, context.check_time)):
        for job in batch:
            fitted, kept = sums[job.readings]
            total = kept if kept is not None and index in unseen else fitted
            for name, linear in sorted(job.readings, key=lambda reading: reading[0]):
                total.take(linear, found[name], index)
        context.progress((index + 1) / count, f"weighing inputs, sample {index + 1} of {count}")
    return {key: (total.finish(), kept.finish() if kept is not None else None) for key, (total, kept) in sums.items()}


def rows_each(groups: int, inputs: int, samples: int) -> int:
    """How many rows of each sample tell enough of a layer."""
    low, high = ROWS
    fewest = low if groups == 1 else DEPTHWISE_ROWS
    return -(-int(np.clip(ROWS_PER_INPUT * inputs, fewest, high)) // samples)


class _Sum:
    """One H while it is gathered: a random part of each sample's rows, added up in chunks."""

    def __init__(self, job: _Job, samples: int) -> None:
        self._rows = rows_each(job.groups, job.inputs, samples)
        self._total = np.zeros((job.groups, job.inputs, job.inputs))
        self._waiting: list[NDArray[np.float32]] = []

    def take(self, linear: Linear, data: Array, index: int) -> None:
        """Rows of one sample; those that are not finite are left out."""
        places = drawn(math.prod(linear.extents(data.shape)), self._rows, index)
        for part in pieces(places, self._total.shape[0] * self._total.shape[1], _CHUNK_BYTES):
            # Activations are float32 themselves, and the sums over a chunk keep six digits.
            self._wait(linear.inputs(data, part))

    def _wait(self, rows: NDArray[np.float32]) -> None:
        # One sum tells that all are finite, in a fraction of the time of looking at each; infinite, it tells nothing.
        with np.errstate(over="ignore", invalid="ignore"):
            total = rows.sum()
        if not np.isfinite(total):
            rows = rows[:, np.isfinite(rows).all(axis=(0, 2))]
        self._waiting.append(rows)
        if sum(part.nbytes for part in self._waiting) >= _CHUNK_BYTES:
            self._flush()

    def finish(self) -> Matrix:
        self._flush()
        return self._total

    def _flush(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting, axis=1)
            self._total += rows.transpose(0, 2, 1) @ rows
            self._waiting.clear()
