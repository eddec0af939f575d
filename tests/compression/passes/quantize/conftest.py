"""Small models with real arithmetic, and the means to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Arrays = Mapping[str, NDArray[np.generic]]
BuildModel = Callable[..., Model]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run."""
    return np.random.default_rng(7)


@pytest.fixture
def build() -> BuildModel:
    """`build(nodes, weights, inputs={"x": shape}, outputs=["y"])`; inputs are float32 unless a type is given."""

    def make(
        nodes: Sequence[onnx.NodeProto],
        weights: Arrays,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Sequence[str] = ("y",),
        types: Mapping[str, int] | None = None,
        opset: int = 17,
    ) -> Model:
        types = types or {}
        graph = helper.make_graph(
            list(nodes),
            "test",
            [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        proto = onnx.shape_inference.infer_shapes(proto)  # as the loader does
        return Model(onnx_ir.serde.deserialize_model(proto), Provenance("onnx", "0" * 64, 0))

    return make


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[..., PassResult]:
    """`quantize(model, arrays, scheme=..., ...)`: the pass on these samples."""

    def apply(model: Model, arrays: Arrays, provided: bool = True, **options: object) -> PassResult:
        data = InputData(model.inputs, dict(arrays), provided)
        config = QuantizeConfig(**options)  # type: ignore[arg-type]
        return Quantize(config)(model, Context(data, tmp_path))

    return apply


def outputs_of(model: Model, arrays: Arrays) -> list[NDArray[np.float32]]:
    """The first output for each sample."""
    data = InputData(model.inputs, dict(arrays))
    with session_of(model) as session:
        return [np.asarray(next(iter(run(session, feed).values()))) for feed in data.feeds(batch_size=1)]


@pytest.fixture
def sqnr() -> Callable[[Model, Model, Arrays], float]:
    """Signal-to-quantization-noise ratio of the first output over all samples, in dB."""

    def measure(original: Model, result: Model, arrays: Arrays) -> float:
        pairs = list(zip(outputs_of(original, arrays), outputs_of(result, arrays), strict=True))
        signal = sum(float(np.square(a, dtype=np.float64).sum()) for a, _ in pairs)
        noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
        return 10 * float(np.log10(signal / max(noise, 1e-30)))

    return measure


@pytest.fixture
def cnn(build: BuildModel, rng: np.random.Generator) -> Model:
    """Conv-Relu, depthwise Conv-Clip, Conv, residual Add-Relu, pooling, Gemm: x [N,8,12,12] -> y [N,64]."""
    node = helper.make_node
    weights = {
        "w1": rng.normal(0, 0.2, (16, 8, 3, 3)),
        "b1": rng.normal(0, 0.1, 16),
        "w2": rng.normal(0, 0.4, (16, 1, 3, 3)),
        "b2": rng.normal(0, 0.1, 16),
        "w3": rng.normal(0, 0.1, (16, 16, 3, 3)),
        "b3": rng.normal(0, 0.1, 16),
        "w4": rng.normal(0, 0.3, (64, 16)),
        "b4": rng.normal(0, 0.1, 64),
    }
    constants = {"low": np.float32(0), "high": np.float32(6), "shape": np.asarray([0, -1], np.int64)}
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "conv_1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], "relu_1"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", pads=[1, 1, 1, 1], group=16),
        node("Clip", ["c2", "low", "high"], ["r2"], "relu6"),
        node("Conv", ["r2", "w3", "b3"], ["c3"], "conv_3", pads=[1, 1, 1, 1]),
        node("Add", ["c3", "r1"], ["s"], "residual"),
        node("Relu", ["s"], ["r3"], "relu_3"),
        node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        node("Reshape", ["p", "shape"], ["f"], "flatten"),
        node("Gemm", ["f", "w4", "b4"], ["y"], "head", transB=1),
    ]
    return build(nodes, {**{n: w.astype(np.float32) for n, w in weights.items()}, **constants}, {"x": ["n", 8, 12, 12]})


@pytest.fixture
def images(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """48 samples for `cnn`."""
    return {"x": rng.normal(0, 1, (48, 8, 12, 12)).astype(np.float32)}


@pytest.fixture
def mlp(build: BuildModel, rng: np.random.Generator) -> Model:
    """Two MatMuls with bias and a Gemm: x [N,T,32] -> y [N*T,32]."""
    node = helper.make_node
    weights = {
        "w1": rng.normal(0, 0.2, (32, 64)).astype(np.float32),
        "b1": rng.normal(0, 0.2, 64).astype(np.float32),
        "w2": rng.normal(0, 0.2, (64, 32)).astype(np.float32),
        "w3": rng.normal(0, 0.2, (32, 32)).astype(np.float32),
        "b3": rng.normal(0, 0.2, 32).astype(np.float32),
        "rows": np.asarray([-1, 32], np.int64),
    }
    nodes = [
        node("MatMul", ["x", "w1"], ["m1"], "fc1"),
        node("Add", ["m1", "b1"], ["a1"], "bias1"),
        node("Tanh", ["a1"], ["t1"], "tanh"),
        node("MatMul", ["t1", "w2"], ["m2"], "fc2"),
        node("Reshape", ["m2", "rows"], ["f"], "rows2"),
        node("Gemm", ["f", "w3", "b3"], ["y"], "fc3", alpha=0.5, beta=2.0),
    ]
    return build(nodes, weights, {"x": ["n", "t", 32]})


@pytest.fixture
def vectors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """24 samples for `mlp`."""
    return {"x": rng.normal(0, 1, (24, 5, 32)).astype(np.float32)}


def ops(model: Model) -> list[str]:
    """The operators of all nodes, subgraphs included."""
    return [node.op_type for node in model.nodes()]


@pytest.fixture
def operators() -> Callable[[Model], list[str]]:
    return ops
