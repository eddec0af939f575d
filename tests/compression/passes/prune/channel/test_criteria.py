"""Each criterion against its definition written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.channels import find_groups
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.passes.prune.channel.prune import CRITERIA
from modelpress_compression.passes.prune.config import PruneConfig
from onnx import helper

RTOL = 1e-5  # float32 weights and activations, summed in float64


def numbers(model: Any, name: str) -> Any:
    return model.graph.initializers[name].const_value.numpy().astype(np.float64)


def scores_of(criterion: str, model: Any, context: Any, **options: Any) -> Any:
    config = PruneConfig(structure="channel", criterion=criterion, **options)
    return CRITERIA[criterion](config)(model, find_groups(model).groups, context)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_is_the_share_of_all_layers_of_the_group(
    criterion: str, power: int, conv_net: Any, context_of: Any
) -> None:
    """A channel's |w|^p in the layer that makes it and in the one that reads it, each over the layer's sum."""
    model = conv_net()
    scores = scores_of(criterion, model, context_of(model))
    made, read = (np.abs(numbers(model, name)) ** power for name in ("w1", "w2"))
    expected = made.sum(axis=(1, 2, 3)) / made.sum() + read.sum(axis=(0, 2, 3)) / read.sum()
    np.testing.assert_allclose(scores["conv1"], expected, rtol=RTOL)


def test_magnitude_does_not_depend_on_the_scale_of_a_layer(conv_net: Any, context_of: Any) -> None:
    """Ten times the weights of one layer, as a normalization behind it allows: the same scores."""
    model, scaled = conv_net(), conv_net()
    replace_numbers(scaled.graph.initializers["w2"], 10 * numbers(model, "w2"))
    one, other = (scores_of("l2", item, context_of(item)) for item in (model, scaled))
    np.testing.assert_allclose(one["conv1"], other["conv1"], rtol=RTOL)


def test_activation_is_weight_times_power(conv_net: Any, context_of: Any, images: Any, outputs_of: Any) -> None:
    """|W_c|^2 E[x_c^2] of the reader over the sum of its channels, with E over samples and positions."""
    model, x = conv_net(), images(7)
    scores = scores_of("activation", model, context_of(model, {"x": x}))
    copy = model.clone()
    copy.graph.outputs[0:1] = [next(v for node in copy.graph for v in node.outputs if v.name == "r1")]
    power = np.square(outputs_of(copy, x).astype(np.float64)).mean(axis=(0, 2, 3))
    energy = np.square(numbers(model, "w2")).sum(axis=(0, 2, 3)) * power
    np.testing.assert_allclose(scores["conv1"], energy / energy.sum(), rtol=RTOL)


def test_activation_finds_the_channel_that_never_speaks(conv_net: Any, context_of: Any, images: Any) -> None:
    """A channel that Relu always silences is worth nothing, whatever its weights."""
    model = conv_net()
    changed = numbers(model, "b1")
    changed[5] = -1000.0
    replace_numbers(model.graph.initializers["b1"], changed)
    scores = scores_of("activation", model, context_of(model, {"x": images(4)}))
    assert scores["conv1"][5] == 0
    assert np.count_nonzero(scores["conv1"]) == len(changed) - 1


def test_activation_of_a_grouped_convolution(channel_model: Any, context_of: Any, outputs_of: Any) -> None:
    """The energy of each group's channels goes through that group's weights."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((16, 3, 1, 1)),
        "w2": rng.standard_normal((16, 8, 1, 1)),
        "w3": rng.standard_normal((4, 16, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1"),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], name="grouped", group=2),
        helper.make_node("Conv", ["c2", "w3"], ["y"], name="conv3"),
    ]
    model = channel_model(nodes, weights, ["n", 3, 4, 4], ["n", 4, 4, 4])
    x = rng.standard_normal((5, 3, 4, 4)).astype(np.float32)
    group = find_groups(model).group("conv1")
    scores = scores_of("activation", model, context_of(model, {"x": x}))["conv1"]
    c1 = np.einsum("oi,nihw->nohw", weights["w1"][:, :, 0, 0], x)
    power = np.square(c1).mean(axis=(0, 2, 3)).reshape(2, 8)
    energy = (np.square(weights["w2"][:, :, 0, 0]).reshape(2, 8, 8) * power[:, None, :]).sum(axis=(0, 1))
    expected = energy / energy.sum()
    member = next(m for m in group.members if m.tensor == "w2" and m.role == "consumer")
    np.testing.assert_allclose(scores, expected[member.indices].sum(axis=1), rtol=1e-4)


def test_random_belongs_to_seed_and_layer(conv_net: Any, context_of: Any) -> None:
    """The same seed draws the same, another one something else; layers draw differently."""
    model = conv_net()
    one, same, other = (scores_of("random", model, context_of(model), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["conv1"], same["conv1"])
    assert not np.array_equal(one["conv1"], other["conv1"])
    assert not np.array_equal(one["conv1"], one["conv2"])
    assert all(scores.min() > 0 and scores.max() <= 1 for scores in one.values())
