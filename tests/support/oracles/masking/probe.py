"""Which elements of a value depend on silenced units: found by runs that differ in these units alone.

The graph runs three times with the weights that make the silenced units changed: positive, negative (so that a Relu
cannot hide both), and larger, with other biases and scales (a square is the same for both signs). All consumers of the
units are silent, so whatever differs between the runs is an element that belongs to a silenced unit. Statistics over
channels would spread the difference to all others; for these runs they are taken out of the graph, which moves no
element to another place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from modelpress_compression.channels.groups import Indices, Member
from modelpress_compression.graph.read import is_op, label
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray

from oracles.masking.constants import Constants
from oracles.masking.statistics import (
    NORMALIZATIONS,
    REDUCTIONS,
    Dead,
    axes_of_statistic,
    without_statistic,
)

Cut = Sequence[tuple[Member, Indices]]
# Factors of the silenced units' weights, run by run.
_RUNS = (1.0, -1.0, 1.7)
# Differences below this share of the value are rounding: a runtime may choose another order of summation.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Statistic:
    """A node whose statistic takes in silenced and other elements; `dead`: which elements of its input are silenced."""

    node: onnx_ir.Node
    dead: Dead


def find_statistics(silent: Model, cut: Cut, feeds: Feeds) -> list[Statistic]:
    """The statistics of the main graph that silenced elements would get into.

    `silent`: the model whose consumers are zeroed; `cut`: members with the indices of their axis that are silenced.
    """
    watched = {
        label(node): node
        for node in silent.graph
        if is_op(node, *NORMALIZATIONS, *REDUCTIONS) and node.inputs[0] is not None and node.inputs[0].producer()
    }
    if not watched or not cut:
        return []
    taken_out = {name for name, node in watched.items() if _is_certain(node)}
    while True:
        dead = _dead_elements(silent, cut, feeds, list(watched), taken_out)
        # A plain mean may turn out to be one; what lies behind it is known only when it has been taken out.
        late = next((n for n, node in watched.items() if n not in taken_out and _is_mixed(node, dead[n])), None)
        if late is None:
            break
        taken_out.add(late)
    return [Statistic(watched[name], dead[name]) for name in watched if _is_mixed(watched[name], dead[name])]


def _is_certain(node: onnx_ir.Node) -> bool:
    """Normalizations, and means that are part of one: x - mean(x), or mean(x^2)."""
    if is_op(node, *NORMALIZATIONS):
        return True
    data, output = node.inputs[0], node.outputs[0]
    if any(is_op(user, "Sub") and data in user.inputs for user in output.consumers()):
        return True
    maker = data.producer() if data is not None else None
    return maker is not None and (is_op(maker, "Pow") or (is_op(maker, "Mul") and maker.inputs[0] is maker.inputs[1]))


def _is_mixed(node: onnx_ir.Node, dead: Dead) -> bool:
    """Whether the node takes silenced and other elements together."""
    if is_op(node, "GroupNormalization"):
        dead = dead.reshape(dead.shape[0], node.attributes["num_groups"].as_int(), -1)
        return bool((dead.any(2) & ~dead.all(2)).any())
    axes = axes_of_statistic(node, dead.ndim)
    return bool((dead.any(axes) & ~dead.all(axes)).any())


def _dead_elements(
    silent: Model, cut: Cut, feeds: Feeds, names: Sequence[str], taken_out: set[str]
) -> Mapping[str, Dead]:
    """For input 0 of each named node which elements are silenced; one entry of the batch stands for all."""
    runs = [_values(silent, cut, feeds, names, taken_out, number) for number in range(len(_RUNS))]
    dead: dict[str, Dead] = {}
    for name, *arrays in zip(names, *runs, strict=True):
        first = np.asarray(arrays[0], np.float64)
        differs: Any = np.zeros(first.shape, np.bool_)
        for array in arrays[1:]:
            other = np.asarray(array, np.float64)
            apart = np.abs(first - other) > _ROUNDING * np.maximum(np.abs(first), np.abs(other))
            differs = np.logical_or(differs, apart | (np.isfinite(first) != np.isfinite(other)))
        dead[name] = differs.any(axis=0, keepdims=True) if differs.ndim > 1 else differs
    return dead


def _values(
    silent: Model, cut: Cut, feeds: Feeds, names: Sequence[str], taken_out: set[str], number: int
) -> list[Array]:
    """Input 0 of each named node in run `number`."""
    probe = silent.clone()
    _change(probe, cut, number)
    nodes = {label(node): node for node in probe.graph}
    watched = [value for name in names if (value := nodes[name].inputs[0]) is not None]
    unique = list({id(value): value for value in watched}.values())
    places = {id(value): place for place, value in enumerate(unique)}
    probe.graph.outputs.clear()
    for value in unique:
        value.type = value.type or onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        probe.graph.outputs.append(value)
    for name in names:
        if name in taken_out:
            without_statistic(nodes[name])
    for value in probe.graph.outputs:
        value.shape = None  # onnxruntime warns where a stored extent is that of another run
    with session_of(probe, optimize=False) as session:
        found = list(run(session, feeds).values())
    return [found[places[id(value)]] for value in watched]


def _change(probe: Model, cut: Cut, number: int) -> None:
    """Other weights for the silenced units; then their consumers are silent again, if they share the tensor."""
    constants = Constants(probe)
    for member, indices in cut:
        select = (slice(None),) * member.axis + (indices,)
        if member.role == "producer":

            def produce(array: NDArray[Any], select: tuple[Any, ...] = select) -> None:
                array[select] = _RUNS[number] * _large(array, select)

            constants.change(member.tensor, member.node, produce)
        elif member.role == "passenger" and number == 2:

            def accompany(array: NDArray[Any], select: tuple[Any, ...] = select) -> None:
                if array.dtype.kind == "f":
                    array[select] = array[select] * 1.5 + 0.01

            constants.change(member.tensor, member.node, accompany)
    for member, indices in cut:
        if member.role == "consumer":

            def silence(
                array: NDArray[Any], select: tuple[Any, ...] = (slice(None),) * member.axis + (indices,)
            ) -> None:
                array[select] = 0

            constants.change(member.tensor, member.node, silence)
    constants.write()


def _large(array: NDArray[Any], select: tuple[Any, ...]) -> NDArray[Any]:
    """Well above the weights in size, so that no bias outweighs them."""
    old = array[select]
    if array.dtype.kind != "f":
        return np.full_like(old, 5, np.int64)
    size: NDArray[Any] = 4 * np.abs(old) + 0.1 * np.abs(array).mean() + 1e-3
    return size
