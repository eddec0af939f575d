"""Four bits under static quantization: half the bytes, the kernels of 8 bits, and 8 bits where 4 will not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.executor import Executor
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.distill.fake_quantization import unfold
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.ranges.output_error import Distances
from modelpress_compression.passes.quantize.static import preparation, widening
from modelpress_compression.runtime import run, session_of
from onnx import helper

Apply = Callable[..., PassResult]


@pytest.fixture
def wide(build: Callable[..., Model], rng: np.random.Generator) -> Model:
    """Conv-Relu-Conv-Relu, pooling, Gemm: x [N,16,8,8] -> y [N,64]; every row has 128 weights or more."""
    weights = {
        "w1": rng.normal(0, 0.1, (128, 16, 3, 3)),
        "b1": rng.normal(0, 0.1, 128),
        "w2": rng.normal(0, 0.1, (128, 128, 1, 1)),
        "w3": rng.normal(0, 0.3, (64, 128)),
        "b3": rng.normal(0, 0.1, 64),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "conv_1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], "relu_1"),
        node("Conv", ["r1", "w2"], ["c2"], "conv_2"),
        node("Relu", ["c2"], ["r2"], "relu_2"),
        node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        node("Reshape", ["p", "rows"], ["f"], "flatten"),
        node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    arrays = {**{name: array.astype(np.float32) for name, array in weights.items()}, "rows": np.asarray([0, -1])}
    return build(nodes, arrays, {"x": ["n", 16, 8, 8]})


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.normal(size=(64, 16, 8, 8)).astype(np.float32)}  # as many as there are classes


def widths(model: Model) -> list[int]:
    """Bits of each weight, in the order of the graph."""
    stored = [item for node in model.nodes() for item in stored_weights(node)]
    return [item.weight.bits for item in stored if item.weight.bits < 32]


def test_half_the_bytes_and_the_same_kernels(
    quantize: Apply, wide: Model, samples: Any, sqnr: Any, tmp_path: Path
) -> None:
    """Weights take half of int8's bytes, to 2 %; onnxruntime runs the integer kernels that it runs for int8."""
    results = {bits: quantize(wide, samples, scheme="static", weights=bits).model for bits in ("int8", "int4")}
    assert widths(results["int4"]) == [4, 4, 4]
    weights = sum(value.size for name, value in arrays_of(wide).items() if name.startswith("w"))
    saved = results["int8"].weight_bytes() - results["int4"].weight_bytes()
    assert saved == pytest.approx(weights / 2, rel=0.02)
    kernels = {}
    for bits, model in results.items():
        model.save(tmp_path / "model.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{bits}.onnx")
        ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
        kernels[bits] = [node.op_type for node in onnx.load(tmp_path / f"{bits}.onnx").graph.node]
    assert kernels["int4"] == kernels["int8"]
    assert "QLinearConv" in kernels["int4"]
    assert "QGemm" in kernels["int4"]
    assert sqnr(wide, results["int4"], samples) > 15


def arrays_of(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value.const_value.numpy()) for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def test_it_runs_in_the_executor_and_can_be_trained(quantize: Apply, wide: Model, samples: Any) -> None:
    """The executor agrees with onnxruntime to a level of the outputs; packed weights become latents, and go back."""
    model = quantize(wide, samples, scheme="static", weights="int4").model
    feed = next(iter(InputData(model.inputs, samples).feeds(batch_size=1)))
    with session_of(model) as session:
        wanted = run(session, feed)["y"]
    np.testing.assert_allclose(Executor(model).run(feed)["y"], wanted, atol=np.abs(wanted).max() / 100)
    unfolded = unfold(model, ())
    assert len([name for name, (stored, _) in unfolded.latents.items() if "packed" in stored]) == 3
    again = unfolded.fold(unfolded.model, model)
    with session_of(again) as session:
        np.testing.assert_array_equal(run(session, feed)["y"], wanted)


