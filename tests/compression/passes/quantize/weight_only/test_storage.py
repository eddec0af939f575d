"""Weights stored in fewer bits: as many in 8 bits as the outputs permit, the rest in 16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.decibels import decibels
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.weight_only.storage import (
    FEW_SAMPLES,
    IN_16_BITS,
    IN_BLOCKS,
    IN_FLOAT16,
    store_all,
)
from modelpress_compression.passes.quantize.weight_only.store import STORED
from modelpress_compression.target import Target
from onnx import helper

CONFIG = QuantizeConfig(scheme="weight_only")


def two_products(build: Callable[..., Model], width: int, outlier: float = 300.0) -> Model:
    """In a row; the first row of the second one is so many times as large as the others, and so is every column's
    scale."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(32, 2 * width)), rng.normal(size=(2 * width, width))
    second[0] *= outlier
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
    assert result.changes.get(STORED, 0) + result.changes.get(IN_16_BITS, 0) == 2
    assert output_distances(uneven, result.model, context).error <= 10 ** (-floor_db / 10)
    assert result.model.weight_bytes() < 0.6 * uneven.weight_bytes()


def test_only_as_many_as_must_go_to_16_bits(uneven: Model, tmp_path: Path) -> None:
    """A low floor leaves all weights in 8 bits, a high one does not."""
    context = context_of(uneven, tmp_path)
    assert IN_16_BITS not in store_all(uneven, CONFIG, context, 10.0).changes
    assert store_all(uneven, CONFIG, context, 55.0).changes[IN_16_BITS] >= 1


