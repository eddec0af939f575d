"""Which intermediate values teach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
from modelpress_compression.executor import weights
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.matching import agreeing, common_values, spread


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
