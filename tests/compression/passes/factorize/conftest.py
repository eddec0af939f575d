"""Layers to factorize, and the pass with and without data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.factorize import Factorize
from onnx import helper


@pytest.fixture
def factorize(tmp_path: Path) -> Callable[..., PassResult]:
    """Runs the pass on a model of input x; `data`: representative samples, None for synthetic ones."""

    def run(model: Model, data: Any = None, **options: Any) -> PassResult:
        shape = [dim if isinstance(dim, int) else 1 for dim in model.inputs[0].shape]
        synthetic = InputData(model.inputs, {"x": np.zeros([2, *shape[1:]], np.float32)}, provided=False)
        samples = synthetic if data is None else InputData.from_arrays({"x": data}, model.inputs)
        before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
        result = Factorize(FactorizeConfig(**options))(model, Context(samples, tmp_path))
        for name, array in before.items():
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)
        return result

    return run


@pytest.fixture
def convolution(channel_model: Callable[..., Model]) -> Callable[..., Model]:
    """One Conv "conv" with weight "w" over x [n, channels, 9, 10]; `attributes` as of the node."""

    def build(weight: Any, channels: int, **attributes: Any) -> Model:
        bias = np.linspace(-1, 1, len(weight))
        node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", **attributes)
        return channel_model([node], {"w": weight, "b": bias}, ["n", channels, 9, 10], ["n", len(weight), None, None])

    return build


@pytest.fixture
def correlated() -> Callable[..., Any]:
    """Samples [n, channels, 9, 10] whose channels follow from four, but for a little noise."""

    def draw(count: int, channels: int, seed: int = 1) -> Any:
        basis = np.random.default_rng(0).standard_normal((channels, 4))
        rng = np.random.default_rng(seed)
        hidden = rng.standard_normal((count, 4, 9, 10))
        noise = 0.05 * rng.standard_normal((count, channels, 9, 10))
        return (np.einsum("cd,ndhw->nchw", basis, hidden) + noise).astype(np.float32)

    return draw
