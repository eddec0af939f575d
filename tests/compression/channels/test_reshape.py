"""Blocks and common factors of shapes."""

from __future__ import annotations

import pytest
from modelpress_compression.channels.ops.reshape import blocks, common_factors


def test_blocks_have_equal_products() -> None:
    """Axes of extent 1 belong to no block."""
    assert blocks((2, 1, 12, 5), (2, 3, 4, 1, 5)) == [([0], [0]), ([2], [1, 2]), ([3], [4])]


@pytest.mark.parametrize(
    ("before", "after", "factors"),
    [
        ((64, 49), (32, 98), [32, 2, 49]),
        ((12,), (3, 4), [3, 4]),
        ((3, 4), (12,), [3, 4]),
        ((6, 4), (4, 6), None),
    ],
)
def test_common_factors(before: tuple[int, ...], after: tuple[int, ...], factors: list[int] | None) -> None:
    """Both sides are products of the factors; where extents cut across each other there are none."""
    assert common_factors(before, after) == factors
