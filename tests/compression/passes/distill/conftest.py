"""A small classifier with its data, worsened copies of it, and the pass on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.distill import Distill
from onnx import helper

SIDE = 8
CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def conv_net(channel_model: Callable[..., Model]) -> Model:
    """Conv-Relu, Conv-Relu, pooling, Gemm: x [n, 3, 8, 8] -> class scores y [n, 4]."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)) / 4,
        "b1": rng.standard_normal(8) / 4,
        "w2": rng.standard_normal((8, 8, 3, 3)) / 6,
        "b2": rng.standard_normal(8) / 4,
        "w3": rng.standard_normal((CLASSES, 8)) * 2,
        "b3": rng.standard_normal(CLASSES),
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
    return channel_model(nodes, weights, ["n", 3, SIDE, SIDE], ["n", CLASSES])


@pytest.fixture(scope="session")
def images() -> Callable[..., Any]:
    """Smooth random images [n, 3, 8, 8]."""

    def make(samples: int, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        coarse = rng.standard_normal((samples, 3, SIDE // 2, SIDE // 2))
        fine = np.repeat(np.repeat(coarse, 2, axis=2), 2, axis=3) + 0.2 * rng.standard_normal((samples, 3, SIDE, SIDE))
        return fine.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def perturbed() -> Callable[..., Model]:
    """A copy of a model with noise on its weights: of `share` of each weight's standard deviation."""

    def make(model: Model, share: float = 0.3, seed: int = 1) -> Model:
        rng = np.random.default_rng(seed)
        copy = model.clone()
        for value in copy.graph.initializers.values():
            array = value.const_value.numpy()
            if array.dtype.kind == "f" and array.ndim > 1:
                noisy = array + share * array.std() * rng.standard_normal(array.shape)
                value.const_value = onnx_ir.tensor(noisy.astype(array.dtype), name=value.name)
        return copy

    return make


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., Context]:
    """A context with these arrays (and `labels`) as the user's data and this model as the original."""

    def make(original: Model, arrays: Mapping[str, Any], **options: Any) -> Context:
        return Context(InputData.from_arrays(arrays, original.inputs), tmp_path, original=original, **options)

    return make


@pytest.fixture
def distill(context_of: Callable[..., Context]) -> Callable[..., PassResult]:
    """Runs the pass on a student and checks that neither it nor the original was changed."""

    def run(original: Model, student: Model, arrays: Mapping[str, Any], **options: Any) -> PassResult:
        before = [weights_of(model) for model in (original, student)]
        result = Distill(DistillConfig(**options))(student, context_of(original, arrays))
        for model, weights in zip((original, student), before, strict=True):
            for name, array in weights_of(model).items():
                np.testing.assert_array_equal(array, weights[name])
        return result

    return run


def weights_of(model: Model) -> dict[str, Any]:
    """Copies of all initializers."""
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


@pytest.fixture(name="weights_of", scope="session")
def weights_fixture() -> Callable[[Model], dict[str, Any]]:
    return weights_of
