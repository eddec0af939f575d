"""Bits of each weight by itself: what a form costs is what it takes, and errors add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.graph.read import constant_tensor
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.weight_only.mixed_bits import EIGHT, FLOAT, FOUR, LONG_FOUR, MixedBits

CONFIG = QuantizeConfig(scheme="weight_only")


@pytest.fixture
def bits(digits: Model, samples: InputData, tmp_path: Path) -> MixedBits:
    return MixedBits(digits, CONFIG, Context(samples, tmp_path))


def stored_bytes(model: Model) -> int:
    """Of all constants but scalars."""
    tensors = filter(None, (constant_tensor(value) for value in model.graph.initializers.values()))
    return sum(tensor.nbytes for tensor in tensors if tensor.size > 1)


def test_fewer_bits_take_less_and_err_more(bits: MixedBits) -> None:
    """Every weight: sizes rise from 4 bits in long blocks to float32, and errors fall to nothing."""
    assert bits.options
    for forms in bits.options.values():
        by_name = {form.name: form for form in forms}
        assert by_name[FLOAT].error == 0.0
        assert 0 < by_name[EIGHT].size_bytes < by_name[FLOAT].size_bytes / 3
        if FOUR in by_name:
            assert by_name[LONG_FOUR].size_bytes <= by_name[FOUR].size_bytes < 0.7 * by_name[EIGHT].size_bytes
            assert by_name[FOUR].error > by_name[EIGHT].error > 0.0


def test_each_weight_gets_the_form_that_it_is_given(bits: MixedBits, digits: Model) -> None:
    """Prices are what the file takes: within 2 %, or the bytes of a few shapes."""
    fours = {name: FOUR for name, forms in bits.options.items() if any(form.name == FOUR for form in forms)}
    assert fours
    first = next(iter(fours))
    mixed = {name: (FOUR if name == first else FLOAT) for name in bits.options}
    before, after = stored_bytes(digits), stored_bytes(bits.store(mixed).model)
    sizes = {form.name: form.size_bytes for form in bits.options[first]}
    assert before - after == pytest.approx(sizes[FLOAT] - sizes[FOUR], rel=0.02, abs=256)
    assert dict(bits.store(mixed).changes) == {"weights_in_4_bits": 1}


def test_errors_of_weights_add_up_to_the_model_s(bits: MixedBits, digits: Model, samples: InputData) -> None:
    """Within 4 dB, of which the few samples that single weights are measured on make some: roundings of different
    weights are nearly independent."""
    forms = {name: options[0].name for name, options in bits.options.items()}
    predicted = sum(options[0].error for options in bits.options.values())
    measured = output_distances(digits, bits.store(forms).model, Context(samples, Path())).error
    assert predicted / 2.5 < measured < predicted * 2.5


def test_the_model_is_not_touched(digits: Model, bits: MixedBits) -> None:
    """Whatever is made of its clone."""
    before = {name: value.const_value.numpy().copy() for name, value in digits.graph.initializers.items()}
    bits.store({})
    after = {name: value.const_value.numpy().copy() for name, value in digits.graph.initializers.items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
