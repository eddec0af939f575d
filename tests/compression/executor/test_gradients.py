"""Gradients of every operator family against finite differences, in float64 (torch.autograd.gradcheck)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.executor import Executor

MICROSOFT = "com.microsoft"
_RNG = np.random.default_rng(7)


def _x(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Distinct numbers, none near an integer or half: away from the kinks of most functions."""
    count = int(np.prod(shape))
    grid = np.linspace(low, high, count + 2)[1:-1]
    return _RNG.permutation(grid).reshape(shape)


def _case(
    op: str, *arrays: np.ndarray, name: str = "", const: Mapping[str, np.ndarray] | None = None, **options: Any
) -> Any:
    inputs = {f"x{i}": array for i, array in enumerate(arrays)}
    return pytest.param(op, inputs, dict(const or {}), options, id=name or op)


def _i(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


_UNARY = (
    "Abs", "Asinh", "Atan", "Cos", "Cosh", "Erf", "Exp", "Neg", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Tan",
    "Tanh", "Elu", "Celu", "Selu", "LeakyRelu", "Relu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Shrink",
    "ThresholdedRelu", "Softmax", "LogSoftmax", "Identity",
)  # fmt: skip
_POSITIVE = ("Sqrt", "Log", "Reciprocal", "Acosh", "Acos", "Asin", "Atanh")
_REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceSumSquare",
)  # fmt: skip


def _positive(op: str) -> np.ndarray:
    return _x(2, 3, low=1.1, high=2.0) if op == "Acosh" else _x(2, 3, low=0.1, high=0.9)


_CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
_LSTM = {"hidden_size": 2}
_CASES = [
    *[_case(op, _x(2, 3, low=-0.93, high=0.91) if op == "Tan" else _x(2, 3)) for op in _UNARY],
    *[_case(op, _positive(op)) for op in _POSITIVE],
    *[_case(op, _x(2, 3, 2), const={"axes": _i(1)}, keepdims=0) for op in _REDUCTIONS],
    _case("ReduceLogSum", _x(2, 3, low=0.5), const={"axes": _i(0)}),
    *[_case(op, _x(2, 3), _x(3)) for op in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")],
    _case("Div", _x(2, 3), _x(3, low=0.5)),
    _case("Pow", _x(2, 3, low=0.5), _x(3)),
    _case("Pow", _x(2, 3), const={"e": np.array(3.0)}, name="Pow-constant"),
    _case("Mod", _x(2, 3), const={"m": np.array(0.7)}, fmod=1),
    _case("Where", _x(2, 3), _x(2, 3), const={"c": np.array([[True, False, True]] * 2)}, order=["c", "x0", "x1"]),
    _case("Clip", _x(2, 3), const={"low": np.array(-1.03), "high": np.array(1.01)}),
    _case("PRelu", _x(2, 3), _x(3)),
    _case("Swish", _x(2, 3), alpha=1.5, opset=24),
    _case("CumSum", _x(2, 3), const={"axis": np.array(1)}, exclusive=1, reverse=1),
    _case("MatMul", _x(2, 2, 3), _x(3, 2)),
    _case("Gemm", _x(2, 3), _x(4, 3), _x(4), transB=1),
    _case("Gemm", _x(3, 2), _x(3, 4), _x(2, 1), transA=1, alpha=0.5, beta=2.0, name="Gemm-scaled"),
    _case("Einsum", _x(2, 3), _x(3, 4), equation="ij,jk->ki"),
    _case("Det", _x(2, 3, 3)),
    _case("Conv", _x(1, 2, 5, 5), _x(4, 1, 3, 3), _x(4), group=2, strides=[2, 2], **_CONV),
    _case("Conv", _x(1, 2, 5, 5), _x(2, 2, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2], name="Conv-same"),
    _case("Conv", _x(1, 2, 7), _x(2, 2, 3), pads=[2, 0], dilations=[2], name="Conv-1d"),
    _case("Conv", _x(1, 1, 3, 3, 3), _x(2, 1, 2, 2, 2), name="Conv-3d"),
    _case("ConvTranspose", _x(1, 2, 3, 3), _x(2, 2, 3, 3), _x(2), strides=[2, 2], output_padding=[1, 0]),
    _case(
        "DeformConv", _x(1, 2, 3, 3), _x(2, 2, 2, 2), _x(1, 8, 2, 2, low=-0.4, high=0.43), _x(2), kernel_shape=[2, 2]
    ),
    _case("Col2Im", _x(1, 4, 4), const={"image": _i(3, 3), "block": _i(2, 2)}),
    _case("MaxPool", _x(1, 2, 5, 5), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    _case("AveragePool", _x(1, 2, 5, 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    _case("AveragePool", _x(1, 1, 5, 5), kernel_shape=[2, 2], pads=[0, 1, 1, 0], name="AveragePool-uneven"),
    _case("LpPool", _x(1, 1, 4, 4, low=0.3), kernel_shape=[2, 2], p=3),
    *[_case(op, _x(1, 2, 3, 3)) for op in ("GlobalAveragePool", "GlobalMaxPool")],
    _case("BatchNormalization", _x(2, 3, 2), _x(3), _x(3), _x(3), _x(3, low=0.5)),
    _case(
        "BatchNormalization",
        _x(2, 3, 4),
        _x(3),
        _x(3),
        const={"m": _x(3), "v": _x(3, low=1)},
        training_mode=1,
        name="BN-train",
    ),
    _case("InstanceNormalization", _x(2, 2, 3), _x(2), _x(2)),
    _case("LayerNormalization", _x(2, 3, 4), _x(4), _x(4)),
    _case("GroupNormalization", _x(2, 4, 3), _x(4), _x(4), num_groups=2),
    _case("GroupNormalization", _x(2, 4, 3), _x(2), _x(2), num_groups=2, opset=18, name="GroupNormalization-18"),
    _case("RMSNormalization", _x(2, 4), _x(4), opset=23),
    _case("LRN", _x(1, 4, 2, 2), size=3),
    _case("LpNormalization", _x(2, 3)),
    _case("MeanVarianceNormalization", _x(2, 2, 2, 2)),
    _case(
        "Resize",
        _x(1, 1, 3, 3),
        const={"s": np.array([1, 1, 1.7, 2.3], np.float32)},
        order=["x0", "", "s"],
        mode="linear",
    ),
    _case(
        "Resize",
        _x(1, 1, 4, 4),
        const={"s": np.array([1, 1, 0.6, 0.6], np.float32)},
        order=["x0", "", "s"],
        mode="cubic",
        antialias=1,
        name="Resize-antialias",
    ),
    _case("Resize", _x(1, 1, 2, 2), const={"s": _i(1, 1, 4, 4)}, order=["x0", "", "", "s"], name="Resize-nearest"),
    _case("GridSample", _x(1, 1, 3, 3), _x(1, 2, 2, 2, low=-0.83, high=0.81), opset=20),
    _case("AffineGrid", _x(1, 2, 3), const={"size": _i(1, 1, 2, 3)}, opset=20),
    _case(
        "RoiAlign",
        _x(1, 2, 4, 4),
        const={"rois": np.array([[0, 0, 3, 3.0]]), "b": _i(0)},
        output_height=2,
        output_width=2,
    ),
    _case("Attention", _x(1, 2, 3, 4), _x(1, 2, 3, 4), _x(1, 2, 3, 4), opset=23, is_causal=1),
    _case(
        "Attention",
        _x(1, 3, 4),
        _x(1, 3, 2),
        _x(1, 3, 2),
        opset=23,
        q_num_heads=2,
        kv_num_heads=1,
        softcap=1.0,
        name="Attention-gqa",
    ),
    _case("RotaryEmbedding", _x(1, 2, 3, 4), _x(1, 3, 2), _x(1, 3, 2), opset=23),
    *[
        _case(op, _x(3, 2, 3), _x(1, n * 2, 3), _x(1, n * 2, 2), _x(1, n * 4), name=op, **_LSTM)
        for op, n in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    ],
    _case(
        "LSTM", _x(3, 1, 2), _x(2, 8, 2), _x(2, 8, 2), _x(2, 16), direction="bidirectional", name="LSTM-both", **_LSTM
    ),
    _case(
        "LSTM",
        _x(3, 2, 2),
        _x(1, 8, 2),
        _x(1, 8, 2),
        _x(1, 16),
        const={"n": np.array([3, 2], np.int32)},
        clip=3.0,
        name="LSTM-lengths",
        **_LSTM,
    ),
    _case("GRU", _x(3, 1, 2), _x(1, 6, 2), _x(1, 6, 2), _x(1, 12), linear_before_reset=1, name="GRU-linear", **_LSTM),
    _case("Reshape", _x(2, 3), const={"s": _i(3, -1)}),
    _case("Transpose", _x(2, 3), perm=[1, 0]),
    _case("Expand", _x(3, 1), const={"s": _i(2, 1, 4)}),
    _case("Tile", _x(2, 2), const={"r": _i(1, 3)}),
    _case("Concat", _x(2, 2), _x(2, 1), axis=1),
    _case("Slice", _x(4, 3), const={"s": _i(3, 0), "e": _i(-5, 2), "a": _i(0, 1), "t": _i(-2, 1)}),
    _case("Pad", _x(2, 3), const={"p": _i(1, 0, 0, 2)}, mode="reflect"),
    _case("Pad", _x(2, 3), const={"p": _i(1, 0, -1, 2)}, name="Pad-constant"),
    _case("Gather", _x(4, 3), const={"i": np.array([[0, -1], [2, 2]])}),
    _case("GatherElements", _x(2, 3), const={"i": np.array([[0, 1, 1]])}),
    _case("GatherND", _x(2, 3), const={"i": np.array([[1, 2], [0, 0]])}),
    _case(
        "ScatterElements", _x(3, 2), _x(1, 2), const={"i": np.array([[2, 0]])}, order=["x0", "i", "x1"], reduction="add"
    ),
    _case("ScatterND", _x(3, 2), _x(2, 2), const={"i": np.array([[2], [0]])}, order=["x0", "i", "x1"]),
    _case("DepthToSpace", _x(1, 4, 2, 2), blocksize=2),
    _case("SpaceToDepth", _x(1, 1, 4, 4), blocksize=2),
    _case("Trilu", _x(3, 3)),
    _case("TopK", _x(2, 4), const={"k": _i(2)}, outputs=2),
    _case("Compress", _x(3, 2), const={"c": np.array([True, False, True])}, axis=0),
    _case("ReverseSequence", _x(3, 2), const={"n": _i(3, 2)}),
    _case("DFT", _x(1, 4, 1), opset=20),
    _case("STFT", _x(1, 8, 1), const={"step": np.array(2), "w": np.hanning(4)}),
    _case("NegativeLogLikelihoodLoss", _x(3, 4), const={"t": _i(0, 3, 1), "w": _x(4, low=0.5)}),
    _case("SoftmaxCrossEntropyLoss", _x(3, 4), const={"t": _i(0, 3, 1)}),
    _case("DequantizeLinear", _x(2), const={"q": np.array([[3, -4]] * 2, np.int8)}, order=["q", "x0"], axis=1),
    *[_case(op, _x(2, 3), domain=MICROSOFT, name=f"ms-{op}") for op in ("Gelu", "FastGelu", "QuickGelu")],
    _case("BiasGelu", _x(2, 3), _x(3), domain=MICROSOFT),
    _case("FusedMatMul", _x(2, 3), _x(4, 3), domain=MICROSOFT, transB=1, alpha=0.5),
    _case("FusedConv", _x(1, 1, 3, 3), _x(1, 1, 2, 2), _x(1), domain=MICROSOFT, activation="Tanh"),
    _case("FusedGemm", _x(2, 3), _x(3, 2), _x(2), domain=MICROSOFT, activation="Sigmoid"),
    _case("SkipLayerNormalization", _x(1, 2, 4), _x(1, 2, 4), _x(4), _x(4), domain=MICROSOFT),
    _case("MultiHeadAttention", _x(1, 2, 4), _x(1, 3, 4), _x(1, 3, 4), _x(12), domain=MICROSOFT, num_heads=2),
    _case(
        "Attention",
        _x(1, 3, 2),
        _x(2, 12),
        _x(12),
        domain=MICROSOFT,
        num_heads=2,
        unidirectional=1,
        name="ms-Attention",
    ),
]


@pytest.mark.parametrize(("op", "inputs", "constants", "options"), _CASES)
def test_gradients_equal_finite_differences(
    make_node_model: Any,
    op: str,
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    options: dict[str, Any],
) -> None:
    """All floating-point inputs at once, to gradcheck's tolerances (atol 1e-5, rtol 1e-3)."""
    model = make_node_model(op, inputs, constants=constants, **options)
    executor = Executor(model)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = executor(dict(zip(inputs, values, strict=True)))
        return tuple(value for value in results.values() if value.requires_grad)

    values = [torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in inputs.values()]
    assert run(*values), "no output has a gradient"
    assert torch.autograd.gradcheck(run, values, atol=1e-5, rtol=1e-3)
