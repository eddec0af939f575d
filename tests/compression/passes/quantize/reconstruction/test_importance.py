"""What the outputs depend on, channel by channel: what the errors of a block are weighted by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.reconstruction.importance import channel_axis, importance_of

ModelFromText = Callable[..., Model]


def nothing() -> None:
    """Time is never up."""


@pytest.fixture
def network(model_from_text: ModelFromText) -> Model:
    """Products after one another, into scores; the second and third channel between them hardly count."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (float[n, 5] x) => (float[n, 2] y) {
        a = MatMul (x, w1)
        b = MatMul (a, w2)
        y = Softmax (b)
    }"""
    random = np.random.default_rng(0)
    w2 = np.asarray([[3, 4], [0.1, 0], [0, 0], [1, -1]], np.float32)
    return model_from_text(text, {"w1": random.standard_normal((5, 4)).astype(np.float32), "w2": w2})


def test_it_is_the_mean_square_of_the_gradients(network: Model) -> None:
    """Of what goes into the softmax: squared norms of the rows of the weight behind, 1 on average; what the outputs do
    not depend on keeps a little."""
    data = InputData(network.inputs, {"x": np.random.default_rng(1).standard_normal((20, 5)).astype(np.float32)})
    found = importance_of(network, ["a"], ["w1", "w2"], data, nothing)["a"]
    expected = np.maximum(np.asarray([25, 0.01, 0, 2]) / (27.01 / 4), 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_has_no_gradient_is_left_out(network: Model) -> None:
    """Values that no trained weight reaches, and values that are not finite."""
    ones = np.ones((4, 5), np.float32)
    assert not importance_of(network, ["x"], ["w2"], InputData(network.inputs, {"x": ones}), nothing)
    broken = InputData(network.inputs, {"x": np.full((4, 5), np.nan, np.float32)})
    assert np.isfinite(importance_of(network, ["a"], ["w1"], broken, nothing).get("a", np.ones(4))).all()


def test_channels_lie_where_convolutions_have_them() -> None:
    """On the second axis of images, on the last of sequences and vectors."""
    assert [channel_axis(rank) for rank in (1, 2, 3, 4, 5)] == [0, 1, 2, 1, 1]
