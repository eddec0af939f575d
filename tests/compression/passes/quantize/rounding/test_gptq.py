"""GPTQ: the arithmetic against a plain loop, and that it never loses to rounding to the nearest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.quantize.rounding import gptq as module
from modelpress_compression.passes.quantize.rounding.gptq import gptq, output_error
from modelpress_compression.passes.quantize.rounding.rounder import nearest
from onnx import helper

Apply = Callable[..., PassResult]


def correlated(rng: np.random.Generator, rows: int, inputs: int, rank: int) -> np.ndarray:
    """Rows whose inputs follow from `rank` factors and a little noise, with scales that differ."""
    mixed = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, inputs))
    return (mixed + 0.1 * rng.standard_normal((rows, inputs))) * rng.uniform(0.1, 2, inputs)


def grid(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, low and high of a symmetric grid per column, [g, K, O]."""
    top = 2 ** (bits - 1) - 1
    scale = np.broadcast_to(np.abs(weight).max(axis=1, keepdims=True) / top, weight.shape)
    return scale, np.full(weight.shape, -float(top)), np.full(weight.shape, float(top))


def reference(weight: np.ndarray, scale: np.ndarray, top: float, hessian: np.ndarray) -> np.ndarray:
    """The paper's loop by the explicit inverse, eliminating one input after the other; one group, [K, O]."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    work, inverse = weight[order].copy(), None
    ordered = hessian[np.ix_(order, order)]
    inverse = np.linalg.inv(ordered + 0.01 * np.diag(ordered).mean() * np.eye(len(order)))
    levels = np.empty_like(work)
    for k in range(len(order)):
        levels[k] = np.clip(np.rint(work[k] / scale[order[k]]), -top, top)
        error = (work[k] - levels[k] * scale[order[k]]) / inverse[k, k]
        work[k + 1 :] -= np.outer(inverse[k + 1 :, k], error)
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    result = np.empty_like(levels)
    result[order] = levels
    return result


def test_it_equals_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked updates by the Cholesky factor give the levels of the explicit elimination, whatever the block."""
    rng = np.random.default_rng(0)
    x = correlated(rng, 400, 24, 6)
    weight = rng.standard_normal((1, 24, 5))
    scale, low, high = grid(weight, 4)
    hessian = (x.T @ x)[None]
    wanted = reference(weight[0], scale[0], 7, hessian[0])
    for block in (1, 5, 128):
        monkeypatch.setattr(module, "_BLOCK", block)
        found = gptq(weight, scale, low, high, hessian)[0]
        better = output_error(weight - found * scale, hessian) < output_error(
            weight - nearest(weight, scale, low, high) * scale, hessian
        )
        np.testing.assert_array_equal(found[:, better[0]], wanted[:, better[0]])
        assert better.all()


@given(
    seed=st.integers(0, 10_000), groups=st.integers(1, 4), inputs=st.integers(1, 40), bits=st.sampled_from([2, 4, 8])
)
@settings(max_examples=60)
def test_no_column_loses(seed: int, groups: int, inputs: int, bits: int) -> None:
    """Levels are whole and within bounds, and no column's error on the data is above that of nearest rounding."""
    rng = np.random.default_rng(seed)
    x = np.stack([correlated(rng, 30, inputs, 3) for _ in range(groups)])
    x[:, :, rng.random(inputs) < 0.2] = 0  # dead inputs
    hessian = x.transpose(0, 2, 1) @ x
    weight = rng.standard_normal((groups, inputs, 6))
    scale, low, high = grid(weight, bits)
    levels = gptq(weight, scale, low, high, hessian)
    assert (levels == np.rint(levels)).all()
    assert ((low <= levels) & (levels <= high)).all()
    plain = output_error(weight - nearest(weight, scale, low, high) * scale, hessian)
    assert (output_error(weight - levels * scale, hessian) <= plain * (1 + 1e-9) + 1e-12).all()


def test_four_bits_gain_clearly_on_correlated_inputs() -> None:
    """Ten times less squared error than rounding to the nearest, on inputs that follow from a few factors."""
    rng = np.random.default_rng(1)
    x = correlated(rng, 2000, 128, 16)
    hessian = (x.T @ x)[None]
    weight = rng.standard_normal((1, 128, 64))
    scale, low, high = grid(weight, 4)
    plain = output_error(weight - nearest(weight, scale, low, high) * scale, hessian).sum()
    assert output_error(weight - gptq(weight, scale, low, high, hessian) * scale, hessian).sum() < 0.1 * plain


@pytest.mark.parametrize("count", [1, 100, 129, 300])
def test_the_inverse_by_halves(count: int) -> None:
    """It is the inverse of an upper triangular matrix (rtol 1e-9), and upper triangular."""
    rng = np.random.default_rng(count)
    matrix = np.triu(rng.standard_normal((2, count, count))) / np.sqrt(count) + 3 * np.eye(count)
    found = module._inverse_of_upper(matrix)
    np.testing.assert_allclose(found, np.linalg.inv(matrix), rtol=1e-9, atol=1e-12)
    assert not np.tril(found, -1).any()


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_a_hessian_that_tells_nothing_means_nearest(broken: float) -> None:
    """Sums that are not finite, or all zero, leave the nearest levels."""
    weight = np.random.default_rng(2).standard_normal((1, 8, 3))
    scale, low, high = grid(weight, 4)
    found = gptq(weight, scale, low, high, np.full((1, 8, 8), broken))
    np.testing.assert_array_equal(found, nearest(weight, scale, low, high))


