"""Dynamic quantization: products, recurrent layers, embeddings, subgraphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

NODE = helper.make_node


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_products_keep_their_signal(mlp, vectors, quantize, sqnr, operators, weights, per_channel) -> None:  # type: ignore[no-untyped-def]
    """MatMul and Gemm with alpha and beta become integer products at 30 dB or more; no float weight is left."""
    result = quantize(mlp, vectors, scheme="dynamic", weights=weights, per_channel=per_channel)
    assert result.changes == {"MatMul": 2, "Gemm": 1}
    assert operators(result.model).count("MatMulInteger") == 3
    assert sqnr(mlp, result.model, vectors) > 30
    assert result.model.weight_bytes() < 0.4 * mlp.weight_bytes()


def test_convolutions_are_left_with_the_reason(cnn, images, quantize) -> None:  # type: ignore[no-untyped-def]
    """ConvInteger is slower than float32: only the head is quantized."""
    result = quantize(cnn, images, scheme="dynamic")
    assert result.changes == {"Gemm": 1}
    assert [skip.node for skip in result.skipped if "slower" in skip.reason] == ["conv_1", "depthwise", "conv_3"]


def test_small_products_are_left(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """Too few weights to pay: the model itself comes back."""
    weight = rng.normal(0, 1, (8, 8)).astype(np.float32)
    model = build([NODE("MatMul", ["x", "w"], ["y"], "small")], {"w": weight}, {"x": ["n", 8]})
    result = quantize(model, {"x": np.ones((2, 8), np.float32)}, scheme="dynamic")
    assert not result.changed
    assert result.model is model
    assert "too few" in result.skipped[0].reason


def test_products_of_one_input_share_its_quantized_form(build, quantize, operators, rng) -> None:  # type: ignore[no-untyped-def]
    """Query, key and value read one DynamicQuantizeLinear."""
    weights = {name: rng.normal(0, 0.2, (32, 32)).astype(np.float32) for name in "qkv"}
    nodes = [NODE("MatMul", ["x", name], [f"{name}y"], name) for name in "qkv"]
    model = build([*nodes, NODE("Sum", ["qy", "ky", "vy"], ["y"], "sum")], weights, {"x": ["n", 4, 32]})
    result = quantize(model, {"x": rng.normal(0, 1, (4, 4, 32)).astype(np.float32)}, scheme="dynamic")
    assert operators(result.model).count("DynamicQuantizeLinear") == 1
    assert operators(result.model).count("MatMulInteger") == 3


def test_activations_are_no_weights(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """A product of two activations, and one whose weight comes first, stay with their reasons."""
    weights = {"w": rng.normal(0, 0.2, (32, 32)).astype(np.float32)}
    nodes = [NODE("MatMul", ["x", "x"], ["a"], "both"), NODE("MatMul", ["w", "a"], ["y"], "first")]
    model = build(nodes, weights, {"x": ["n", 32, 32]})
    result = quantize(model, {"x": rng.normal(0, 1, (2, 32, 32)).astype(np.float32)}, scheme="dynamic")
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert not result.changed
    assert "both factors" in reasons["both"]
    assert "first factor" in reasons["first"]


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_lstm(build, quantize, sqnr, rng, direction, per_channel) -> None:  # type: ignore[no-untyped-def]
    """An LSTM runs in 8 bits at 25 dB or more and keeps both of its used outputs."""
    count = 2 if direction == "bidirectional" else 1
    weights = {
        "w": rng.normal(0, 0.3, (count, 64, 24)).astype(np.float32),
        "r": rng.normal(0, 0.3, (count, 64, 16)).astype(np.float32),
        "b": rng.normal(0, 0.3, (count, 128)).astype(np.float32),
    }
    node = NODE("LSTM", ["x", "w", "r", "b"], ["y", "", "c"], "lstm", hidden_size=16, direction=direction)
    model = build([node], weights, {"x": [7, "n", 24]}, outputs=["y", "c"])
    samples = {"x": rng.normal(0, 1, (5, 7, 1, 24)).astype(np.float32)}
    result = quantize(model, samples, scheme="dynamic", per_channel=per_channel)
    assert result.changes == {"LSTM": 1}
    assert [spec.name for spec in result.model.outputs] == ["y", "c"]
    assert sqnr(model, result.model, samples) > 25


def test_gru_stays_with_the_reason(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """onnxruntime has no 8-bit GRU."""
    weights = {"w": rng.normal(0, 0.3, (1, 48, 24)), "r": rng.normal(0, 0.3, (1, 48, 16))}
    model = build(
        [NODE("GRU", ["x", "w", "r"], ["y"], "gru", hidden_size=16)],
        {name: array.astype(np.float32) for name, array in weights.items()},
        {"x": [7, "n", 24]},
    )
    result = quantize(model, {"x": np.ones((1, 7, 1, 24), np.float32)}, scheme="dynamic")
    assert [skip.reason for skip in result.skipped] == ["GRU: onnxruntime has no 8-bit kernel for it"]


def test_embeddings_get_a_scale_per_row(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Rows of very different norms all come back at 30 dB or more; the float table is gone."""
    table = (rng.normal(0, 1, (200, 64)) * np.geomspace(1e-3, 10, 200)[:, None]).astype(np.float32)
    model = build(
        [NODE("Gather", ["table", "x"], ["y"], "embedding")],
        {"table": table},
        {"x": ["n", 3]},
        types={"x": TensorProto.INT64},
    )
    for row in (0, 100, 199):
        samples = {"x": np.full((1, 3), row, np.int64)}
        result = quantize(model, samples, scheme="dynamic")
        assert result.changes == {"Gather": 1}
        assert sqnr(model, result.model, samples) > 30
    assert result.model.weight_bytes() < 0.3 * model.weight_bytes()


