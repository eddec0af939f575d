"""What is held out is about as much as was asked for, and nothing of it is alike what is fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.holding_out import held_out, parted, random_share
from modelpress_compression.inputs import InputData
from modelpress_compression.specs import TensorSpec


def data_of(kinds: Any, batch: int | str = "n") -> InputData:
    """One sample for each entry; those of one kind are copies of each other."""
    rows = np.random.default_rng(0).standard_normal((max(kinds) + 1, 40)).astype(np.float32)
    return InputData((TensorSpec("x", "float32", (batch, 40)),), {"x": rows[np.asarray(kinds)]})


@given(count=st.integers(2, 60), every=st.integers(2, 6))
def test_of_samples_that_differ_every_nth_is_held_out(count: int, every: int) -> None:
    """In order; of few samples more of them, so that there is at least one, and one to fit to."""
    period = max(2, min(every, count // 2))
    assert held_out(data_of(range(count)), every) == set(range(period - 1, count, period))


@given(kinds=st.lists(st.integers(0, 12), min_size=2, max_size=80), every=st.integers(2, 5))
def test_copies_lie_on_one_side(kinds: list[int], every: int) -> None:
    """Both sides have some, no more is held out than its share, and no kind is on both, unless all are alike."""
    held = held_out(data_of(kinds), every)
    assert 0 < len(held) < len(kinds)
    if len(set(kinds)) > 1:
        assert not {kinds[place] for place in held} & {kinds[place] for place in set(range(len(kinds))) - held}
        assert len(held) * max(2, min(every, len(set(kinds)) // 2)) <= len(kinds)


@given(kinds=st.lists(st.integers(0, 12), min_size=2, max_size=80), share=st.floats(0.05, 0.5), seed=st.integers(0, 9))
def test_a_random_share_takes_copies_together(kinds: list[int], share: float, seed: int) -> None:
    """Every sample is on one side, and so is every kind where there is more than one."""
    train, held = random_share(data_of(kinds), share, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(kinds)))
    if len(set(kinds)) > 1:
        assert len(train)
        assert len(held)
        assert not {kinds[place] for place in train} & {kinds[place] for place in held}


def test_a_random_share_of_samples_that_differ() -> None:
    """As many as asked for, others for another seed, the same for the same one."""
    data = data_of(range(50))
    train, held = random_share(data, 0.1, 1)
    assert len(held) == 5
    assert held.tolist() == sorted(held.tolist())
    assert random_share(data, 0.1, 1)[0].tolist() == train.tolist()
    assert random_share(data, 0.1, 2)[1].tolist() != held.tolist()


def test_batches_with_samples_alike_go_together() -> None:
    """A model that takes four samples at a time: feeds that share a kind are held out together, or not at all."""
    kinds = np.arange(80)
    kinds[7], kinds[79] = kinds[0], kinds[40]  # feeds 0 and 1, and feeds 10 and 19
    held = held_out(data_of(kinds, batch=4))
    assert (0 in held) == (1 in held)
    assert (10 in held) == (19 in held)
    assert 2 <= len(held) <= 4
    fitted, judging = parted(data_of(kinds, batch=4))
    assert (len(fitted), len(judging)) == (80 - 4 * len(held), 4 * len(held))


def test_a_single_sample_is_not_held_out() -> None:
    """There would be nothing to fit to."""
    assert held_out(data_of([0])) == frozenset()


@pytest.mark.parametrize("count", [3, 10])
def test_where_all_are_alike_each_stands_for_itself(count: int) -> None:
    """There is no choice."""
    assert held_out(data_of([0] * count)) == held_out(data_of(range(count)))
