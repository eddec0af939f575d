"""Training without data: what images are made from, in what time, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.executor import Executor
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill import made_inputs as making
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.distill import Distill
from modelpress_compression.passes.distill.inversion import find_statistics
from modelpress_compression.passes.distill.made_inputs import made_inputs
from onnx import helper


@pytest.fixture
def normalized_net(channel_model: Callable[..., Model]) -> Model:
    """Conv, BatchNormalization of known statistics, Relu, pooling, Gemm."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((6, 3, 3, 3)) / 4,
        "scale": np.ones(6),
        "shift": np.zeros(6),
        "mean": np.linspace(-1, 1, 6),
        "variance": np.linspace(0.5, 2, 6),
        "w2": rng.standard_normal((4, 6)),
        "b2": np.zeros(4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    return channel_model(nodes, weights, ["n", 3, 8, 8], ["n", 4])


def distance(model: Model, arrays: Any) -> float:
    """Of the layers' statistics to those stored."""
    (statistics,) = find_statistics(model)
    values = Executor(model, outputs=[statistics.value]).run(arrays)
    return float(statistics.distance(torch.from_numpy(values[statistics.value])))


def without_data(model: Model, folder: Path, original: Model) -> Context:
    return Context(synthetic_inputs(model, samples=8), folder, original=original)


def test_inputs_meet_the_statistics(normalized_net: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' means and variances on the made inputs are those of the normalization, to a twentieth of the distance
    that plausible random inputs have, whatever the seed."""
    monkeypatch.setattr(making, "SAMPLES", 32)
    context = without_data(normalized_net, tmp_path, normalized_net)
    data, how = made_inputs(normalized_net, context, 0, float("inf"))
    plausible = synthetic_inputs(normalized_net, samples=32)
    assert distance(normalized_net, data.arrays) < distance(normalized_net, plausible.arrays) / 20
    assert not data.provided
    assert "optimized to meet the statistics of 1 normalization" in how


def test_without_statistics_inputs_show_the_classes(
    conv_net: Model, tmp_path: Path, outputs_of: Callable[[Model, Any], Any]
) -> None:
    """A classifier without normalization gets inputs of all its classes, where random ones show few of them."""
    data, how = made_inputs(conv_net, without_data(conv_net, tmp_path, conv_net), 0, float("inf"))
    shown = np.bincount(outputs_of(conv_net, data.arrays["x"]).argmax(1), minlength=4) / len(data)
    assert shown.min() > 0.1
    assert how == "optimized to show each class"


def test_without_classes_inputs_are_plausible(conv_net: Model, tmp_path: Path, perturbed: Callable[..., Model]) -> None:
    """A graph that tells nothing of its data is trained on random inputs; the report says so, and the model comes
    nearer to the original on such inputs."""
    conv_net = conv_net.clone()
    for value in list(conv_net.graph.outputs):
        value.name = "embedding"
    context = without_data(conv_net, tmp_path, conv_net)
    result = Distill(DistillConfig(epochs=3))(perturbed(conv_net), context)
    assert any("No data was given" in warning and "plausible random" in warning for warning in result.warnings)
    assert any("Confidence is low" in warning for warning in result.warnings)
    assert result.changes["loss_after"] < result.changes["loss_before"]


@pytest.mark.parametrize(("left_s", "most_s"), [(0.0, 60.0), (float("inf"), -1.0)])
def test_time_limit_holds_while_inputs_are_made(
    normalized_net: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, most_s: float
) -> None:
    """With no time left, of the job or for making inputs, there is one batch, as it began."""
    monkeypatch.setattr(making, "MAX_SECONDS", most_s)
    context = without_data(normalized_net, tmp_path, normalized_net)
    data, _ = made_inputs(normalized_net, context, 0, left_s)
    expected = synthetic_inputs(normalized_net, samples=making.SAMPLES)
    np.testing.assert_array_equal(data.arrays["x"], expected.arrays["x"][: making.BATCH_SIZE])


def test_statistics_of_training_graphs_are_left_out(normalized_net: Model) -> None:
    """A BatchNormalization in training form stores nothing to aim at."""
    from onnx_ir import AttrInt64

    node = next(node for node in normalized_net.graph if node.op_type == "BatchNormalization")
    node.attributes["training_mode"] = AttrInt64("training_mode", 1)
    assert find_statistics(normalized_net) == []
