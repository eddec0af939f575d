"""Cuts of small graphs: shapes, attributes and constants that hold extents, and what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.channels import cut, find_groups

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def graph(model_from_text: Any) -> Callable[..., Any]:
    """A graph with one float input x, one output y, and nodes as text."""

    def build(x: str, y: str, nodes: str, **weights: np.ndarray) -> Any:
        domains = '["" : 18, "com.microsoft" : 1]'
        return model_from_text(
            f"<ir_version: 9, opset_import: {domains}> g (float[{x}] x) => (float[{y}] y) {{{nodes}}}", weights
        )

    return build


def test_the_given_model_is_left_alone(graph: Any, shapes_of: Any) -> None:
    """cut works on a copy."""
    model = graph("n,4", "n,3", "h = MatMul(x, a) y = MatMul(h, b)", a=normal(4, 6), b=normal(6, 3))
    before = shapes_of(model)
    (group,) = find_groups(model).groups
    small = cut(model, {group.id: np.array([0, 5])})
    assert shapes_of(model) == before
    assert shapes_of(small) == {"a": (4, 2), "b": (2, 3)}


def test_indices_are_checked(graph: Any) -> None:
    """No unit, a unit that is not there, a wrong order and an unknown group are errors."""
    model = graph("n,4", "n,3", "h = MatMul(x, a) y = MatMul(h, b)", a=normal(4, 6), b=normal(6, 3))
    (group,) = find_groups(model).groups
    for wrong in ([], [6], [2, 1], [-1, 2]):
        with pytest.raises(ValueError, match="rising indices below 6"):
            cut(model, {group.id: np.array(wrong, np.int64)})
    with pytest.raises(KeyError):
        cut(model, {"nothing": np.array([0])})


def test_parameters_of_a_unit(graph: Any) -> None:
    """A hidden unit of 4 -> 6 -> 3 with bias has 4 + 1 + 3 numbers."""
    nodes = "h = Gemm(x, a, c) y = MatMul(h, b)"
    model = graph("n,4", "n,3", nodes, a=normal(4, 6), c=normal(6), b=normal(6, 3))
    (group,) = find_groups(model).groups
    assert group.parameters_per_unit == pytest.approx(8)
    assert {member.role for member in group.members} == {"producer", "consumer", "passenger"}


def test_a_weight_with_two_users_is_cut_for_both(graph: Any, check_cut: Any, shapes_of: Any) -> None:
    """Both users lose the same indices."""
    nodes = "h = MatMul(x, a) r = Relu(h) s = MatMul(r, b) t = Relu(s) u = MatMul(t, b) v = Relu(u) y = MatMul(v, c)"
    model = graph("n,4", "n,3", nodes, a=normal(4, 8), b=normal(8, 8), c=normal(8, 3))
    _, small = check_cut(model, {"x": normal(2, 4)})
    assert shapes_of(small) == {"a": (4, 4), "b": (4, 4), "c": (4, 3)}


def test_split_sizes_follow(graph: Any, check_cut: Any) -> None:
    """Parts of a Split may lose different numbers of units; the two halves are groups of their own."""
    nodes = "h = MatMul(x, a) p, q = Split<axis=1, num_outputs=2>(h) s = MatMul(p, b) t = MatMul(q, c) y = Add(s, t)"
    model = graph("n,4", "n,3", nodes, a=normal(4, 10), b=normal(5, 3), c=normal(5, 3))
    analysis, _ = check_cut(model, {"x": normal(2, 4)})
    assert [group.units for group in analysis.groups] == [5, 5]


def test_slices_and_indices_follow(graph: Any, check_cut: Any) -> None:
    """Bounds of a Slice and constant indices of a Gather name the same channels as before."""
    nodes = """h = MatMul(x, a) p = Slice(h, start, end, one) q = Gather<axis=1>(h, index)
               s = MatMul(p, b) t = MatMul(q, c) y = Add(s, t)"""
    numbers = {name: np.array([value]) for name, value in (("start", 2), ("end", -1), ("one", 1))}
    index = np.array([5, 0, -1])
    model = graph("n,4", "n,3", nodes, a=normal(4, 9), b=normal(6, 3), c=normal(3, 3), index=index, **numbers)
    check_cut(model, {"x": normal(2, 4)})


def test_extents_of_cropping_and_resizing_follow(graph: Any, check_cut: Any) -> None:
    """Sizes that an operator is given for the channels' axis shrink with them, listed by `axes` or not."""
    nodes = """h = Conv(x, a) p = CenterCropPad(h, all) q = CenterCropPad<axes=[1, 3]>(p, some)
               r = Resize<axes=[-3, 3], mode="nearest">(q, , , wider) y = Conv(r, b)"""
    sizes = {"all": np.array([2, 8, 5, 4]), "some": np.array([8, 6]), "wider": np.array([8, 12])}
    model = graph("2,3,7,7", "2,2,5,12", nodes, a=normal(8, 3, 1, 1), b=normal(2, 8, 1, 1), **sizes)
    analysis, _ = check_cut(model, {"x": normal(2, 3, 7, 7)})
    assert [group.units for group in analysis.groups] == [8]