def test_rows_with_outliers_are_in_blocks(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """Without a floor even; the file stays below .3 of float32's, and other rows have a scale a channel."""
    model = two_products(channel_model, 64)
    result = store_all(model, CONFIG, context_of(model, tmp_path), 0.0)
    assert result.changes == {STORED: 2, IN_BLOCKS: 1}
    assert result.model.weight_bytes() < 0.3 * model.weight_bytes()
    even = two_products(channel_model, 64, outlier=1.0)
    assert store_all(even, CONFIG, context_of(even, tmp_path), 0.0).changes == {STORED: 2}


def test_openvino_gets_no_blocks(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """It takes them for products of another shape: what they would serve is in channels, or in float16."""
    model = two_products(channel_model, 64)
    context = replace(context_of(model, tmp_path), target=Target(device="openvino"))
    for floor_db in (0.0, 60.0):
        assert IN_BLOCKS not in store_all(model, CONFIG, context, floor_db).changes


def test_blocks_come_before_16_bits(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """A floor 1 dB over what channels keep is held by blocks, without float16; two weights are in 8 bits still."""
    model = two_products(channel_model, 64, outlier=3.0)
    context = context_of(model, tmp_path)
    by_channel = store_all(model, CONFIG, context, 0.0)
    assert IN_BLOCKS not in by_channel.changes
    floor_db = decibels(output_distances(model, by_channel.model, context).error) + 1
    result = store_all(model, CONFIG, context, floor_db)
    assert result.changes[IN_BLOCKS] >= 1
    assert IN_16_BITS not in result.changes
    assert result.changes[STORED] == 2
    assert output_distances(model, result.model, context).error <= 10 ** (-floor_db / 10)
    assert result.model.weight_bytes() < 0.3 * model.weight_bytes()


def test_16_bits_with_scales_keep_more_than_float16(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """80 dB, where float16 keeps 74 of normal weights."""
    model = two_products(channel_model, 24, outlier=1.0)
    context = context_of(model, tmp_path)
    result = store_all(model, CONFIG, context, 80.0)
    assert result.changes == {IN_16_BITS: 2}
    assert output_distances(model, result.model, context).error <= 10**-8
    assert result.model.weight_bytes() < 0.6 * model.weight_bytes()


def test_float16_takes_channels_with_outliers(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """One of 4,096 weights of a channel is a thousand times as large as the rest, which float16 does not mind."""
    weights = np.random.default_rng(7).normal(size=(4097, 1))
    weights[0] = 1000.0
    model = channel_model(
        [helper.make_node("MatMul", ["x", "a"], ["y"])], {"a": weights}, ["batch", 4097], ["batch", 1]
    )
    samples = np.random.default_rng(8).normal(size=(8, 4097)).astype(np.float32)
    samples[:, 0] = 0.0
    context = Context(InputData.from_arrays({"x": samples}, model.inputs), tmp_path)
    result = store_all(model, CONFIG, context, 60.0)
    assert result.changes == {IN_FLOAT16: 1}
    assert output_distances(model, result.model, context).error <= 10**-6


def test_the_cheapest_move_comes_first(channel_model: Callable[..., Model], tmp_path: Path) -> None:
    """Of two weights that err about alike, the one of a sixteenth of the size goes to 16 bits."""
    rng = np.random.default_rng(5)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    model = channel_model(nodes, {"a": rng.normal(size=(32, 20)), "b": rng.normal(size=(20, 500))},
                          ["batch", 32], ["batch", 500])  # fmt: skip
    context = context_of(model, tmp_path)
    error = output_distances(model, store_all(model, CONFIG, context, 0.0).model, context).error
    result = store_all(model, CONFIG, context, decibels(error) + 1)
    wide = [value.name for value in result.model.graph.initializers.values() if value.dtype == onnx_ir.DataType.INT16]
    assert wide == ["a_quantized"]


def test_a_floor_beyond_16_bits_leaves_the_model_alone(uneven: Model, tmp_path: Path) -> None:
    """150 dB is more than 16 bits keep: the model comes back as it was, with the reason."""
    result = store_all(uneven, CONFIG, context_of(uneven, tmp_path), 150.0)
    assert not result.changed
    assert result.model is uneven
    assert "16 bits" in result.warnings[0]


@pytest.mark.parametrize("scale", [1.0, 0.3], ids=["like the others", "harder than the others"])
def test_what_any_change_costs_is_not_counted_for_each_weight(
    channel_model: Callable[..., Model], tmp_path: Path, scale: float
) -> None:
    """A remainder, of which any change makes another, errs by 25 dB for each of 16 weights: by their sum, all
    of them would have to stay. One has rows that 8 bits serve badly; with it in 16, the rest is in 8 bits.

    That is found on few samples, `scale` times as large as the others: smaller ones err more for their size."""
    rng = np.random.default_rng(6)
    weights = {f"w{number}": rng.normal(size=(16, 80)) for number in range(16)}
    weights["w0"][0] *= 30.0
    nodes = [
        *(helper.make_node("MatMul", ["x", name], [f"h{name}"]) for name in weights),
        helper.make_node("Sum", [f"h{name}" for name in weights], ["sum"]),
        helper.make_node("Mul", ["sum", "often"], ["scaled"]),
        helper.make_node("Mod", ["scaled", "one"], ["rest"], fmod=1),
        helper.make_node("Mul", ["rest", "little"], ["noise"]),
        helper.make_node("Concat", ["hw0", "noise"], ["y"], axis=1),
    ]
    constants = {"often": np.asarray(1e3), "one": np.asarray(1.0), "little": np.asarray(0.27)}
    model = channel_model(nodes, weights | constants, ["batch", 16], ["batch", 160])
    samples = rng.normal(size=(32, 16)).astype(np.float32)
    samples[:, 0] = 0.0  # which the large row is for
    samples[np.arange(FEW_SAMPLES) * len(samples) // FEW_SAMPLES] *= scale
    context = Context(InputData.from_arrays({"x": samples}, model.inputs), tmp_path)
    by_channel = store_all(model, CONFIG, context, 0.0)
    floor_db = decibels(output_distances(model, by_channel.model, context).error) + 1
    result = store_all(model, CONFIG, context, floor_db)
    assert result.changes == {STORED: 15, IN_16_BITS: 1}
