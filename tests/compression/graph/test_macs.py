"""Multiply-accumulates against figures by hand, and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.model import Model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


CASES = {
    "Conv: output elements times one filter": (
        "g (float[N,4,10,10] x) => (float[N,8,8,8] y) { y = Conv(x, w) }",
        {"w": floats(8, 4, 3, 3)},
        8 * 8 * 8 * 4 * 9,
    ),
    "grouped Conv: a filter sees its group only": (
        "g (float[N,4,10,10] x) => (float[N,8,8,8] y) { y = Conv <group = 4> (x, w) }",
        {"w": floats(8, 1, 3, 3)},
        8 * 8 * 8 * 9,
    ),
    "ConvTranspose: input elements times their row": (
        "g (float[N,4,5,5] x) => (float[N,6,11,11] y) { y = ConvTranspose <strides = [2, 2]> (x, w) }",
        {"w": floats(4, 6, 3, 3)},
        4 * 25 * 6 * 9,
    ),
    "Gemm with transposed weight": (
        "g (float[N,32] x) => (float[N,10] y) { y = Gemm <transB = 1> (x, w) }",
        {"w": floats(10, 32)},
        320,
    ),
    "batched MatMul broadcasts": (
        "g (float[N,6,7,8] x) => (float[N,6,7,9] y) { y = MatMul(x, w) }",
        {"w": floats(8, 9)},
        6 * 7 * 8 * 9,
    ),
    "MatMul with a vector": ("g (float[N,8] x) => (float[N] y) { y = MatMul(x, w) }", {"w": floats(8)}, 8),
    "bidirectional LSTM: four gates": (
        "g (float[5,N,3] x) => (float[5,2,N,4] y) "
        '{ y = LSTM <hidden_size = 4, direction = "bidirectional"> (x, w, r) }',
        {"w": floats(2, 16, 3), "r": floats(2, 16, 4)},
        5 * 2 * 16 * (3 + 4),
    ),
    "GRU: three gates": (
        "g (float[5,N,3] x) => (float[5,1,N,4] y) { y = GRU <hidden_size = 4> (x, w, r) }",
        {"w": floats(1, 12, 3), "r": floats(1, 12, 4)},
        5 * 12 * (3 + 4),
    ),
    "Einsum of two operands": (
        'g (float[N,5,6] x) => (float[N,5,7] y) { y = Einsum <equation = "...ij,jk->...ik"> (x, w) }',
        {"w": floats(6, 7)},
        5 * 6 * 7,
    ),
    "FusedConv, and the Conv after it": (
        "g (float[N,4,10,10] x) => (float[N,2,6,6] y) "
        '{ a = com.microsoft.FusedConv <activation = "Relu"> (x, w)  y = Conv(a, v) }',
        {"w": floats(8, 4, 3, 3), "v": floats(2, 8, 3, 3)},
        8 * 64 * 36 + 2 * 36 * 72,
    ),
    "com.microsoft Attention": (
        "g (float[N,7,8] x) => (float[N,7,8] y) { y = com.microsoft.Attention <num_heads = 2> (x, w, b) }",
        {"w": floats(8, 24), "b": floats(24)},
        7 * 8 * 24 + 2 * 7 * 7 * 8,
    ),
    "SkipLayerNormalization counts nothing and hands its shape on": (
        "g (float[N,7,8] x) => (float[N,7,3] y) "
        "{ a = com.microsoft.SkipLayerNormalization(x, x, s)  y = MatMul(a, w) }",
        {"s": floats(8), "w": floats(8, 3)},
        7 * 8 * 3,
    ),
    "MatMulInteger": (
        "g (uint8[N,8] x) => (int32[N,9] y) { y = MatMulInteger(x, w) }",
        {"w": np.zeros((8, 9), np.int8)},
        72,
    ),
    "DynamicQuantizeMatMul, then MatMul": (
        "g (float[N,8] x) => (float[N,4] y) { a = com.microsoft.DynamicQuantizeMatMul(x, w, s)  y = MatMul(a, v) }",
        {"w": np.zeros((8, 9), np.int8), "s": floats(9), "v": floats(9, 4)},
        72 + 36,
    ),
    "a Conv between DequantizeLinear": (
        "g (float[N,4,10,10] x) => (float[N,8,8,8] y) { w = DequantizeLinear(q, s)  y = Conv(x, w) }",
        {"q": np.zeros((8, 4, 3, 3), np.int8), "s": np.float32([1]).reshape(())},
        8 * 64 * 36,
    ),
    "If counts its larger branch": (
        "g (float[N,8] x, bool c) => (float[N,8] y) { y = If (c) <"
        "then_branch = t () => (float[N,8] a) { a = MatMul(x, w) }, "
        "else_branch = e () => (float[N,8] b) { b0 = MatMul(x, w) b = MatMul(b0, w) }> }",
        {"w": floats(8, 8)},
        128,
    ),
    "a Reshape to a computed shape is found by running": (
        "g (float[N,2,6] x) => (float[N,a] y) { r = NonZero(k)  t = Shape(r)  z = Reshape(x, t)  y = MatMul(z, w) }",
        # Two axes, six entries that are not zero: [2, 6].
        {"k": np.ones((2, 3), np.float32), "w": floats(6, 5)},
        2 * 6 * 5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_by_hand(name: str, model_from_text: Callable[..., Model]) -> None:
    """Each operator counts what its definition says, with the dynamic dimension at 1."""
    text, weights, expected = CASES[name]
    assert count_macs(model_from_text(f"{HEAD} {text}", weights)).total == expected


def test_dimensions_can_be_bound(model_from_text: Callable[..., Model]) -> None:
    """With an input's shape given, its dynamic dimensions count; others of the same name follow."""
    text = f"{HEAD} g (float[N,8] x, float[N,8] z) => (float[N,3] y) {{ a = Add(x, z)  y = MatMul(a, w) }}"
    assert count_macs(model_from_text(text, {"w": floats(8, 3)}), {"x": (5, 8)}).total == 5 * 24


