"""What counts as a parameter, and how quantized and packed weights are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.model import Model, Provenance
from torch import nn

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def test_parameters_are_those_of_torch(model_from_torch: Callable[..., Model]) -> None:
    """A small ConvNet, exported, has the parameters, bytes and layers that torch says; shapes and pads do not count."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 169, 10))
    stats = model_stats(model_from_torch(module, (1, 1, 28, 28)))
    expected = sum(weight.numel() for weight in module.parameters())
    assert stats.parameters == stats.nonzero_parameters == expected
    assert stats.macs == 4 * 26 * 26 * 9 + 4 * 169 * 10
    assert [(layer.op_type, layer.parameters, layer.bytes) for layer in stats.layers] == [
        ("Conv", 40, 160),
        ("Gemm", 6770, 27080),
    ]
    assert sum(layer.macs or 0 for layer in stats.layers) == stats.macs
    assert stats.ops["Conv"] == 1


def test_constants_of_formulas_do_not_count(model_from_text: Callable[..., Model]) -> None:
    """Single numbers in elementwise operators, shapes and bounds are no parameters; a one-element bias of a Conv is."""
    text = (
        f"{HEAD} g (float[N,1,4,4] x) => (float[N,16] y) "
        "{ a = Mul(x, half)  b = Clip(a, half, half)  c = Conv(b, w, bias)  y = Reshape(c, shape) }"
    )
    weights = {
        "half": np.float32(0.5).reshape(()),
        "w": np.ones((1, 1, 1, 1), np.float32),
        "bias": np.zeros(1, np.float32),
        "shape": np.int64([-1, 16]),
    }
    stats = model_stats(model_from_text(text, weights))
    assert stats.parameters == 2
    assert stats.nonzero_parameters == 1


def test_shared_weights_count_once(model_from_text: Callable[..., Model]) -> None:
    """A weight of two nodes is stored, and counted, once."""
    text = f"{HEAD} g (float[N,4] x) => (float[N,4] y) {{ a = MatMul(x, w)  y = MatMul(a, w) }}"
    stats = model_stats(model_from_text(text, {"w": np.ones((4, 4), np.float32)}))
    assert stats.parameters == 16
    assert stats.macs == 32


def test_zeros_of_a_quantized_weight_equal_its_zero_point(model_from_text: Callable[..., Model]) -> None:
    """Per channel, an element that equals its channel's zero point stands for 0; scale and zero point do not count."""
    text = (
        f"{HEAD} g (float[N,2] x) => (float[N,3] y) "
        "{ w = DequantizeLinear <axis = 0> (q, s, z)  y = Gemm <transB = 1> (x, w) }"
    )
    weights = {
        "q": np.uint8([[128, 1], [7, 7], [0, 9]]),
        "s": np.ones(3, np.float32),
        "z": np.uint8([128, 7, 0]),
    }
    stats = model_stats(model_from_text(text, weights))
    assert stats.parameters == 6
    assert stats.nonzero_parameters == 2
    (layer,) = stats.layers
    assert (layer.op_type, layer.bytes, layer.macs) == ("Gemm", 6 + 12 + 3, 6)


def test_packed_weights_count_their_values(model_from_text: Callable[..., Model]) -> None:
    """MatMulNBits stores two four-bit values a byte; its parameters are N * K, its zeros are 8."""
    text = (
        f"{HEAD} g (float[M,32] x) => (float[M,2] y) "
        "{ y = com.microsoft.MatMulNBits <K = 32, N = 2, bits = 4, block_size = 32> (x, q, s) }"
    )
    packed = np.full((2, 1, 16), 0x88, np.uint8)
    packed[0, 0, 0] = 0x81
    stats = model_stats(model_from_text(text, {"q": packed, "s": np.ones(2, np.float32)}))
    assert (stats.parameters, stats.nonzero_parameters, stats.macs) == (64, 1, 64)
    assert stats.ops == {"com.microsoft.MatMulNBits": 1}


def test_scales_of_rows_do_not_count(model_from_text: Callable[..., Model]) -> None:
    """An embedding in eight bits, one scale a row: the table is the weight, the scales are not; floats still are."""
    text = (
        f"{HEAD} g (int64[N] i) => (float[N,4] y) "
        "{ q = Gather(t, i)  f = Cast <to = 1> (q)  s = Gather(scales, i)  z = Mul(f, s)  y = Mul(z, w) }"
    )
    weights = {"t": np.ones((7, 4), np.int8), "scales": np.ones((7, 1), np.float32), "w": np.ones(4, np.float32)}
    assert model_stats(model_from_text(text, weights)).parameters == 28 + 4


def test_weights_in_constants_and_subgraphs_count(model_from_text: Callable[..., Model]) -> None:
    """A weight in a Constant node inside a branch is found, and so are the branch's operators."""
    text = (
        f"{HEAD} g (float[N,2] x, bool c) => (float[N,2] y) {{ y = If (c) <"
        "then_branch = t () => (float[N,2] a) { k = Constant <value = float[2,2] {1, 2, 3, 0}> () a = MatMul(x, k) }, "
        "else_branch = e () => (float[N,2] b) { b = Identity(x) }> }"
    )
    stats = model_stats(model_from_text(text))
    assert (stats.parameters, stats.nonzero_parameters) == (4, 3)
    assert stats.ops == {"Constant": 1, "Identity": 1, "If": 1, "MatMul": 1}


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_quantizing_keeps_the_number_of_parameters(scheme: str, tmp_path: object) -> None:
    """What onnxruntime's quantizer adds (scales, zero points, reshaped biases) are no parameters."""
    from pathlib import Path

    from onnxruntime.quantization import CalibrationDataReader, quant_utils, quantize_dynamic, quantize_static

    folder = Path(str(tmp_path))
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,5] y) "
        "{ a = Conv(x, w, b)  r = Relu(a)  f = Flatten(r)  y = Gemm <transB = 1> (f, v, c) }"
    )
    for name, shape in {"w": (4, 3, 3, 3), "b": (4,), "v": (5, 144), "c": (5,)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, folder / "a.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self.left = 3

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} if self.left >= 0 else None

    if scheme == "dynamic":
        quantize_dynamic(folder / "a.onnx", folder / "b.onnx", per_channel=True)
    else:
        kind = quant_utils.QuantFormat.QDQ
        quantize_static(folder / "a.onnx", folder / "b.onnx", Reader(), quant_format=kind, per_channel=True)
    before, after = (
        model_stats(Model(_sorted(onnx_ir.load(folder / name)), Provenance("onnx", "", 0)))
        for name in ("a.onnx", "b.onnx")
    )
    assert after.parameters == before.parameters == 4 * 27 + 4 + 5 * 144 + 5
    assert after.macs == before.macs


def _sorted(model: onnx_ir.Model) -> onnx_ir.Model:
    # The quantizer appends nodes behind their users.
    model.graph.sort()
    return model
