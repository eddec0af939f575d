"""What all schemes have in common, float16, and fused nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.graph.edit import Editor
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.expand import expand_fused
from modelpress_compression.passes.quantize.float16 import store_in_float16
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.passes.quantize.report import Findings
from onnx import helper

NODE = helper.make_node


def test_auto_is_refused() -> None:
    """The pipeline resolves 'auto'; the pass says so."""
    with pytest.raises(ValueError, match="'static' and 'dynamic'"):
        Quantize(QuantizeConfig(scheme="auto"))


@pytest.mark.parametrize("scheme", ["static", "dynamic", "float16"])
def test_a_second_run_changes_nothing(mlp, vectors, quantize, scheme) -> None:  # type: ignore[no-untyped-def]
    """A quantized model is recognized and given back as it is."""
    once = quantize(mlp, vectors, scheme=scheme)
    again = quantize(once.model, vectors, scheme=scheme)
    assert once.changed
    assert not again.changed
    assert again.model is once.model
    assert "already" in again.skipped[0].reason


@pytest.mark.parametrize("scheme", ["static", "dynamic", "float16"])
def test_two_runs_at_once_do_not_meet(cnn, mlp, images, vectors, quantize, scheme) -> None:  # type: ignore[no-untyped-def]
    """Threads over the same and over different models give what single runs give."""
    work = [(cnn, images), (mlp, vectors), (cnn, images), (mlp, vectors)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda pair: quantize(*pair, scheme=scheme), work))
    for (model, arrays), result in zip(work, parallel, strict=True):
        alone = quantize(model, arrays, scheme=scheme)
        assert result.changes == alone.changes
        assert [t.tobytes() for t in result.model.tensors()] == [t.tobytes() for t in alone.model.tensors()]


@pytest.fixture
def reader(build, rng):  # type: ignore[no-untyped-def]
    """An embedding, a product with bias, one over 300 inputs, an LSTM, a Gemm with bias: x [n, 7] of words -> y."""
    weights = {
        "table": rng.normal(0, 1, (70, 64)),
        "w1": rng.normal(0, 0.1, (64, 300)),
        "b1": rng.normal(0, 0.1, 300),
        "w2": rng.normal(0, 0.1, (300, 24)),
        "w": rng.normal(0, 0.2, (2, 64, 24)),
        "r": rng.normal(0, 0.2, (2, 64, 16)),
        "w3": rng.normal(0, 0.1, (5, 224)),
        "b3": rng.normal(0, 0.1, 5),
    }
    nodes = [
        NODE("Gather", ["table", "x"], ["e"], "embed"),
        NODE("MatMul", ["e", "w1"], ["m1"], "one"),
        NODE("Add", ["m1", "b1"], ["a1"], "bias"),
        NODE("Tanh", ["a1"], ["t1"], "tanh"),
        NODE("MatMul", ["t1", "w2"], ["m2"], "two"),
        NODE("Transpose", ["m2"], ["s"], "steps", perm=[1, 0, 2]),
        NODE("LSTM", ["s", "w", "r"], ["h"], "lstm", hidden_size=16, direction="bidirectional"),
        NODE("Transpose", ["h"], ["u"], "samples", perm=[2, 0, 1, 3]),
        NODE("Reshape", ["u", "rows"], ["f"], "flat"),
        NODE("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    return build(nodes, {**constants, "rows": np.asarray([-1, 224])}, {"x": ["n", 7]}, types={"x": 7})


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "static", "smooth_quant": False},
        {"scheme": "dynamic"},
        {"scheme": "dynamic", "per_channel": False},
        {"scheme": "weight_only"},
        {"scheme": "weight_only", "per_channel": False},
        {"scheme": "weight_only", "weights": "int4", "block_size": 16},
        {"scheme": "float16"},
    ],
    ids=str,
)
def test_parameters_stay(cnn, images, reader, rng, quantize, options) -> None:  # type: ignore[no-untyped-def]
    """Whatever the format, a quantized model counts the parameters of before, and no more zeros than its levels say:
    a twentieth of the weights in 8 bits, a sixth in 4."""
    for model, arrays in ((cnn, images), (reader, {"x": rng.integers(0, 70, (16, 7))})):
        result = quantize(model, arrays, **options)
        before, after = model_stats(model), model_stats(result.model)
        assert after.parameters == before.parameters
        share = 1 / 6 if options.get("weights") == "int4" else 1 / 20
        assert before.nonzero_parameters - after.nonzero_parameters <= share * before.parameters
        assert sum(layer.parameters for layer in after.layers) == after.parameters


def test_a_glob_without_a_match_is_warned_of(mlp, vectors, quantize) -> None:  # type: ignore[no-untyped-def]
    """`exclude` takes globs on node names; one that matches nothing is likely a mistake."""
    result = quantize(mlp, vectors, scheme="dynamic", exclude=("fc1", "head*"))
    assert result.changes == {"MatMul": 1, "Gemm": 1}
    assert result.warnings == ("exclude: 'head*' matches no node.",)


def test_opset_12_is_left_with_the_reason(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """Per-channel scales need opset 13."""
    model = build([NODE("MatMul", ["x", "w"], ["y"])], {"w": np.ones((32, 32), np.float32)}, {"x": [1, 32]}, opset=12)
    result = quantize(model, {"x": np.ones((2, 32), np.float32)}, scheme="static")
    assert "opset 12" in result.skipped[0].reason


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only", "float16"])
def test_a_weight_that_a_caller_may_override_stays(build, quantize, vectors, rng, scheme) -> None:  # type: ignore[no-untyped-def]
    """Of two equal layers only that with a weight of its own is quantized; the other's is an input with a default."""
    nodes = [NODE("MatMul", ["x", "w"], ["h"], name="open"), NODE("MatMul", ["h", "v"], ["y"], name="own")]
    size = vectors["x"].shape[-1]
    weights = {name: rng.normal(0, 0.2, (size, size)).astype(np.float32) for name in ("w", "v")}
    model = build(nodes, weights, {"x": ["n", 5, size], "w": [size, size]})
    result = quantize(model, vectors, scheme=scheme)
    assert result.changed
    assert result.model.graph.initializers["w"].is_graph_input()
    np.testing.assert_array_equal(result.model.graph.initializers["w"].const_value.numpy(), weights["w"])
    assert "v" not in result.model.graph.initializers


