"""Layer-wise reconstruction: where blocks begin and end, and what it recovers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from modelpress_compression.executor import weights
from modelpress_compression.graph.blocks import find_blocks
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.distill.matching import common_values
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from onnx import helper


def test_a_chain_has_a_block_a_layer(conv_net: Model) -> None:
    """Each layer of a chain is a block that takes the one before and owns its weights; the last ends at the outputs."""
    blocks = find_blocks(conv_net, weights, set(common_values(conv_net, conv_net, weights)))
    assert [(block.inputs, block.target) for block in blocks] == [(("x",), "c1"), (("c1",), "c2"), (("c2",), "")]
    names = [sorted(value.name or "" for value in block.weights) for block in blocks]
    assert names == [["b1", "w1"], ["b2", "w2"], ["b3", "w3"]]


def test_a_residual_block_stays_whole(channel_model: Callable[..., Model]) -> None:
    """While a skip connection is open no block ends."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Add", ["c2", "r1"], ["s"]),
        helper.make_node("Conv", ["s", "w3"], ["y"]),
    ]
    shapes = {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "w3": (2, 4, 1, 1)}
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    model = channel_model(nodes, arrays, ["n", 3, 8, 8], ["n", 2, 8, 8])
    blocks = find_blocks(model, weights, {"c1", "r1", "c2", "s"})
    assert [(block.inputs, block.target) for block in blocks] == [(("x",), "c1"), (("c1",), "s"), (("s",), "")]


def test_blocks_behind_many_open_branches(channel_model: Callable[..., Model]) -> None:
    """However many values are needed at once in one part of the graph, the parts behind it have blocks of their own."""
    branches = [f"s{number}" for number in range(80)]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Split", ["c1"], branches, axis=1, num_outputs=80),
        helper.make_node("Sum", branches, ["t"]),
        helper.make_node("Conv", ["t", "w2"], ["c2"]),
        helper.make_node("Conv", ["c2", "w3"], ["y"]),
    ]
    arrays = {
        name: np.ones(shape) for name, shape in {"w1": (80, 3, 1, 1), "w2": (4, 1, 1, 1), "w3": (2, 4, 1, 1)}.items()
    }
    model = channel_model(nodes, arrays, ["n", 3, 8, 8], ["n", 2, 8, 8])
    assert [block.target for block in find_blocks(model, weights, {"t", "c2"})] == ["t", "c2", ""]


def test_recovers_a_perturbed_model(
    conv_net: Model, images: Any, perturbed: Any, distill: Callable[..., PassResult]
) -> None:
    """Block by block a disturbed model is brought back: its loss falls to a tenth at most, and there is a line for each
    block."""
    result = distill(
        conv_net, perturbed(conv_net), {"x": images(256)}, method="layerwise", epochs=10, learning_rate=1e-2
    )
    assert result.changes["loss_after"] < result.changes["loss_before"] / 10
    assert [row["block"] for row in result.details] == ["c1", "c2", "outputs"]
    assert all(row["loss_after"] < row["loss_before"] for row in result.details)


def test_recovers_a_pruned_model(
    conv_net: Model, images: Any, distill: Callable[..., PassResult], context_of: Callable[..., Context]
) -> None:
    """Channels that were cut are matched by what they do; blocks behind them are fitted to those that stayed."""
    config = PruneConfig(structure="channel", sparsity=0.25, round_to=1, min_channels=1, repair="none")
    pruned = Prune(config)(conv_net, context_of(conv_net, {"x": images(64)})).model
    result = distill(conv_net, pruned, {"x": images(256)}, method="layerwise", epochs=10, learning_rate=1e-2)
    assert result.changes["loss_after"] < result.changes["loss_before"] / 2
    assert "c2" in [row["block"] for row in result.details]


def test_little_memory_takes_fewer_samples(
    conv_net: Model, images: Any, perturbed: Any, distill: Callable[..., PassResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for next to nothing, one feed is stored and trained on all the same."""
    from modelpress_compression.passes.distill import layerwise

    kept: list[int] = []
    record = layerwise._Recorder.record

    def count(self: Any, feeds: Any, augment: Any) -> Any:
        self.room = min(self.room, 1)
        stored = record(self, feeds, augment)
        kept.append(len(stored))
        return stored

    monkeypatch.setattr(layerwise._Recorder, "record", count)
    distill(conv_net, perturbed(conv_net), {"x": images(256)}, method="layerwise", epochs=2)
    assert kept == [1] * 6  # for each of three blocks, one of each: validation and training
