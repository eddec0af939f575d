"""Weights stored in fewer bits: as many in 8 bits as the outputs permit, the rest in float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.weight_only.storage import IN_BLOCKS, IN_FLOAT16, store_all
from modelpress_compression.passes.quantize.weight_only.store import STORED
from onnx import helper

CONFIG = QuantizeConfig(scheme="weight_only")


def two_products(build: Callable[..., Model], width: int) -> Model:
    """In a row; in the rows of the second one weight is 300 times as large as the others."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(32, 2 * width)), rng.normal(size=(2 * width, width))
    second[0] *= 300
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["r", "b"], ["y"])]
    nodes.insert(1, helper.make_node("Relu", ["h"], ["r"]))
    return build(nodes, {"a": first, "b": second}, ["batch", 32], ["batch", width])


@pytest.fixture
def uneven(channel_model: Callable[..., Model]) -> Model:
    """Rows of 24 weights have no blocks."""
    return two_products(channel_model, 24)


def context_of(model: Model, folder: Path) -> Context:
    """Samples of which most leave the large weights alone."""
    rng = np.random.default_rng(4)
    return Context(InputData.from_arrays({"x": rng.normal(size=(8, 32)).astype(np.float32)}, model.inputs), folder)


@pytest.mark.parametrize("floor_db", [20.0, 45.0, 55.0])
def test_the_outputs_keep_the_floor(uneven: Model, tmp_path: Path, floor_db: float) -> None:
    """Whatever the floor, the error is below it, and every weight is stored in 8 or 16 bits."""
    context = context_of(uneven, tmp_path)
    result = store_all(uneven, CONFIG, context, floor_db)
    assert result.changes.get(STORED, 0) + result.changes.get(IN_FLOAT16, 0) == 2
    assert output_distances(uneven, result.model, context).error <= 10 ** (-floor_db / 10)
    assert result.model.weight_bytes() < 0.6 * uneven.weight_bytes()


def test_only_as_many_as_must_go_to_float16(uneven: Model, tmp_path: Path) -> None:
    """A low floor leaves all weights in 8 bits, a high one does not."""
    context = context_of(uneven, tmp_path)
    assert IN_FLOAT16 not in store_all(uneven, CONFIG, context, 10.0).changes
    assert store_all(uneven, CONFIG, context, 55.0).changes[IN_FLOAT16] >= 1


def test_uneven_rows_go_into_blocks_before_they_go_to_float16(
    channel_model: Callable[..., Model], tmp_path: Path
) -> None:
    """A floor 3 dB over what channels keep is held by blocks, without float16; two weights are in 8 bits still."""
    model = two_products(channel_model, 64)
    context = context_of(model, tmp_path)
    by_channel = output_distances(model, store_all(model, CONFIG, context, 0.0).model, context).error
    floor_db = -10 * np.log10(by_channel) + 3
    result = store_all(model, CONFIG, context, floor_db)
    assert result.changes[IN_BLOCKS] == 1
    assert IN_FLOAT16 not in result.changes
    assert result.changes[STORED] == 2
    assert output_distances(model, result.model, context).error <= 10 ** (-floor_db / 10)
    assert result.model.weight_bytes() < 0.3 * model.weight_bytes()


def test_a_floor_beyond_float16_leaves_the_model_alone(uneven: Model, tmp_path: Path) -> None:
    """150 dB is more than float16 keeps: the model comes back as it was, with the reason."""
    result = store_all(uneven, CONFIG, context_of(uneven, tmp_path), 150.0)
    assert not result.changed
    assert result.model is uneven
    assert "float16" in result.warnings[0]