def test_the_deadline_is_kept(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A deadline in the past ends calibration."""
    context = Context(InputData(cnn.inputs, images), tmp_path, deadline=0.0)
    with pytest.raises(TimeLimitError):
        Quantize(QuantizeConfig(scheme="static"))(cnn, context)


@pytest.mark.parametrize("activation", ["Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"])
def test_fused_conv_is_expanded_exactly(build, sqnr, images, rng, activation) -> None:  # type: ignore[no-untyped-def]
    """Conv, residual addition and activation compute what FusedConv does: over 120 dB."""
    parameters = {"Clip": [-0.5, 1.5], "LeakyRelu": [0.1], "HardSigmoid": [0.25, 0.4]}.get(activation)
    weights = {"w": rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32), "b": rng.normal(0, 1, 8).astype(np.float32)}
    extra: dict[str, Any] = {"activation_params": parameters} if parameters else {}
    node = NODE(
        "FusedConv", ["x", "w", "b", "x"], ["y"], "fused",
        domain="com.microsoft", activation=activation, pads=[1, 1, 1, 1], **extra,
    )  # fmt: skip
    model = build([node], weights, {"x": ["n", 8, 12, 12]})
    expanded = model.clone()
    assert expand_fused(expanded, Editor(expanded)) == 1
    assert [node.op_type for node in expanded.nodes()] == ["Conv", "Add", activation]
    assert sqnr(model, expanded, images) > 120


def test_fused_nodes_are_quantized(build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """FusedConv and FusedGemm count as Conv and Gemm afterwards; 20 dB or more."""
    weights = {
        "w": rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32),
        "g": rng.normal(0, 0.05, (16, 1152)).astype(np.float32),
        "c": rng.normal(0, 0.1, 16).astype(np.float32),
    }
    domain = "com.microsoft"
    nodes = [
        NODE("FusedConv", ["x", "w"], ["a"], "conv", domain=domain, activation="Relu", pads=[1, 1, 1, 1]),
        NODE("Flatten", ["a"], ["f"], "flatten"),
        NODE("FusedGemm", ["f", "g", "c"], ["y"], "gemm", domain=domain, activation="LeakyRelu",
             activation_alpha=0.2, transB=1),
    ]  # fmt: skip
    model = build(nodes, weights, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    assert result.changes["Conv"] == 1
    assert result.changes["Gemm"] == 1
    assert sqnr(model, result.model, images) > 20


def test_float16_halves_and_keeps_types(cnn, images, quantize, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Half the bytes, 50 dB or more, inputs and outputs still float32."""
    result = quantize(cnn, images, scheme="float16")
    assert result.changes == {"Conv": 3, "Gemm": 1}
    assert result.model.weight_bytes() < 0.52 * cnn.weight_bytes()
    assert [spec.dtype for spec in (*result.model.inputs, *result.model.outputs)] == ["float32", "float32"]
    assert sqnr(cnn, result.model, images) > 50


def test_float16_does_not_overflow_in_activations(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Activations beyond 65504 do no harm, since only weights are stored in float16: over 50 dB."""
    weights = {"w": rng.normal(0, 1000, (32, 32)).astype(np.float32), "v": rng.normal(0, 1, (32, 8)).astype(np.float32)}
    nodes = [NODE("MatMul", ["x", "w"], ["a"], "large"), NODE("MatMul", ["a", "v"], ["y"], "next")]
    model = build(nodes, weights, {"x": ["n", 4, 32]})
    samples = {"x": rng.normal(0, 100, (4, 4, 32)).astype(np.float32)}
    result = quantize(model, samples, scheme="float16")
    assert result.changes == {"MatMul": 2}
    assert result.model.weight_bytes() <= 0.5 * model.weight_bytes()
    assert sqnr(model, result.model, samples) > 50


@pytest.mark.parametrize(("factor", "reason"), [(1e6, "beyond float16"), (1e-9, "too small")])
def test_weights_outside_float16_stay(build, quantize, sqnr, rng, factor, reason) -> None:  # type: ignore[no-untyped-def]
    """A weight that overflows or vanishes stays float32 with the reason; the other is converted: over 50 dB."""
    weights = {
        "w": (rng.normal(0, 1, (32, 32)) * factor).astype(np.float32),
        "scale": np.float32(1 / factor),
        "v": rng.normal(0, 1, (32, 8)).astype(np.float32),
    }
    nodes = [
        NODE("MatMul", ["x", "w"], ["a"], "odd"),
        NODE("Mul", ["a", "scale"], ["b"], "rescale"),
        NODE("MatMul", ["b", "v"], ["y"], "plain"),
    ]
    model = build(nodes, weights, {"x": ["n", 4, 32]})
    samples = {"x": rng.normal(0, 1, (4, 4, 32)).astype(np.float32)}
    result = quantize(model, samples, scheme="float16")
    assert result.changes == {"MatMul": 1}
    assert any(skip.node == "odd" and reason in skip.reason for skip in result.skipped)
    assert sqnr(model, result.model, samples) > 50


def test_stored_float16_is_the_rounded_weight(mlp) -> None:  # type: ignore[no-untyped-def]
    """A Cast in front of each use, and nothing else changes."""
    copy = mlp.clone()
    store_in_float16(copy, (), Findings())
    casts = [node for node in copy.nodes() if node.op_type == "Cast"]
    assert len(casts) == 5
    assert all(node.inputs[0].dtype == onnx_ir.DataType.FLOAT16 for node in casts)


def test_a_large_model_is_written_with_external_data(mlp, vectors, quantize, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Beyond the threshold weights go to a file of their own all the way; dynamic quantization does not mind."""
    monkeypatch.setattr("modelpress_compression.model.EXTERNAL_DATA_THRESHOLD_BYTES", 1000)
    assert quantize(mlp, vectors, scheme="dynamic").changes == {"MatMul": 2, "Gemm": 1}
    assert quantize(mlp, vectors, scheme="static", smooth_quant=False, rounding="nearest").changes == {
        "MatMul": 2,
        "Gemm": 1,
    }
