"""Importance by what a channel does to the layers that read it: |weight| times the norm of its activations.

A layer y = sum_c W_c x_c loses the energy |W_c|^2 E[x_c^2] with channel c, if channels do not correlate; this is the
score of Wanda (Sun et al., arXiv:2306.11695), squared and summed over a whole channel. Each reader's energies are
taken relative to the sum over its inputs: what counts is the share of its answer that goes. Readers whose inputs cannot
be observed (in a branch of If, or inside a recurrent layer) are judged by their weights alone.

Activations are streamed: one running sum for each channel is kept. Positions that an attention mask leaves out do not
count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.channels import Group, Member
from modelpress_compression.graph.linear import parts_along
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.read import MICROSOFT, int_attribute, is_op
from modelpress_compression.graph.watch import observable, stream
from modelpress_compression.graph.watch.portions import portions
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.criteria import Magnitude, Scores
from modelpress_compression.passes.prune.channel.weights import Weights, along, per_unit

# Means settle within some hundred samples, each of which has many positions.
MAX_SAMPLES = 256


@dataclass(frozen=True)
class _Source:
    """Where a reader's channels come in: a value of the graph, and its channel axis."""

    value: str
    axis: int


class ActivationMagnitude:
    """Judges by weights and the data's activations."""

    needs_data = True

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """One run over at most 256 samples; see `Criterion`. Raises ModelNotRunnableError."""
        weights = Weights(model)
        readers = {
            group.id: [(member, _source(member, weights, model)) for member in group.members if _reads(member, weights)]
            for group in groups
        }
        powers = _powers({source for found in readers.values() for _, source in found if source}, model, context)
        scores = dict(Magnitude(2)(model, [group for group in groups if not readers[group.id]], context))
        for group in groups:
            if readers[group.id]:
                scores[group.id] = sum(
                    (
                        _shares(weights.array(member.tensor), member, source, powers)
                        for member, source in readers[group.id]
                    ),
                    np.zeros(group.units),
                )
        return scores


def _reads(member: Member, weights: Weights) -> bool:
    array = weights.array(member.tensor)
    return member.role == "consumer" and array.ndim > 1 and array.dtype.kind == "f"


def _shares(array: Array, member: Member, source: _Source | None, powers: Mapping[_Source, Scores]) -> Scores:
    """The share of the reader's energy that comes from each unit."""
    energy = np.square(along(array, member.axis).astype(np.float64))
    extent = len(energy)
    power = powers.get(source) if source else None
    if power is None or power.size % extent:
        along_axis = energy.sum(axis=1)
    elif power.size == extent:
        along_axis = energy.sum(axis=1) * power
    else:
        # A grouped convolution [O, C / groups, k...]: its outputs are split over the groups of its inputs.
        parts = power.size // extent
        outputs = np.square(
            np.moveaxis(array, member.axis, 1).reshape(parts, -1, extent, energy.shape[1] // len(array))
        )
        along_axis = np.einsum("goek,ge->e", outputs.astype(np.float64), power.reshape(parts, extent))
    total = float(along_axis.sum())
    return per_unit(along_axis / total if total else along_axis, member)


def _source(member: Member, weights: Weights, model: Model) -> _Source | None:
    """Where the channels that this weight reads can be observed; None where they cannot."""
    node, weight = weights.node(member.node), weights.value(member.tensor)
    if node is None or weight is None:
        return None
    data, axis = _data_of(node, weight)
    return _Source(data.name or "", axis) if data is not None and observable(data, model) else None


def _data_of(node: onnx_ir.Node, weight: onnx_ir.Value) -> tuple[onnx_ir.Value | None, int]:
    position = next((index for index, value in enumerate(node.inputs) if value is weight), -1)
    if is_op(node, "Conv", "ConvTranspose") and position == 1:
        return node.inputs[0], 1
    if is_op(node, "Gemm") and position == 1:
        return node.inputs[0], 0 if int_attribute(node, "transA", 0) else -1
    if is_op(node, "MatMul") and position in (0, 1):
        return node.inputs[1 - position], -1 if position == 1 else -2
    if is_op(node, "LSTM", "GRU", "RNN") and position == 1:
        return node.inputs[0], -1
    if is_op(node, "Attention", domain=MICROSOFT) and position == 1:
        return node.inputs[0], -1
    return None, 0


def _powers(sources: Iterable[_Source], model: Model, context: Context) -> dict[_Source, NDArray[np.float64]]:
    """Mean square of every channel over samples and positions."""
    wanted, samples = list(sources), context.data.spread(MAX_SAMPLES)
    sums: dict[_Source, NDArray[np.float64]] = {}
    counts: dict[_Source, int] = {}
    for part in portions(model, [(source.value,) for source in wanted], samples):
        together = [wanted[place] for place in part]
        seen = stream(model, [source.value for source in together], samples, context.check_time)
        for feed, values in zip(samples.feeds(batch_size=1), seen, strict=True):
            mask = counted_positions(feed)
            for source in together:
                squares, rows = _squares(values[source.value], source.axis, mask)
                sums[source] = sums[source] + squares if source in sums else squares
                counts[source] = counts.get(source, 0) + rows
    return {source: np.nan_to_num(total / max(1, counts[source])) for source, total in sums.items()}


def _squares(array: Array, axis: int, mask: NDArray[np.bool_] | None) -> tuple[NDArray[np.float64], int]:
    """The sum of squares of each channel over the positions that are no padding, and how many these are."""
    counted = without_padding(np.moveaxis(array, axis, -1), mask)
    sums = np.zeros(counted.shape[-1])
    for part in parts_along(counted, -1):
        rows = along(part, -1).astype(np.float64)
        sums += np.einsum("cr,cr->c", rows, rows)
    return sums, counted.size // max(1, len(sums))
