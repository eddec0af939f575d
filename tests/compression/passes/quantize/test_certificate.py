"""Certificates of whole models, held against the saturating arithmetic."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.integers.certificate import certify, keep_within_limits
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.pipeline.run import Result, compress
from modelpress_compression.recipe import Recipe
from modelpress_compression.report.html import render_html
from modelpress_compression.runtime import run, session_of
from modelpress_compression.target import Target
from numpy.typing import NDArray
from onnx import helper

Arrays = Mapping[str, NDArray[np.float32]]
NODE = helper.make_node


@pytest.fixture(scope="module")
def emulate() -> Callable[..., Model]:
    """`emulate(model, saturating=...)` of the benchmarks: the arithmetic written out."""
    path = Path(__file__).parents[4] / "benchmarks" / "saturating_products.py"
    spec = importlib.util.spec_from_file_location("saturating_products", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Model] = module.emulate
    return function


def quantized(model: Model, arrays: Arrays, work: Path, cpu: str, **options: object) -> PassResult:
    """The pass for a target."""
    context = Context(InputData(model.inputs, dict(arrays)), work, target=Target(cpu=cpu))
    return Quantize(QuantizeConfig(**options))(model, context)  # type: ignore[arg-type]


def answers(model: Model, arrays: Arrays) -> NDArray[np.float32]:
    """The first output for all samples at once."""
    with session_of(model) as session:
        return np.asarray(next(iter(run(session, dict(arrays)).values())))


def certificates(result: PassResult) -> list[Mapping[str, str | int | float]]:
    """The rows of the details that are certificates."""
    return [row for row in result.details if "without_vnni" in row]


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_certified_models_answer_the_same_in_saturating_arithmetic(cnn, images, emulate, tmp_path, scheme) -> None:  # type: ignore[no-untyped-def]
    """Written-out integers equal onnxruntime's to 1e-5; saturation changes nothing, bit for bit."""
    # Large activations of one sign are where saturation would show.
    loud = {"x": np.abs(images["x"])}
    result = quantized(cnn, loud, tmp_path, "generic", scheme=scheme)
    exact, saturating = (answers(emulate(result.model, saturating=value), loud) for value in (False, True))
    np.testing.assert_array_equal(saturating, exact)
    np.testing.assert_allclose(exact, answers(result.model, loud), rtol=1e-5, atol=1e-5)


