"""Errors at the outputs, one tensor and one weight at a time, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.decibels import decibels
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import make_plan
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.ranges.output_error import Trial, open_probe, output_distances, share
from modelpress_compression.passes.quantize.rounding.affine import Range, activation_parameters
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static import preparation
from modelpress_compression.passes.quantize.static.bias_correction import mean_shifts
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.passes.quantize.weights import WeightStore
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
PLAIN = QuantizeConfig(
    scheme="static", smooth_quant=False, bias_correction=False, rounding="nearest", calibration="minmax"
)


def prepared(
    model: Model, arrays: Arrays, folder: Path, config: QuantizeConfig = PLAIN
) -> tuple[StaticQuantizer, Context]:
    context = Context(InputData(model.inputs, dict(arrays)), folder)
    quantizer = prepare_static(model, config, context)
    assert quantizer is not None
    return quantizer, context


def test_the_parts_add_up_to_the_whole(cnn: Model, images: Arrays, tmp_path: Path) -> None:
    """The sum over tensors and weights is within 3 dB of what the quantized model really errs by, on any CPU: the
    weights of the generic target leave no pair of products that saturates."""
    quantizer, context = prepared(cnn, images, tmp_path)
    predicted = quantizer.ranges.error_of(quantizer.plan)
    assert predicted is not None
    measured = output_distances(cnn, quantizer.quantize()[0], context).error
    assert decibels(predicted) == pytest.approx(decibels(measured), abs=3.0)


def test_distances_are_those_ahead_of_softmax(cnn: Model, images: Arrays, tmp_path: Path) -> None:
    """With a softmax behind it, seen through a Reshape, a model errs by as much as without (rtol 1e-5)."""

    def with_softmax(model: Model) -> Model:
        work = model.clone()
        shape = onnx_ir.Value(name="any", const_value=onnx_ir.tensor(np.asarray([-1, 64], np.int64), name="any"))
        work.graph.register_initializer(shape)
        soft = onnx_ir.node("Softmax", [work.graph.outputs[0]])
        moved = onnx_ir.node("Reshape", [soft.outputs[0], shape])
        soft.outputs[0].name, moved.outputs[0].name = "soft", "probabilities"
        moved.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        work.graph.extend([soft, moved])
        work.graph.outputs[0] = moved.outputs[0]
        return work

    quantizer, context = prepared(cnn, images, tmp_path)
    changed = quantizer.quantize()[0]
    plain = output_distances(cnn, changed, context)
    behind = output_distances(with_softmax(cnn), with_softmax(changed), context)
    np.testing.assert_allclose(behind.errors, plain.errors, rtol=1e-5)
    np.testing.assert_allclose(behind.signals, plain.signals, rtol=1e-5)


def test_the_hardest_samples_are_looked_at(
    cnn: Model, images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges chosen on few quiet samples clip the rare peaks of others; looking again, on those where the whole model
    errs most, makes the error at least 3 dB smaller."""
    x = np.asarray(images["x"])
    loud = np.concatenate([x] * 4)[:64].copy()
    loud[::20, :, :2, :2] = 60
    config = replace(PLAIN, calibration="auto")
    found, context = prepared(cnn, {"x": loud}, tmp_path, config)
    monkeypatch.setattr(preparation, "ADDS_UP", np.inf)
    missed, _ = prepared(cnn, {"x": loud}, tmp_path, config)
    with_it, without = (output_distances(cnn, one.quantize()[0], context).error for one in (found, missed))
    assert decibels(with_it) > decibels(without) + 3


def test_an_error_of_nothing() -> None:
    """Outputs that are 0 throughout err by nothing where they stay so, and beyond measure elsewhere."""
    assert (share(1.0, 4.0), share(0.0, 0.0), share(1e-9, 0.0)) == (0.25, 0.0, float("inf"))


