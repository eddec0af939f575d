"""Which positions of a padded batch count."""

from __future__ import annotations

import numpy as np
import pytest
from modelpress_compression.graph.padding import counted_positions, without_padding

MASK = np.asarray([[1, 1, 0], [1, 0, 0]], np.int64)


@pytest.mark.parametrize("name", ["attention_mask", "input_mask", "encoder.attention_mask"])
def test_a_mask_is_known_by_its_name(name: str) -> None:
    """Ones are the positions that count."""
    found = counted_positions({"ids": np.zeros((2, 3), np.int64), name: MASK})
    assert found is not None
    np.testing.assert_array_equal(found, MASK == 1)


@pytest.mark.parametrize(
    "feeds",
    [
        {"padding_mask": MASK},
        {"attention_mask": np.ones((2, 3), np.int64)},
        {"attention_mask": np.zeros((2, 3), np.int64)},
        {"attention_mask": MASK * 7},
        {"attention_mask": MASK[None]},
    ],
)
def test_what_is_no_such_mask_leaves_all_positions(feeds: dict[str, np.ndarray]) -> None:
    """Names that mean the opposite as often, masks that leave nothing out or everything, other values, other ranks."""
    assert counted_positions(feeds) is None


def test_only_sequences_of_the_masks_shape_lose_positions() -> None:
    """[N, T, C] becomes [positions, C]; class scores [N, C], other lengths and no mask stay as they are."""
    sequence = np.arange(12).reshape(2, 3, 2)
    mask = MASK == 1
    np.testing.assert_array_equal(without_padding(sequence, mask), sequence[mask])
    for array in (np.zeros((2, 3)), np.zeros((2, 4, 2))):
        assert without_padding(array, mask) is array
    assert without_padding(sequence, None) is sequence