def test_others_do_not(mlp, vectors, emulate, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Without the reduction the same layers saturate, and the answers move by over 1 % of their size."""
    loud = {"x": np.abs(vectors["x"])}
    result = quantized(mlp, loud, tmp_path, "vnni", scheme="static")
    assert not any("exact" in str(row["without_vnni"]) for row in certificates(result))
    exact, saturating = (answers(emulate(result.model, saturating=value), loud) for value in (False, True))
    assert np.abs(saturating - exact).max() > 0.01 * np.abs(exact).max()


def test_the_emulation_is_that_of_single_pairs(build, rng, emulate, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A convolution written out equals a loop over pairs, channels fastest, padding at the zero point, bit for bit."""
    weight = rng.choice([-1.0, 0.9, 1.0], (4, 5, 3, 3)).astype(np.float32)
    model = build([NODE("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])], {"w": weight}, {"x": ["n", 5, 5, 5]})
    arrays = {"x": rng.normal(0.5, 1, (2, 5, 5, 5)).astype(np.float32)}
    work = quantized(model, arrays, tmp_path, "vnni", scheme="static", bias_correction=False).model
    producer = next(node for node in work.nodes() if node.op_type == "Conv")
    x, w = (value.producer() for value in producer.inputs[:2])
    scale, zero = (value.const_value.numpy() for value in x.inputs[1:])
    levels, w_scale = (value.const_value.numpy() for value in w.inputs[:2])
    stored = np.clip(np.rint(arrays["x"] / scale) + zero, 0, 255).astype(np.int64)
    padded = np.pad(stored, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=int(zero))
    rows = np.moveaxis(levels, 1, -1).reshape(4, -1).astype(np.int64)
    expected = np.zeros((2, 4, 5, 5))
    for row in range(5):
        for column in range(5):
            patch = np.moveaxis(padded[:, :, row : row + 3, column : column + 3], 1, -1).reshape(2, 1, -1)
            products = np.pad(patch * rows, ((0, 0), (0, 0), (0, 1))).reshape(2, 4, -1, 2).sum(axis=3)
            assert (products > 32767).any()
            sums = np.clip(products, -32768, 32767).sum(axis=2) - int(zero) * rows.sum(axis=1)
            expected[:, :, row, column] = sums * w_scale * scale
    y = next(use.node for use in producer.outputs[0].uses() if use.node.op_type == "QuantizeLinear")
    y_scale, y_zero = (value.const_value.numpy() for value in y.inputs[1:])
    requantized = (np.clip(np.rint(expected / y_scale) + int(y_zero), 0, 255) - int(y_zero)) * y_scale
    np.testing.assert_allclose(answers(emulate(work, saturating=True), arrays), requantized, atol=1e-5)


def test_every_layer_is_certified_with_its_reason(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Rows name the node, how many channels gave up resolution, and why it is exact; the note sums them up."""
    result = quantized(cnn, images, tmp_path, "generic", scheme="static")
    rows = {str(row["node"]): row for row in certificates(result)}
    assert set(rows) == {"conv_1", "depthwise", "conv_3", "head"}
    assert "single products of a depthwise convolution" in str(rows["depthwise"]["without_vnni"])
    assert rows["conv_1"]["without_vnni"] == "exact: pairs of products reach 32640 of 32767"
    assert 0 < int(rows["conv_1"]["channels_reduced"]) <= int(rows["conv_1"]["channels"]) == 16
    assert result.notes[0].startswith("No saturation without VNNI: 4 of 4 layers certified; ")


def test_vnni_reduces_nothing_and_says_so(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Nothing gives up resolution; the note counts what happens to be free of saturation."""
    result = quantized(cnn, images, tmp_path, "vnni", scheme="static")
    assert {row["channels_reduced"] for row in certificates(result)} == {0}
    assert result.notes == (
        "Saturation without VNNI was allowed (target.cpu: vnni): 1 of 4 layers certified to be free of it",
    )


@pytest.mark.parametrize("cpu", ["vnni", "generic"])
def test_unsigned_weights_are_exact_anyway(cnn, images, tmp_path, cpu) -> None:  # type: ignore[no-untyped-def]
    """Their kernels widen to 16 bits before they multiply."""
    result = quantized(cnn, images, tmp_path, cpu, scheme="static", weights="uint8")
    assert {row["channels_reduced"] for row in certificates(result)} == {0}
    assert all("unsigned weights" in str(row["without_vnni"]) for row in certificates(result))


@pytest.mark.parametrize("per_channel", [True, False])
def test_recurrent_layers_are_certified(build, rng, tmp_path, per_channel) -> None:  # type: ignore[no-untyped-def]
    """Both weights of an LSTM have a row; an odd number of inputs does not shift the pairs of the next gate."""
    weights = {name: rng.uniform(0.5, 1, (1, 64, size)).astype(np.float32) for name, size in (("w", 9), ("r", 16))}
    node = NODE("LSTM", ["x", "w", "r"], ["y"], "lstm", hidden_size=16)
    model = build([node], weights, {"x": [3, 1, 9]})
    arrays = {"x": rng.normal(0, 1, (4, 3, 1, 9)).astype(np.float32)}
    for cpu, word in (("generic", "exact"), ("vnni", "saturate")):
        result = quantized(model, arrays, tmp_path, cpu, scheme="dynamic", per_channel=per_channel)
        assert [row["node"] for row in certificates(result)] == ["lstm/DynamicQuantizeLSTM"] * 2
        assert all(word in str(row["without_vnni"]) for row in certificates(result))


def test_attention_is_certified(build, rng, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """QAttention sums over the rows of its weight."""
    weights = {"w": rng.uniform(0.5, 1, (32, 96)).astype(np.float32), "b": np.zeros(96, np.float32)}
    node = NODE("Attention", ["x", "w", "b"], ["y"], "attention", domain="com.microsoft", num_heads=4)
    model = build([node], weights, {"x": ["n", 5, 32]})
    arrays = {"x": rng.normal(0, 1, (4, 5, 32)).astype(np.float32)}
    result = quantized(model, arrays, tmp_path, "generic", scheme="dynamic")
    assert [(row["operator"], row["channels"], row["channels_reduced"]) for row in certificates(result)] == [
        ("QAttention", 96, 96)
    ]
    assert "exact" in str(certificates(result)[0]["without_vnni"])


def test_sums_that_can_leave_32_bits_are_not_certified(build, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With VNNI they saturate, without they wrap around: 70,000 terms of one sign are too many."""
    weights = {"w": np.ones((70_000, 2), np.float32)}
    model = build([NODE("MatMul", ["x", "w"], ["y"], "wide")], weights, {"x": ["n", 70_000]})
    result = quantized(model, {"x": np.ones((1, 70_000), np.float32)}, tmp_path, "generic", scheme="dynamic")
    assert certificates(result)[0]["without_vnni"] == "sums of 2 of 2 outputs can leave 32 bits"
    assert "0 of 1 layers certified" in result.notes[0]


@pytest.mark.parametrize("cpu", ["generic", "vnni"])
def test_the_recipe_s_target_reaches_the_report(cnn, images, cpu) -> None:  # type: ignore[no-untyped-def]
    """report.json has the note and the rows of the step, and the page shows both."""
    document = {
        "version": 1,
        "steps": [{"quantize": {"scheme": "static"}}],
        "target": {"cpu": cpu},
        "benchmark": {"rounds": 5},
    }
    result: Result = compress(cnn, Recipe.from_dict(document), data=images)
    (step,) = result.report["steps"]
    assert ("No saturation without VNNI" in step["notes"][0]) is (cpu == "generic")
    assert sum("without_vnni" in row for row in step["details"]) == 4
    page = render_html(result.report)
    assert step["notes"][0] in page
    assert "without vnni" in page


def test_models_without_integers_have_no_certificate(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """float16 says nothing of saturation."""
    result = quantized(cnn, images, tmp_path, "generic", scheme="float16")
    assert result.details == ()
    assert result.notes == ()


def test_gptq_is_kept_within_the_limits_too(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Whatever rounds the weights, they are certified, and nearly all of its levels stay."""
    loud = {"x": np.abs(images["x"])}
    result = quantized(cnn, loud, tmp_path, "generic", scheme="static", rounding="gptq")
    assert all("exact" in str(row["without_vnni"]) for row in certificates(result))
    assert any(int(row["channels_reduced"]) for row in certificates(result))


def test_a_finished_model_can_be_kept_within_the_limits(cnn, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Weights made for VNNI saturate; moved to the nearest levels that do not, every layer is certified, and a second
    time there is nothing to move."""
    result = quantized(cnn, images, tmp_path, "vnni", scheme="static")
    work = result.model.clone()
    assert not all(item.certified for item in certify(work))
    assert keep_within_limits(work) > 0
    assert all(item.certified for item in certify(work))
    assert keep_within_limits(work) == 0


def test_moved_pairs_of_dynamic_products_stay_near(mlp: Model, vectors: Arrays, tmp_path: Path) -> None:
    """Levels whose scale stands behind the product move by what saturates alone: the weights keep 15 dB."""
    result = quantized(mlp, vectors, tmp_path, "vnni", scheme="dynamic")
    work = result.model.clone()
    assert keep_within_limits(work) > 0
    assert all(item.certified for item in certify(work))
    pairs = zip(result.model.nodes(), work.nodes(), strict=True)
    weights = [(old.weight, new.weight) for pair in pairs for old, new in zip(*map(stored_weights, pair), strict=True)]
    assert len(weights) == 3
    for old, new in weights:
        before, after = old.dequantize(), new.dequantize()
        assert np.square(after - before).sum() < 10**-1.5 * np.square(before).sum()
