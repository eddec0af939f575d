"""Whole networks, as exported, as our own passes fuse and quantize them: the executor gives what onnxruntime gives."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from modelpress_compression import runtime
from modelpress_compression.executor import Executor, weights
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from torch import Tensor, nn

BATCH = 3


class Segmenter(nn.Module):
    """Down and up again, with a squeeze-and-excitation gate, a transposed convolution and a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish())
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        first = first * self.gate(first)
        both = torch.cat([first, self.up(self.down(first))], 1)
        return nn.functional.interpolate(self.head(both), scale_factor=2.0, mode="bilinear", align_corners=False)


class Tagger(nn.Module):
    """A bidirectional LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class Encoder(nn.Module):
    """Self-attention spelled out, erf-GELU, layer normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.feed_forward = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], 4, 4).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        seen = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        x = self.norms[0](x + self.o(seen.permute(0, 2, 1, 3).reshape(x.shape)))
        return self.norms[1](x + self.feed_forward(x))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "segmenter": (Segmenter, (3, 16, 16)),
    "tagger": (Tagger, (7, 6)),
    "encoder": (Encoder, (5, 16)),
}
_FORMS = {
    "exported": None,
    "fused": Fuse(FuseConfig()),
    "static": Quantize(QuantizeConfig(scheme="static")),
    "dynamic": Quantize(QuantizeConfig(scheme="dynamic")),
}


def _exported(name: str) -> Model:
    build, shape = _NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build().eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the exporter that needs no tracing of symbols
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        torch.onnx.export(
            module, (torch.randn(BATCH, *shape),), buffer, dynamo=False, opset_version=17, input_names=["x"],
            output_names=["y"], dynamic_axes=axes,
        )  # fmt: skip
    return Model(onnx_ir.from_proto(onnx.load_from_string(buffer.getvalue())), Provenance("onnx", "", 0))


def _data(name: str) -> np.ndarray:
    shape = _NETWORKS[name][1]
    return np.random.default_rng(0).standard_normal((BATCH, *shape)).astype(np.float32)


def _compressed(name: str, form: str, folder: Path) -> Model:
    model, step = _exported(name), _FORMS[form]
    if step is None:
        return model
    return step(model, Context(InputData.from_arrays({"x": _data(name)}, model.inputs), folder)).model


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("name", _NETWORKS)
def test_equals_onnxruntime_and_every_weight_gets_a_gradient(name: str, form: str, tmp_path: Path) -> None:
    """rtol 1e-3 for floats. Quantized values may fall on the other side of a half: 2 % of the outputs' norm, and the
    dynamic LSTM of onnxruntime quantizes its inputs as well."""
    model, x = _compressed(name, form, tmp_path), _data(name)
    with runtime.session_of(model, optimize=False) as session:
        expected = runtime.run(session, {"x": x})["y"]
    executor = Executor(model, trainable=weights)
    found = executor.run({"x": x})["y"]
    if form in ("exported", "fused"):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        executor({"x": torch.from_numpy(x)})["y"].square().sum().backward()
        assert all(parameter.grad is not None for parameter in executor.parameters())
        assert len(list(executor.parameters())) > 5
    else:
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_the_gradient_is_that_of_the_module() -> None:
    """The input's gradient through the executor equals torch's own through the module; rtol 1e-3."""
    for name, (build, _) in _NETWORKS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build().eval()
        ours, theirs = (torch.from_numpy(_data(name)).requires_grad_() for _ in range(2))
        Executor(_exported(name))({"x": ours})["y"].square().sum().backward()
        module(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """The nets are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