def test_padding_that_shifts_channels_freezes_them(graph: Any) -> None:
    """Pads of opposite signs leave the extent as it is, and move every channel to another place."""
    nodes = "h = Conv(x, a) p = Pad(h, pads, , axes) y = Conv(p, b)"
    constants = {"pads": np.array([1, -1]), "axes": np.array([-3])}
    model = graph("n,3,5,5", "n,2,5,5", nodes, a=normal(8, 3, 1, 1), b=normal(2, 8, 1, 1), **constants)
    analysis = find_groups(model)
    assert not analysis.groups
    assert "The axis is resized or padded. (p)" in {frozen.reason for frozen in analysis.frozen}


def test_depthwise_and_grouped_convolutions(graph: Any, check_cut: Any) -> None:
    """The depthwise one loses groups; the other keeps four groups, or loses whole ones."""
    nodes = """h = Conv(x, a) d = Conv<group=8, pads=[1,1,1,1]>(h, b) g = Conv<group=4>(d, c) y = Conv(g, e)"""
    model = graph(
        "n,3,5,5",
        "n,2,5,5",
        nodes,
        a=normal(8, 3, 1, 1),
        b=normal(8, 1, 3, 3),
        c=normal(8, 2, 1, 1),
        e=normal(2, 8, 1, 1),
    )
    _, small = check_cut(model, {"x": normal(2, 3, 5, 5)})
    assert [node.attributes["group"].as_int() for node in small.nodes() if "group" in node.attributes] == [4, 2]


def test_a_computed_target_of_a_reshape_is_mended(graph: Any, check_cut: Any) -> None:
    """The batch stays dynamic where the number of heads was a constant in the target."""
    nodes = """h = MatMul(x, a) s = Shape<end=1>(x) t = Concat<axis=0>(s, minus, heads, size) r = Reshape(h, t)
               m = Transpose<perm=[0,2,1,3]>(r) k = Transpose<perm=[0,1,3,2]>(m) w = MatMul(m, k) p = Softmax(w)
               o = MatMul(p, m) q = Transpose<perm=[0,2,1,3]>(o) u = Concat<axis=0>(s, minus, all) v = Reshape(q, u)
               y = MatMul(v, b)"""
    numbers = {"minus": np.array([-1]), "heads": np.array([4]), "size": np.array([5]), "all": np.array([20])}
    model = graph("n,t,6", "n,t,3", nodes, a=normal(6, 20), b=normal(20, 3), **numbers)
    analysis, _ = check_cut(model, {"x": normal(3, 7, 6)})
    check_cut(model, {"x": normal(1, 2, 6)})
    (group,) = analysis.groups
    assert (group.kind, group.units, group.align) == ("head", 4, 5)


def test_a_scale_of_the_extent_stays_what_it_was(graph: Any, check_cut: Any) -> None:
    """As the older exporter writes attention: h / sqrt(extent of h), which the cut network still divides by."""
    scale = "s = Shape<start=1>(h) f = Cast<to=1>(s) d = Sqrt(f)"
    model = graph(
        "n,4", "n,3", f"h = MatMul(x, a) {scale} r = Div(h, d) y = MatMul(r, b)", a=normal(4, 6), b=normal(6, 3)
    )
    analysis, _ = check_cut(model, {"x": normal(2, 4)})
    (group,) = analysis.groups
    assert group.units == 6


