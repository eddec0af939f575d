"""Forms that onnxruntime runs in integers: looked up in the graph that it has made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression.graph.read import MICROSOFT
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.passes.quantize.static.forms import take_in_biases
from modelpress_compression.target import Target
from numpy.typing import NDArray
from onnx import NodeProto, helper

NODE = helper.make_node
Build = Callable[..., Model]
Operators = Callable[[Model], list[str]]
Arrays = dict[str, NDArray[np.float32]]


def static(quantize: Callable[..., PassResult], model: Model, arrays: Arrays) -> Model:
    """With fixed ranges, which inputs as even as these have no use to find in each run, and with no more biases than
    there were."""
    return quantize(model, arrays, scheme="static", calibration="minmax", bias_correction=False).model


def samples(rng: np.random.Generator, *shape: int) -> Arrays:
    return {"x": rng.uniform(-1, 1, shape).astype(np.float32)}


@pytest.fixture
def weights(rng: np.random.Generator) -> Arrays:
    """Of products with 20, 256 and 256 inputs, the last with as many outputs; biases of several shapes."""
    return {
        "w1": rng.normal(0, 0.2, (20, 256)).astype(np.float32),
        "w2": rng.normal(0, 0.06, (256, 256)).astype(np.float32),
        "b1": rng.normal(0, 0.1, 256).astype(np.float32),
        "b2": rng.normal(0, 0.1, 256).astype(np.float32),
        "row": rng.normal(0, 0.1, (1, 256)).astype(np.float32),
    }


def used(nodes: Sequence[NodeProto], weights: Arrays) -> Arrays:
    names = {name for node in nodes for name in node.input}
    return {name: array for name, array in weights.items() if name in names}


PERCEPTRON = [
    NODE("MatMul", ["x", "w1"], ["m1"], "one"),
    NODE("Add", ["m1", "b1"], ["a1"]),
    NODE("Relu", ["a1"], ["r1"]),
    NODE("MatMul", ["r1", "w2"], ["m2"], "two"),
    NODE("Add", ["b2", "m2"], ["a2"]),
    NODE("Relu", ["a2"], ["y"]),
]


@pytest.mark.parametrize("batch", ["n", 1])
def test_a_perceptron_runs_in_integers(  # type: ignore[no-untyped-def]
    batch, build: Build, quantize, sqnr, rng, weights, loaded_operators: Operators
) -> None:
    """Products with biases behind them are integer Gemms from one to the next, whatever the batch: no weight is
    dequantized in a run, and no product is one of floats; 30 dB or more."""
    model = build(PERCEPTRON, used(PERCEPTRON, weights), {"x": [batch, 20]})
    x = samples(rng, 32, 20)
    result = static(quantize, model, x)
    assert Counter(loaded_operators(result)) == {"QuantizeLinear": 1, "QGemm": 2, "Relu": 1}
    assert sqnr(model, result, x) > 30


@pytest.mark.parametrize(
    ("shape", "summand"),
    [(["n", 256], "row"), (["n", 256], "x"), ([1, 8, 256], "b1"), ([1, 8, 256], "x"), (["n", 8, 256], "b1")],
)
def test_a_sum_behind_a_product_leaves_it_in_integers(  # type: ignore[no-untyped-def]
    shape, summand, build: Build, quantize, sqnr, rng, weights, loaded_operators: Operators
) -> None:
    """A summand that no integer Gemm takes, a residual or one bias for all extents of a stack, is added behind the
    integer product; 30 dB or more."""
    nodes = [
        NODE("MatMul", ["x", "w2"], ["m"], "product"),
        NODE("Add", ["m", summand], ["a"]),
        NODE("Tanh", ["a"], ["y"]),
    ]
    model = build(nodes, used(nodes, weights), {"x": shape})
    x = samples(rng, 16, *shape[1:])
    result = static(quantize, model, x)
    loaded = loaded_operators(result)
    assert "MatMulIntegerToFloat" in loaded
    assert not {"DequantizeLinear", "MatMul", "Gemm", "FusedGemm"} & set(loaded)
    assert sqnr(model, result, x) > 30


def test_a_sum_behind_a_gemm_leaves_it_in_integers(  # type: ignore[no-untyped-def]
    build: Build, quantize, sqnr, rng, weights, loaded_operators: Operators
) -> None:
    """onnxruntime would merge a Sum into a Gemm without a bias; 30 dB or more."""
    nodes = [NODE("Gemm", ["x", "w2"], ["m"], "product"), NODE("Sum", ["m", "x"], ["a"]), NODE("Tanh", ["a"], ["y"])]
    model = build(nodes, used(nodes, weights), {"x": ["n", 256]})
    x = samples(rng, 16, 256)
    result = static(quantize, model, x)
    loaded = loaded_operators(result)
    assert "QGemm" in loaded
    assert not {"DequantizeLinear", "Gemm", "FusedGemm"} & set(loaded)
    assert sqnr(model, result, x) > 30


def test_biases_are_taken_in_exactly(build: Build, sqnr, rng, weights, operators) -> None:  # type: ignore[no-untyped-def]
    """The Gemms have the products' names and answer as those did: over 120 dB."""
    model = build(PERCEPTRON, used(PERCEPTRON, weights), {"x": ["n", 20]})
    taken = model.clone()
    assert take_in_biases(taken, ()) == 2
    assert operators(taken) == ["Gemm", "Relu", "Gemm", "Relu"]
    assert [node.name for node in taken.nodes() if node.op_type == "Gemm"] == ["one", "two"]
    assert sqnr(model, taken, samples(rng, 8, 20)) > 120


@pytest.mark.parametrize(
    ("shape", "bias", "exclude"), [(["n", "t", 256], "b1", ()), (["n", 256], "row", ()), (["n", 256], "b1", ("prod*",))]
)
def test_other_biases_stay_where_they_are(shape, bias, exclude, build: Build, weights, operators) -> None:  # type: ignore[no-untyped-def]
    """Of a stack of matrices, of more than one axis, or of a product that the recipe excludes."""
    nodes = [NODE("MatMul", ["x", "w2"], ["m"], "product"), NODE("Add", ["m", bias], ["y"])]
    model = build(nodes, used(nodes, weights), {"x": shape})
    assert take_in_biases(model, exclude) == 0
    assert operators(model) == ["MatMul", "Add"]


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("openvino", False)])
def test_runtimes_that_fuse_pairs_get_pairs(
    build: Build, rng, weights, tmp_path: Path, device: str, fused: bool
) -> None:  # type: ignore[no-untyped-def]
    """A model with operators of onnxruntime's own: its products become one more of them only where they run as such."""
    nodes = [
        NODE("MatMul", ["x", "w2"], ["m"], "product"),
        NODE("Add", ["m", "b1"], ["a"]),
        helper.make_node("Gelu", ["a"], ["y"], domain=MICROSOFT),
    ]
    model = build(nodes, used(nodes, weights), {"x": ["n", 8, 256]})
    data = InputData.from_arrays(samples(rng, 16, 8, 256), model.inputs)
    context = Context(data, tmp_path, target=Target(device=device))
    result = Quantize(QuantizeConfig(scheme="static", calibration="minmax", bias_correction=False))(model, context)
    operators = Counter(node.op_type for node in result.model.nodes())
    assert ("MatMulIntegerToFloat" in operators) is fused
    assert (operators["DequantizeLinear"] > 0) is not fused
