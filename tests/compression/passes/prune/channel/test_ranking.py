"""How many units stay, and which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.channels import Group
from modelpress_compression.passes.prune.channel.limits import Limits
from modelpress_compression.passes.prune.channel.ranking import select_by_layer, select_globally


def make_group(name: str, units: int, align: int = 1) -> Group:
    return Group(name, units, "channel", (), 1.0, align)


groups_ = st.lists(st.tuples(st.integers(1, 200), st.sampled_from([1, 2, 8, 32, 64])), min_size=1, max_size=6).map(
    lambda sizes: [make_group(f"g{index}", units, align) for index, (units, align) in enumerate(sizes)]
)


@given(
    groups=groups_,
    sparsity=st.floats(0, 0.99),
    round_to=st.sampled_from([1, 4, 8, 16, 12]),
    least=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_what_stays_is_what_was_asked_for(
    groups: list[Group], sparsity: float, round_to: int, least: int, seed: int
) -> None:
    """In both scopes: multiples of `round_to`, at least `min_channels`, the largest scores, rising indices."""
    rng = np.random.default_rng(seed)
    scores = {group.id: rng.random(group.units) for group in groups}
    limits = Limits(dict.fromkeys(scores, sparsity), round_to, least)
    costs = {group.id: float(rng.random() + 0.1) for group in groups}
    by_layer = select_by_layer(groups, scores, limits)
    for selection in (by_layer, select_globally(groups, scores, costs, sparsity, limits)):
        for group in groups:
            kept = selection.kept.get(group.id)
            if kept is None:
                continue
            assert 0 < len(kept) < group.units
            assert len(kept) * group.align % round_to == 0
            assert len(kept) * group.align >= least
            assert np.all(np.diff(kept) > 0)
            gone = np.setdiff1d(np.arange(group.units), kept)
            assert scores[group.id][kept].min() >= scores[group.id][gone].max()
    for group in groups:
        step, count = limits.step(group), len(by_layer.kept.get(group.id, range(group.units)))
        if count > limits.fewest(group):
            assert abs(count - group.units * (1 - sparsity)) <= step / 2 + 1e-6


@given(groups=groups_, sparsity=st.floats(0.05, 0.9), seed=st.integers(0, 5))
def test_global_share(groups: list[Group], sparsity: float, seed: int) -> None:
    """Never more than half a bundle over the share; no group below half of what scope layer would leave."""
    rng = np.random.default_rng(seed)
    scores = {group.id: rng.random(group.units) for group in groups}
    limits = Limits(dict.fromkeys(scores, sparsity), 8, 1)
    kept = select_globally(groups, scores, dict.fromkeys(scores, 1.0), sparsity, limits).kept
    removed = sum((group.units - len(kept.get(group.id, range(group.units)))) * group.align for group in groups)
    total = sum(group.units * group.align for group in groups)
    bundle = max(limits.step(group) * group.align for group in groups)
    assert removed <= round(sparsity * total) + bundle / 2
    for group in groups:
        assert len(kept.get(group.id, range(group.units))) >= group.units * (1 - sparsity) / 2


def test_global_ranking_takes_the_cheap_importance_first() -> None:
    """Of two equally important layers the dearer one loses its channels."""
    groups = [make_group("cheap", 64), make_group("dear", 64)]
    scores = {group.id: np.linspace(1, 2, 64) for group in groups}
    limits = Limits(dict.fromkeys(scores, 0.3), 8, 1)
    kept = select_globally(groups, scores, {"cheap": 1.0, "dear": 10.0}, 0.3, limits).kept
    assert list(kept) == ["dear"]
    assert len(kept["dear"]) == 24  # 40 of 128 go, as many as the share and the floor permit


def test_overrides_leave_the_ranking() -> None:
    """A group with its own sparsity gets that, and the others share theirs among them."""
    groups = [make_group("a", 64), make_group("b", 64), make_group("c", 64)]
    scores = {group.id: np.linspace(1, 2, 64) for group in groups}
    limits = Limits({"a": 0.25, "b": 0.75, "c": 0.25}, 8, 1)
    kept = select_globally(groups, scores, dict.fromkeys(scores, 1.0), 0.25, limits).kept
    assert len(kept["b"]) == 16
    assert sum(64 - len(kept.get(name, range(64))) for name in "ac") == 32


def test_nearest_multiple() -> None:
    """To the nearest multiple, down in a tie; whole heads where one head is a multiple already."""
    limits = Limits({}, 8, 1)
    assert [limits.nearest(make_group("g", units), 0.5) for units in (64, 20, 24, 10, 8)] == [32, 8, 8, 8, 8]
    assert limits.nearest(make_group("heads", 12, align=32), 0.5) == 6


def test_min_channels_is_told() -> None:
    """What would fall below `min_channels` is held there and named."""
    group = make_group("g", 64)
    selection = select_by_layer([group], {"g": np.arange(64.0)}, Limits({"g": 0.9}, 8, 12))
    assert selection.raised == ("g",)
    assert len(selection.kept["g"]) == 16
