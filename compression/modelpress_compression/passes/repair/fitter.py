"""Gathers the rows of one layer from the activations of both models, and fits it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.linear import Mask, Places, Rows, drawn, pieces
from modelpress_compression.graph.padding import counted_among
from modelpress_compression.inputs import Array
from modelpress_compression.passes.repair.correction import HeldOut, choose_correction
from modelpress_compression.passes.repair.layers import Layer
from modelpress_compression.passes.repair.normal_equations import Sums
from modelpress_compression.passes.repair.paired import Sample

# Rows for each input of a layer: fits settle at some five; more only takes time.
ROWS_PER_INPUT = 5
# Fewest and most rows of a layer, where the data has as many; fewer where each makes many small problems.
ROWS, GROUPED_ROWS = (4096, 65536), (1024, 16384)
_CHUNK_ROWS = (256, 2048)
# Below this share of the variance a layer is as good as unchanged.
_NEGLIGIBLE = 1e-9

Masks = Mapping[tuple[str, int], Mask]  # which indices of (tensor, axis) stay


@dataclass(frozen=True)
class Fit:
    """One layer: the error of its answers before and after, on samples that the fit did not see, as a share of their
    variance."""

    node: str
    error_before: float
    error_after: float


class Fitter:
    """`masks`: what stays of every axis that was cut; `samples`: how many will come, those held out included."""

    def __init__(self, layer: Layer, masks: Masks, samples: int) -> None:
        self.layer = layer
        start = layer.linear.matrix(layer.numbers)
        groups, inputs, answers = start.shape
        self._start = start.astype(np.float32)
        self._bias = layer.bias.astype(np.float32).reshape(groups, 1, answers)
        self._made = masks.get((layer.weight.name or "", layer.output_axis))
        self._read = _read_mask(layer, masks, groups)
        self._rows = _rows_each(start.shape, samples)
        self._sums = Sums.zeros(groups, inputs, answers)
        self._held_out = HeldOut()
        self._waiting: list[tuple[Rows, Rows]] = []  # not in the sums yet
        self._count, self._total, self._squares = 0, np.zeros((groups, answers)), 0.0

    @staticmethod
    def size_bytes(layer: Layer, samples: int, held_out: int) -> int:
        """Memory that fitting this layer takes: the sums, as much again while the equations are solved, and the rows of
        so many samples held out."""
        groups, inputs, answers = shape = layer.linear.matrix(layer.numbers).shape
        rows = held_out * len(layer.all) * _rows_each(shape, samples)
        held_bytes: int = 4 * groups * (inputs + answers) * rows
        return 2 * Sums.size_bytes(groups, inputs, answers) + held_bytes

    def take(self, sample: Sample) -> None:
        """Rows of one sample."""
        for layer in self.layer.all:
            self._take(layer, sample)

    def _take(self, layer: Layer, sample: Sample) -> None:
        groups, inputs, answers = self._start.shape
        for places in pieces(self._places(layer, sample), groups * (inputs + answers)):
            self._take_rows(layer, sample, places)

    def _take_rows(self, layer: Layer, sample: Sample, places: Places) -> None:
        """Those at some of its places."""
        linear = layer.linear
        data, output = sample.cut[layer.data], sample.full[layer.output]
        stay = _staying(self._made, output, linear.channel_axis)
        plain = linear.answers(output, places, stay)
        answers = self._with_drift(layer, sample, plain, places, stay)
        inputs, lacks = self._pair(linear.inputs(data, places), answers)
        if sample.held_out:
            self._held_out.add(inputs, lacks, (layer.name, sample.index))
            self._count += answers.shape[1]
            self._total += answers.sum(axis=1, dtype=np.float64)
            self._squares += float(np.square(answers).sum(dtype=np.float64))
            return
        self._waiting.append((inputs, lacks))
        intact = self._intact(layer, sample, data, places)
        if intact is not None:
            self._waiting.append(self._pair(intact, plain))
        # A product of a few rows costs as much memory traffic as one of a thousand.
        if sum(rows.shape[1] for rows, _ in self._waiting) >= np.clip(self._start.shape[1], *_CHUNK_ROWS):
            self._flush()

    def _pair(self, inputs: Rows, answers: Rows) -> tuple[Rows, Rows]:
        """Inputs, and what the layer's answers to them lack."""
        with np.errstate(invalid="ignore", over="ignore"):  # rows that are not finite are left out later
            return inputs, answers - inputs @ self._start - self._bias

    def _with_drift(self, layer: Layer, sample: Sample, plain: Rows, places: Places, stay: Mask | None) -> Rows:
        """The answers that make the sum right which they go into."""
        if not layer.sum or not layer.other:
            return plain
        linear = layer.linear
        output, total, other = sample.full[layer.output], sample.full[layer.sum], sample.cut[layer.other]
        if total.shape != output.shape or other.shape != _kept_shape(output, stay, linear.channel_axis):
            return plain
        with np.errstate(invalid="ignore", over="ignore"):
            return linear.answers(total, places, stay) - linear.answers(other, places)

    def _intact(self, layer: Layer, sample: Sample, data: Array, places: Places) -> Rows | None:
        """What the layer would read if nothing before it had changed its values."""
        if self._read is None or not layer.intact:
            return None
        intact, axis = sample.full[layer.intact], layer.linear.channel_axis
        stay = _staying(self._read, intact, axis)
        return layer.linear.inputs(intact, places, stay) if _kept_shape(intact, stay, axis) == data.shape else None

    def _places(self, layer: Layer, sample: Sample) -> Places:
        """Of the answers' rows those to take: at most so many as are enough, and none of padding."""
        positions = layer.linear.extents(sample.cut[layer.data].shape)
        if (counted := counted_among(positions, sample.mask)) is None:
            return drawn(math.prod(positions), self._rows, sample.index)
        places = np.arange(math.prod(positions)).reshape(positions)[counted].reshape(-1)
        return drawn(places, self._rows, sample.index)

    def _flush(self) -> None:
        if self._waiting:
            self._sums.add(*(np.concatenate(parts, axis=1) for parts in zip(*self._waiting, strict=True)))
            self._waiting.clear()

    def fit(self, editor: Editor) -> Fit | None:
        """Puts the correction into the editor's model; None where nothing is better than what is there."""
        self._flush()
        spread = self._squares - float(np.square(self._total).sum()) / max(1, self._count)
        if spread <= _NEGLIGIBLE * self._squares:
            spread = self._squares  # always the same answers
        if not self._sums.rows or not len(self._held_out) or self._held_out.spreads().sum() <= _NEGLIGIBLE * spread:
            return None
        found = choose_correction(self._sums, self._held_out, intercept=self.layer.takes_bias)
        if not found.error_after < found.error_before:
            return None
        self.layer.correct(found.weight, found.bias, editor)
        return Fit(self.layer.name, found.error_before / spread, found.error_after / spread)


