"""Fake quantization: numbers of onnxruntime, gradients of LSQ (arXiv:1902.08153)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from modelpress_compression import runtime
from modelpress_compression.executor import Executor, weights
from modelpress_compression.model import Model

ModelFromText = Callable[..., Model]
_FAKE = """
<ir_version: 10, opset_import: ["": 21]>
g (float[n, m] x) => (float[n, m] y) {{
    q = QuantizeLinear <axis = {axis}, block_size = {block}> (x, s, z)
    y = DequantizeLinear <axis = {axis}, block_size = {block}> (q, s, z)
}}
"""


def _fake(build: ModelFromText, scale: np.ndarray, zero: np.ndarray, axis: int = 1, block: int = 0) -> Model:
    return build(_FAKE.format(axis=axis, block=block), {"s": scale.astype(np.float32), "z": zero})


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_equals_onnxruntime(model_from_text: ModelFromText, kind: str) -> None:
    """Per axis, with zero points, also beyond the range; exactly up to float32 rounding."""
    model = _fake(model_from_text, np.array([0.5, 0.01, 2]), np.array([3, 100, 7], kind))
    x = np.random.default_rng(0).normal(0, 30, (5, 3)).astype(np.float32)
    with runtime.session_of(model) as session:
        expected = runtime.run(session, {"x": x})["y"]
    np.testing.assert_allclose(Executor(model).run({"x": x})["y"], expected, rtol=1e-6)


def test_blocks_along_an_axis(model_from_text: ModelFromText) -> None:
    """A scale for every two columns, the last block of one."""
    model = _fake(model_from_text, np.array([[1.0, 10.0]]), np.array([[0, 0]], np.int8), block=2)
    found = Executor(model).run({"x": np.array([[1.4, 2.6, 37.0]], np.float32)})["y"]
    np.testing.assert_allclose(found, [[1, 3, 40]])


def test_gradients_pass_straight_through_within_the_range(model_from_text: ModelFromText) -> None:
    """1 for values inside, 0 for those that are cut off."""
    executor = Executor(_fake(model_from_text, np.array(0.5), np.array(0, np.int8)))
    x = torch.tensor([[0.3, -10.0, 63.4, 64.6, -80.0]], requires_grad=True)
    executor({"x": x})["y"].sum().backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), [[1, 1, 1, 0, 0]])


def test_constant_scales_make_one_step(model_from_text: ModelFromText) -> None:
    """Q and DQ run as one kernel; asked for the integers, or to learn the scale, they do not."""
    model = _fake(model_from_text, np.array([0.5, 0.01, 2]), np.array([3, 100, 7], np.uint8))
    assert len(Executor(model)._plan.steps) == 1
    assert len(Executor(model, outputs=["q", "y"])._plan.steps) == 2
    learned = Executor(model, trainable=["s"])
    assert len(learned._plan.steps) == 2
    x = np.random.default_rng(0).normal(0, 3, (4, 3)).astype(np.float32)
    np.testing.assert_allclose(learned.run({"x": x})["y"], Executor(model).run({"x": x})["y"], rtol=1e-5)


def test_the_scale_has_the_gradient_of_lsq(model_from_text: ModelFromText) -> None:
    """Summed over the values: round(v / s) - v / s inside, where 63.4 is on the outermost level; the bound outside."""
    executor = Executor(_fake(model_from_text, np.array(0.5), np.array(0, np.int8)), trainable=["s"])
    v = np.array([[0.3, -10.1, 63.4, 90.0, -80.0]])
    executor({"x": torch.from_numpy(v.astype(np.float32))})["y"].sum().backward()
    scaled = v / 0.5
    inside = np.abs(scaled) < 127
    expected = np.where(inside, np.round(scaled) - scaled, np.where(scaled > 0, 127, -128)).sum()
    (scale,) = executor.parameters()
    assert scale.grad is not None
    np.testing.assert_allclose(scale.grad.item(), expected, rtol=1e-4)


def test_a_quantized_weight_is_trained_through_its_quantization(model_from_text: ModelFromText) -> None:
    """The float weight behind Q and DQ, and a transposition, is a weight and gets a gradient."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float[n, 2] y) {
        q = QuantizeLinear (w, s, z)
        d = DequantizeLinear (q, s, z)
        t = Transpose <perm = [1, 0]> (d)
        y = MatMul (x, t)
    }"""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((2, 3)).astype(np.float32), "s": np.array(0.1, np.float32), "z": np.array(0, np.int8)
    }  # fmt: skip
    executor = Executor(model_from_text(text, constants), trainable=weights)
    assert set(executor.parameters_by_name) == {"w"}
    executor({"x": torch.ones(1, 3)})["y"].sum().backward()
    gradient = executor.parameters_by_name["w"].grad
    assert gradient is not None
    np.testing.assert_array_equal(gradient.numpy(), np.ones((2, 3)))


def test_integers_that_something_else_reads_stay_integers(model_from_text: ModelFromText) -> None:
    """A quantized value that is an output is int8."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y, int8[n] q) {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }"""
    model = model_from_text(text, {"s": np.array(1, np.float32), "z": np.array(0, np.int8)})
    assert Executor(model)({"x": torch.tensor([1.2, 300.0])})["q"].tolist() == [1, 127]
