"""Weight-only quantization: what it becomes, what is left and why, and that the arithmetic is the weights' own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import PassResult
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper

Apply = Callable[..., PassResult]
WIDE = 288  # inputs of a product: a multiple of 32, not of 128 or 256


@pytest.fixture
def wide(build, rng):  # type: ignore[no-untyped-def]
    """MatMul, Tanh, Gemm (alpha, beta, transB), over 288 inputs each: x [N, T, 288] -> y [N * T, 24]."""
    weights = {
        "w1": rng.normal(0, 0.1, (WIDE, WIDE)),
        "w2": rng.normal(0, 0.1, (24, WIDE)),
        "b2": rng.normal(0, 0.2, 24),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "first"),
        helper.make_node("Tanh", ["m"], ["t"], "tanh"),
        helper.make_node("Reshape", ["t", "rows"], ["f"], "rows"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], "second", transB=1, alpha=0.5, beta=2.0),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    return build(nodes, {**constants, "rows": np.asarray([-1, WIDE])}, {"x": ["n", "t", WIDE]})


@pytest.fixture
def samples(rng) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """16 samples for `wide`."""
    return {"x": rng.normal(0, 1, (16, 5, WIDE)).astype(np.float32)}


@pytest.mark.parametrize(("weights", "size", "used", "least", "ratio"), [
    ("int8", 32, 32, 35, 0.29), ("int8", 128, 32, 35, 0.29), ("uint8", 32, 32, 35, 0.29), ("int4", 16, 16, 16, 0.20),
    ("int4", 32, 32, 15, 0.17), ("int4", 256, 64, 14, 0.17), ("int2", 32, 32, 3, 0.11), ("int2", 16, 16, 4, 0.14),
])  # fmt: skip
def test_products_in_blocks(wide, samples, quantize: Apply, sqnr, weights, size, used, least, ratio) -> None:  # type: ignore[no-untyped-def]
    """Both products become MatMulNBits, in blocks up to the size asked for, at `least` dB and `ratio` of the bytes."""
    result = quantize(wide, samples, scheme="weight_only", weights=weights, block_size=size)
    assert result.changes == {"MatMul": 1, "Gemm": 1}
    products = [node for node in result.model.nodes() if node.op_type == "MatMulNBits"]
    bits = {"int4": 4, "int2": 2}.get(weights, 8)
    assert [node.attributes["block_size"].as_int() for node in products] == [used, used]
    assert {node.attributes["bits"].as_int() for node in products} == {bits}
    assert result.model.weight_bytes() < ratio * wide.weight_bytes()
    assert sqnr(wide, result.model, samples) > least
    assert [spec.name for spec in result.model.outputs] == ["y"]


def test_bias_alpha_and_beta_are_exact(build, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Weights that 8 bits hold exactly: y = alpha x W^T + beta C (atol 1e-3), for every kind of constant C."""
    levels = np.random.default_rng(0).integers(-127, 128, (16, 256))
    levels[:, ::32] = 127
    weight = (levels / 127).astype(np.float32)
    x = np.eye(4, 256, dtype=np.float32)
    for bias in (np.arange(16.0), np.full((1,), 3.0), np.asarray(2.0), np.arange(16.0)[None], None):
        constants = {"w": weight} if bias is None else {"w": weight, "c": np.asarray(bias, np.float32)}
        node = helper.make_node("Gemm", ["x", *constants], ["y"], "g", transB=1, alpha=-0.5, beta=2.0)
        model = build([node], constants, {"x": ["n", 256]})
        result = quantize(model, {"x": x}, scheme="weight_only")
        assert [node.op_type for node in result.model.nodes()] == ["MatMulNBits"]
        with session_of(result.model) as session:
            y = run(session, {"x": x})["y"]
        wanted = -0.5 * x @ weight.T + (0 if bias is None else 2 * bias)
        np.testing.assert_allclose(y, wanted, atol=1e-3)


