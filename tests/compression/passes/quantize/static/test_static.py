"""Static quantization: what fires, what does not and why, and what is left of the signal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from modelpress_compression import runtime
from modelpress_compression.passes.base import PassResult
from modelpress_compression.runtime import run, session_of
from onnx import helper

Apply = Callable[..., PassResult]


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_cnn_keeps_its_signal(cnn, images, quantize, sqnr, calibration, per_channel) -> None:  # type: ignore[no-untyped-def]
    """Every node runs in 8 bits, at 20 dB or more (entropy, which clips: 12 dB), in a third of the bytes."""
    result = quantize(cnn, images, scheme="static", calibration=calibration, per_channel=per_channel)
    assert result.changes["Conv"] == 3
    assert result.changes["Add"] == 1
    assert result.changes["Gemm"] == 1
    assert sqnr(cnn, result.model, images) > (12 if calibration == "entropy" else 20)
    assert result.model.weight_bytes() < 0.45 * cnn.weight_bytes()


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_types_are_honoured(cnn, images, quantize, sqnr, weights, activations) -> None:  # type: ignore[no-untyped-def]
    """Weights and zero points have the types of the recipe, and the result runs at 20 dB or more."""
    result = quantize(cnn, images, scheme="static", weights=weights, activations=activations)
    quantize_linear = [node for node in result.model.nodes() if node.op_type == "QuantizeLinear"]
    assert {node.inputs[2].const_value.numpy().dtype for node in quantize_linear} == {np.dtype(activations)}
    kinds = {tensor.numpy().dtype for tensor in result.model.tensors() if len(tensor.shape) == 4}
    assert kinds == {np.dtype(weights)}
    assert sqnr(cnn, result.model, images) > 20


def test_onnxruntime_runs_it_in_integers(cnn, images, quantize, loaded_operators) -> None:  # type: ignore[no-untyped-def]
    """Relu and Clip are absorbed, and no float convolution, addition or product is left in the fused graph."""
    result = quantize(cnn, images, scheme="static")
    fused = loaded_operators(result.model)
    assert fused.count("QLinearConv") == 3
    assert {"QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= set(fused)
    assert not {"Conv", "Relu", "Clip", "Add", "FusedConv"} & set(fused)


def test_names_and_outputs_stay(cnn, images, quantize) -> None:  # type: ignore[no-untyped-def]
    """Inputs and outputs keep names and shapes, and the given model is not touched."""
    before = [node.op_type for node in cnn.nodes()]
    result = quantize(cnn, images, scheme="static")
    assert result.model.inputs == cnn.inputs
    assert [spec.name for spec in result.model.outputs] == ["y"]
    assert [node.op_type for node in cnn.nodes()] == before


def test_a_quantized_output_keeps_its_name(build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """A convolution that ends the graph gives its dequantized values under the old name."""
    weight = rng.normal(0, 0.2, (4, 8, 3, 3)).astype(np.float32)
    model = build([helper.make_node("Conv", ["x", "w"], ["y"], "only")], {"w": weight}, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    assert [spec.name for spec in result.model.outputs] == ["y"]
    assert sqnr(model, result.model, images) > 25


def test_an_excluded_convolution_stays_float_in_onnxruntime_too(  # type: ignore[no-untyped-def]
    cnn, images, quantize, loaded_operators
) -> None:
    """onnxruntime would quantize a float Conv between 8-bit ones by itself; the result keeps it from that."""
    result = quantize(cnn, images, scheme="static", exclude=("conv_3",))
    assert ("conv_3", "Conv: excluded by the recipe") in {(skip.node, skip.reason) for skip in result.skipped}
    assert result.warnings == ()
    assert "Conv" in " ".join(name for name in loaded_operators(result.model) if "QLinear" not in name)


def test_a_lone_depthwise_convolution_is_left(build, images, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """Depthwise between float nodes: nothing to gain, so the model stays as it is, with the reason."""
    weight = rng.normal(0, 0.3, (8, 1, 3, 3)).astype(np.float32)
    model = build(
        [helper.make_node("Conv", ["x", "w"], ["y"], "depthwise", group=8)], {"w": weight}, {"x": ["n", 8, 12, 12]}
    )
    result = quantize(model, images, scheme="static")
    assert not result.changed
    assert result.model is model
    assert any("few products" in skip.reason for skip in result.skipped)


def test_synthetic_data_brings_a_warning(cnn, images, quantize) -> None:  # type: ignore[no-untyped-def]
    """Ranges from made-up inputs are said to be such."""
    assert any("--data" in text for text in quantize(cnn, images, provided=False, scheme="static").warnings)


def test_a_large_model_is_quantized_without_a_probe(cnn, images, quantize, sqnr, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Which would hold its weights several times; the report says what was left out."""
    monkeypatch.setattr(runtime, "SPARE_BYTES", -(10**9))
    result = quantize(cnn, images, scheme="static")
    assert any("sensitivity of single layers was not measured" in warning for warning in result.warnings)
    assert sqnr(cnn, result.model, images) > 15


