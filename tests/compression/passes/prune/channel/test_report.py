"""Figures of single layers: what they cost before and after."""

from __future__ import annotations

from typing import Any

import pytest
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.measure import node_times
from modelpress_compression.measure.node_times import node_times_ms
from modelpress_compression.passes.prune.channel import report


def test_parameters_macs_and_latency_of_every_layer_that_was_cut(
    conv_net: Any, images: Any, prune_channels_of: Any
) -> None:
    """32 of 32, 16 of 32 kept: numbers of weight and bias, positions times weights, and some time of each layer."""
    result = prune_channels_of(conv_net(), {"x": images(4)}, sparsity=0.5, repair="none")
    rows = {row["layer"]: row for row in result.details if "parameters_before" in row}
    assert list(rows) == ["conv1", "conv2", "fc"]
    assert [rows["conv2"][f"parameters_{when}"] for when in ("before", "after")] == [32 * 32 * 9 + 32, 16 * 16 * 9 + 16]
    assert [rows["conv2"][f"macs_{when}"] for when in ("before", "after")] == [16 * 32 * 32 * 9, 16 * 16 * 16 * 9]
    assert all(row[f"latency_ms_{when}"] > 0 for row in rows.values() for when in ("before", "after"))


def test_layers_without_times(
    conv_net: Any, images: Any, prune_channels_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot be profiled is pruned all the same; the report has no times then."""

    def refuse(*arguments: Any) -> Any:
        raise ModelNotRunnableError("no kernel")

    monkeypatch.setattr(report, "node_times_ms", refuse)
    result = prune_channels_of(conv_net(), {"x": images(4)}, sparsity=0.5, repair="none")
    rows = [row for row in result.details if "parameters_before" in row]
    assert rows
    assert not any("latency_ms_before" in row for row in rows)


@pytest.mark.parametrize(("budget_s", "rounds"), [(100.0, 15), (0.0, 4)])
def test_rounds_are_bounded(
    budget_s: float, rounds: int, conv_net: Any, images: Any, context_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models take turns, fifteen rounds at most; once time is up, one round after the warm-up is enough."""
    ran: list[int] = []
    original = node_times.run

    def run(session: Any, feed: Any) -> Any:
        ran.append(id(session))
        return original(session, feed)

    monkeypatch.setattr(node_times, "run", run)
    monkeypatch.setattr(node_times, "BUDGET_S", budget_s)
    models = [conv_net(), conv_net(wide=16)]
    context = context_of(models[0], {"x": images(2)})
    times = node_times_ms(models, context.data, context.work_directory)
    assert len(ran) == 2 * rounds
    assert ran[0::2] == [ran[0]] * rounds
    assert ran[1::2] == [ran[1]] * rounds
    assert all(set(found) >= {"conv1", "conv2", "fc"} for found in times)
