"""Attention, recurrence, and operators that mix channels or share weights: a cut model equals the masked one, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# (builder, value, all values) -> new values; see conftest.
Step = Callable[[Any, Any, list[Any]], list[Any]]
_SETTINGS = settings(
    derandomize=True,
    database=None,
    print_blob=False,
)


def _axis(x: Any) -> int:
    return 1 if len(x.shape) == 4 else 2


def _inner(x: Any) -> tuple[int, ...]:
    return (x.channels, 1, 1) if len(x.shape) == 4 else (x.channels,)


def softmax(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """Over the channels: they cannot be cut."""
    return [replace(x, name=b(b.pick(["Softmax", "LogSoftmax"]), x.name, axis=_axis(x)))]


def reduce(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A number from all channels, added to each."""
    kind = b.pick(["ReduceSum", "ReduceMax", "ReduceMean", "ReduceL2", "ReduceProd"])
    reduced = b(kind, x.name, b.constant([_axis(x)]), keepdims=1)
    return [replace(x, name=b("Add", x.name, reduced))]


def reduce_without_axis(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A reduced axis that comes back by Unsqueeze."""
    axis = b.constant([2 if len(x.shape) == 4 else 1])
    reduced = b("Unsqueeze", b(b.pick(["ReduceSum", "ReduceMax", "ReduceMean"]), x.name, axis, keepdims=0), axis)
    return [replace(x, name=b("Sub", x.name, reduced))]


def where(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """One number for each channel instead of the value, where that is negative."""
    positive = b("Greater", x.name, b.constant(np.float32(0)))
    return [replace(x, name=b("Where", positive, x.name, b.weight(*_inner(x))))]


def expand(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A bias that is written out to the whole shape, given or computed."""
    shape = b.constant(list(x.shape)) if b.pick([True, False]) else b("Shape", x.name)
    return [replace(x, name=b("Add", x.name, b("Expand", b.weight(*_inner(x)), shape)))]


def tile(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """The channels twice."""
    repeats = [1] * len(x.shape)
    repeats[_axis(x)] = 2
    shape = list(x.shape)
    shape[_axis(x)] *= 2
    return [replace(x, name=b("Tile", x.name, b.constant(repeats)), shape=tuple(shape))]


def shared_weight(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """Two layers with one weight."""
    c = x.channels
    if len(x.shape) == 4:
        weight = b.weight(c, c, 1, 1, fan_in=c)
        return [replace(x, name=b("Conv", b("Relu", b("Conv", x.name, weight)), weight))]
    weight = b.weight(c, c, fan_in=c)
    return [replace(x, name=b("MatMul", b("Relu", b("MatMul", x.name, weight)), weight))]


def tied_weight(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A weight forth and its transpose back."""
    if len(x.shape) == 4:
        return []
    weight = b.weight(x.channels, 6, fan_in=x.channels)
    back = b("Transpose", weight, perm=[1, 0])
    return [replace(x, name=b("MatMul", b("Tanh", b("MatMul", x.name, weight)), back))]


def quantized_weight(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """Eight-bit weights with a scale for each output channel."""
    c, out = x.channels, 8
    shape, axis = ((out, c, 1, 1), 0) if len(x.shape) == 4 else ((c, out), 1)
    integers = b.constant(b.rng.integers(-127, 128, shape).astype(np.int8))
    scale = b.constant((b.rng.uniform(0.5, 1.5, out) / 127 / c**0.5).astype(np.float32))
    weight = b("DequantizeLinear", integers, scale, b.constant(np.zeros(out, np.int8)), axis=axis)
    y = b("Conv" if len(x.shape) == 4 else "MatMul", x.name, weight)
    changed = list(x.shape)
    changed[_axis(x)] = out
    return [replace(x, name=y, shape=tuple(changed))]


def einsum(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A matrix product in Einstein's notation."""
    c, out = x.channels, 6
    equation = "nchw,oc->nohw" if len(x.shape) == 4 else "ntc,oc->nto"
    y = b("Einsum", x.name, b.weight(out, c, fan_in=c), equation=equation)
    changed = list(x.shape)
    changed[_axis(x)] = out
    return [replace(x, name=y, shape=tuple(changed))]


def gram(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """Channels times channels: a product of values over all else."""
    if len(x.shape) == 4:
        return []
    products = b("MatMul", b("Transpose", x.name, perm=[0, 2, 1]), x.name)
    return [replace(x, name=b("MatMul", x.name, products))]


def cumulative(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """A running sum over the channels."""
    return [replace(x, name=b("CumSum", x.name, b.constant(np.int64(_axis(x)))))]


def attention(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """Heads split by Reshape and Transpose; keys and values may have half as many heads (GQA)."""
    if len(x.shape) == 4:
        return []
    n, t, c = x.shape
    heads, size = b.pick([2, 4]), b.pick([2, 4])
    shared = b.pick([1, 2])

    def project(count: int, perm: list[int]) -> str:
        y = b("MatMul", x.name, b.weight(c, count * size, fan_in=c))
        y = b("Add", y, b.weight(count * size))
        return str(b("Transpose", b("Reshape", y, b.constant([n, t, count, size])), perm=perm))

    q = project(heads, [0, 2, 1, 3])
    k, v = project(heads // shared, [0, 2, 3, 1]), project(heads // shared, [0, 2, 1, 3])
    if shared == 2:
        repeat = np.repeat(np.arange(heads // 2), 2)
        k, v = (b("Gather", y, b.constant(repeat), axis=1) for y in (k, v))
    mixed = b("MatMul", b("Softmax", b("MatMul", q, k), axis=-1), v)
    joined = b(
        "Reshape", b("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant(b.pick([[n, t, heads * size], [0, 0, -1]]))
    )
    width = heads * size
    return [replace(x, name=b("MatMul", joined, b.weight(width, c, fan_in=width)))]


def packed_attention(b: Any, x: Any, _: list[Any]) -> list[Any]:
    """One projection for queries, keys and values, split afterwards."""
    if len(x.shape) == 4:
        return []
    n, t, c = x.shape
    heads, size = 2, b.pick([2, 4])
    packed = b("MatMul", x.name, b.weight(c, 3 * heads * size, fan_in=c))
    parts = b("Split", packed, b.constant([heads * size] * 3), axis=2, outputs=3)
    q, k, v = (
        b("Transpose", b("Reshape", part, b.constant([0, 0, heads, size])), perm=perm)
        for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    mixed = b("MatMul", b("Softmax", b("MatMul", q, k), axis=-1), v)
    joined = b("Reshape", b("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant([0, 0, heads * size]))
    return [replace(x, name=joined, shape=(n, t, heads * size))]


def recurrent(b: Any, x: Any, _: list[Any]) -> list[Any]:
    if len(x.shape) == 4:
        return []
    n, t, c = x.shape
    kind, hidden = b.pick(["LSTM", "GRU", "RNN"]), b.pick([3, 4])
    directions = b.pick([1, 2])
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = [b.weight(directions, gates * hidden, width, fan_in=width) for width in (c, hidden)]
    weights += [b.weight(directions, 2 * gates * hidden)] if b.pick([True, False]) else []
    direction = "bidirectional" if directions == 2 else "forward"
    turned = b("Transpose", x.name, perm=[1, 0, 2])
    y = b(kind, turned, *weights, hidden_size=hidden, direction=direction)
    if directions == 1:
        joined = b("Squeeze", y, b.constant([1]))
    else:
        joined = b("Reshape", b("Transpose", y, perm=[0, 2, 1, 3]), b.constant([t, n, -1]))
    y = b("Transpose", joined, perm=[1, 0, 2])
    return [replace(x, name=y, shape=(n, t, directions * hidden))]


SPECIAL: tuple[Step, ...] = (
    softmax, reduce, reduce_without_axis, where, expand, tile, shared_weight, tied_weight, quantized_weight, einsum,
    gram, cumulative, attention, packed_attention, recurrent,
)  # fmt: skip


@pytest.mark.parametrize("special", SPECIAL, ids=lambda step: step.__name__)
@pytest.mark.parametrize("graph_kind", ["images", "tokens"])
def test_each_special_step(
    random_graphs: Callable[..., st.SearchStrategy[Any]], graph_kind: str, special: Step
) -> None:
    """Each step directly between two layers: cut equals masked, rtol 1e-3, atol 1e-4."""

    @settings(_SETTINGS, max_examples=6)
    @given(case=random_graphs(graph_kind, 2, (special,)), data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        case.check(data)

    check()


@pytest.mark.parametrize("graph_kind", ["images", "tokens"])
def test_special_steps_among_others(random_graphs: Callable[..., st.SearchStrategy[Any]], graph_kind: str) -> None:
    """Graphs of up to eight steps out of all there are: cut equals masked, rtol 1e-3, atol 1e-4."""

    @settings(_SETTINGS, max_examples=60)
    @given(case=random_graphs(graph_kind, 8, (), SPECIAL), data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        case.check(data)

    check()
