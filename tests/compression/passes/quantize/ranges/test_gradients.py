"""Errors at the outputs from gradients, against those of trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.decibels import decibels
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.ranges import gradients
from modelpress_compression.passes.quantize.ranges.gradients import gradient_probe
from modelpress_compression.passes.quantize.ranges.output_error import Trial, open_probe
from modelpress_compression.passes.quantize.ranges.sensitivity import SensitivityProbe
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from numpy.typing import NDArray

PLAIN = QuantizeConfig(
    scheme="static", smooth_quant=False, bias_correction=False, rounding="nearest", calibration="minmax"
)
Build = Callable[..., Model]
LAYERS = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 64] x) => (float[n, {outputs}] y) {{
  h = MatMul(x, w1)
  {middle}
  y = MatMul(z, w2)
}}
"""


def layers(build: Build, middle: str, outputs: int = 3) -> Model:
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((64, 128)).astype(np.float32),
        "w2": rng.standard_normal((128, outputs)).astype(np.float32),
    }
    return build(LAYERS.format(middle=middle, outputs=outputs), weights)


def setup_of(model: Model, arrays: Mapping[str, NDArray[Any]], folder: Path) -> tuple[QuantizationSetup, list[Trial]]:
    """With a trial for each activation, in its own range, and each weight."""
    quantizer = prepare_static(model, PLAIN, Context(InputData(model.inputs, dict(arrays)), folder))
    assert quantizer is not None
    plan = quantizer.setup.plan
    names = [item.value.name or "" for item in plan.activations.values() if item.has_own_range]
    trials = [Trial(name, parameters=quantizer.ranges.parameters[name]) for name in names]
    return quantizer.setup, [*trials, *(Trial(node.outputs[0].name or "", is_weight=True) for node in plan.layers)]


def vectors() -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}


def test_few_outputs_of_a_linear_model_are_exact(model_from_text: Build, tmp_path: Path) -> None:
    """Three outputs take unit vectors, and a linear model has no higher orders: the errors are those of trials, to
    float32's rounding of errors that are a hundredth of the outputs (rtol 1e-3)."""
    setup, trials = setup_of(layers(model_from_text, "z = Identity(h)"), vectors(), tmp_path)
    probe = gradient_probe(setup)
    assert probe is not None
    with open_probe(setup) as exact:
        np.testing.assert_allclose(probe.errors(trials) or [], exact.errors(trials) or [], rtol=1e-3)
    assert len(trials) == 4


def test_estimates_are_near_what_trials_find(cnn: Model, images: Mapping[str, NDArray[Any]], tmp_path: Path) -> None:
    """8 samples in 4 directions: each within 4 dB, the sum within 1.5 dB."""
    setup, trials = setup_of(cnn, images, tmp_path)
    probe = gradient_probe(setup)
    assert probe is not None
    with open_probe(setup) as exact:
        found, true = probe.errors(trials), exact.errors(trials)
    assert found is not None
    assert true is not None
    np.testing.assert_allclose([decibels(one) for one in found], [decibels(one) for one in true], atol=4.0)
    assert decibels(sum(found)) == pytest.approx(decibels(sum(true)), abs=1.5)
    assert probe.errors(trials) == found  # the signs are the same each time


def test_what_nothing_differentiable_precedes_has_an_error_too(model_from_text: Build, tmp_path: Path) -> None:
    """An activation that comes out of a table, by integers alone."""
    rng = np.random.default_rng(2)
    model = model_from_text(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (int64[n, 4] ids) => (float[n, 4, 24] y) {
          rows = Gather(table, ids)
          y = MatMul(rows, w)
        }
        """,
        {
            "table": rng.standard_normal((10, 64)).astype(np.float32),
            "w": rng.standard_normal((64, 24)).astype(np.float32),
        },
    )
    setup, trials = setup_of(model, {"ids": rng.integers(0, 10, (8, 4))}, tmp_path)
    probe = gradient_probe(setup)
    assert probe is not None
    with open_probe(setup) as exact:
        found, true = probe.errors(trials), exact.errors(trials)
    np.testing.assert_allclose(np.log10(found or []), np.log10(true or []), atol=0.3)


def test_trials_take_over_where_gradients_are_not_finite(model_from_text: Build, tmp_path: Path) -> None:
    """The root of what is zero has an infinite gradient; the error is measured all the same."""
    rooted = layers(model_from_text, "p = Sub(h, h)\n  q = Sqrt(p)\n  z = Add(h, q)", outputs=16)
    setup, trials = setup_of(rooted, vectors(), tmp_path)
    probe = gradient_probe(setup)
    assert probe is not None
    assert probe.errors(trials) is None
    with open_probe(setup) as exact:
        assert SensitivityProbe(setup).errors(trials) == exact.errors(trials)


def test_gradients_that_would_not_fit_are_tried_out(
    model_from_text: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the activations of one sample and their gradients take too much memory, each error is found by its runs."""
    setup, trials = setup_of(layers(model_from_text, "z = Relu(h)", outputs=16), vectors(), tmp_path)
    monkeypatch.setattr(gradients, "MAX_GRADIENT_BYTES", 64)
    assert gradient_probe(setup) is None
    with open_probe(setup) as exact:
        assert SensitivityProbe(setup).errors(trials) == exact.errors(trials)


def test_by_trial_asks_no_gradients(model_from_text: Build, tmp_path: Path) -> None:
    """What the whole model's error has refuted is not asked again."""
    setup, trials = setup_of(layers(model_from_text, "z = Relu(h)", outputs=16), vectors(), tmp_path)
    with open_probe(setup) as exact:
        assert SensitivityProbe(setup, by_trial=True).errors(trials) == exact.errors(trials)
    assert SensitivityProbe(setup).errors(trials) != SensitivityProbe(setup, by_trial=True).errors(trials)


def test_the_model_stays_as_it_was(cnn: Model, images: Mapping[str, NDArray[Any]], tmp_path: Path) -> None:
    """Nodes, inputs and outputs are those of before."""
    setup, _ = setup_of(cnn, images, tmp_path)
    before = ([node.op_type for node in cnn.nodes()], cnn.inputs, cnn.outputs)
    assert gradient_probe(replace(setup, model=cnn)) is not None
    assert ([node.op_type for node in cnn.nodes()], cnn.inputs, cnn.outputs) == before