def test_other_samples_judge() -> None:
    """From 12 rows of 48 inputs GPTQ learns their noise by heart. Judged by other rows it errs on a third set by less
    than where its own rows judge, no column by more than rounding to the nearest does on the rows that judge."""
    rng = np.random.default_rng(5)
    mixing, weight = rng.standard_normal((6, 48)), rng.standard_normal((1, 48, 40))
    scale, low, high = grid(weight, 4)
    fitted, judging, third = (
        (x.T @ x)[None]
        for x in (rng.standard_normal((n, 6)) @ mixing + rng.standard_normal((n, 48)) for n in (12, 400, 400))
    )
    simple = nearest(weight, scale, low, high)
    alone, judged = gptq(weight, scale, low, high, fitted), gptq(weight, scale, low, high, fitted, judging)
    errors = {
        name: output_error(weight - levels * scale, third).sum()
        for name, levels in (("alone", alone), ("judged", judged))
    }
    assert errors["judged"] < 0.9 * errors["alone"]
    kept, plain = (output_error(weight - levels * scale, judging) for levels in (judged, simple))
    assert (kept <= plain).all()


def test_samples_like_the_own_ones_change_nothing() -> None:
    """Where errors are as large on what is held out, the first damping is the last, and the levels are the paper's."""
    rng = np.random.default_rng(6)
    x = correlated(rng, 4000, 24, 6)
    weight = rng.standard_normal((1, 24, 5))
    scale, low, high = grid(weight, 4)
    fitted, other = ((part.T @ part)[None] for part in (x[:2000], x[2000:]))
    found = gptq(weight, scale, low, high, fitted, other)
    np.testing.assert_array_equal(found, gptq(weight, scale, low, high, fitted))
    np.testing.assert_array_equal(gptq(weight, scale, low, high, fitted, np.zeros_like(other)), found)


@pytest.fixture
def tall(build, rng):  # type: ignore[no-untyped-def]
    """MatMul over 320 inputs, Relu, Gemm (transB) over 256, both inputs correlated: x [N, 320] -> y [N, 24]."""
    weights = {
        "w1": rng.normal(0, 0.1, (320, 256)).astype(np.float32),
        "w2": rng.normal(0, 0.1, (24, 256)).astype(np.float32),
        "b2": rng.normal(0, 0.1, 24).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "first"),
        helper.make_node("Relu", ["m"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], "second", transB=1),
    ]
    samples = correlated(rng, 300, 320, 12).astype(np.float32)
    return build(nodes, weights, {"x": ["n", 320]}), {"x": samples}


@pytest.mark.parametrize("size", [32, 128])
def test_weight_only_gains(tall, quantize: Apply, sqnr, size: int) -> None:  # type: ignore[no-untyped-def]
    """4 bits: 4 dB more of the output than with nearest rounding, at the same size, also on samples not seen."""
    model, samples = tall
    half, rest = {"x": samples["x"][:200]}, {"x": samples["x"][200:]}
    options = {"scheme": "weight_only", "weights": "int4", "block_size": size}
    plain = quantize(model, half, rounding="nearest", **options).model
    better = quantize(model, half, rounding="gptq", **options).model
    assert better.weight_bytes() == plain.weight_bytes()
    assert sqnr(model, better, rest) > sqnr(model, plain, rest) + 4


def test_static_and_dynamic_use_it(tall, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """8-bit weights differ from the nearest ones under both schemes, and lose nothing (0.1 dB)."""
    model, samples = tall
    for scheme in ("static", "dynamic"):
        plain = quantize(model, samples, scheme=scheme, rounding="nearest")
        better = quantize(model, samples, scheme=scheme, rounding="gptq")
        levels = [
            np.concatenate([array.ravel() for array in sorted(large, key=lambda array: array.shape)])
            for large in (
                [tensor.numpy() for tensor in result.model.tensors() if tensor.size > 4000]
                for result in (plain, better)
            )
        ]
        assert (levels[0] != levels[1]).any()
        assert np.abs(levels[0].astype(int) - levels[1]).mean() < 2
        assert sqnr(model, better.model, samples) > sqnr(model, plain.model, samples) - 0.1


def test_convolutions_gain_too(cnn, images, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Static int8 with convolutions, one of them depthwise: no node falls back, and nothing is lost (0.1 dB)."""
    options = {"scheme": "static", "bias_correction": False}
    plain = quantize(cnn, images, rounding="nearest", **options)
    better = quantize(cnn, images, rounding="gptq", **options)
    assert not any("gptq" in skip.reason for skip in better.skipped)
    assert better.changes == plain.changes
    assert sqnr(cnn, better.model, images) > sqnr(cnn, plain.model, images) - 0.1


def test_without_data_it_is_nearest_with_a_warning(tall, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Synthetic inputs say nothing of how a weight's inputs go together."""
    model, samples = tall
    options = {"scheme": "weight_only", "weights": "int4"}
    result = quantize(model, samples, provided=False, rounding="gptq", **options)
    assert any("gptq" in text and "--data" in text for text in result.warnings)
    plain = quantize(model, samples, rounding="nearest", **options)
    for one, other in zip(result.model.tensors(), plain.model.tensors(), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
