"""Quantized models in training: taken apart and put together without loss, and better after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from modelpress_compression.encodings.weight import pack
from modelpress_compression.executor import Executor
from modelpress_compression.graph.read import MICROSOFT
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.distill import Distill
from modelpress_compression.passes.distill.fake_quantization import unfold
from modelpress_compression.passes.integers.certificate import certify
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper

Quantized = Callable[..., Model]
FORMS: dict[str, dict[str, Any]] = {
    "static": {"scheme": "static", "smooth_quant": False},
    "static, one scale a tensor": {"scheme": "static", "per_channel": False, "smooth_quant": False},
    "weights of 8 bits": {"scheme": "weight_only", "weights": "int8"},
    "weights of 4 bits": {"scheme": "weight_only", "weights": "int4"},
}


@pytest.fixture(scope="session")
def wide_net(channel_model: Callable[..., Model]) -> Model:
    """Conv-Relu, Conv-Relu, pooling, Gemm, Relu, MatMul, with weights large enough for every form: x -> y [n, 8]."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (24, 16, 3, 3), "w3": (300, 24), "w4": (300, 8)}
    weights = {name: rng.standard_normal(s) / np.sqrt(np.prod(s[1:])) for name, s in shapes.items()}
    weights["w4"] = weights["w4"] / 6
    weights |= {name: rng.standard_normal(size) / 4 for name, size in {"b1": 16, "b2": 24, "b3": 300}.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], name="fc1", transB=1),
        helper.make_node("Relu", ["g"], ["r3"], name="relu3"),
        helper.make_node("MatMul", ["r3", "w4"], ["y"], name="fc2"),
    ]
    return channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 8])


@pytest.fixture
def quantized(wide_net: Model, images: Any, context_of: Callable[..., Context]) -> Quantized:
    """The wide net, or another model, in a form."""

    def make(form: str, model: Model | None = None) -> Model:
        model = wide_net if model is None else model
        return Quantize(QuantizeConfig(**FORMS[form]))(model, context_of(model, {"x": images(64)})).model

    return make


