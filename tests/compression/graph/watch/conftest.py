"""A network with values to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from onnx import helper


@pytest.fixture(scope="session")
def chain(channel_model: Callable[..., Model]) -> Callable[[], Model]:
    """Makes x -> conv1 c1 -> relu1 r1 -> conv2 c2 -> relu2 r2 -> pool p -> flatten f -> fc y."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((32, 3, 3, 3)),
        "w2": rng.standard_normal((32, 32, 3, 3)) / 32,
        "w3": rng.standard_normal((10, 32)),
        "b3": rng.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="fc", transB=1),
    ]
    return lambda: channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 10])


@pytest.fixture(scope="session")
def images() -> Callable[[int], Array]:
    """Random images [n, 3, 8, 8]."""
    return lambda samples: np.random.default_rng(1).standard_normal((samples, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def data_of() -> Callable[[Model, Array], InputData]:
    """Samples for the one input of a model."""
    return lambda model, x: InputData.from_arrays({"x": x}, model.inputs)
