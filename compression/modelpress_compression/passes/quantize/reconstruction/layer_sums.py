"""The error of one layer with other weights, from sums over its inputs in place of the inputs.

A layer reads X^ in the quantized model and X in the float model. Its weights are Q there and W here, its biases b^, b:

    |X^ Q + b^ - X W - b|^2  =  sum over columns of  e^T A e + 2 e^T d + r,      e = Q - W

    A = X^^T X^ [g, K, K],    D = X^^T R [g, K, O],    r = |R|^2 [g, O],      R = (X^ - X) W + b^ - b

So a step of learning costs one product with A, however many samples there are, where running the layer on a batch of
them forth and back costs a hundred times as much. What a Relu behind the layer takes away is not seen: whether levels
are taken is decided by running the layer with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray

from modelpress_compression.executor import Executor
from modelpress_compression.graph.blocks import Block
from modelpress_compression.graph.linear import Linear, Matrix, drawn, linear_of, pieces
from modelpress_compression.graph.read import constant_array, input_of, only_consumer, required
from modelpress_compression.model import Model
from modelpress_compression.passes.hessians import rows_each
from modelpress_compression.passes.quantize.reconstruction.grids import Grid, Levels
from modelpress_compression.passes.quantize.reconstruction.samples import Sample
from modelpress_compression.passes.quantize.reconstruction.soft_rounding import Annealing, SoftRounding

# K of the largest A: 16 MiB in float32. Beyond it a step costs as much as running the layer.
MAX_INPUTS = 2048
_TYPES = (np.float32, np.float32, np.int16, np.int16, np.int16)  # of a grid's arrays
_CHUNK_BYTES = 4 * 1024**2  # 4 MiB: of rows at a time


@dataclass(frozen=True)
class Sums:
    """A [g, K, K], D [g, K, O] and r [g, O] as above."""

    products: Matrix
    differences: Matrix
    rest: Matrix

    def errors(self, change: Matrix) -> Matrix:
        """The squared error of each column [g, O] with weights that differ by `change` [g, K, O]."""
        return np.asarray((change * (self.products @ change + 2 * self.differences)).sum(axis=1) + self.rest)


class LayerReader:
    """What one layer of the quantized model reads, and how it multiplies by it; made by `LayerReader.open`.

    `grid`: that of its weight, with all arrays as [g, K, O]; `shape`: the weight's own.
    """

    def __init__(
        self,
        linear: Linear,
        grid: Grid,
        shape: tuple[int, ...],
        block: Block,
        shift: NDArray[np.float64],
        part: Executor | None,
    ) -> None:
        self.linear, self.grid, self.shape = linear, grid, shape
        self._name, self._target, self._shift, self._part = block.inputs[0], block.target, shift, part

    @classmethod
    def open(cls, original: Model, student: Model, block: Block, grid: Grid) -> LayerReader | None:
        """None: the block is no layer with one input, or one of too many. Raises NotExecutableError."""
        (weight,) = block.weights
        node = only_consumer(weight)
        if node is None or input_of(node, 1) is not weight or len(block.inputs) != 1:
            return None
        twin, linear = _twin(original, node), linear_of(node)
        if twin is None or isinstance(linear, str):
            return None
        shape = grid.weight.shape
        parts = (grid.weight, grid.scale, grid.low, grid.high, grid.levels)
        matrices = [linear.matrix(np.broadcast_to(part, shape)) for part in parts]
        groups, inputs, outputs = matrices[0].shape
        if inputs > MAX_INPUTS:
            return None
        own = Grid(*(part.astype(kind) for part, kind in zip(matrices, _TYPES, strict=True)))
        biases = [constant_array(input_of(one, 2)) for one in (node, twin)]
        shift = np.zeros(groups * outputs)
        for bias, sign in zip(biases, (1.0, -1.0), strict=True):
            shift += 0.0 if bias is None else sign * bias.astype(np.float64)
        read, part = required(node, 0).name or "", None
        if read != block.inputs[0]:
            part = Executor(student, inputs=block.inputs, outputs=[read])
        return cls(linear, own, shape, block, shift.reshape(groups, 1, outputs), part)

    def has(self, sample: Sample) -> bool:
        """Whether the sample has what the layer reads in both models."""
        mine, plain = sample.given.get(self._name), sample.plain.get(self._name)
        return mine is not None and plain is not None and mine.is_floating_point() and mine.shape == plain.shape

    def sums(self, samples: Sequence[Sample]) -> Sums:
        """Over a random part of the rows of each sample."""
        weight = self.grid.weight.astype(np.float32)
        groups, inputs, outputs = weight.shape
        products, differences = np.zeros((groups, inputs, inputs)), np.zeros((groups, inputs, outputs))
        rest = np.zeros((groups, outputs))
        count = rows_each(groups, inputs, max(1, len(samples)))
        for index, sample in enumerate(samples):
            given, plain = self._read(sample), sample.plain[self._name].cpu().numpy()
            places = drawn(math.prod(self.linear.extents(given.shape)), count, index)
            counts = self.linear.answers(sample.counts[self._target].cpu().numpy(), places).any(axis=(0, 2))
            for some in pieces(places[counts], groups * (2 * inputs + outputs), _CHUNK_BYTES):
                mine = self.linear.inputs(given, some)
                apart = (mine - self.linear.inputs(plain, some)) @ weight + self._shift.astype(np.float32)
                turned = mine.transpose(0, 2, 1)
                products += turned @ mine
                differences += turned @ apart
                rest += np.square(apart).sum(axis=1)
        return Sums(products, differences, rest)

    def _read(self, sample: Sample) -> NDArray[np.float32]:
        if self._part is None:
            found = sample.given[self._name]
        else:
            with torch.no_grad():
                (found,) = self._part(sample.given).values()
        return found.cpu().numpy()


class Layer:
    """One layer with its sums, of samples that it learns from and of those held out."""

    def __init__(self, reader: LayerReader, samples: Sequence[Sample]) -> None:
        self._reader, grid = reader, reader.grid
        self._train, self._judged = (
            reader.sums([one for one in samples if one.held_out == held]) for held in (False, True)
        )
        self._before = grid.real(grid.levels).astype(np.float64) - grid.weight
        self._error = max(float(self._train.errors(self._before).sum()), 1e-20)

    def learn(self, annealing: Annealing) -> Levels | None:
        """The levels that gradient descent arrives at, in the columns where they err less on samples held out; None: it
        met values that are not finite. Raises TimeLimitError."""
        grid = self._reader.grid
        products, differences = (
            torch.from_numpy((part / self._error).astype(np.float32))
            for part in (self._train.products, self._train.differences)
        )
        weight, soft = torch.from_numpy(grid.weight), SoftRounding(grid, torch.device("cpu"))

        def pull() -> None:
            real = soft.weight()
            with torch.no_grad():
                slope = 2 * (products @ (real - weight) + differences)
            real.backward(slope)  # type: ignore[no-untyped-call]

        if not annealing.run([soft], pull):
            return None
        found = soft.levels()
        after = grid.real(found).astype(np.float64) - grid.weight
        better = self._judged.errors(after) < self._judged.errors(self._before)
        levels = np.where(better[:, None, :], found, grid.levels)
        return self._reader.linear.weight(levels, self._reader.shape).astype(np.int16)


def _twin(model: Model, other: onnx_ir.Node) -> onnx_ir.Node | None:
    """The node that makes a value of the same name."""
    name = other.outputs[0].name
    return next((node for node in model.graph if node.outputs and node.outputs[0].name == name), None)