def test_dead_and_tiny_channels_do_no_harm(build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Channels of zero weights with a large bias, constant outputs included, survive; their bias comes through."""
    weight = rng.normal(0, 0.2, (4, 8, 3, 3)).astype(np.float32)
    weight[1], weight[2] = 0, 1e-12
    weights = {"w": weight, "b": np.asarray([0.1, 7.0, -5.0, 0], np.float32)}
    model = build([helper.make_node("Conv", ["x", "w", "b"], ["y"], "c")], weights, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    assert sqnr(model, result.model, images) > 30


def test_an_all_zero_activation_is_no_catastrophe(cnn, images, quantize) -> None:  # type: ignore[no-untyped-def]
    """Calibrated on zeros alone, the result still runs and is finite on real values."""
    zeros = {"x": np.zeros_like(images["x"])}
    result = quantize(cnn, zeros, scheme="static")
    with session_of(result.model) as session:
        assert np.isfinite(run(session, images)["y"]).all()


def test_values_that_are_not_finite_keep_a_node_float(  # type: ignore[no-untyped-def]
    build, images, quantize, rng
) -> None:
    """A convolution that reads infinities is left alone, and says so; the other one is quantized."""
    node = helper.make_node
    weights = {
        "w": rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32),
        "v": rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32),
        "zero": np.float32(0),
    }
    nodes = [
        node("Div", ["x", "zero"], ["d"], "division"),
        node("Conv", ["d", "w"], ["z"], "broken"),
        node("Conv", ["x", "v"], ["y"], "sound"),
    ]
    model = build(nodes, weights, {"x": ["n", 8, 12, 12]}, outputs=["y", "z"])
    result = quantize(model, images, scheme="static")
    assert result.changes["Conv"] == 1
    assert any(skip.node == "broken" and "infinite or NaN" in skip.reason for skip in result.skipped)


def test_ragged_samples_calibrate(mlp, quantize, sqnr, vectors) -> None:  # type: ignore[no-untyped-def]
    """Static quantization of products with a dynamic axis; 20 dB or more."""
    result = quantize(mlp, vectors, scheme="static", smooth_quant=False, rounding="nearest")
    assert result.changes == {"MatMul": 2, "Gemm": 1}
    assert sqnr(mlp, result.model, vectors) > 20


def test_a_convolution_that_would_lose_its_signal_stays_float(  # type: ignore[no-untyped-def]
    build, images, quantize, rng
) -> None:
    """A huge channel that the weights ignore takes all the levels: the convolution is left, with its ratio."""
    weight = rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32)
    weight[:, 0] = 0
    model = build([helper.make_node("Conv", ["x", "w"], ["y"], "c")], {"w": weight}, {"x": ["n", 8, 12, 12]})
    loud = {"x": images["x"].copy()}
    loud["x"][:, 0] *= 1000
    result = quantize(model, loud, scheme="static", calibration="minmax", smooth_quant=False)
    assert not result.changed
    assert any(skip.node == "c" and "would leave the outputs" in skip.reason for skip in result.skipped)


def test_a_product_takes_its_range_at_run_time_where_that_is_more_exact(  # type: ignore[no-untyped-def]
    build, quantize, rng, operators
) -> None:
    """A large element in one sample costs a fixed range its resolution in all: the product becomes dynamic."""
    weight = rng.normal(0, 0.2, (32, 64)).astype(np.float32)
    weight[0] = 0
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], {"w": weight}, {"x": ["n", 4, 32]})
    values = rng.normal(0, 1, (16, 4, 32)).astype(np.float32)
    values[0, 0, 0] = 60
    result = quantize(model, {"x": values}, scheme="static", calibration="minmax", smooth_quant=False)
    assert result.changes == {"MatMul": 1}
    assert "MatMulInteger" in operators(result.model)
    assert "QuantizeLinear" not in operators(result.model)


def test_shared_weights_are_stored_once(build, images, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """Two convolutions on one weight share its 8-bit form."""
    node = helper.make_node
    weight = rng.normal(0, 0.1, (8, 8, 3, 3)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["a"], "one", pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w"], ["y"], "two", pads=[1, 1, 1, 1]),
    ]
    model = build(nodes, {"w": weight}, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static", smooth_quant=False)
    assert result.changes["Conv"] == 2
    assert sum(len(tensor.shape) == 4 for tensor in result.model.tensors()) == 1