def _rows_each(shape: tuple[int, ...], samples: int) -> int:
    """How many rows of each sample are taken, where it has as many. `shape`: g, K and O of the weight."""
    groups, inputs, _ = shape
    return -(-int(np.clip(ROWS_PER_INPUT * inputs, *(ROWS if groups == 1 else GROUPED_ROWS))) // samples)


def _read_mask(layer: Layer, masks: Masks, groups: int) -> Mask | None:
    """Which channels of the uncut model's input the cut layer still reads; None where that is not known."""
    tensor = layer.weight.name or ""
    if groups == 1:
        return masks.get((tensor, 1 - layer.output_axis), np.ones(0, np.bool_))
    one_by_one = layer.numbers.shape[0] == groups
    return masks.get((tensor, 0), np.ones(0, np.bool_)) if one_by_one else None


def _staying(mask: Mask | None, values: Array, axis: int) -> Mask | None:
    """Which channels of the values stay, None where all do; those beyond the mask do."""
    if mask is None or not mask.size:
        return None
    stay = np.ones(values.shape[axis], np.bool_)
    stay[: len(mask)] = mask
    return stay


def _kept_shape(values: Array, stay: Mask | None, axis: int) -> tuple[int, ...]:
    """That of the channels that stay."""
    shape = list(values.shape)
    shape[axis] = shape[axis] if stay is None else int(stay.sum())
    return tuple(shape)
