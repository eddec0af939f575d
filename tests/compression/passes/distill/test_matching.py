"""Which values, and which channels of them, student and teacher have in common."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.executor import weights
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.matching import (
    agreeing,
    common_values,
    corresponding,
    cut_axis,
    rising_selection,
    spread,
)


def matched(original: Model, student: Model, x: Any) -> list[str]:
    return list(agreeing(original, student, common_values(original, student, weights), {"x": x}))


def test_values_of_one_name_and_nearly_the_same_numbers(
    conv_net: Model, images: Any, perturbed: Callable[..., Model]
) -> None:
    """A disturbed model has the original's values, without outputs and what only moves numbers."""
    assert matched(conv_net, perturbed(conv_net, 0.1), images(8)) == ["c1", "r1", "c2", "r2", "p"]


def test_a_name_with_another_meaning_is_left_out(conv_net: Model, images: Any) -> None:
    """Where a pass scaled a layer against its reader, the value between is not held to the original's."""
    scaled = conv_net.clone()
    for name, factor in (("w1", 3.0), ("b1", 3.0), ("w2", 1 / 3)):
        value = scaled.graph.initializers[name]
        replace_numbers(value, value.const_value.numpy() * factor)
    assert matched(conv_net, scaled, images(8)) == ["c2", "r2", "p"]


def test_cut_channels_are_left_out(conv_net: Model, images: Any) -> None:
    """Values of other shapes are not compared."""
    cut = conv_net.clone()
    for name, kept in (("w1", np.s_[:5]), ("b1", np.s_[:5]), ("w2", np.s_[:, :5])):
        value = cut.graph.initializers[name]
        value.const_value = onnx_ir.tensor(value.const_value.numpy()[kept].copy(), name=name)
    assert not {"c1", "r1"} & set(matched(conv_net, cut, images(8)))


def test_spread_takes_the_last() -> None:
    """Few names stay as they are; of many some are taken evenly, the last among them."""
    names = [str(number) for number in range(20)]
    assert spread(names[:3]) == names[:3]
    assert len(spread(names, 8)) == 8
    assert spread(names, 8)[-1] == "19"


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 10_000))
def test_selection_is_the_best_rising_one(rows: int, spare: int, seed: int) -> None:
    """The selection's gain is that of the best of all rising selections."""
    gain = np.random.default_rng(seed).standard_normal((rows, rows + spare))
    selection = rising_selection(gain)
    assert (np.diff(selection) > 0).all()
    best = max(sum(gain[i, j] for i, j in enumerate(choice)) for choice in combinations(range(rows + spare), rows))
    assert sum(gain[i, j] for i, j in enumerate(selection)) == pytest.approx(best)


def test_cut_channels_are_found_again() -> None:
    """Channels that were kept, scaled and disturbed, are recognised; unrelated ones are not."""
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((16, 12, 4, 4)).astype(np.float32)
    kept = np.array([0, 3, 4, 7, 11])
    student = 2 * teacher[:, kept] + 0.5 * rng.standard_normal((16, 5, 4, 4)).astype(np.float32)
    found = corresponding([student], [teacher], axis=1)
    assert found is not None
    np.testing.assert_array_equal(found, kept)
    assert corresponding([rng.standard_normal((16, 5, 4, 4))], [teacher], axis=1) is None


def test_cut_axis() -> None:
    """One axis with fewer channels, other than that of the samples."""
    assert cut_axis((2, 4, 8), (2, 6, 8)) == 1
    assert cut_axis((2, 6, 8), (2, 4, 8)) is None
    assert cut_axis((1, 4), (2, 4)) is None
    assert cut_axis((2, 4, 4), (2, 6, 6)) is None
