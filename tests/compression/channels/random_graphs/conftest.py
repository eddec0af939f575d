"""Random graphs out of the operators that carry channels.

A graph is drawn step by step; a step adds a layer, or a block of several nodes, on a value made before. Weights come
from a seed, so that a failure shrinks to few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import note
from hypothesis import strategies as st
from modelpress_compression.channels import Indices, cut, find_groups
from modelpress_compression.inputs import Array
from modelpress_compression.loaders.normalize import normalize
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper
from oracles.masking import masked

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the graph under construction: [N, C, H, W] or [N, T, C]."""

    name: str
    shape: Shape

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) == 4 else self.shape[2]


class Case:
    """A model with one input `x`, and numbers for it. Hypothesis would print a dataclass with all its weights."""

    def __init__(self, model: Model, x: np.ndarray, steps: str) -> None:
        self.model, self.x, self.steps = model, x, steps

    def __repr__(self) -> str:
        return self.steps

    def check(self, data: st.DataObject) -> None:
        """Cuts a drawn number of units of every group and compares all outputs, rtol 1e-3, atol 1e-4."""
        analysis = find_groups(self.model)
        kept: dict[str, Indices] = {}
        for group in analysis.groups:
            for member in group.members:
                assert member.indices.shape[0] == group.units
                assert len(np.unique(member.indices)) == member.indices.size
            rng = np.random.default_rng(data.draw(st.integers(0, 2**16), group.id))
            kept[group.id] = np.sort(rng.choice(group.units, rng.integers(1, group.units + 1), replace=False))
        note(f"groups: {[(group.id, group.units, kept[group.id].tolist()) for group in analysis.groups]}")
        got = self.run(cut(self.model, kept))
        expected = self.run(masked(self.model, analysis, kept, {"x": self.x}))
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert np.isfinite(array).all()
            np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4)

    def run(self, model: Model) -> dict[str, Array]:
        """Outputs of a model with the same input; without fusions that would round activations."""
        with session_of(model, optimize=False) as session:
            return run(session, {"x": self.x})


