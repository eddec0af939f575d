"""Positions of padded sequences that count: those that an attention mask does not leave out.

What a model makes of padding is arbitrary, and no one reads it; ranges and errors must not be taken from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.inputs import Array

# One where a token counts. Names such as padding_mask mean the opposite as often, and are left alone.
_NAME = re.compile(r"(?:^|[._/])(?:attention|input)_mask$", re.IGNORECASE)
_Number = TypeVar("_Number", bound=np.generic)


def is_attention_mask(name: str) -> bool:
    """Whether an input of this name has a one where a token counts."""
    return _NAME.search(name) is not None


def counted_positions(feeds: Mapping[str, Array]) -> NDArray[np.bool_] | None:
    """The mask [N, T] among a model's inputs; None: it has none, or all positions count."""
    for name, array in feeds.items():
        if not is_attention_mask(name) or array.ndim != 2 or array.dtype.kind not in "biuf":
            continue
        mask: NDArray[np.bool_] = np.not_equal(array, 0)
        if bool(np.isin(array, (0, 1)).all()) and mask.any() and not mask.all():
            return mask
    return None


def counted_among(positions: Sequence[int], mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """What picks the positions that count; None: all of them do, or they are not those of the mask's sequences.

    `positions`: the extents of an activation without its channels, (N, T, ...), or (N * T,) where the model merges
    samples and positions.
    """
    if mask is None:
        return None
    if tuple(positions[:2]) == mask.shape:
        return mask
    return mask.reshape(-1) if tuple(positions) == (mask.size,) else None


def without_padding(array: NDArray[_Number], mask: NDArray[np.bool_] | None) -> NDArray[_Number]:
    """Of an activation [N, T, ..., C] or [N * T, C] the positions that count, as [positions, ..., C]; any other array
    as it is."""
    counted = counted_among(array.shape[:-1], mask)
    return array if counted is None else array[counted]
