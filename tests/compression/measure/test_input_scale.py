"""Whether inputs have the scale of training, told by biases and running variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.measure.input_scale import Moments, scale_warnings
from onnx import helper

RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((16, 3, 8, 8)).astype(np.float32)
FILTERS = RNG.standard_normal((6, 3, 3, 3)).astype(np.float32) / np.sqrt(27)
Network = Callable[..., Model]


def data(model: Model, factor: float) -> InputData:
    return InputData.from_arrays({"x": NORMAL * np.float32(factor)}, model.inputs)


@pytest.fixture
def biased(channel_model: Network) -> Model:
    """A Conv with a bias, behind a division by a constant."""
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "w", "b"], ["y"], name="conv"),
    ]
    weights = {"factor": 0.5, "w": FILTERS, "b": RNG.standard_normal(6) / 3}
    return channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 6, 6, 6])


@pytest.fixture
def normalized(channel_model: Network) -> Model:
    """A Conv without a bias, and a BatchNormalization behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["sums"], name="conv"),
        helper.make_node("BatchNormalization", ["sums", "scale", "shift", "mean", "variance"], ["y"], name="norm"),
    ]
    ones, zeros = np.ones(6), np.zeros(6)
    weights = {"w": FILTERS, "scale": ones, "shift": zeros, "mean": zeros, "variance": ones}
    return channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 6, 6, 6])


@pytest.mark.parametrize("factor", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("network", ["biased", "normalized"])
def test_usual_scales_pass(network: str, factor: float, request: pytest.FixtureRequest) -> None:
    """Normalized inputs, and those a few times larger or smaller, raise no alarm."""
    model = request.getfixturevalue(network)
    assert scale_warnings(model, data(model, factor)) == []


@pytest.mark.parametrize("factor", [150.0, 1000.0])
@pytest.mark.parametrize("network", ["biased", "normalized"])
def test_inputs_far_too_large_are_named(network: str, factor: float, request: pytest.FixtureRequest) -> None:
    """Raw pixels in place of normalized ones: the input and the layer that tells are named."""
    model = request.getfixturevalue(network)
    (text,) = scale_warnings(model, data(model, factor))
    assert "'x'" in text
    assert "far too large" in text
    assert ("'conv'" if network == "biased" else "'norm'") in text


def test_only_statistics_of_training_tell_what_is_too_small(biased: Model, normalized: Model) -> None:
    """A bias may be large on purpose."""
    assert "far too small" in scale_warnings(normalized, data(normalized, 1e-3))[0]
    assert scale_warnings(biased, data(biased, 1e-3)) == []


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": FILTERS}),
        ([helper.make_node("Relu", ["x"], ["y"])], {}),
        ([helper.make_node("Conv", ["x", "w", "b"], ["y"])], {"w": FILTERS, "b": np.zeros(6)}),
    ],
    ids=["no bias", "no layer", "zero bias"],
)
def test_networks_that_tell_nothing(channel_model: Network, nodes: list[Any], weights: dict[str, Any]) -> None:
    """Without a bias or statistics there is nothing to hold the inputs against."""
    model = channel_model(nodes, weights, ["n", 3, 8, 8], ["n", None, None, None])
    assert scale_warnings(model, data(model, 1000.0)) == []


def test_moments_are_those_of_all_samples() -> None:
    """Sample by sample and in one piece the same mean and variance of each channel (rtol 1e-9), however far from zero
    the values lie."""
    values = (1e4 + np.random.default_rng(3).standard_normal((7, 3, 5, 4)) * [[[[1]], [[10]], [[0.1]]]]).astype("f4")
    moments = Moments(1)
    for sample in values:
        moments.add(sample[None])
    channels = values.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(moments.means, channels.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(moments.variances, channels.var(axis=1), rtol=1e-9)