@dataclass
class Builder:
    """Nodes and weights; `pick` draws choices of hypothesis."""

    pick: Callable[[Any], Any]
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def constant(self, array: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape: int, fan_in: int = 1) -> str:
        return self.constant((self.rng.normal(size=shape) / fan_in**0.5).astype(np.float32))

    def positive(self, *shape: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, shape).astype(np.float32))

    def __call__(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names


# Steps take the builder, a value, and all values so far; they return new values, none where they do not fit.
Step = Callable[[Builder, Value, list[Value]], list[Value]]


def conv(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    group = b.pick([g for g in (1, 1, 2, 4, c) if c % g == 0])
    out = c * b.pick([1, 2]) if group == c else group * b.pick([2, 4])
    kernel = b.pick([1, 3])
    inputs = [x.name, b.weight(out, c // group, kernel, kernel, fan_in=c // group * kernel**2)]
    inputs += [b.weight(out)] if b.pick([True, False]) else []
    y = b("Conv", *inputs, group=group, pads=[kernel // 2] * 4, kernel_shape=[kernel, kernel])
    return [Value(y, (n, out, h, w))]


def conv_transpose(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    group = b.pick([1, 2] if c % 2 == 0 else [1])
    per_group = b.pick([2, 3])
    y = b("ConvTranspose", x.name, b.weight(c, per_group, 2, 2, fan_in=c), group=group, strides=[2, 2])
    return [Value(y, (n, group * per_group, 2 * h, 2 * w))] if h <= 8 else []


def activation(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    return [Value(b(b.pick(["Relu", "Sigmoid", "HardSwish", "Tanh", "Identity"]), x.name), x.shape)]


def prelu(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    slope = b.positive(x.channels, 1, 1) if len(x.shape) == 4 else b.positive(x.channels)
    return [Value(b("PRelu", x.name, slope), x.shape)]


def affine(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    inner = (x.channels, 1, 1) if len(x.shape) == 4 else (x.channels,)
    y = b(b.pick(["Add", "Mul", "Sub", "Max"]), *b.pick([[x.name, "?"], ["?", x.name]]))
    operand = b.weight(*inner)
    for position, name in enumerate(b.nodes[-1].input):
        if name == "?":
            b.nodes[-1].input[position] = operand
    return [Value(y, x.shape)]


def batch_norm(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    c = x.channels
    y = b("BatchNormalization", x.name, b.positive(c), b.weight(c), b.weight(c), b.positive(c))
    return [Value(y, x.shape)]


def instance_norm(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    y = b("InstanceNormalization", x.name, b.positive(x.channels), b.weight(x.channels))
    return [Value(y, x.shape)]


def group_norm(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    groups = b.pick([g for g in (1, 2, 4) if c % g == 0])
    if b.pick([True, False]):
        y = b("GroupNormalization", x.name, b.positive(c), b.weight(c), num_groups=groups)
        return [Value(y, x.shape)]
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    grouped = b("Reshape", x.name, b.constant([0, groups, -1]))
    normal = b("InstanceNormalization", grouped, b.constant(ones), b.constant(zeros))
    back = b("Reshape", normal, b.pick([b("Shape", x.name), b.constant([n, c, h, w])]))
    return [Value(b("Mul", back, b.positive(c, 1, 1)), x.shape)]


def pool(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    y = b(b.pick(["MaxPool", "AveragePool"]), x.name, kernel_shape=[2, 2], strides=[2, 2])
    return [Value(y, (n, c, h // 2, w // 2))] if h >= 4 else []


def resize(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    if h > 4:
        return []
    if b.pick([True, False]):
        y = b("Resize", x.name, "", b.constant(np.asarray([1, 1, 2, 2], np.float32)), mode="nearest")
    else:
        y = b("Resize", x.name, "", "", b.constant([n, c, 2 * h, 2 * w]), mode="nearest")
    return [Value(y, (n, c, 2 * h, 2 * w))]


def pad(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    return [Value(b("Pad", x.name, b.constant([0, 0, 1, 0, 0, 0, 1, 0])), (n, c, h + 2, w))] if h == w else []


def join(b: Builder, x: Value, values: list[Value]) -> list[Value]:
    same = [value for value in values if value.shape == x.shape]
    y = b(b.pick(["Add", "Mul"]), x.name, b.pick(same).name)
    return [Value(y, x.shape)]


def concat(b: Builder, x: Value, values: list[Value]) -> list[Value]:
    axis = 1 if len(x.shape) == 4 else 2
    fits = [v for v in values if len(v.shape) == len(x.shape) and _without(v.shape, axis) == _without(x.shape, axis)]
    others = [b.pick(fits) for _ in range(b.pick([1, 2]))]
    y = b("Concat", x.name, *(value.name for value in others), axis=axis)
    return [_with_channels(x, y, x.channels + sum(value.channels for value in others))]


def split(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    axis, c = (1 if len(x.shape) == 4 else 2), x.channels
    if c < 4:
        return []
    first = b.pick([c // 2, c // 4, 1])
    if b.pick([True, False]):
        names = b("Split", x.name, b.constant([first, c - first]), axis=axis, outputs=2)
    else:
        ends = [(0, first), (first, b.pick([c, 2**31 - 1]))]
        names = [b("Slice", x.name, *(b.constant([number]) for number in (start, end, axis))) for start, end in ends]
    return [_with_channels(x, names[0], first), _with_channels(x, names[1], c - first)]


def gather(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    order = b.rng.permutation(x.channels)[: max(2, x.channels - 1)]
    return [_with_channels(x, b("Gather", x.name, b.constant(order), axis=1 if len(x.shape) == 4 else 2), len(order))]


def shuffle(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    if c % 2:
        return []
    split_up = b("Reshape", x.name, b.constant([n, 2, c // 2, h, w]))
    turned = b("Transpose", split_up, perm=[0, 2, 1, 3, 4])
    return [Value(b("Reshape", turned, b.constant(b.pick([[n, c, h, w], [0, -1, h, w]]))), x.shape)]


def pixel_shuffle(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    if c % 4 or h > 8:
        return []
    shape = (n, c // 4, 2 * h, 2 * w)
    if b.pick([True, False]):
        return [Value(b("DepthToSpace", x.name, blocksize=2, mode=b.pick(["DCR", "CRD"])), shape)]
    split_up = b("Reshape", x.name, b.constant([n, c // 4, 2, 2, h, w]))
    return [Value(b("Reshape", b("Transpose", split_up, perm=[0, 1, 4, 2, 5, 3]), b.constant(list(shape))), shape)]


def space_to_depth(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    if h % 2 or w % 2 or c > 8:
        return []
    return [Value(b("SpaceToDepth", x.name, blocksize=2), (n, 4 * c, h // 2, w // 2))]


def squeeze_excite(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    c = x.channels
    pooled = b("GlobalAveragePool", x.name) if b.pick([True, False]) else b("ReduceMean", x.name, b.constant([2, 3]))
    hidden = b("Relu", b("Conv", pooled, b.weight(4, c, 1, 1, fan_in=c), b.weight(4)))
    gate = b("Sigmoid", b("Conv", hidden, b.weight(c, 4, 1, 1, fan_in=4), b.weight(c)))
    return [Value(b("Mul", x.name, gate), x.shape)]


def to_tokens(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, c, h, w = x.shape
    flat = b("Reshape", x.name, b.constant(b.pick([[0, 0, -1], [n, c, h * w], [n, -1, h * w]])))
    return [Value(b("Transpose", flat, perm=[0, 2, 1]), (n, h * w, c))]


def to_image(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, t, c = x.shape
    side = int(t**0.5)
    if side * side != t:
        return []
    turned = b("Transpose", x.name, perm=[0, 2, 1])
    return [Value(b("Reshape", turned, b.constant([n, b.pick([c, -1]), side, side])), (n, c, side, side))]


def linear(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    n, t, c = x.shape
    out = b.pick([4, 8, 12])
    y = b("MatMul", x.name, b.weight(c, out, fan_in=c))
    return [Value(b("Add", y, b.weight(out)) if b.pick([True, False]) else y, (n, t, out))]


def flat_linear(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    """Flatten of channels and positions, Gemm, and back to an image of one position."""
    n, out, size = x.shape[0], b.pick([4, 8]), int(np.prod(x.shape[1:]))
    flat = b("Flatten", x.name) if b.pick([True, False]) else b("Reshape", x.name, b.constant([n, -1]))
    y = b("Gemm", flat, b.weight(out, size, fan_in=size), b.weight(out), transB=1)
    return [Value(b("Unsqueeze", y, b.constant([2, 3])), (n, out, 1, 1))]


def layer_norm(b: Builder, x: Value, _: list[Value]) -> list[Value]:
    scale, bias = b.positive(x.channels), b.weight(x.channels)
    if b.pick([True, False]):
        return [Value(b("LayerNormalization", x.name, scale, bias, axis=-1), x.shape)]
    axes, epsilon = b.constant([-1]), b.constant(np.float32(1e-5))
    data = x.name
    if b.pick([True, False]):
        data = b("Sub", data, b("ReduceMean", data, axes))
    mean = b("ReduceMean", b("Mul", data, data), axes)
    normal = b("Div", data, b("Sqrt", b("Add", mean, epsilon)))
    return [Value(b("Mul", normal, scale), x.shape)]


IMAGE: tuple[Step, ...] = (
    conv, conv, conv, conv_transpose, activation, prelu, affine, batch_norm, instance_norm, group_norm, pool, resize,
    pad, join, concat, split, gather, shuffle, pixel_shuffle, space_to_depth, squeeze_excite, to_tokens, flat_linear,
)  # fmt: skip
TOKENS: tuple[Step, ...] = (
    linear, linear, linear, activation, prelu, affine, join, concat, split, gather, layer_norm, to_image, flat_linear,
)  # fmt: skip


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


def _with_channels(like: Value, name: str, channels: int) -> Value:
    axis = 1 if len(like.shape) == 4 else 2
    return Value(name, (*like.shape[:axis], channels, *like.shape[axis + 1 :]))


def _head(b: Builder, x: Value) -> onnx.ValueInfoProto:
    """Three channels of the last value, and the graph's output."""
    c = x.channels
    weight = b.weight(3, c, 1, 1, fan_in=c) if len(x.shape) == 4 else b.weight(c, 3, fan_in=c)
    y = b("Conv" if len(x.shape) == 4 else "MatMul", x.name, weight)
    return helper.make_tensor_value_info(y, TensorProto.FLOAT, _with_channels(x, y, 3).shape)


@st.composite
def _graphs(
    draw: st.DrawFn, start: Shape, longest: int, only: tuple[Step, ...] = (), also: tuple[Step, ...] = ()
) -> Case:
    """A model with one input `x` of shape `start`; now and then an inner value is an output as well."""
    b = Builder(lambda options: draw(st.sampled_from(list(options))), draw(st.integers(0, 2**16)))
    values = (conv if len(start) == 4 else linear)(b, Value("x", start), [])
    for _ in range(draw(st.integers(1, longest))):
        x = draw(st.sampled_from(values[-3:]))
        step = draw(st.sampled_from(only or (IMAGE if len(x.shape) == 4 else TOKENS) + also))
        kept = len(b.nodes)
        made = step(b, x, values)
        if made:
            values += made
            b.steps.append(f"{step.__name__}({x.name} {x.shape})")
        else:
            del b.nodes[kept:]
    outputs = [_head(b, values[-1])]
    if not only and draw(st.integers(0, 3)) == 0:
        inner = draw(st.sampled_from(values))
        outputs.append(helper.make_tensor_value_info(inner.name, TensorProto.FLOAT, inner.shape))
    graph = helper.make_graph(
        b.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, start)], outputs, b.weights
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    model = normalize(Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0)))
    return Case(model, b.rng.normal(size=start).astype(np.float32), " -> ".join(b.steps))


# What a graph starts from, by kind.
STARTS: dict[str, tuple[Shape, tuple[Step, ...]]] = {"images": ((2, 4, 8, 8), IMAGE), "tokens": ((2, 4, 6), TOKENS)}


@pytest.fixture(scope="session")
def random_graphs() -> Callable[..., st.SearchStrategy[Case]]:
    """The strategy for graphs of a kind with at most so many steps.

    `only`: the steps to draw from instead of the usual; `also`: steps beside them.
    """

    def strategy(
        kind: str, longest: int, only: tuple[Step, ...] = (), also: tuple[Step, ...] = ()
    ) -> st.SearchStrategy[Case]:
        return _graphs(STARTS[kind][0], longest, only, also)

    return strategy


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `kind` and `step` run for each kind of step."""
    if {"kind", "step"} <= set(metafunc.fixturenames):
        pairs = [(kind, step) for kind, (_, steps) in STARTS.items() for step in dict.fromkeys(steps)]
        metafunc.parametrize(("kind", "step"), pairs, ids=[f"{kind}-{step.__name__}" for kind, step in pairs])