def test_a_table_with_other_users_stays(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """A table tied to the output layer would have to be kept in float32 beside its 8-bit form."""
    model = build(
        [NODE("Gather", ["table", "x"], ["e"], "embedding"), NODE("Mul", ["e", "e"], ["y"], "square"),
         NODE("Identity", ["table"], ["z"], "tied")],
        {"table": rng.normal(0, 1, (200, 64)).astype(np.float32)},
        {"x": ["n", 3]},
        outputs=["y", "z"],
        types={"x": TensorProto.INT64},
    )  # fmt: skip
    result = quantize(model, {"x": np.ones((1, 3), np.int64)}, scheme="dynamic")
    assert not result.changed
    assert any("other users" in skip.reason for skip in result.skipped)


def test_attention(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """com.microsoft Attention becomes QAttention at 25 dB or more."""
    weights = {
        "w": rng.normal(0, 0.2, (32, 96)).astype(np.float32),
        "b": rng.normal(0, 0.2, 96).astype(np.float32),
    }
    node = NODE("Attention", ["x", "w", "b"], ["y"], "attention", domain="com.microsoft", num_heads=4)
    model = build([node], weights, {"x": ["n", 6, 32]})
    samples = {"x": rng.normal(0, 1, (4, 6, 32)).astype(np.float32)}
    result = quantize(model, samples, scheme="dynamic")
    assert result.changes == {"Attention": 1}
    assert sqnr(model, result.model, samples) > 25


def branch(name: str, weight: np.ndarray) -> onnx.GraphProto:
    """A branch with a weight of its own."""
    return helper.make_graph(
        [NODE("MatMul", ["x", f"w_{name}"], [f"out_{name}"], f"product_{name}")],
        name,
        [],
        [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, f"w_{name}")],
    )


@pytest.mark.parametrize("scheme", ["dynamic", "static", "float16"])
def test_weights_in_branches(build, quantize, sqnr, rng, scheme) -> None:  # type: ignore[no-untyped-def]
    """Weights inside the branches of an If are compressed too, and the float ones leave the subgraphs."""
    then, other = (rng.normal(0, 0.2, (32, 48)).astype(np.float32) for _ in range(2))
    nodes = [
        NODE("ReduceMean", ["x"], ["mean"], "mean", keepdims=0),
        NODE("Greater", ["mean", "zero"], ["positive"], "positive"),
        NODE("If", ["positive"], ["y"], "if", then_branch=branch("a", then), else_branch=branch("b", other)),
    ]
    model = build(nodes, {"zero": np.float32(0)}, {"x": ["n", 4, 32]})
    samples = {"x": rng.normal(0, 1, (8, 4, 32)).astype(np.float32)}
    result = quantize(model, samples, scheme=scheme)
    assert result.changes["MatMul"] == 2
    assert result.model.weight_bytes() < 0.55 * model.weight_bytes()
    assert sqnr(model, result.model, samples) > 30
