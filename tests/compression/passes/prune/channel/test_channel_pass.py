"""The pass as a whole: what it cuts, what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression import Recipe, compress, load
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.report.html import render_html
from onnx import helper

MNIST = Path(__file__).parents[5] / "examples" / "mnist"


def channels_of(model: Any) -> list[int]:
    """Outputs of each weight."""
    return [value.const_value.shape[0] for name, value in model.graph.initializers.items() if name.startswith("w")]


def test_cuts_and_reports(conv_net: Any, prune_channels_of: Any, outputs_of: Any, images: Any) -> None:
    """Half of the channels go; figures of groups, channels and parameters are those of the result."""
    model = conv_net(wide=32)
    result = prune_channels_of(model, sparsity=0.5)
    assert channels_of(result.model) == [16, 16, 10]
    before, after = (sum(tensor.size for tensor in item.tensors()) for item in (model, result.model))
    assert result.changes == {
        "groups": 2,
        "groups_cut": 2,
        "channels": 64,
        "channels_removed": 32,
        "parameters_removed_share": pytest.approx(1 - after / before),
    }
    assert result.changes["parameters_removed_share"] > 0.6
    assert {"group": "conv1", "kind": "channel", "channels": 32, "channels_kept": 16} in result.details
    assert "fc" in {skip.node for skip in result.skipped}
    assert any("representative inputs" in warning for warning in result.warnings)
    assert outputs_of(result.model, images(2)).shape == (2, 10)


@pytest.mark.parametrize("normalize", ["none", "parameters", "macs", "latency"])
def test_global_scope(normalize: str, conv_net: Any, prune_channels_of: Any, outputs_of: Any, images: Any) -> None:
    """With every cost the share of the whole model goes."""
    result = prune_channels_of(conv_net(wide=32), sparsity=0.25, scope="global", normalize=normalize)
    assert result.changes["channels_removed"] == 16
    assert np.isfinite(outputs_of(result.model, images(2))).all()


def test_overrides(conv_net: Any, prune_channels_of: Any) -> None:
    """A layer's own sparsity, by node or weight; the longest pattern counts, and one that fits nothing is told."""
    overrides = (("c*", 0.0), ("conv2", 0.75), ("nothing*", 0.5))
    result = prune_channels_of(conv_net(wide=32), sparsity=0.5, overrides=overrides)
    assert channels_of(result.model) == [32, 8, 10]
    assert [warning for warning in result.warnings if "override" in warning] == [
        "The override 'nothing*' matches no layer whose channels can be cut."
    ]


def test_excluded_layers_stay_whole(conv_net: Any, prune_channels_of: Any) -> None:
    """Neither the channels that an excluded layer makes nor those that it reads are cut."""
    result = prune_channels_of(conv_net(wide=32), sparsity=0.5, exclude=("w3", "typo*"))
    assert channels_of(result.model) == [16, 32, 10]
    assert any("typo*" in warning for warning in result.warnings)
    assert any(skip.node == "conv2" and "Excluded by the recipe" in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparsity": 0.0}, "the sparsity is 0"),
        ({"sparsity": 0.1, "round_to": 16}, "round_to = 16"),
        ({"exclude": ("*",)}, "excludes every layer"),
        ({"sparsity": 0.9, "min_channels": 64}, "min_channels = 64"),
    ],
)
def test_nothing_to_cut(options: dict[str, Any], reason: str, conv_net: Any, prune_channels_of: Any) -> None:
    """The model stays as it was, counts as unchanged, and a warning says why."""
    model = conv_net(wide=32)
    result = prune_channels_of(model, **options)
    assert result.model is model
    assert not result.changed
    assert any(warning.startswith("Nothing was cut") and reason in warning for warning in result.warnings)


def test_a_model_without_channels(channel_model: Any, prune_channels_of: Any) -> None:
    """One layer from input to output has none: its outputs are the model's."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="only")
    model = channel_model([node], {"w": np.ones((8, 8))}, ["n", 8], ["n", 8])
    result = prune_channels_of(model)
    assert result.model is model
    assert any("no channels that can be cut" in warning for warning in result.warnings)


def test_min_channels_warns(conv_net: Any, prune_channels_of: Any) -> None:
    """Layers that the sparsity would empty keep `min_channels`, and a warning names them."""
    result = prune_channels_of(conv_net(wide=32), sparsity=0.9, min_channels=12, round_to=4)
    assert channels_of(result.model) == [12, 12, 10]
    assert any("min_channels = 12" in warning and "conv1" in warning for warning in result.warnings)


@pytest.mark.parametrize("options", [{"criterion": "activation"}, {"repair": "least_squares"}])
def test_needs_data(options: dict[str, Any], conv_net: Any, prune_channels_of: Any) -> None:
    """What looks at activations refuses synthetic ones, in words."""
    with pytest.raises(InvalidDataError, match="needs representative inputs"):
        prune_channels_of(conv_net(), **options)


@pytest.mark.parametrize(("given", "criterion"), [(True, "activation"), (False, "l2")])
def test_auto_criterion(given: bool, criterion: str, conv_net: Any, images: Any, prune_channels_of: Any) -> None:
    """Channels are judged by their activations where there is data, else by magnitude: the same ones go."""
    arguments = ({"x": images(16)},) if given else ()
    automatic, named = (
        prune_channels_of(conv_net(), *arguments, sparsity=0.5, criterion=one) for one in ("auto", criterion)
    )
    for name, value in automatic.model.graph.initializers.items():
        np.testing.assert_array_equal(
            value.const_value.numpy(), named.model.graph.initializers[name].const_value.numpy()
        )


def test_through_the_pipeline(conv_net: Any, images: Any) -> None:
    """A recipe cuts the model; the report has the figures, and fewer parameters and MACs."""
    options = {"structure": "channel", "sparsity": 0.5, "overrides": {"conv1": 0.25}}
    recipe = Recipe.from_dict({"version": 1, "steps": [{"prune": options}], "benchmark": {"rounds": 5}})
    report = compress(conv_net(wide=64), recipe, data={"x": images(16)}).report
    (step,) = report["steps"]
    assert step["changes"]["groups_cut"] == 2
    assert step["config"]["overrides"] == {"conv1": 0.25}
    assert {row["group"]: row["channels_kept"] for row in step["details"] if "group" in row} == {
        "conv1": 48,
        "conv2": 32,
    }
    assert {row["layer"] for row in step["details"] if "error_after" in row} == {"conv2", "fc"}
    assert "Layer by layer: 7" in render_html(report)
    assert report["optimized"]["parameters"] < report["original"]["parameters"] / 2
    assert report["optimized"]["macs"] < report["original"]["macs"]


@pytest.mark.parametrize("criterion", ["l1", "l2", "activation", "random"])
def test_repair_on_trained_weights(criterion: str, prune_channels_of: Any, outputs_of: Any) -> None:
    """MNIST's example at 50 %, labels of the evaluation set: repair finds at least half of what pruning lost again."""
    model = load(MNIST / "model.onnx")
    with np.load(MNIST / "samples.npz") as samples, np.load(MNIST / "eval.npz") as evaluation:
        data, x, labels = dict(samples), evaluation["x"], evaluation["labels"]
    accuracy = [
        float((outputs_of(item, x).argmax(1) == labels).mean())
        for item in (
            model,
            prune_channels_of(model, data, sparsity=0.5, criterion=criterion, repair="none").model,
            prune_channels_of(model, data, sparsity=0.5, criterion=criterion, repair="least_squares").model,
        )
    ]
    assert accuracy[0] - accuracy[2] < (accuracy[0] - accuracy[1]) / 2
