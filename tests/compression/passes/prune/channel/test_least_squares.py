"""Repair brings the cut model's answers nearer to the uncut one's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.passes.repair import least_squares
from modelpress_compression.passes.repair.fitter import Fitter
from modelpress_compression.passes.repair.layers import Layer
from modelpress_compression.passes.repair.normal_equations import Sums
from onnx import helper


def distance(one: Any, other: Any) -> float:
    """Mean squared difference over the variance of `other`."""
    return float(np.square(one - other).mean() / other.var())


@pytest.mark.parametrize("criterion", ["l1", "activation", "random"])
def test_answers_come_nearer_on_data_not_seen(
    criterion: str, conv_net: Any, images: Any, prune_channels_of: Any, outputs_of: Any
) -> None:
    """Half the channels gone: with repair at most a quarter of the error on new samples."""
    model, data, new = conv_net(), {"x": images(64)}, images(64, seed=1)
    options = {"sparsity": 0.5, "criterion": criterion}
    plain = prune_channels_of(model, data, repair="none", **options)
    fitted = prune_channels_of(model, data, repair="least_squares", **options)
    expected = outputs_of(model, new)
    before, after = (distance(outputs_of(result.model, new), expected) for result in (plain, fitted))
    assert after < before / 4
    assert fitted.changes["layers_repaired"] == 2
    assert fitted.changes["repair_error_after"] < fitted.changes["repair_error_before"]
    assert "layers_repaired" not in plain.changes


def test_redundant_channels_cost_nothing(channel_model: Any, prune_channels_of: Any, outputs_of: Any) -> None:
    """Where the channels that go are sums of those that stay, the answers come back (1e-3 of the variance)."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((8, 5))
    weights = {
        "w1": np.concatenate([10 * first, 0.1 * rng.standard_normal((8, 8)) @ first]),  # the last eight: combinations
        "b1": rng.standard_normal(16),
        "w2": rng.standard_normal((3, 16)),
        "b2": rng.standard_normal(3),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="fc1", transB=1),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["y"], name="fc2", transB=1),
    ]
    model = channel_model(nodes, weights, ["n", 5], ["n", 3])
    x = rng.standard_normal((200, 5)).astype(np.float32)
    result = prune_channels_of(model, {"x": x[:100]}, sparsity=0.5, criterion="l2")
    assert result.changes["channels_removed"] == 8
    assert distance(outputs_of(result.model, x[100:]), outputs_of(model, x[100:])) < 1e-3


def sequence_model(channel_model: Any, bias: bool) -> Any:
    """MatMul, Relu, MatMul over [n, t, c], each with an Add behind it if `bias`."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((6, 32)), "w2": rng.standard_normal((32, 4))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="up"),
        helper.make_node("Relu", ["m1"], ["r1"], name="relu"),
        helper.make_node("MatMul", ["r1", "w2"], ["m2" if bias else "y"], name="down"),
    ]
    if bias:
        weights["b2"] = rng.standard_normal(4)
        nodes.append(helper.make_node("Add", ["b2", "m2"], ["y"], name="add"))
    return channel_model(nodes, weights, ["n", 5, 6], ["n", 5, 4])


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_sequences(bias: bool, channel_model: Any, prune_channels_of: Any, outputs_of: Any) -> None:
    """A MatMul is fitted too; its bias is that of the Add behind it, and where there is none, none is made."""
    model = sequence_model(channel_model, bias)
    x = np.random.default_rng(1).standard_normal((60, 5, 6)).astype(np.float32)
    plain, fitted = (
        prune_channels_of(model, {"x": x[:40]}, sparsity=0.5, repair=repair) for repair in ("none", "least_squares")
    )
    expected = outputs_of(model, x[40:])
    before, after = (distance(outputs_of(result.model, x[40:]), expected) for result in (plain, fitted))
    assert after < before / 2
    assert len(list(fitted.model.graph)) == len(list(model.graph))
    if bias:
        changed = [result.model.graph.initializers["b2"].const_value.numpy() for result in (plain, fitted)]
        assert not np.allclose(*changed)


def test_layers_without_bias_get_one(channel_model: Any, prune_channels_of: Any, outputs_of: Any) -> None:
    """What channels that go gave on average goes into a new bias; a bias that others use stays theirs."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((32, 3, 3, 3)),
        "shared": rng.standard_normal(32),
        "w2": rng.standard_normal((32, 32, 1, 1)),
        "w3": rng.standard_normal((5, 32, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "shared"], ["c1"], name="conv1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2"),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["y"], name="conv3"),
    ]
    model = channel_model(nodes, weights, ["n", 3, 6, 6], ["n", 5, 4, 4])
    x = rng.standard_normal((40, 3, 6, 6)).astype(np.float32)
    options = {"sparsity": 0.5, "round_to": 4, "criterion": "l1"}
    fitted = prune_channels_of(model, {"x": x[:30]}, **options)
    plain = prune_channels_of(model, {"x": x[:30]}, repair="none", **options)
    expected = outputs_of(model, x[30:])
    before, after = (distance(outputs_of(result.model, x[30:]), expected) for result in (plain, fitted))
    assert after < before / 2
    assert [len(node.inputs) for node in fitted.model.graph if node.op_type == "Conv"] == [3, 3, 3]


