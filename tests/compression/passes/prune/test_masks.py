"""Radix selection: exactly the k smallest, over parts that are never together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from modelpress_compression.passes.prune.masks import smallest, smallest_of_groups

_scores = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(0, 1e6, width=32) | st.sampled_from([0.0, 1.0, 1.0000001, 3e-40])
)


@given(st.lists(_scores, min_size=1, max_size=4), st.floats(0, 1))
def test_exactly_the_k_smallest(parts: list[np.ndarray], share: float) -> None:  # type: ignore[type-arg]
    """k are taken, none of them is larger than any that stays; ties and denormals included."""
    everything = np.concatenate(parts)
    k = round(share * everything.size)
    selector = smallest(k, lambda: parts)
    mask = np.concatenate([selector.take(part) for part in parts])
    assert np.count_nonzero(mask) == k
    if 0 < k < everything.size:
        assert everything[mask].max() <= everything[~mask].min()


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.floats(0, 10, width=32)),
    st.integers(2, 8),
    st.data(),
)
def test_every_group_loses_n(scores: np.ndarray, m: int, data: st.DataObject) -> None:  # type: ignore[type-arg]
    """Exactly n of every whole group go, the smallest ones; the remainder of a row stays."""
    n = data.draw(st.integers(1, m - 1))
    mask = smallest_of_groups(scores, n, m)
    whole = scores.shape[1] // m * m
    assert not mask[:, whole:].any()
    groups, values = mask[:, :whole].reshape(-1, m), scores[:, :whole].reshape(-1, m)
    assert (groups.sum(axis=1) == n).all()
    for chosen, group in zip(groups, values, strict=True):
        assert group[chosen].max() <= group[~chosen].min()


@pytest.mark.parametrize("k", [0, 1, 2_499_999, 3_000_000])
def test_more_than_one_chunk(k: int) -> None:
    """Three million scores, in pieces of one million inside."""
    scores = np.random.default_rng(0).random(3_000_000, dtype=np.float32)
    mask = smallest(k, lambda: [scores]).take(scores)
    assert np.count_nonzero(mask) == k
    if 0 < k < scores.size:
        assert scores[mask].max() <= scores[~mask].min()
