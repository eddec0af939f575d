"""Whatever the strict reader admits, Python's reader and torch's see alike."""

from __future__ import annotations

import random

import pytest
from readers_agree import ours, pythons, run, torchs
from zip_writer import swapped, torch_like


def test_one_file_that_is_two_archives() -> None:
    """Python's reader and torch's see different members of the same file; ours refuses it."""
    evil, good = (torch_like(random.Random(seed)) for seed in (1, 2))
    data = swapped(evil, good)
    assert pythons(data) == {member.name.decode(): member.data for member in good.members}
    assert torchs(data) == {member.name.decode(): member.data for member in evil.members}
    assert ours(data) is None


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_three_readers_agree_on_what_is_admitted(count: int) -> None:
    """Of archives with lies in them some are admitted, as they are read alike; others fool a reader and are refused."""
    counts = run(count, seed=count)
    assert counts["admitted"] > count / 20
    assert counts["of the refused, read by both and differently"] > count / 50