def test_a_bias_that_is_fed_keeps_the_gemm(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Its weight is stored in 8 bits all the same, and folded."""
    weight = rng.normal(0, 0.1, (256, 16)).astype(np.float32)
    model = build(
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"], "g")], {"w": weight}, {"x": ["n", 256], "c": ["n", 16]}
    )
    arrays = {"x": rng.normal(0, 1, (4, 256)).astype(np.float32), "c": np.ones((4, 16), np.float32)}
    result = quantize(model, arrays, scheme="weight_only")
    assert "Gemm" in [node.op_type for node in result.model.nodes()]
    assert sqnr(model, result.model, arrays) > 35


@pytest.mark.parametrize(("weights", "least"), [("int8", 35), ("int4", 20), ("int2", 20)])
def test_convolutions_are_folded_when_loaded(  # type: ignore[no-untyped-def]
    cnn, images, quantize: Apply, sqnr, loaded_operators, weights, least
) -> None:
    """Weights of Convs go through arithmetic that onnxruntime folds away; small ones stay, and say why.

    Of the Gemm's rows, which are too short for 4 bits, a warning tells; and of 2 bits, which no Conv has.
    """
    result = quantize(cnn, images, scheme="weight_only", weights=weights)
    assert result.changes == {"Conv": 2, "Gemm": 1}
    assert ("depthwise", "Conv: its 144 weights are too few to pay for their scales") in {
        (skip.node, skip.reason) for skip in result.skipped
    }
    assert (len(result.notes), result.warnings) == ({"int8": 0, "int4": 1, "int2": 2}[weights], ())
    assert loaded_operators(result.model) == loaded_operators(cnn)
    assert sqnr(cnn, result.model, images) > least


def test_recurrent_and_transposed_convolutions(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """LSTM, GRU and ConvTranspose, which have no 8-bit kernels or bad ones, get 8-bit files; scales per gate row."""
    weights = {
        "w": rng.normal(0, 0.2, (2, 64, 24)),
        "r": rng.normal(0, 0.2, (2, 64, 16)),
        "wg": rng.normal(0, 0.2, (1, 48, 24)),
        "rg": rng.normal(0, 0.2, (1, 48, 16)),
        "t": rng.normal(0, 0.2, (24, 8, 3, 3)),
    }
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["y"], "lstm", hidden_size=16, direction="bidirectional"),
        helper.make_node("GRU", ["x", "wg", "rg"], ["g"], "gru", hidden_size=16),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    kernel = constants.pop("t")
    model = build(nodes, constants, {"x": ["t", "n", 24]}, outputs=("y", "g"))
    arrays = {"x": rng.normal(0, 1, (3, 5, 2, 24)).astype(np.float32)}
    result = quantize(model, arrays, scheme="weight_only")
    assert result.changes == {"LSTM": 2, "GRU": 2}
    assert sqnr(model, result.model, arrays) > 35
    up = build([helper.make_node("ConvTranspose", ["x", "t"], ["y"], "up")], {"t": kernel}, {"x": ["n", 24, 6, 6]})
    images = {"x": rng.normal(0, 1, (3, 24, 6, 6)).astype(np.float32)}
    assert sqnr(up, quantize(up, images, scheme="weight_only").model, images) > 35


def test_weights_that_are_rearranged_on_the_way(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Gates that Slice, Concat and Unsqueeze bring into another order are found, and stored once."""
    weights = {"w": rng.normal(0, 0.2, (64, 24)), "r": rng.normal(0, 0.2, (1, 64, 16))}
    bounds = {"zero": [0], "half": [32], "end": [64], "rows": [0]}
    nodes = [
        helper.make_node("Slice", ["w", "half", "end", "rows"], ["w1"]),
        helper.make_node("Slice", ["w", "zero", "half", "rows"], ["w2"]),
        helper.make_node("Concat", ["w1", "w2"], ["w3"], axis=0),
        helper.make_node("Unsqueeze", ["w3", "zero"], ["w4"]),
        helper.make_node("LSTM", ["x", "w4", "r"], ["y"], "lstm", hidden_size=16),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    numbers = {name: np.asarray(value) for name, value in bounds.items()}
    model = build(nodes, {**constants, **numbers}, {"x": ["t", "n", 24]})
    arrays = {"x": rng.normal(0, 1, (3, 5, 2, 24)).astype(np.float32)}
    result = quantize(model, arrays, scheme="weight_only")
    assert result.changes == {"LSTM": 2}
    assert result.model.weight_bytes() < 0.4 * model.weight_bytes()
    assert sqnr(model, result.model, arrays) > 35


@pytest.mark.parametrize(
    ("weights", "columns", "bits"),
    [
        ("int8", 64, 8),
        ("int4", 64, 4),
        ("int4", 65, 8),
        ("int2", 64, 2),
        ("int2", 68, 2),
        ("int2", 66, 4),
        ("int2", 65, 8),
    ],
)
def test_embeddings(build, rng, quantize: Apply, sqnr, weights, columns, bits) -> None:  # type: ignore[no-untyped-def]
    """A table becomes GatherBlockQuantized; rows that do not fill whole bytes take more bits."""
    table = rng.normal(0, 1, (100, columns)).astype(np.float32)
    model = build(
        [helper.make_node("Gather", ["w", "x"], ["y"], "embed")], {"w": table}, {"x": ["n", 7]}, types={"x": 7}
    )
    arrays = {"x": rng.integers(0, 100, (5, 7))}
    result = quantize(model, arrays, scheme="weight_only", weights=weights)
    (node,) = result.model.nodes()
    assert node.op_type == "GatherBlockQuantized"
    assert node.attributes["bits"].as_int() == bits
    assert sqnr(model, result.model, arrays) > {8: 40, 4: 18, 2: 8}[bits]


def test_experts_and_tables_of_onnxruntime(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """EmbedLayerNormalization and a mixture of experts: what they read is made of 8 bits when the model is loaded."""
    nodes = [
        helper.make_node(
            "EmbedLayerNormalization", ["ids", "", "words", "places", "", "one", "zero"], ["e", "m"], "embed",
            domain="com.microsoft", epsilon=1e-5,
        ),
        helper.make_node("Reshape", ["e", "rows"], ["x"], "flat"),
        helper.make_node("MatMul", ["x", "gate"], ["g"], "gate"),
        helper.make_node(
            "MoE", ["x", "g", "up", "", "down"], ["y"], "experts", domain="com.microsoft", k=2, activation_type="gelu"
        ),
    ]  # fmt: skip
    shapes = {"words": (200, 32), "places": (16, 32), "gate": (32, 4), "up": (4, 64, 32), "down": (4, 32, 64)}
    weights = {name: (rng.standard_normal(shape) / 6).astype(np.float32) for name, shape in shapes.items()}
    weights |= {"one": np.ones(32, np.float32), "zero": np.zeros(32, np.float32), "rows": np.asarray([-1, 32])}
    model = build(nodes, weights, {"ids": ["n", 5]}, types={"ids": onnx.TensorProto.INT32})
    words = {"ids": rng.integers(0, 200, (6, 5)).astype(np.int32)}
    result = quantize(model, words, scheme="weight_only", weights="int8")
    assert result.changes == {"EmbedLayerNormalization": 2, "MoE": 2}
    assert result.model.weight_bytes() < model.weight_bytes() / 3.4
    assert sqnr(model, result.model, words) > 35


def test_shared_weights_are_stored_once(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Two products by one weight read the same three constants."""
    weight = rng.normal(0, 0.06, (256, 256)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "two"),
    ]
    model = build(nodes, {"w": weight}, {"x": ["n", 256]})
    arrays = {"x": rng.normal(0, 1, (4, 256)).astype(np.float32)}
    result = quantize(model, arrays, scheme="weight_only", weights="int4")
    one, two = result.model.nodes()
    assert [value.name for value in one.inputs[1:]] == [value.name for value in two.inputs[1:]]
    assert len(list(result.model.tensors())) == 3
    assert sqnr(model, result.model, arrays) > 12


def test_a_table_that_is_also_a_factor_is_stored_in_eight_bits(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Tied embeddings, looked up and multiplied by, are one 8-bit tensor for both."""
    table = rng.normal(0, 1, (80, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["e"], "embed"),
        helper.make_node("Transpose", ["w"], ["t"], "turn"),
        helper.make_node("MatMul", ["e", "t"], ["y"], "logits"),
    ]
    model = build(nodes, {"w": table}, {"x": ["n", 7]}, types={"x": 7})
    arrays = {"x": rng.integers(0, 80, (5, 7))}
    result = quantize(model, arrays, scheme="weight_only")
    assert result.model.weight_bytes() < 0.3 * model.weight_bytes()
    assert sqnr(model, result.model, arrays) > 35


def branches(weight: np.ndarray) -> onnx.ModelProto:
    """If c: MatMul(x, w) else MatMul(x, v); w is the main graph's, v the branch's own."""
    other = numpy_helper.from_array(weight[::-1].copy(), "v")

    def branch(name: str, factor: str, own: list[onnx.TensorProto]) -> onnx.GraphProto:
        output = [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)]
        return helper.make_graph(
            [helper.make_node("MatMul", ["x", factor], [f"{name}_y"], name)], name, [], output, own
        )

    node = helper.make_node(
        "If", ["c"], ["y"], "choose", then_branch=branch("then", "w", []), else_branch=branch("else", "v", [other])
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("inputs", [256, 64])
def test_branches(rng, quantize: Apply, inputs: int) -> None:  # type: ignore[no-untyped-def]
    """Weights inside an If, and of the main graph used there, in blocks or folded; both branches answer right."""
    weight = rng.normal(0, 0.1, (inputs, 32)).astype(np.float32)
    model = Model(onnx_ir.from_proto(branches(weight)), Provenance("onnx", "0" * 64, 0))
    x = rng.normal(0, 1, (1, 3, inputs)).astype(np.float32)
    arrays = {"c": np.asarray([True]), "x": x}
    result = quantize(model, arrays, scheme="weight_only", rounding="gptq")
    assert result.changes == {"MatMul": 2}
    found = Counter(node.op_type for node in result.model.nodes())
    assert found["MatMulNBits" if inputs == 256 else "Cast"] == 2
    # Calibration cannot look into a branch, and the report says so.
    assert len([skip for skip in result.skipped if "nearest" in skip.reason]) == 2
    with session_of(result.model) as session:
        for choice, factor in ((True, weight), (False, weight[::-1])):
            y = run(session, {"c": np.asarray(choice), "x": x[0]})["y"]
            np.testing.assert_allclose(y, x[0] @ factor, atol=0.05)


def test_exclude_and_broken_weights(build, rng, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Excluded nodes and weights with NaN stay, with their reasons; with nothing left the model is the one given."""
    weight = rng.normal(0, 0.1, (256, 16)).astype(np.float32)
    broken = weight.copy()
    broken[3, 3] = np.nan
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "fine"),
        helper.make_node("MatMul", ["x", "v"], ["z"], "bad"),
    ]
    model = build(nodes, {"w": weight, "v": broken}, {"x": ["n", 256]}, outputs=("y", "z"))
    arrays = {"x": rng.normal(0, 1, (4, 256)).astype(np.float32)}
    result = quantize(model, arrays, scheme="weight_only", exclude=("fi*",))
    assert not result.changed
    assert result.model is model
    assert {skip.node: skip.reason for skip in result.skipped} == {
        "fine": "MatMul: excluded by the recipe",
        "bad": "MatMul: its weight holds infinite or NaN values",
    }


def test_twice_is_refused(wide, samples, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """A model in blocks is quantized already."""
    once = quantize(wide, samples, scheme="weight_only").model
    again = quantize(once, samples, scheme="weight_only")
    assert not again.changed
    assert [skip.reason for skip in again.skipped] == ["the model is quantized already"]


def test_folded_twice_changes_nothing(cnn, images, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Weights that are stored in 8 bits are no float constants any more, so that there is nothing left to do."""
    once = quantize(cnn, images, scheme="weight_only").model
    assert not quantize(once, images, scheme="weight_only").changed


def test_the_given_model_is_not_touched(wide, samples, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """The pass works on a copy."""
    before = [(node.op_type, [value.name for value in node.inputs if value]) for node in wide.nodes()]
    quantize(wide, samples, scheme="weight_only", weights="int4")
    assert [(node.op_type, [value.name for value in node.inputs if value]) for node in wide.nodes()] == before
