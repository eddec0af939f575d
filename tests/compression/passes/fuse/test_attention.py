"""Attention of transformers, as both exporters of torch write it and as graphs made by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.fuse.config import FuseConfig
from onnx import TensorProto, helper
from torch import nn

HEADS, SIZE, WIDTH = 4, 8, 32


class _Layer(nn.Module):
    """One layer of BERT, written as transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, SIZE).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE) + mask
        context = torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3)
        x = self.norm1(x + self.out(context.reshape(x.shape[0], x.shape[1], WIDTH)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class _Encoder(nn.Module):
    """Two layers and an additive mask [batch, 1, 1, tokens], made from one of ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        additive = (1.0 - mask[:, None, None, :].to(torch.float32)) * -10000.0
        for layer in self.layers:
            x = layer(x, additive)
        return x


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The encoder through one of the exporters, with dynamic batch and length."""
    path: Path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    arguments = (torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' deprecations are not what is tested
        if request.param == "dynamo":
            batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("s", min=2, max=64)
            shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
            torch.onnx.export(_Encoder().eval(), arguments, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {name: {0: "batch", 1: "s"} for name in ("ids", "mask")}
            names = ["ids", "mask"]
            torch.onnx.export(
                _Encoder().eval(), arguments, path, dynamo=False, dynamic_axes=axes, input_names=names, opset_version=17
            )
    return Model(onnx_ir.load(path), Provenance("onnx", "0" * 64, 0))


def test_exported_encoder(encoder: Model, fuse: Any, ops: Any) -> None:
    """Both exporters' graphs fuse completely; the projections stay MatMul."""
    result = fuse(encoder)
    assert result.changes["attention"] == 2
    kinds = ops(result)
    assert "Softmax" not in kinds
    assert "Erf" not in kinds  # the dynamo exporter writes Gelu itself
    assert kinds.count("com.microsoft.MultiHeadAttention") == 2
    assert kinds.count("MatMul") + kinds.count("Gemm") == 12
    # The mask has one row, and is expanded to one for each query once for both layers.
    assert kinds.count("Expand") <= 1


def test_exported_encoder_with_padding(encoder: Model, fuse: Any) -> None:
    """Masked tokens: the samples' masks hold zeros and ones, and outputs agree for each length and batch."""
    from modelpress_compression.runtime import run, session_of

    result = fuse(encoder)
    generator = np.random.default_rng(5)
    names = [spec.name for spec in encoder.inputs]
    with session_of(encoder) as original, session_of(result.model) as fused:
        for batch, tokens in ((1, 2), (3, 17)):
            mask = np.ones((batch, tokens), np.int64)
            mask[:, tokens // 2 :] = 0
            feeds = {names[0]: generator.integers(0, 50, (batch, tokens)), names[1]: mask}
            for wanted, got in zip(run(original, feeds).values(), run(fused, feeds).values(), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_switched_off(encoder: Model, fuse: Any, ops: Any) -> None:
    """`transformers: false` writes ONNX operators only."""
    result = fuse(encoder, FuseConfig(transformers=False))
    assert "Softmax" in ops(result)
    assert "com.microsoft" not in result.model.ir.opset_imports


def _attention(*, perm: tuple[int, ...] = (0, 2, 1, 3), scale: str = "scores", extra_output: bool = False) -> Any:
    """Nodes and weights of one attention over x [n, s, 32], without projections."""
    shape = np.array([0, 0, HEADS, SIZE], np.int64)
    nodes = []
    for name in ("q", "k", "v"):
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}3"]))
        nodes.append(helper.make_node("Reshape", [f"{name}3", "split"], [f"{name}4"]))
    nodes += [
        helper.make_node("Transpose", ["q4"], ["qh"], perm=perm),
        helper.make_node("Transpose", ["k4"], ["kh"], perm=(0, 2, 3, 1)),
        helper.make_node("Transpose", ["v4"], ["vh"], perm=(0, 2, 1, 3)),
    ]
    query, scores = "qh", "scores"
    if scale == "query":
        nodes.append(helper.make_node("Mul", ["qh", "factor"], ["qs"]))
        query = "qs"
    nodes.append(helper.make_node("MatMul", [query, "kh"], ["scores"]))
    if scale == "scores":
        nodes.append(helper.make_node("Mul", ["scores", "factor"], ["scaled"]))
        scores = "scaled"
    nodes += [
        helper.make_node("Softmax", [scores], ["p"], axis=-1, name="softmax"),
        helper.make_node("MatMul", ["p", "vh"], ["c"]),
        helper.make_node("Transpose", ["c"], ["ct"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["ct", "merge"], ["y"]),
    ]
    rng = np.random.default_rng(2)
    weights = {f"w{name}": rng.standard_normal((WIDTH, WIDTH)) * 0.2 for name in ("q", "k", "v")}
    constants = {"split": shape, "merge": np.array([0, 0, WIDTH], np.int64), "factor": 0.3}
    return nodes, weights | constants, {"output": ("y", "p") if extra_output else "y", "shape": ("n", "s", WIDTH)}


@pytest.mark.parametrize("scale", ["scores", "query", "none"])
def test_scale_is_kept(build: Any, fuse: Any, ops: Any, scale: str) -> None:
    """A scale that is not 1 / sqrt(D), wherever it stands, and none at all."""
    nodes, weights, options = _attention(scale=scale)
    assert ops(fuse(build(nodes, weights, **options))) == ["MatMul"] * 3 + ["com.microsoft.MultiHeadAttention"]


def test_probabilities_as_output_stay(build: Any, fuse: Any, ops: Any) -> None:
    """Some models return the attention's probabilities; the operator does not."""
    nodes, weights, options = _attention(extra_output=True)
    assert "Softmax" in ops(fuse(build(nodes, weights, **options)))


def test_integer_input_of_other_rank_is_no_candidate(build: Any, fuse: Any, ops: Any) -> None:
    """A softmax on its own is not attention, and nothing is said about it."""
    result = fuse(build([helper.make_node("Softmax", ["x"], ["y"])], {}, shape=("n", 8), dtype=TensorProto.FLOAT))
    assert ops(result) == ["Softmax"]
    assert result.skipped == ()