def test_branches_see_what_is_cut_outside(graph: Any, check_cut: Any, shapes_of: Any) -> None:
    """Both branches of an If read the same hidden units, and their outputs are tied."""
    nodes = """h = MatMul(x, a) m = ReduceSum(x) c = Greater(m, zero)
               i = If (c) <then_branch = one () => (float[n,7] p) { p = MatMul(h, b) },
                           else_branch = two () => (float[n,7] q) { q = MatMul(h, d) }>
               y = MatMul(i, e)"""
    weights = {"a": normal(4, 6), "b": normal(6, 7), "d": normal(6, 7), "e": normal(7, 3)}
    model = graph("n,4", "n,3", nodes, zero=np.float32(0).reshape(()), **weights)
    analysis = find_groups(model)
    assert [group.units for group in analysis.groups] == [6, 7]
    small = cut(model, {group.id: np.array([0, 2]) for group in analysis.groups})
    assert shapes_of(small)["b"] == shapes_of(small)["d"] == (2, 2)
    check_cut(model, {"x": np.ones((2, 4), np.float32)})
    check_cut(model, {"x": -np.ones((2, 4), np.float32)})


def test_an_lstm_loses_hidden_units(graph: Any, check_cut: Any) -> None:
    """Both directions lose the same units, with all gates; hidden_size follows."""
    nodes = """h, z = LSTM<hidden_size=6, direction="bidirectional">(x, w, r, b) y = MatMul(z, c)"""
    weights = {"w": normal(2, 24, 4), "r": normal(2, 24, 6), "b": normal(2, 48), "c": normal(6, 3)}
    model = graph("t,n,4", "2,n,3", nodes, **weights)
    analysis, small = check_cut(model, {"x": normal(5, 2, 4)})
    assert analysis.groups[0].kind == "hidden"
    assert next(node for node in small.nodes() if node.op_type == "LSTM").attributes["hidden_size"].as_int() == 3


def test_fused_attention_loses_heads(graph: Any, check_cut: Any) -> None:
    """MultiHeadAttention keeps the size of a head."""
    nodes = """q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)
               o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, bias) y = MatMul(o, d)"""
    weights = {"a": normal(6, 20), "b": normal(6, 20), "c": normal(6, 20), "d": normal(20, 3), "bias": normal(60)}
    _, small = check_cut(graph("n,t,6", "n,t,3", nodes, **weights), {"x": normal(2, 5, 6)})
    assert next(n for n in small.nodes() if n.op_type == "MultiHeadAttention").attributes["num_heads"].as_int() == 2


@pytest.mark.parametrize("layout", ["flat", "heads apart"])
def test_attention_of_the_standard_loses_heads_that_share(model_from_text: Any, check_cut: Any, layout: str) -> None:
    """Four query heads on two of keys and values, of size 5: one shared head goes with its two query heads. The heads
    are part of the last axis, or an axis of their own."""
    nodes = "q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c) "
    weights = {"a": normal(6, 20), "b": normal(6, 10), "c": normal(6, 10), "d": normal(20, 3)}
    if layout == "flat":
        nodes += "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) "
    else:
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            nodes += f"{name}s = Reshape({name}, {name}_to) {name}t = Transpose<perm=[0, 2, 1, 3]>({name}s) "
            weights[f"{name}_to"] = np.array([0, 0, heads, 5])
        nodes += "p = Attention(qt, kt, vt) pt = Transpose<perm=[0, 2, 1, 3]>(p) o = Reshape(pt, merged) "
        weights["merged"] = np.array([0, 0, 20])
    text = (
        f'<ir_version: 11, opset_import: ["" : 23]> g (float[n,t,6] x) => (float[n,t,3] y) {{{nodes}y = MatMul(o, d)}}'
    )
    analysis, small = check_cut(model_from_text(text, weights), {"x": normal(2, 5, 6)})
    assert [(group.kind, group.units) for group in analysis.groups] == [("head", 2)]
    assert {name: value.shape.numpy() for name, value in small.graph.initializers.items() if name in "abcd"} == {
        "a": (6, 10), "b": (6, 5), "c": (6, 5), "d": (10, 3),
    }  # fmt: skip


def test_quantized_weights_are_cut_with_their_scales(graph: Any, check_cut: Any, shapes_of: Any) -> None:
    """Scales by output channel are cut with the rows they belong to."""
    nodes = """w = DequantizeLinear<axis=1>(a, s) h = MatMul(x, w) r = Relu(h) y = MatMul(r, b)"""
    weights = {"a": RNG.integers(-100, 100, (4, 8)).astype(np.int8), "s": np.abs(normal(8)) / 50, "b": normal(8, 3)}
    _, small = check_cut(graph("n,4", "n,3", nodes, **weights), {"x": normal(2, 4)})
    assert shapes_of(small) == {"a": (4, 4), "s": (4,), "b": (4, 3)}


