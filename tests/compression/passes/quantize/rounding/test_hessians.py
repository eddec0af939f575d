"""Sums over the inputs of weights: equal to the products of all rows, in bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.passes import hessians as module
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.hessians import Hessians
from modelpress_compression.passes.quantize.rounding.gptq import gptq, output_error
from onnx import helper


def weight_of(model, name: str):  # type: ignore[no-untyped-def]
    return next(node for node in model.graph if node.name == name).inputs[1]


@pytest.fixture
def context(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A context with these samples."""
    return lambda model, arrays: Context(InputData(model.inputs, dict(arrays)), tmp_path)


def test_products_of_all_rows(mlp, vectors, context) -> None:  # type: ignore[no-untyped-def]
    """A MatMul's sums are x^T x over samples and positions (rtol 1e-5)."""
    found = Hessians(mlp, context(mlp, vectors)).of(weight_of(mlp, "fc1"))
    rows = vectors["x"].reshape(-1, 32).astype(np.float64)
    np.testing.assert_allclose(found[0], rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_depthwise_patches(cnn, images, context) -> None:  # type: ignore[no-untyped-def]
    """A depthwise convolution has one matrix of 3 x 3 inputs for each of its 16 channels."""
    hessians = Hessians(cnn, context(cnn, images))
    found = hessians.of(weight_of(cnn, "depthwise"))
    assert found.shape == (16, 9, 9)
    np.testing.assert_allclose(found, found.transpose(0, 2, 1), rtol=1e-5)
    assert (np.linalg.eigvalsh(found) > -1e-3).all()
    assert hessians.of(weight_of(cnn, "conv_1")).shape == (1, 72, 72)


def test_what_is_held_out(mlp, vectors, rng, context) -> None:  # type: ignore[no-untyped-def]
    """Every fifth of 20 samples has sums of its own, and both together are those of all (rtol 1e-5); of 10 samples none
    is held out."""
    x = rng.standard_normal((20, *vectors["x"].shape[1:])).astype(np.float32)
    weight = weight_of(mlp, "fc1")
    both = Hessians(mlp, context(mlp, {"x": x}), holds_out=True)
    kept = both.held_out(weight)
    assert kept is not None
    rows = x[4::5].reshape(-1, 32).astype(np.float64)
    np.testing.assert_allclose(kept[0], rows.T @ rows, rtol=1e-5, atol=1e-4)
    whole = Hessians(mlp, context(mlp, {"x": x})).of(weight)
    np.testing.assert_allclose(both.of(weight) + kept, whole, rtol=1e-5, atol=1e-4)
    few = Hessians(mlp, context(mlp, {"x": x[:10]}), holds_out=True)
    assert few.held_out(weight) is None
    assert module.held_out_samples(context(mlp, {"x": x[:10]}).data) is None


def test_a_small_budget_makes_batches_and_changes_nothing(  # type: ignore[no-untyped-def]
    cnn, images, context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight at a time, in any order, gives the same sums; one that is too large by itself says so."""
    whole = Hessians(cnn, context(cnn, images))
    wanted = {name: whole.of(weight_of(cnn, name)) for name in ("conv_1", "conv_3", "depthwise")}
    monkeypatch.setattr(module, "MAX_SUMS_BYTES", 1)
    monkeypatch.setattr(module, "MAX_BYTES", 8 * 100**2)
    small = Hessians(cnn, context(cnn, images))
    for name in ("depthwise", "conv_1"):
        np.testing.assert_array_equal(small.of(weight_of(cnn, name)), wanted[name])
    assert "MiB" in str(small.linear(weight_of(cnn, "conv_3")))


def test_a_shared_weight_has_the_sum_of_its_users(build, rng, context) -> None:  # type: ignore[no-untyped-def]
    """Two products by one weight: their rows together; users that read it differently: none, with the reason."""
    weight = rng.normal(0, 1, (8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "two"),
    ]
    model = build(nodes, {"w": weight}, {"x": ["n", 8]})
    x = rng.normal(0, 1, (20, 8)).astype(np.float32)
    found = Hessians(model, context(model, {"x": x})).of(weight_of(model, "one"))
    both = np.concatenate([x, x @ weight]).astype(np.float64)
    np.testing.assert_allclose(found[0], both.T @ both, rtol=1e-4, atol=1e-3)
    nodes[1] = helper.make_node("Gemm", ["h", "w"], ["y"], "two", transB=1)
    model = build(nodes, {"w": weight}, {"x": ["n", 8]})
    assert "different ways" in str(Hessians(model, context(model, {"x": x})).linear(weight_of(model, "one")))


def test_rows_that_are_not_finite_are_left_out(mlp, vectors, context) -> None:  # type: ignore[no-untyped-def]
    """A sample with NaN does not spoil the sums."""
    x = vectors["x"].copy()
    x[3, 2, 5] = np.nan
    found = Hessians(mlp, context(mlp, {"x": x})).of(weight_of(mlp, "fc1"))
    rows = np.delete(x.reshape(-1, 32), 3 * 5 + 2, axis=0).astype(np.float64)
    np.testing.assert_allclose(found[0], rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_some_positions_of_large_pictures_are_enough(build, rng, context) -> None:  # type: ignore[no-untyped-def]
    """GPTQ in 4 bits by 4096 of the 36,864 patches that nine pictures have errs on a tenth picture at most 2 % more
    than by all of them, and at least 10 % less than rounding to the nearest."""
    pictures = np.cumsum(rng.standard_normal((10, 8, 64, 64)), axis=3).astype(np.float32) / 4
    weight = rng.normal(0, 0.2, (16, 8, 3, 3)).astype(np.float32)
    model = build(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4)], {"w": weight}, {"x": ["n", 8, 64, 64]}
    )
    value = weight_of(model, "conv")
    linear = Hessians(model, context(model, {"x": pictures})).linear(value)
    assert not isinstance(linear, str)

    def sums(data: Any, rows: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ROWS", (rows, rows))
            patch.setattr(module, "ROWS_PER_INPUT", 0)
            return Hessians(model, context(model, {"x": data})).of(value)

    matrix = linear.matrix(weight)
    scale = np.broadcast_to(np.abs(matrix).max(axis=1, keepdims=True) / 7, matrix.shape)
    low, high = np.full(matrix.shape, -7.0), np.full(matrix.shape, 7.0)
    unseen = sums(pictures[9:], 4096)

    def error(levels: Any) -> float:
        return float(output_error(matrix - levels * scale, unseen).sum())

    every, some = (error(gptq(matrix, scale, low, high, sums(pictures[:9], rows))) for rows in (36864, 4096))
    assert some < 1.02 * every
    assert some < 0.9 * error(np.clip(np.round(matrix / scale), low, high))


def test_rows_of_one_large_sample_come_in_pieces(  # type: ignore[no-untyped-def]
    build, rng, context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single sample has all the rows of the sums, 38 MB of patches: they are never there at once (less than 30 MB
    are held, the sums and the sample included), and their products are those of all rows (rtol 1e-4)."""
    monkeypatch.setattr(module, "ROWS", (16384, 16384))
    x = rng.standard_normal((1, 64, 128, 128)).astype(np.float32)
    weights = {"w": rng.normal(0, 0.1, (8, 64, 3, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4)
    model = build([node], weights, {"x": ["n", 64, 128, 128]})
    hessians = Hessians(model, context(model, {"x": x}))
    tracemalloc.start()
    found = hessians.of(weight_of(model, "conv"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    linear = hessians.linear(weight_of(model, "conv"))
    assert not isinstance(linear, str)
    rows = linear.inputs(x, np.arange(128 * 128))
    assert peak_bytes < 30e6 < rows.nbytes
    np.testing.assert_allclose(found, rows.transpose(0, 2, 1) @ rows, rtol=1e-4, atol=1e-2)
