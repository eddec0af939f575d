"""Which positions of a padded batch count."""

from __future__ import annotations

import numpy as np
import pytest
from modelpress_compression.graph.padding import counted_among, counted_positions, without_padding

MASK = np.asarray([[1, 1, 0], [1, 0, 0]], np.int64)


@pytest.mark.parametrize("name", ["attention_mask", "input_mask", "encoder.attention_mask"])
def test_a_mask_is_known_by_its_name(name: str) -> None:
    """Ones are the positions that count."""
    found = counted_positions({"ids": np.zeros((2, 3), np.int64), name: MASK})
    assert found is not None
    np.testing.assert_array_equal(found, MASK == 1)


def test_positions_are_counted_without_channels() -> None:
    """[N, T, ...], whatever axis the channels were, and [N * T]."""
    mask = MASK == 1
    for positions in ((2, 3), (2, 3, 4)):
        assert counted_among(positions, mask) is mask
    np.testing.assert_array_equal(counted_among((6,), mask), [True, True, False, True, False, False])
    for other in ((2,), (3, 2), (2, 4)):
        assert counted_among(other, mask) is None
    assert counted_among((2, 3), None) is None


@pytest.mark.parametrize(
    "feeds",
    [
        {"padding_mask": MASK},
        {"attention_mask": np.ones((2, 3), np.int64)},
        {"attention_mask": np.zeros((2, 3), np.int64)},
        {"attention_mask": MASK * 7},
        {"attention_mask": MASK[None]},
        {"attention_mask": (1 - MASK) * np.float32(-1e4)},
    ],
)
def test_what_is_no_such_mask_leaves_all_positions(feeds: dict[str, np.ndarray]) -> None:
    """Names that mean the opposite as often, masks that leave nothing out or everything, other values,
    other ranks, and masks that are added to scores, where zeros are the positions that count."""
    assert counted_positions(feeds) is None


def test_only_sequences_of_the_masks_shape_lose_positions() -> None:
    """[N, T, C] and [N * T, C] become [positions, C]; class scores [N, C], other lengths and no mask stay as they
    are, [N, T, C] whose T and C make as many as the mask has among them."""
    sequence = np.arange(12).reshape(2, 3, 2)
    mask = MASK == 1
    np.testing.assert_array_equal(without_padding(sequence, mask), sequence[mask])
    np.testing.assert_array_equal(without_padding(sequence.reshape(6, 2), mask), sequence[mask])
    for array in (np.zeros((2, 3)), np.zeros((2, 4, 2)), np.zeros((1, 6, 2)), np.zeros((3, 2, 2))):
        assert without_padding(array, mask) is array
    assert without_padding(sequence, None) is sequence