@pytest.mark.parametrize("form", FORMS)
def test_unfolding_keeps_the_answers(form: str, quantized: Quantized, images: Any) -> None:
    """With float weights behind fake quantization a model answers as before, in the executor and in onnxruntime (to
    1e-4 of the largest answer), and there is a float weight for each quantized one."""
    model, x = quantized(form), images(8)
    unfolded = unfold(model, ())
    assert len(unfolded.latents) >= 3
    expected = Executor(model).run({"x": x})["y"]
    got = Executor(unfolded.model, trainable=list(unfolded.latents)).run({"x": x})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with session_of(unfolded.model) as session:
        again = run(session, {"x": x})["y"]
    np.testing.assert_allclose(again, expected, rtol=0, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
def test_folding_gives_the_same_integers(form: str, quantized: Quantized, weights_of: Any) -> None:
    """Untrained float weights become the integers that they came from, to the last bit."""
    model = quantized(form)
    unfolded = unfold(model, ())
    before, after = weights_of(model), weights_of(unfolded.fold(unfolded.model, model))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("form", FORMS)
def test_training_improves_a_quantized_model(
    form: str,
    wide_net: Model,
    quantized: Quantized,
    perturbed: Callable[..., Model],
    images: Any,
    distill: Callable[..., PassResult],
    weights_of: Any,
) -> None:
    """Trained towards the original, a disturbed and quantized model comes nearer to it: its loss falls to a fifth at
    most, in the integers of the file; its nodes, types and scales stay. No 8-bit product saturates afterwards."""
    model = quantized(form, perturbed(wide_net, 0.2))
    result = distill(wide_net, model, {"x": images(256)}, epochs=8, batch_size=16, learning_rate=5e-4)
    assert result.changes["loss_after"] < 0.2 * result.changes["loss_before"]
    assert result.changes["quantized_weights_trained"] >= 3
    proofs = certify(result.model)
    assert bool(proofs) is form.startswith("static")
    assert all(proof.certified for proof in proofs)
    assert any("without VNNI" in note for note in result.notes) is bool(proofs)
    assert [node.op_type for node in result.model.nodes()] == [node.op_type for node in model.nodes()]
    before, after = weights_of(model), weights_of(result.model)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        if "scale" in name or "zero_point" in name:
            np.testing.assert_array_equal(after[name], array)


def test_levels_stay_within_their_range(
    wide_net: Model, quantized: Quantized, images: Any, distill: Callable[..., PassResult], weights_of: Any
) -> None:
    """Steps far beyond the range do not write levels further from the zero point than the file had."""
    model = quantized("static")
    result = distill(wide_net, model, {"x": images(64)}, epochs=2, learning_rate=0.05, feature_weight=0.0)
    before, after = weights_of(model), weights_of(result.model)
    for name, array in before.items():
        if array.dtype == np.int8 and array.ndim > 1:
            assert np.abs(after[name].astype(int)).max() <= np.abs(array.astype(int)).max()


def test_dynamic_quantization_says_why_not(
    wide_net: Model, images: Any, distill: Callable[..., PassResult], context_of: Callable[..., Context]
) -> None:
    """Products that compute in integers are named with the reason and what to do instead."""
    context = context_of(wide_net, {"x": images(16)})
    model = Quantize(QuantizeConfig(scheme="dynamic"))(wide_net, context).model
    result = distill(wide_net, model, {"x": images(64)}, epochs=1)
    reasons = [skip.reason for skip in result.skipped]
    assert any(
        "integers, which have no gradient" in reason and "Distill before quantizing" in reason for reason in reasons
    )


def test_excluded_weights_keep_their_integers(quantized: Quantized) -> None:
    """A quantized weight is excluded by the name of the node that uses it."""
    model = quantized("static")
    names = unfold(model, ("conv2",)).latents
    assert len(names) < len(unfold(model, ()).latents)
    assert not any("w2" in name or "conv2" in name for name in names)


def foreign_model(form: str) -> Model:
    """x [n, 33] -> y [n, 8] by a weight in 4 bits, in blocks of 16, as nobody here writes it."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 16, (8, 33)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, (8, 3)).astype(np.float32)
    zeros = rng.integers(0, 16, (8, 3)).astype(np.uint8)
    if form == "DequantizeLinear":
        four = {"q": levels.T, "z": zeros.T}
        weights: dict[str, Any] = {name: array.astype(ml_dtypes.uint4) for name, array in four.items()} | {"s": scale.T}
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0, block_size=16),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    else:
        filled = np.pad(levels, ((0, 0), (0, 15)))
        weights = {"q": pack(filled, 4).reshape(8, 3, 8), "s": scale, "b": rng.normal(0, 1, 8).astype(np.float32)}
        # onnxruntime takes no notice of packed zero points beside the groups.
        groups = rng.permutation(np.arange(33) // 16).astype(np.int32)
        weights |= {"g": groups} if form == "order" else {"z": pack(zeros, 4)}
        inputs = ["x", "q", "s", "", "g"] if form == "order" else ["x", "q", "s", "z"]
        attributes = {"domain": MICROSOFT, "K": 33, "N": 8, "bits": 4, "block_size": 16}
        nodes = [
            helper.make_node("MatMulNBits", inputs, ["one"], **attributes),
            helper.make_node("MatMulNBits", [*inputs, *[""] * (5 - len(inputs)), "b"], ["two"], **attributes),
            helper.make_node("Sub", ["two", "one"], ["d"]),
            helper.make_node("Add", ["d", "two"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 33])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "0" * 64, 0))


@pytest.mark.parametrize("form", ["DequantizeLinear", "MatMulNBits", "order"])
def test_weights_from_elsewhere(form: str, weights_of: Any) -> None:
    """Blocks of a DequantizeLinear, a product of two users with a bias, and groups of columns: one float weight each,
    the answers of before (to 1e-5 of the largest) and, untrained, the same bytes for all that is read of them."""
    model, x = foreign_model(form), np.random.default_rng(1).standard_normal((5, 33)).astype(np.float32)
    unfolded = unfold(model, ())
    assert len(unfolded.latents) == 1
    with session_of(model, optimize=False) as session:
        expected = run(session, {"x": x})["y"]
    got = Executor(unfolded.model, trainable=list(unfolded.latents)).run({"x": x})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    folded = unfolded.fold(unfolded.model, model)
    with session_of(folded, optimize=False) as session:
        np.testing.assert_array_equal(run(session, {"x": x})["y"], expected)
    for name, array in weights_of(model).items():
        if name != "q" or form == "DequantizeLinear":
            np.testing.assert_array_equal(weights_of(folded)[name], array)


@pytest.mark.parametrize("form", ["static", "static, one scale a tensor"])
def test_learned_scales_come_back(form: str, quantized: Quantized, images: Any) -> None:
    """Untrained they change nothing; trained ones answer in onnxruntime as in training, to two levels of the outputs:
    the scales of biases follow those of inputs and weights."""
    model, x = quantized(form), images(8)
    unfolded = unfold(model, (), scales=True)
    learned = unfolded.scales.trained
    assert len(unfolded.scales.weights) >= 3
    assert len(unfolded.scales.activations) >= 4
    names = [*unfolded.latents, *learned]
    before = Executor(unfolded.model, trainable=names).run({"x": x})["y"]
    np.testing.assert_allclose(before, Executor(model).run({"x": x})["y"], rtol=0, atol=1e-4 * np.abs(before).max())
    trained = unfolded.model.clone()
    rng = np.random.default_rng(0)
    for name in sorted(learned):  # or the order of a set would decide what each of them gets
        value = trained.graph.initializers[name]
        shape = value.const_value.shape.numpy()
        value.const_value = onnx_ir.tensor(rng.uniform(-0.2, 0.2, shape).astype(np.float32), name=name)
    expected = Executor(trained, trainable=names).run({"x": x})["y"]
    assert np.abs(expected - before).max() > 0.02 * np.abs(before).max()
    with session_of(unfolded.fold(trained, model)) as session:
        got = run(session, {"x": x})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    again = unfolded.fold(unfolded.model, model)
    with session_of(again) as session, session_of(model) as plain:
        np.testing.assert_array_equal(run(session, {"x": x})["y"], run(plain, {"x": x})["y"])


def test_excluded_scales_stay(quantized: Quantized) -> None:
    """Those of the activations of a node, by its name, and all that has the same scale; those of a weight."""
    model = quantized("static")
    names = {node.name for node in model.graph if node.op_type == "QuantizeLinear"}
    assert unfold(model, ("*",), scales=True).scales.trained == frozenset()
    one = sorted(names)[0]
    assert len(unfold(model, (one,), scales=True).scales.activations) < len(
        unfold(model, (), scales=True).scales.activations
    )


@pytest.mark.slow
def test_what_is_trained_is_what_is_written(
    wide_net: Model, quantized: Quantized, images: Any, context_of: Callable[..., Context]
) -> None:
    """With scales and without, the file errs less than before, and about as little as the model did in training:
    nothing is trained that is not written."""
    model, losses = quantized("static"), {}
    context = replace(context_of(model, {"x": images(64)}), original=wide_net)
    for scales in (False, True):
        result = Distill(DistillConfig(epochs=8, patience=8, scales=scales, learning_rate=3e-4))(model, context)
        assert result.changes["loss_after"] < result.changes["loss_before"]
        assert ("scales_trained" in result.changes) == scales
        best = min(float(row["held_out_loss"]) for row in result.details if "held_out_loss" in row)
        losses[scales] = float(result.changes["loss_after"])
        assert losses[scales] < 1.5 * best
    assert all(certificate.certified for certificate in certify(result.model))
