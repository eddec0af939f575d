"""Small networks whose channels can be cut, with the data that goes through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from onnx import helper

SIDE = 8  # of the images


def _conv_net(channel_model: Callable[..., Model], seed: int, wide: int) -> Model:
    """Two convolutions, average pooling and a classifier; the first two layers' channels depend on each other."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((wide, wide // 4))  # so that some channels follow from others
    first = np.tensordot(mix, rng.standard_normal((wide // 4, 3, 3, 3)), 1)
    weights = {
        "w1": first + 0.02 * rng.standard_normal(first.shape),
        "b1": rng.standard_normal(wide),
        "w2": rng.standard_normal((wide, wide, 3, 3)) / wide,
        "b2": rng.standard_normal(wide),
        "w3": rng.standard_normal((10, wide)),
        "b3": rng.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="fc", transB=1),
    ]
    return channel_model(nodes, weights, ["n", 3, SIDE, SIDE], ["n", 10])


@pytest.fixture(scope="session")
def conv_net(channel_model: Callable[..., Model]) -> Callable[..., Model]:
    """Makes a small convolutional network: `conv_net(seed=0, wide=32)`."""
    return lambda seed=0, wide=32: _conv_net(channel_model, seed, wide)


@pytest.fixture(scope="session")
def images() -> Callable[..., Any]:
    """Smooth random images [n, 3, 8, 8]: neighbours are alike, as in photographs."""

    def make(samples: int, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        coarse = rng.standard_normal((samples, 3, SIDE // 2, SIDE // 2))
        fine = np.repeat(np.repeat(coarse, 2, axis=2), 2, axis=3) + 0.2 * rng.standard_normal((samples, 3, SIDE, SIDE))
        return fine.astype(np.float32)

    return make


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., Context]:
    """A context with these arrays as the user's data, or with synthetic data."""

    def make(model: Model, arrays: Mapping[str, Any] | None = None) -> Context:
        if arrays is not None:
            return Context(InputData.from_arrays(arrays, model.inputs), tmp_path)
        shapes = {spec.name: tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape) for spec in model.inputs}
        zeros = {name: np.zeros((2, *shape[1:]), np.float32) for name, shape in shapes.items()}
        return Context(InputData(model.inputs, zeros, provided=False), tmp_path)

    return make


@pytest.fixture
def prune_channels_of(context_of: Callable[..., Context]) -> Callable[..., PassResult]:
    """Runs the pass with `structure: channel` and checks that the input model stayed as it was."""

    def prune(model: Model, arrays: Mapping[str, Any] | None = None, **options: Any) -> PassResult:
        before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
        result = Prune(PruneConfig(structure="channel", **options))(model, context_of(model, arrays))
        for name, array in before.items():
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)
        return result

    return prune