# u = [1], computed from the data.
COMPUTED_ONE = "i = Cast<to=7>(x) k = ReduceMax<keepdims=0>(i) z = Sub(k, k) e = Add(z, one) u = Reshape(e, last)"


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = Softmax<axis=-1>(h)", "Softmax over the axis"),
        ("r = CumSum(h, one)", "CumSum depends on every index"),
        ("m = ReduceMax<keepdims=1>(h, last) r = Sub(h, m)", "ReduceMax over the axis"),
        ("s = Size(h) f = Cast<to=1>(s) r = Div(h, f)", "calculates with the extent"),
        ('r = Einsum<equation="...i->...i">(h)', "Einsum is not traced"),
        (f"{COMPUTED_ONE} r = Slice(h, zero, six, axis, u)", "bounds of the slice are computed"),
        (f"{COMPUTED_ONE} r = Slice(h, zero, six, u)", "axes of the slice are computed"),
    ],
)
def test_what_mixes_channels_freezes_them(graph: Any, between: str, reason: str) -> None:
    """The report names the producer and the reason."""
    nodes = f"h = MatMul(x, a) {between} y = MatMul(r, b)"
    constants = {
        "one": np.array(1),
        "last": np.array([-1]),
        "zero": np.array([0]),
        "six": np.array([6]),
        "axis": np.array([1]),
    }
    used = {name: array for name, array in constants.items() if name in between}
    analysis = find_groups(graph("n,4", "n,3", nodes, a=normal(4, 6), b=normal(6, 3), **used))
    assert analysis.groups == ()
    assert any(reason in frozen.reason and frozen.channels == 6 for frozen in analysis.frozen)


def test_inputs_and_outputs_stay(graph: Any) -> None:
    """A layer between input and output has nothing to cut."""
    analysis = find_groups(graph("n,4", "n,3", "y = MatMul(x, a)", a=normal(4, 3)))
    assert analysis.groups == ()
    assert "output" in analysis.frozen[0].reason


def test_channels_that_an_overridable_weight_reads_stay(graph: Any) -> None:
    """A default that a caller may override is an input: its rows cannot be cut, nor what it is multiplied with."""
    model = graph("n,4", "n,3", "h = MatMul(x, a) y = MatMul(h, b)", a=normal(4, 6), b=normal(6, 3))
    model.graph.inputs.append(model.graph.initializers["b"])
    analysis = find_groups(model)
    assert analysis.groups == ()
    assert any(frozen.channels == 6 and "cannot be cut" in frozen.reason for frozen in analysis.frozen)


def test_stored_shapes_follow_and_stay_symbolic(graph: Any) -> None:
    """The batch keeps its name; the hidden axis has the extent that is left."""
    nodes = "h = MatMul(x, a) y = MatMul(h, b)"
    model = graph("n,4", "n,3", nodes, a=normal(4, 6), b=normal(6, 3))
    model.graph[0].outputs[0].shape = onnx_ir.Shape(["n", 6])
    (group,) = find_groups(model).groups
    small = cut(model, {group.id: np.array([1, 2])})
    assert [str(dim) for dim in small.graph[0].outputs[0].shape or ()] == ["n", "2"]


def test_a_loop_freezes_what_it_carries(graph: Any, check_cut: Any) -> None:
    """Hidden units inside of the body are cut; the state that goes around is not."""
    nodes = """h = MatMul(x, a)
               z = Loop(trips, go, h) <body = run (int64 i, bool c, float[n,6] s) => (bool d, float[n,6] t) {
                   d = Identity(c) k = MatMul(s, e) r = Relu(k) t = MatMul(r, f) }>
               y = MatMul(z, b)"""
    numbers = {"trips": np.array(3), "go": np.array(True)}
    weights = {"a": normal(4, 6), "b": normal(6, 3), "e": normal(6, 8) / 3, "f": normal(8, 6) / 3}
    analysis, _ = check_cut(graph("n,4", "n,3", nodes, **weights, **numbers), {"x": normal(2, 4)})
    assert all(group.units != 6 for group in analysis.groups)


def test_weights_of_an_operator_without_rule_are_reported(graph: Any) -> None:
    """Nothing is cut, and the report says at which node and why."""
    nodes = "y = com.microsoft.MatMulNBits<K=4, N=3, bits=4, block_size=16>(x, q, s)"
    weights = {"q": np.zeros((3, 1, 8), np.uint8), "s": np.ones(3, np.float32)}
    analysis = find_groups(graph("n,4", "n,3", nodes, **weights))
    assert analysis.groups == ()
    assert [frozen.channels for frozen in analysis.frozen] == [3]
    assert "No rule traces channels through com.microsoft MatMulNBits" in analysis.frozen[0].reason