def test_unknown_is_none(model_from_text: Callable[..., Model]) -> None:
    """A custom operator may compute anything: the total is not known, while other nodes' counts are."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[N,8] x) => (float[N,3] y) '
        "{ a = MatMul(x, w)  y = acme.Mystery(a) }"
    )
    macs = count_macs(model_from_text(text, {"w": floats(8, 3)}))
    assert macs.total is None
    assert macs.by_output["a"] == 24


def test_loop_body_times_its_trips(model_from_text: Callable[..., Model]) -> None:
    """A Loop with a constant trip count runs its body so often."""
    text = (
        f"{HEAD} g (float[N,8] x) => (float[N,8] y) <int64 n = {{4}}, bool c = {{1}}> {{ y = Loop (n, c, x) <"
        "body = b (int64 i, bool ci, float[1,8] v) => (bool co, float[1,8] u) "
        "{ co = Identity(ci)  u = MatMul(v, w) }> }"
    )
    assert count_macs(model_from_text(text, {"w": floats(8, 8)})).total == 4 * 64


def test_a_trip_count_that_a_caller_may_override_is_unknown(model_from_text: Callable[..., Model]) -> None:
    """Its default says nothing of the next run."""
    text = (
        f"{HEAD} g (float[N,8] x, int64 n) => (float[N,8] y) <bool c = {{1}}> {{ y = Loop (n, c, x) <"
        "body = b (int64 i, bool ci, float[1,8] v) => (bool co, float[1,8] u) "
        "{ co = Identity(ci)  u = MatMul(v, w) }> }"
    )
    model = model_from_text(text, {"w": floats(8, 8), "n": np.int64(4).reshape(())})
    assert model.graph.initializers["n"].is_graph_input()
    assert count_macs(model).total is None


class Block(nn.Module):
    """The residual block of ResNet-18."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride != 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + self.skip(x))


def resnet18(width: int) -> nn.Module:
    """ResNet-18 with `width` channels in its first stage; 64 in the original."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage in range(4):
        for block in range(2):
            layers.append(Block(channels, width << stage, 2 if stage and not block else 1))
            channels = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


@pytest.mark.parametrize("width", [8, 64])
def test_resnet18_is_what_torch_counts(width: int, model_from_torch: Callable[..., Model]) -> None:
    """Equal to torch's FlopCounterMode (two operations a MAC); at full width the known 1.814 GMACs."""
    module = resnet18(width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, 224, 224))
    total = count_macs(model_from_torch(module, (1, 3, 224, 224))).total
    assert total == counter.get_total_flops() // 2
    if width == 64:
        assert total == 1_814_073_344
