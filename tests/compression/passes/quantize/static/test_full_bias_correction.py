"""Biases corrected in the order of the layers: the means of the quantized model's values are those of the float one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression import mapped
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.static.full_bias_correction import full_shifts
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray

Images = Mapping[str, NDArray[np.float32]]


@pytest.fixture
def quantizer(cnn: Model, images: Images, tmp_path: Path) -> StaticQuantizer:
    """Four-bit weights to the nearest level, biases as they were."""
    config = QuantizeConfig(scheme="static", weights="int4", rounding="nearest", bias_correction=False)
    found = prepare_static(cnn, config, Context(InputData(cnn.inputs, dict(images), True), tmp_path))
    assert found is not None
    return found


def mean_output(model: Model, images: Images) -> NDArray[np.float64]:
    with session_of(model) as session:
        return np.asarray(run(session, dict(images))["y"].mean(axis=0, dtype=np.float64))


def test_means_are_right_at_the_end(cnn: Model, quantizer: StaticQuantizer, images: Images) -> None:
    """What is left of the outputs' mean error is below 15 % of what it was, all layers before included; the means come
    from a part of the images."""
    plan = quantizer.plan
    shifts = full_shifts(replace(quantizer.setup, plan=plan), quantizer.ranges.on(plan))
    wanted = mean_output(cnn, images)
    plain, corrected = (
        mean_output(one.quantize()[0], images) - wanted for one in (quantizer, replace(quantizer, shifts=shifts))
    )
    assert sorted(shifts) == sorted(layer.outputs[0].name or "" for layer in plan.layers)
    assert np.linalg.norm(corrected) < 0.15 * np.linalg.norm(plain)


def test_the_model_is_left_alone(cnn: Model, quantizer: StaticQuantizer, images: Images) -> None:
    """Looking for shifts changes neither the float model nor what the quantizer writes."""
    before = mean_output(quantizer.quantize()[0], images)
    plan = quantizer.plan
    full_shifts(replace(quantizer.setup, plan=plan), quantizer.ranges.on(plan))
    np.testing.assert_array_equal(mean_output(quantizer.quantize()[0], images), before)
    assert "corrected" not in " ".join(node.name or "" for node in quantizer.setup.model.graph)


def test_of_a_large_model_the_rounded_weights_lie_in_a_file(
    quantizer: StaticQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shifts are those of a small one (1e-6), and nothing is left behind."""
    setup, parameters = replace(quantizer.setup, plan=quantizer.plan), quantizer.ranges.on(quantizer.plan)
    expected = full_shifts(setup, parameters)
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 512)
    mapping, opened = mapped._mapped, []

    def counted(tensor: onnx_ir.TensorProtocol, path: Path, offset: int) -> onnx_ir.ExternalTensor:
        opened.append(path.parent.parent)
        return mapping(tensor, path, offset)

    monkeypatch.setattr(mapped, "_mapped", counted)
    before = set(tmp_path.iterdir())
    found = full_shifts(setup, parameters)
    assert len(opened) == len(quantizer.plan.layers)
    assert set(opened) == {tmp_path}
    assert set(tmp_path.iterdir()) == before
    assert sorted(found) == sorted(expected)
    for name, shift in found.items():
        np.testing.assert_allclose(shift, expected[name], rtol=1e-6, atol=1e-9)