def test_catastrophes_have_eight_bits(
    quantize: Apply, wide: Model, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the floor between what 4 and 8 bits leave, weights have 8, and the report says so; none is in float32."""
    monkeypatch.setattr(widening, "FLOOR_DB", 30.0)
    result = quantize(wide, samples, scheme="static", weights="int4", rounding="nearest")
    assert 8 in widths(result.model)
    assert any("8 bits instead of 4" in skip.reason for skip in result.skipped)
    assert len(widths(result.model)) == 3


def test_heads_that_the_samples_do_not_vouch_for_have_eight_bits(quantize: Apply, wide: Model, samples: Any) -> None:
    """Of 64 classes 63 samples leave one unseen: the head has 8 bits, and the report says why; with 64 it has 4."""
    few = quantize(wide, {"x": samples["x"][:63]}, scheme="static", weights="int4")
    assert widths(few.model) == [4, 4, 8]
    reasons = [skip.reason for skip in few.skipped if "8 bits instead of 4" in skip.reason]
    assert len(reasons) == 1
    assert "64 classes and the data 63 samples" in reasons[0]
    assert widths(quantize(wide, samples, scheme="static", weights="int4").model) == [4, 4, 4]


def test_the_dearest_errors_have_eight_bits(wide: Model) -> None:
    """Weights that together err by more than they may: those that err most for their size have 8 bits, no more of them
    than it takes; a catastrophe always has."""
    layers = [node for node in wide.graph if node.op_type in ("Conv", "Gemm")]

    def chosen(**errors: float) -> list[str | None]:
        return [layer.name for layer in widening.too_narrow(layers, errors, 10 ** (-1.8))]

    assert chosen(c1=0.005, c2=0.005, y=0.005) == []
    assert chosen(c1=0.01, c2=0.02, y=0.001) == ["conv_2"]
    assert chosen(c1=0.01, c2=0.001, y=0.01) == ["head"]
    assert chosen(c1=0.015, c2=0.015, y=0.015) == ["conv_2", "head"]
    assert chosen(c1=0.001, c2=0.001, y=np.inf) == ["head"]


def test_the_whole_model_is_asked(
    quantize: Apply, wide: Model, samples: Any, sqnr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sum of the errors promises enough and the whole model errs by more, weights have 8 bits still."""
    monkeypatch.setattr(preparation, "with_wide_weights", lambda quantizer: quantizer)
    few = quantize(wide, samples, scheme="static", weights="int4").model
    monkeypatch.setattr(widening, "_ALLOWED", 1e-4)
    many = quantize(wide, samples, scheme="static", weights="int4").model
    assert widths(few).count(8) < widths(many).count(8)
    assert sqnr(wide, many, samples) > sqnr(wide, few, samples) + 3


def test_eight_bits_are_what_four_are_held_against(
    quantize: Apply, wide: Model, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations in 8 bits may err by more with float weights than with rounded ones, whose means make up for theirs:
    where weights in 4 bits take the outputs below those in 8, they have 8 all the same."""

    def distances(original: Model, changed: Model, *rest: Any, **options: Any) -> Distances:
        found = widths(changed)
        error = 0.05 if not found else 0.03 if 4 in found else 0.001
        return Distances(np.full(4, error), np.ones(4))

    monkeypatch.setattr(widening, "output_distances", distances)
    assert widths(quantize(wide, samples, scheme="static", weights="int4").model) == [8, 8, 8]


def test_what_is_right_in_eight_bits_stays_so() -> None:
    """A sample that errs less than in 8 bits, where both err much, makes up for none that errs more; what is not finite
    is without bound."""
    plain = Distances(np.asarray([0.3, 0.01, 0.01, 0.01]), np.ones(4))

    def broken(*errors: float) -> float:
        return widening._broken(Distances(np.asarray(errors), np.ones(4)), plain)

    assert broken(0.1, 0.05, 0.01, 0.01) == pytest.approx(0.01)
    assert broken(0.3, 0.01, 0.01, 0.0) == 0
    assert broken(0.3, np.inf, 0.01, 0.01) == np.inf


def test_what_hard_samples_show_of_four_bits(
    quantize: Apply, wide: Model, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight whose 4 bits turn out to be a catastrophe on the hardest samples has 8, and is not left in float32."""
    measured, distances, calls = preparation.measure_errors, preparation._distances, list[int]()

    def harder(*given: Any) -> Any:
        found = measured(*given)
        calls.append(1)
        assert found is not None
        return found if len(calls) == 1 else replace(found, weight_errors={**found.weight_errors, "c2": 0.5})

    def closer(*given: Any) -> Distances:
        found = distances(*given)
        return replace(found, errors=found.errors * 0.5 ** len(calls))

    monkeypatch.setattr(preparation, "ADDS_UP", -np.inf)
    monkeypatch.setattr(preparation, "measure_errors", harder)
    monkeypatch.setattr(preparation, "_distances", closer)
    assert widths(quantize(wide, samples, scheme="static", weights="int4").model) == [4, 8, 4]
    assert len(calls) == 2


def test_activations_alone_are_beside_float_weights(wide: Model, samples: Any, tmp_path: Path) -> None:
    """onnxruntime, which quantizes weights between pairs of its own accord, computes as torch does; what is compared
    differs by some activations that lie on the other side of a step."""
    data = InputData(wide.inputs, samples)
    quantizer = prepare_static(wide, QuantizeConfig(scheme="static", weights="int4"), Context(data, tmp_path))
    assert quantizer is not None
    alone = widening.without_weights(quantizer)
    with session_of(alone) as session:
        found = run(session, samples)["y"].astype(np.float64)
    expected = Executor(alone).run(samples)["y"]
    assert np.square(found - expected).sum() < 1e-5 * np.square(expected).sum()


def test_short_rows_have_eight_bits(quantize: Apply, cnn: Model, images: Any) -> None:
    """Depthwise convolutions and heads of few inputs are stored in 8 bits, the rest in 4."""
    assert widths(quantize(cnn, images, scheme="static", weights="int4").model) == [4, 8, 4, 8]