def test_a_trial_is_what_it_says(cnn: Model, images: Arrays, tmp_path: Path) -> None:
    """A range that clips everything destroys the output; the tensor's own hardly hurts it; the range of each run, which
    a product's input may have, is no worse than one that is ten times too wide; 0 trials take no run."""
    quantizer, _ = prepared(cnn, images, tmp_path)
    with open_probe(replace(quantizer.setup, model=cnn)) as probe:
        clipped = activation_parameters(Range(0.0, 1e-3), "uint8")
        good = quantizer.ranges.parameters["r1"]
        errors = probe.errors([Trial("r1", parameters=clipped), Trial("r1", parameters=good)])
        assert errors is not None
        assert errors[0] > 0.1
        assert errors[1] < 1e-3
        assert probe.errors([]) == []


def test_the_probe_leaves_the_model_as_it_was(cnn: Model, images: Arrays, tmp_path: Path) -> None:
    """Nodes, inputs and outputs are those of before."""
    before = ([node.op_type for node in cnn.nodes()], cnn.inputs, cnn.outputs)
    quantizer, _ = prepared(cnn, images, tmp_path)
    with open_probe(replace(quantizer.setup, model=cnn)):
        pass
    assert ([node.op_type for node in cnn.nodes()], cnn.inputs, cnn.outputs) == before


def test_auto_ranges_are_no_worse_than_any_method(cnn: Model, images: Arrays, tmp_path: Path) -> None:
    """The predicted error of calibration auto is at most that of each method alone, on the samples it was measured on;
    2 % are left for ranges that count as the same."""
    outlier = {"x": np.asarray(images["x"]).copy()}
    outlier["x"][::7, 0, 0, 0] = 40.0
    errors = {}
    for method in ("auto", "minmax", "percentile", "entropy", "mse", "moving_average"):
        quantizer, _ = prepared(cnn, outlier, tmp_path, replace(PLAIN, calibration=method))
        errors[method] = quantizer.ranges.error_of(quantizer.plan)
    best = errors.pop("auto")
    assert best is not None
    assert all(other is not None and best <= 1.02 * other for other in errors.values())


def test_layers_and_their_errors_are_in_the_report(
    cnn: Model, images: Arrays, quantize: Callable[..., PassResult]
) -> None:
    """Each layer in 8 bits has a row with its error in dB."""
    rows = {row["layer"]: row["error_db"] for row in quantize(cnn, images, scheme="static").details if "layer" in row}
    assert set(rows) == {"conv_1", "depthwise", "conv_3", "head"}
    assert all(float(value) > 15 for value in rows.values())


def test_shifts_are_those_of_the_means(mlp: Model, vectors: Arrays, tmp_path: Path) -> None:
    """The shift of the first product is the mean of what its 8-bit form gives beyond itself, over samples and
    positions, here computed by hand (atol 1e-4). The second has no bias of its own to take it back."""
    plan = make_plan(mlp.graph, [node for node in mlp.graph if node.op_type == "MatMul"])
    x = np.asarray(vectors["x"], np.float64).reshape(-1, 32)
    parameters = {
        name: activation_parameters(Range(*span), "uint8")
        for name, span in {"x": (x.min(), x.max()), "t1": (-1.0, 1.0)}.items()
    }
    context = Context(InputData(mlp.inputs, dict(vectors)), tmp_path)
    shifts = mean_shifts(QuantizationSetup(mlp, plan, PLAIN, NearestRounder(), context), parameters)
    assert set(shifts) == {"m1"}
    node = next(node for node in mlp.graph if node.name == "fc1")
    store = WeightStore(Editor(mlp.clone()), PLAIN, NearestRounder(), context.target)
    rounded = store.layer(node).dequantize()
    read = parameters["x"].fake_quantize(x.astype(np.float32))
    by_hand = (read @ rounded - x @ np.asarray(constant_array(node.inputs[1]), np.float64)).mean(axis=0)
    np.testing.assert_allclose(shifts["m1"], by_hand, atol=1e-4)
