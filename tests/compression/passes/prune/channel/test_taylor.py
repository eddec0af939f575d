"""Taylor importance against what really happens when a channel goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.channels import find_groups
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.passes.prune.channel.taylor import Taylor


def numbers(model: Any, name: str) -> Any:
    return model.graph.initializers[name].const_value.numpy().astype(np.float64)


def small(model: Any) -> Any:
    """A copy whose scores are not so sure that their classes never change."""
    copy = model.clone()
    replace_numbers(copy.graph.initializers["w3"], 0.2 * numbers(copy, "w3"))
    return copy


def scores_of(model: Any, context: Any, seed: int = 0) -> Any:
    return Taylor(seed)(model, find_groups(model).groups, context)


def softmax(scores: Any) -> Any:
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_finds_the_channel_that_never_speaks(conv_net: Any, context_of: Any, images: Any) -> None:
    """A channel that Relu always silences is worth nothing, whatever its weights; all others are worth something."""
    model = conv_net()
    changed = numbers(model, "b1")
    changed[5] = -1000.0
    replace_numbers(model.graph.initializers["b1"], changed)
    scores = scores_of(model, context_of(model, {"x": images(16)}))["conv1"]
    assert scores[5] == 0
    assert np.count_nonzero(scores) == len(scores) - 1


def test_finds_the_channel_that_no_answer_hears(conv_net: Any, context_of: Any, images: Any) -> None:
    """A channel that moves all classes alike changes no probability, though its weights are the largest."""
    model = small(conv_net())
    read = numbers(model, "w3")
    read[:, 3] = 5.0
    replace_numbers(model.graph.initializers["w3"], read)
    scores = scores_of(model, context_of(model, {"x": images(64)}))["conv2"]
    assert scores[3] < 1e-6 * scores.max()


def test_ranks_as_the_divergence_does(conv_net: Any, context_of: Any, images: Any, outputs_of: Any) -> None:
    """The scores order channels as the KL divergence does that removing each of them causes (rank correlation 0.9)."""
    model, x = small(conv_net()), images(128)
    scores = scores_of(model, context_of(model, {"x": x}))["conv2"]
    before = softmax(outputs_of(model, x))
    divergences = []
    for channel in range(len(scores)):
        copy, read = model.clone(), numbers(model, "w3")
        read[:, channel] = 0
        replace_numbers(copy.graph.initializers["w3"], read)
        after = softmax(outputs_of(copy, x))
        divergences.append(float((before * (np.log(before) - np.log(after))).sum(axis=1).mean()))
    ranks = [np.argsort(np.argsort(values)) for values in (scores, divergences)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_reproducible_by_seed(conv_net: Any, context_of: Any, images: Any) -> None:
    """One seed, one ranking."""
    model = small(conv_net())
    context = context_of(model, {"x": images(16)})
    one, again, other = (scores_of(model, context, seed)["conv1"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prunes_by_gradients(scope: str, conv_net: Any, images: Any, prune_channels_of: Any) -> None:
    """The criterion is one of the recipe's, in both scopes."""
    result = prune_channels_of(conv_net(), {"x": images(16)}, criterion="taylor", scope=scope)
    assert result.changes["channels_removed"] > 0


def test_needs_data(conv_net: Any, prune_channels_of: Any) -> None:
    """Gradients on made-up inputs would judge something else; without data the step is refused."""
    with pytest.raises(InvalidDataError, match="'taylor' needs representative inputs"):
        prune_channels_of(conv_net(), criterion="taylor")