def test_layers_of_one_weight_are_fitted_as_one(channel_model: Any, prune_channels_of: Any, outputs_of: Any) -> None:
    """A head that reads two levels stays one head, and answers better on images that no fit saw."""
    rng = np.random.default_rng(11)
    weights = {
        "w1": rng.standard_normal((24, 4, 3, 3)) / 6,
        "w2": rng.standard_normal((6, 24, 3, 3)) / 15,
        "b1": rng.standard_normal(24),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], name="trunk", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["p0"], name="relu"),
        helper.make_node("MaxPool", ["p0"], ["p1"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w2"], ["h0"], name="head0", pads=[1] * 4),
        helper.make_node("Conv", ["p1", "w2"], ["h1"], name="head1", pads=[1] * 4),
        helper.make_node("Flatten", ["h0"], ["f0"], name="flat0"),
        helper.make_node("Flatten", ["h1"], ["f1"], name="flat1"),
        helper.make_node("Concat", ["f0", "f1"], ["y"], name="join", axis=1),
    ]
    model = channel_model(nodes, weights, ["n", 4, 8, 8], ["n", 480])
    samples = rng.standard_normal((64, 4, 8, 8)).astype(np.float32)
    fresh = rng.standard_normal((16, 4, 8, 8)).astype(np.float32)
    result = prune_channels_of(model, {"x": samples}, sparsity=0.3, round_to=1)
    heads = [node for node in result.model.graph if node.name in ("head0", "head1")]
    assert len({id(value) for node in heads for value in node.inputs[1:]}) == 2  # one weight, one bias
    assert result.changes["layers_repaired"] == 1
    plain = prune_channels_of(model, {"x": samples}, sparsity=0.3, round_to=1, repair="none")
    expected = outputs_of(model, fresh)
    errors = [float(np.square(outputs_of(one.model, fresh) - expected).sum()) for one in (result, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_memory_is_bounded(conv_net: Any, images: Any, prune_channels_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose sums would take more memory than permitted is left as it is, and the result says so."""
    monkeypatch.setattr(least_squares, "MAX_FITTING_BYTES", 250_000)
    result = prune_channels_of(conv_net(), {"x": images(8)}, sparsity=0.5)
    assert [skip.node for skip in result.skipped if "1 GiB" in skip.reason] == ["conv2"]
    assert result.changes["layers_repaired"] == 1


@pytest.mark.parametrize("samples", [2, 3, 8, 20])
def test_never_worse_on_what_is_held_out(samples: int, conv_net: Any, images: Any, prune_channels_of: Any) -> None:
    """However few samples there are, a fit is only taken where it holds on samples that it did not see."""
    result = prune_channels_of(conv_net(), {"x": images(samples)}, sparsity=0.5)
    fits = [row for row in result.details if "error_after" in row]
    assert fits or any("no fit saw" in warning for warning in result.warnings)
    for row in fits:
        assert 0 <= row["error_after"] < row["error_before"]


def wide_model(channel_model: Any) -> Any:
    """One wide hidden layer, whose channels have little in common."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((6, 256)), "w2": rng.standard_normal((256, 12)), "w3": np.eye(12)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="up"),
        helper.make_node("Sin", ["m1"], ["r1"], name="sin"),
        helper.make_node("MatMul", ["r1", "w2"], ["m2"], name="down"),
        helper.make_node("Mul", ["m2", "m2"], ["y"], name="square"),
    ]
    return channel_model(nodes, weights, ["n", 6], ["n", 12])


def test_fits_that_do_the_outputs_no_good_are_taken_back(
    channel_model: Any, prune_channels_of: Any, outputs_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the outputs are farther away with the fits, the model is as it is without repair, and a warning says so."""
    model = wide_model(channel_model)
    x = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)

    def spoil(self: Layer, weight: Any, bias: Any, pruned: Any) -> None:
        replace_numbers(self.weight, self.numbers * 100)

    monkeypatch.setattr(Layer, "correct", spoil)
    fitted = prune_channels_of(model, {"x": x}, sparsity=0.5)
    plain = prune_channels_of(model, {"x": x}, sparsity=0.5, repair="none")
    np.testing.assert_array_equal(outputs_of(fitted.model, x), outputs_of(plain.model, x))
    assert "layers_repaired" not in fitted.changes
    assert [warning for warning in fitted.warnings if "left as they were after all" in warning]


def test_one_sample_is_too_few(conv_net: Any, images: Any, prune_channels_of: Any) -> None:
    """With one sample nothing can be checked: nothing is fitted, and a warning says so."""
    result = prune_channels_of(conv_net(), {"x": images(1)}, sparsity=0.5)
    assert "layers_repaired" not in result.changes
    assert [warning for warning in result.warnings if "one sample" in warning]


def residual_model(channel_model: Any) -> Any:
    """Two residual blocks with depthwise convolutions; the channels that run through them are one group."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((16, 8))
    weights = {
        "stem": np.tensordot(mix, rng.standard_normal((8, 3, 3, 3)), 1) / 4,
        **{f"up{block}": rng.standard_normal((32, 16, 1, 1)) / 4 for block in range(2)},
        **{f"dw{block}": rng.standard_normal((32, 1, 3, 3)) / 3 for block in range(2)},
        **{f"down{block}": rng.standard_normal((16, 32, 1, 1)) / 6 for block in range(2)},
        "head": rng.standard_normal((5, 16, 1, 1)) / 4,
    }
    nodes = [helper.make_node("Conv", ["x", "stem"], ["h0"], name="stem", pads=[1] * 4)]
    for block in range(2):
        names = [f"{part}{block}" for part in ("a", "b", "c", "d", "e")]
        nodes += [
            helper.make_node("Conv", [f"h{block}", f"up{block}"], [names[0]], name=f"up{block}"),
            helper.make_node("Relu", [names[0]], [names[1]]),
            helper.make_node("Conv", [names[1], f"dw{block}"], [names[2]], name=f"dw{block}", group=32, pads=[1] * 4),
            helper.make_node("Relu", [names[2]], [names[3]]),
            helper.make_node("Conv", [names[3], f"down{block}"], [names[4]], name=f"down{block}"),
            helper.make_node("Add", [f"h{block}", names[4]], [f"h{block + 1}"], name=f"add{block}"),
        ]
    nodes.append(helper.make_node("Conv", ["h2", "head"], ["y"], name="head"))
    return channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 5, 8, 8])


def test_residual_blocks_with_depthwise_convolutions(
    channel_model: Any, images: Any, prune_channels_of: Any, outputs_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depthwise convolutions are fitted as well, and a layer makes up for the drift of what it is added to: nearer
    outputs than where it only mends its own answers."""
    model, data, new = residual_model(channel_model), {"x": images(60)}, images(40, seed=1)
    expected = outputs_of(model, new)
    plain = prune_channels_of(model, data, sparsity=0.5, repair="none")
    fitted = prune_channels_of(model, data, sparsity=0.5)
    monkeypatch.setattr(Fitter, "_with_drift", lambda self, layer, sample, plain, *_: plain)
    alone = prune_channels_of(model, data, sparsity=0.5)
    errors = [distance(outputs_of(result.model, new), expected) for result in (plain, alone, fitted)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[0] / 2
    assert {"dw0", "dw1"} <= {row["layer"] for row in fitted.details if "error_after" in row}


@pytest.mark.parametrize("name", ["attention_mask", "input_mask"])
def test_padding_does_not_count(channel_model: Any, prune_channels_of: Any, name: str) -> None:
    """What stands at positions that the model is told to be padding changes no fit."""
    base = sequence_model(channel_model, True)
    base.graph.inputs.append(onnx_ir.val(name, onnx_ir.DataType.INT64, onnx_ir.Shape(["n", 5])))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 5, 6)).astype(np.float32)
    mask = np.tile(np.array([1, 1, 1, 0, 0]), (40, 1))
    found = []
    for padding in (0.0, 100.0):
        filled = np.where(mask[:, :, None] == 1, x, x * padding).astype(np.float32)
        result = prune_channels_of(base, {"x": filled, name: mask}, sparsity=0.5)
        assert result.changes["layers_repaired"] == 1
        found.append(result.model.graph.initializers["w2"].const_value.numpy())
    np.testing.assert_array_equal(*found)


def test_rows_held_out_are_counted_as_they_are(
    channel_model: Any, images: Any, prune_channels_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four images, given 16 times each, two are held out with all their copies: a fit is sized for their rows."""
    copies = np.repeat(images(4), 16, axis=0)
    fit, seen = Fitter.fit, []

    def counted(self: Fitter, editor: Any) -> Any:
        held = [part for parts in self._held_out._parts.values() for part in parts]
        held_bytes = sum(inputs.nbytes + answers.nbytes for inputs, answers in held)
        sized_bytes = Fitter.size_bytes(self.layer, 64, 32) - 2 * Sums.size_bytes(*self._start.shape)
        seen.append((len(self._held_out), held_bytes / sized_bytes))
        return fit(self, editor)

    monkeypatch.setattr(Fitter, "fit", counted)
    prune_channels_of(residual_model(channel_model), {"x": copies}, sparsity=0.5)
    assert {samples for samples, _ in seen} == {32}
    assert max(share for _, share in seen) == 1.0
