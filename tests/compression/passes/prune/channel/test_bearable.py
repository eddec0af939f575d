"""Fewer channels go where an output's cosine would fall below `min_cosine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel import bearable
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from onnx import helper

WIDTH = 64


def cosine(a: Any, b: Any) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def network(channel_model: Callable[..., Any], last: str) -> Any:
    """Half of the first layer's channels say next to nothing; each of the second says as much as the others.

    `last`: the operator behind the last layer; without one its outputs are the scores of classes.
    """
    rng = np.random.default_rng(1)
    half = rng.standard_normal((WIDTH // 2, 32)) / 6
    weights = {
        "w1": np.concatenate([half, 0.02 * rng.standard_normal(half.shape)]),
        "w2": rng.standard_normal((WIDTH, WIDTH)) / 6,
        "w3": rng.standard_normal((16, WIDTH)) / 8,
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h1"], name="fc1", transB=1),
        helper.make_node("Relu", ["h1"], ["r1"], name="relu1"),
        helper.make_node("Gemm", ["r1", "w2"], ["h2"], name="fc2", transB=1),
        helper.make_node("Relu", ["h2"], ["r2"], name="relu2"),
        helper.make_node("Gemm", ["r2", "w3"], ["h3" if last else "y"], name="fc3", transB=1),
    ]
    if last:
        nodes.append(helper.make_node(last, ["h3"], ["y"], name="last"))
    return channel_model(nodes, weights, ["n", 32], ["n", 16])


@pytest.fixture(scope="module")
def uneven(channel_model: Callable[..., Any]) -> Any:
    """One whose outputs are numbers."""
    return network(channel_model, "Tanh")


def rows(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)


def channels_of(result: Any) -> dict[str, int]:
    """What stays of the groups that were cut."""
    return {row["group"]: row["channels_kept"] for row in result.details if "group" in row}


def test_what_bears_it_goes_and_the_rest_stays(uneven: Any, prune_channels_of: Any, outputs_of: Any) -> None:
    fresh = rows(200, seed=9)
    wanted = outputs_of(uneven, fresh)
    plain = prune_channels_of(uneven, {"x": rows(400, seed=0)}, sparsity=0.5)
    assert channels_of(plain) == {"fc1": 32, "fc2": 32}
    assert cosine(wanted, outputs_of(plain.model, fresh)) < 0.97
    result = prune_channels_of(uneven, {"x": rows(400, seed=0)}, sparsity=0.5, min_cosine=0.98)
    found = channels_of(result)
    assert found["fc1"] == 32
    assert 32 < found.get("fc2", WIDTH) <= WIDTH
    assert cosine(wanted, outputs_of(result.model, fresh)) > 0.975
    (warning,) = [text for text in result.warnings if "min_cosine" in text]
    gone = 2 * WIDTH - found["fc1"] - found.get("fc2", WIDTH)
    assert warning.startswith(f"Of the 64 channels that should go {gone} went")
    assert result.changes["channels_removed"] == gone


def test_what_is_borne_as_a_whole_is_cut_as_asked(uneven: Any, prune_channels_of: Any) -> None:
    data = {"x": rows(100, seed=0)}
    plain = prune_channels_of(uneven, data, sparsity=0.5)
    result = prune_channels_of(uneven, data, sparsity=0.5, min_cosine=0.1)
    assert channels_of(result) == channels_of(plain)
    assert result.changes == plain.changes
    assert not any("min_cosine" in text for text in result.warnings)


def test_nothing_goes_where_nothing_is_borne(uneven: Any, prune_channels_of: Any) -> None:
    result = prune_channels_of(uneven, {"x": rows(100, seed=0)}, sparsity=0.9, min_cosine=0.9999999)
    assert not result.changed
    assert result.model is uneven
    assert any("none went" in text for text in result.warnings)
    assert {"fc1", "fc2"} <= {skip.node for skip in result.skipped if "min_cosine" in skip.reason}


def test_of_large_answers_fewer_are_compared(
    uneven: Any, context_of: Any, outputs_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit into what may be kept of them, spread over the samples; the fewest that tell where none do."""
    context = replace(context_of(uneven), data=InputData(uneven.inputs, {"x": rows(64, seed=0)}, provided=False))
    for kept_bytes, compared in ((bearable.KEPT_BYTES, 64), (16 * 64, 16), (1, 8)):
        monkeypatch.setattr(bearable, "KEPT_BYTES", kept_bytes)
        looked_at: list[float] = []
        monkeypatch.setattr(Context, "check_time", lambda self, seen=looked_at: seen.append(1.0))
        assert bearable.Answers(uneven, context).kept(uneven) == pytest.approx(1.0)
        assert len(looked_at) == 2 * compared


def test_made_up_inputs_judge_where_there_is_no_data(uneven: Any, context_of: Any, outputs_of: Any) -> None:
    """Nothing is fitted then."""
    made_up = InputData(uneven.inputs, {"x": rows(64, seed=0)}, provided=False)
    config = PruneConfig(structure="channel", sparsity=0.5, min_cosine=0.9)
    result = Prune(config)(uneven, replace(context_of(uneven), data=made_up))
    assert 0 < result.changes["channels_removed"] < 64
    fresh = rows(100, seed=9)
    assert cosine(outputs_of(uneven, fresh), outputs_of(result.model, fresh)) > 0.85


def test_classes_bear_less_than_numbers(
    channel_model: Callable[..., Any], prune_channels_of: Any, outputs_of: Any
) -> None:
    """Scores that keep their cosine can change their largest; of real inputs, nine in ten keep it."""
    scores = network(channel_model, "")
    data, fresh = {"x": rows(400, seed=0)}, rows(400, seed=9)

    def same(sparsity: float, least: float) -> float:
        result = prune_channels_of(scores, data, sparsity=sparsity, min_cosine=least)
        return float(np.mean(outputs_of(scores, fresh).argmax(1) == outputs_of(result.model, fresh).argmax(1)))

    assert same(0.5, 0.5) < 0.8
    assert same(0.5, 0.9) > 0.85
