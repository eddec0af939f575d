"""Operators of com.microsoft, older opsets and forms that ONNX's tests leave out, against onnxruntime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from modelpress_compression import runtime
from modelpress_compression.encodings.weight import pack
from modelpress_compression.executor import Executor

MICROSOFT = "com.microsoft"
_RNG = np.random.default_rng(3)


def _f(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def _u8(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape, dtype=np.uint8)


def _i7(*shape: int) -> np.ndarray:
    """Weights in int8 that use 7 bits: onnxruntime's kernels for CPUs without VNNI add pairs of products with uint8 in
    16 bits, and 2 * 255 * 64 fits."""
    return _RNG.integers(-64, 65, shape, dtype=np.int8)


def _case(op: str, inputs: dict[str, np.ndarray], name: str = "", **options: Any) -> Any:
    return pytest.param(op, inputs, options, id=name or op)


_S = np.array(0.02, np.float32)
_ATTENTION = {"x": _f(2, 3, 8), "w": _f(8, 24), "b": _f(24)}
_HEADS = {"q": _f(2, 3, 8), "k": _f(2, 5, 8), "v": _f(2, 5, 8)}
_QUANTIZED = {
    "a": _u8(2, 3),
    "as": _S,
    "az": np.array(120, np.uint8),
    "b": _u8(2, 3),
    "bs": np.array(0.04, np.float32),
    "bz": np.array(9, np.uint8),
}
_OUT = {"ys": np.array(0.05, np.float32), "yz": np.array(128, np.uint8)}
_IDS = _RNG.integers(0, 6, (2, 3)).astype(np.int32)
_CASES = [
    *[_case(op, {"x": _f(2, 3, 4)}, domain=MICROSOFT) for op in ("Gelu", "QuickGelu")],
    *[_case(op, {"x": _f(2, 3, 4), "b": _f(4)}, domain=MICROSOFT) for op in ("FastGelu", "BiasGelu")],
    _case(
        "FusedConv",
        {"x": _f(1, 2, 5, 5), "w": _f(3, 2, 3, 3), "b": _f(3)},
        domain=MICROSOFT,
        activation="Clip",
        activation_params=[0.0, 0.5],
    ),
    _case(
        "FusedConv",
        {"x": _f(1, 2, 5, 5), "w": _f(3, 2, 3, 3), "b": _f(3), "z": _f(1, 3, 3, 3)},
        "FusedConv-residual",
        domain=MICROSOFT,
        activation="Relu",
    ),
    _case(
        "FusedGemm",
        {"a": _f(3, 2), "b": _f(3, 4), "c": _f(4)},
        domain=MICROSOFT,
        transA=1,
        activation="LeakyRelu",
        activation_alpha=0.2,
    ),
    _case("FusedMatMul", {"a": _f(2, 4, 3), "b": _f(2, 5, 4)}, domain=MICROSOFT, transA=1, transB=1, alpha=0.3),
    _case(
        "SkipLayerNormalization",
        {"x": _f(2, 3, 4), "s": _f(2, 3, 4), "g": _f(4), "b": _f(4), "bias": _f(4)},
        domain=MICROSOFT,
    ),
    _case("SkipSimplifiedLayerNormalization", {"x": _f(2, 3, 4), "s": _f(2, 3, 4), "g": _f(4)}, domain=MICROSOFT),
    _case("SimplifiedLayerNormalization", {"x": _f(2, 3, 4), "g": _f(4)}, domain="", opset=17),
    _case("MultiHeadAttention", _HEADS, domain=MICROSOFT, num_heads=2),
    _case(
        "MultiHeadAttention",
        {**_HEADS, "b": _f(24), "m": np.array([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], np.int32), "a": _f(2, 2, 3, 5)},
        "MHA-masks",
        domain=MICROSOFT,
        num_heads=2,
        scale=0.4,
    ),
    _case(
        "MultiHeadAttention",
        {"q": _f(2, 3, 8), "k": _f(2, 3, 8), "v": _f(2, 3, 8)},
        "MHA-causal",
        domain=MICROSOFT,
        num_heads=2,
        unidirectional=1,
    ),
    _case("Attention", _ATTENTION, domain=MICROSOFT, num_heads=2),
    _case(
        "Attention",
        {**_ATTENTION, "m": np.array([[1, 1, 0], [1, 1, 1]], np.int32)},
        "Attention-mask",
        domain=MICROSOFT,
        num_heads=2,
        unidirectional=1,
    ),
    _case(
        "Attention", {**_ATTENTION, "m": np.array([2, 3], np.int32)}, "Attention-lengths", domain=MICROSOFT, num_heads=4
    ),
    _case(
        "QAttention",
        {
            "x": _u8(2, 3, 8),
            "w": _i7(8, 24),
            "b": _f(24),
            "xs": _S,
            "ws": _S,
            "m": np.array([2, 3], np.int32),
            "xz": np.array(120, np.uint8),
            "wz": np.array(0, np.int8),
        },
        domain=MICROSOFT,
        num_heads=2,
    ),
    _case(
        "RotaryEmbedding",
        {"x": _f(1, 2, 3, 4), "p": np.array([[0, 2, 1]]), "c": _f(5, 2), "s": _f(5, 2)},
        "ms-Rotary",
        domain=MICROSOFT,
    ),
    _case(
        "EmbedLayerNormalization",
        {"i": _IDS, "t": _IDS % 2, "w": _f(6, 4), "p": _f(5, 4), "s": _f(2, 4), "g": _f(4), "b": _f(4)},
        domain=MICROSOFT,
        outputs=2,
    ),
    _case(
        "DynamicQuantizeMatMul",
        {"a": _f(2, 4), "b": _i7(4, 3), "s": np.array([0.1, 0.2, 0.3], np.float32)},
        domain=MICROSOFT,
    ),
    _case(
        "MatMulIntegerToFloat",
        {"a": _u8(2, 4), "b": _i7(4, 3), "as": _S, "bs": _S, "az": np.array(7, np.uint8)},
        domain=MICROSOFT,
    ),
    _case(
        "QGemm",
        {**{k: v for k, v in _QUANTIZED.items() if k != "b"}, "b": _u8(3, 2), "c": np.array([5, -9], np.int32)},
        order=["a", "as", "az", "b", "bs", "bz", "c"],
        domain=MICROSOFT,
    ),
    *[_case(op, {**_QUANTIZED, **_OUT}, domain=MICROSOFT) for op in ("QLinearAdd", "QLinearMul")],
    _case("QLinearSigmoid", {"a": _u8(2, 3), "as": _S, "az": np.array(120, np.uint8), **_OUT}, domain=MICROSOFT),
    _case(
        "QLinearLeakyRelu",
        {"a": _u8(2, 3), "as": _S, "az": np.array(120, np.uint8), **_OUT},
        domain=MICROSOFT,
        alpha=0.3,
    ),
    _case("QLinearConcat", {**_OUT, **_QUANTIZED}, domain=MICROSOFT, axis=1),
    _case(
        "QLinearGlobalAveragePool",
        {"a": _u8(1, 3, 4, 4), "as": _S, "az": np.array(120, np.uint8), **_OUT},
        domain=MICROSOFT,
    ),
    _case("Softmax", {"x": _f(2, 3, 4)}, "Softmax-11", opset=11, axis=1),
    _case("ReduceSum", {"x": _f(2, 3, 4)}, "ReduceSum-11", opset=11, axes=[-1], keepdims=0),
    _case("ReduceMax", {"x": _f(2, 3, 4)}, "ReduceMax-12", opset=12, axes=[0, 2]),
    _case("Squeeze", {"x": _f(2, 1, 4)}, "Squeeze-11", opset=11, axes=[1]),
    _case("Unsqueeze", {"x": _f(2, 4)}, "Unsqueeze-12", opset=12, axes=[0, 3]),
    _case("Split", {"x": _f(2, 6)}, "Split-11", opset=11, axis=1, split=[1, 5], outputs=2),
    _case("Clip", {"x": _f(2, 6), "low": np.array(-0.5, np.float32)}, "Clip-11", opset=11),
    _case(
        "Upsample", {"x": _f(1, 2, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}, "Upsample-9", opset=9, mode="linear"
    ),
    _case("Dropout", {"x": _f(2, 3)}, "Dropout-11", opset=11, ratio=0.4),
    _case("GroupNormalization", {"x": _f(2, 4, 3), "s": _f(4), "b": _f(4)}, opset=21, num_groups=2),
    _case(
        "LSTM",
        {"x": _f(4, 2, 3), "w": _f(2, 8, 3), "r": _f(2, 8, 2), "b": _f(2, 16)},
        opset=14,
        hidden_size=2,
        direction="bidirectional",
        outputs=3,
    ),
    _case(
        "LSTM",
        {"x": _f(4, 2, 3), "w": _f(1, 8, 3), "r": _f(1, 8, 2), "b": _f(1, 16), "n": np.array([4, 2], np.int32)},
        "LSTM-lengths",
        opset=14,
        hidden_size=2,
        direction="reverse",
        outputs=3,
    ),
    _case(
        "GRU",
        {"x": _f(4, 2, 3), "w": _f(2, 6, 3), "r": _f(2, 6, 2), "b": _f(2, 12)},
        opset=14,
        hidden_size=2,
        direction="bidirectional",
        linear_before_reset=1,
        outputs=2,
    ),
    _case(
        "RNN",
        {"x": _f(4, 2, 3), "w": _f(1, 2, 3), "r": _f(1, 2, 2), "b": _f(1, 4)},
        opset=14,
        hidden_size=2,
        outputs=2,
        activations=["Relu"],
    ),
    *[
        _case(
            "Resize",
            {"x": _f(1, 2, 5, 7), "r": _f(0), "s": np.array(s, np.float32)},
            f"Resize-{m}-{c}-{s[2]}",
            opset=13,
            mode=m,
            coordinate_transformation_mode=c,
        )
        for m in ("nearest", "linear", "cubic")
        for c in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for s in ([1, 1, 2, 2], [1, 1, 0.6, 1.7])
        if c != "align_corners" or s[2] == 2
    ],
]


@pytest.mark.parametrize(("op", "inputs", "options"), _CASES)
def test_equals_onnxruntime(
    make_node_model: Any, op: str, inputs: dict[str, np.ndarray], options: dict[str, Any]
) -> None:
    """rtol 1e-3, atol 1e-4 for floats; integers by at most one step, where rounding falls on a half."""
    model = make_node_model(op, inputs, **options)
    with runtime.session_of(model, optimize=False) as session:
        expected = runtime.run(session, inputs)
    found = Executor(model).run(inputs)
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype
        if wanted.dtype.kind in "iu":
            assert np.abs(found[name].astype(int) - wanted.astype(int)).max() <= 1
        else:
            np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_in_few_bits_equal_onnxruntime(make_node_model: Any, bits: int, zero_points: bool) -> None:
    """MatMulNBits with blocks of 16, columns that do not fill the last block; rtol 1e-3."""
    rows, columns, block = 5, 40, 16
    blocks = -(-columns // block)
    constants = {"b": _u8(rows, blocks, block * bits // 8), "s": np.abs(_f(rows * blocks))}
    if zero_points:
        constants["z"] = _u8(rows * -(-blocks * bits // 8))
    x = {"x": _f(3, columns)}
    model = make_node_model(
        "MatMulNBits", x, constants=constants, domain=MICROSOFT, K=columns, N=rows, bits=bits, block_size=block
    )
    with runtime.session_of(model) as session:
        expected = runtime.run(session, x)["y0"]
    np.testing.assert_allclose(Executor(model).run(x)["y0"], expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
def test_tables_in_few_bits_equal_onnxruntime(make_node_model: Any, packed: bool, zero_points: bool) -> None:
    """GatherBlockQuantized of 4 bits in blocks of 16, the last one short, in bytes or in a type of 4 bits, by indices
    of two axes that may be negative; rtol 1e-6."""
    rng = np.random.default_rng(0)
    kind: Any = (lambda array: pack(array, 4)) if packed else (lambda array: array.astype(ml_dtypes.uint4))
    constants = {"q": kind(rng.integers(0, 16, (9, 40))), "s": rng.uniform(0.1, 1, (9, 3)).astype(np.float32)}
    if zero_points:
        constants["z"] = kind(rng.integers(0, 16, (9, 3)))
    x = {"x": np.asarray([[0, 8, -1], [3, -9, 3]])}
    model = make_node_model(
        "GatherBlockQuantized", x, constants=constants, order=["q", "x", *list(constants)[1:]], domain=MICROSOFT,
        bits=4, block_size=16, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    with runtime.session_of(model) as session:
        expected = runtime.run(session, x)["y0"]
    np.testing.assert_allclose(Executor(model).run(x)["y0"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero_points", [True, False])
def test_columns_in_an_order_of_their_own_equal_onnxruntime(make_node_model: Any, zero_points: bool) -> None:
    """MatMulNBits with a group for each column (g_idx) and zero points in floats; rtol 1e-3."""
    rng = np.random.default_rng(0)
    constants = {"b": _u8(5, 3, 8), "s": np.abs(_f(15))}
    if zero_points:
        constants["z"] = rng.uniform(0, 15, (5, 3)).astype(np.float32)
    constants["g"] = rng.permutation(np.arange(40) // 16).astype(np.int32)
    x = {"x": _f(3, 40)}
    order = ["x", "b", "s", "z" if zero_points else "", "g"]
    model = make_node_model(
        "MatMulNBits", x, constants=constants, order=order, domain=MICROSOFT, K=40, N=5, bits=4, block_size=16
    )
    with runtime.session_of(model) as session:
        expected = runtime.run(session, x)["y0"]
    np.testing.assert_allclose(Executor(model).run(x)["y0"], expected, rtol=1e-3, atol=1e-2)
