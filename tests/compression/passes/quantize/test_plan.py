"""Between layers: what moves values about stays in 8 bits, and what is joined shares a range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from onnx import NodeProto, TensorProto, helper

NODE = helper.make_node
Quantize = Callable[..., PassResult]

# Each takes "a" [n, 16, 12, 12] from one convolution and gives "b" to the next.
MOVES: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "Split": (
        [NODE("Split", ["a"], ["a1", "a2"], axis=1), NODE("Concat", ["a2", "a1"], ["b"], axis=1)],
        {},
    ),
    "Slice": ([NODE("Slice", ["a", "zero", "six", "two"], ["b"])], {"zero": [0], "six": [6], "two": [2]}),
    "Gather": ([NODE("Gather", ["a", "order"], ["b"], axis=1)], {"order": np.arange(16)[::-1]}),
    "DepthToSpace": ([NODE("DepthToSpace", ["a"], ["b"], blocksize=2)], {}),
    "Resize": (
        [NODE("Resize", ["a", "", "twice"], ["b"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"twice": np.asarray([1, 1, 2, 2], np.float32)},
    ),
    "Transpose": ([NODE("Transpose", ["a"], ["b"], perm=[0, 1, 3, 2])], {}),
}


def convolution(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray[Any, Any]:
    return rng.normal(0, 0.1, (outputs, inputs, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", MOVES)
def test_moves_are_made_in_8_bits(kind, build, images, quantize, sqnr, rng, loaded_operators) -> None:  # type: ignore[no-untyped-def]
    """One QuantizeLinear at the input, one DequantizeLinear at the output, integers between; 25 dB or more."""
    nodes, constants = MOVES[kind]
    channels = 4 if kind == "DepthToSpace" else 16
    model = build(
        [
            NODE("Conv", ["x", "w1"], ["c"], "first"),
            NODE("Relu", ["c"], ["a"]),
            *nodes,
            NODE("Conv", ["b", "w2"], ["y"]),
        ],
        {"w1": convolution(rng, 16, 8), "w2": convolution(rng, 8, channels)}
        | {name: np.asarray(value) for name, value in constants.items()},
        {"x": ["n", 8, 14, 14]},
    )
    x = {"x": rng.normal(0, 1, (6, 8, 14, 14)).astype(np.float32)}
    result = quantize(model, x, scheme="static")
    assert sqnr(model, result.model, x) > 25
    loaded = loaded_operators(result.model)
    assert loaded.count("QLinearConv") == 2
    assert loaded.count("QuantizeLinear") == loaded.count("DequantizeLinear") == 1
    assert kind in loaded


def joined(build: Callable[..., Model], rng: np.random.Generator, activations: Mapping[str, str]) -> Model:
    """x -> two convolutions, each with its activation or without -> Concat -> convolution -> y."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["c1" if "one" in activations else "one"]),
        NODE("Conv", ["x", "w2"], ["c2" if "two" in activations else "two"]),
        *(NODE(kind, [f"c{1 if name == 'one' else 2}"], [name]) for name, kind in activations.items()),
        NODE("Concat", ["one", "two"], ["both"], axis=1),
        NODE("Conv", ["both", "w3"], ["y"]),
    ]
    weights = {
        "w1": convolution(rng, 16, 8), "w2": 7 * convolution(rng, 16, 8), "w3": convolution(rng, 8, 32),
    }  # fmt: skip
    return build(nodes, weights, {"x": ["n", 8, 12, 12]})


def scale_of(model: Model, name: str) -> float:
    """The scale of the QuantizeLinear behind a tensor."""
    (node,) = [node for node in model.nodes() if node.op_type == "QuantizeLinear" and node.inputs[0].name == name]
    return float(node.inputs[1].const_value.numpy())


@pytest.mark.parametrize(
    ("activations", "shared"),
    [({}, {"one", "two"}), ({"one": "Relu", "two": "Relu"}, {"one", "two"}), ({"one": "Relu"}, {"two"})],
)
def test_what_is_joined_has_the_range_of_the_whole(activations, shared, build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """So nothing is rounded twice; a Relu that only its own range stands for keeps that."""
    model = joined(build, rng, activations)
    result = quantize(model, images, scheme="static")
    scales = {name: scale_of(result.model, name) for name in ("one", "two", "both")}
    assert {name for name in ("one", "two") if scales[name] == scales["both"]} == shared
    assert sqnr(model, result.model, images) > 25


@pytest.mark.parametrize("scale", [10.0, 300.0])
def test_a_range_is_shared_only_where_the_concat_is_in_8_bits(scale, build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Beside a much larger operand, before a reader that stays in float32, a convolution keeps its own range."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["one"], pads=[1, 1, 1, 1]),
        NODE("Mul", ["x", "large"], ["two"]),
        NODE("Concat", ["one", "two"], ["both"], axis=1),
        NODE("Conv", ["both", "w3"], ["d"], "depthwise", group=24),
        NODE("Tanh", ["d"], ["y"]),
    ]
    light = rng.normal(0, 0.1, (24, 1, 3, 3)).astype(np.float32)
    light[16:] /= scale
    weights = {"w1": convolution(rng, 16, 8), "w3": light, "large": np.asarray(scale, np.float32)}
    model = build(nodes, weights, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    assert result.changes["Conv"] == 1
    assert sqnr(model, result.model, images) > 30


def test_a_concat_that_falls_out_leaves_the_others(build, images, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """An operand that is infinite keeps the Concat in float32; the convolution before it is quantized all the same."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["one"], pads=[1, 1, 1, 1]),
        NODE("Relu", ["x"], ["r"]),
        NODE("Log", ["r"], ["two"]),
        NODE("Concat", ["one", "two"], ["both"], axis=1),
        NODE("Conv", ["both", "w3"], ["c"]),
        NODE("Clip", ["c", "low", "high"], ["y"]),
    ]
    weights = {
        "w1": convolution(rng, 16, 8), "w3": np.abs(convolution(rng, 8, 24)),
        "low": np.float32(-3), "high": np.float32(6),
    }  # fmt: skip
    result = quantize(build(nodes, weights, {"x": ["n", 8, 12, 12]}), images, scheme="static")
    assert result.changes["Conv"] == 1


def test_constants_are_joined_in_float32(build, images, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Coordinates that two Concats append, as CoordConv does, have no range that calibration could see."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        NODE("Concat", ["a", "grid"], ["b"], axis=1),
        NODE("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
        NODE("Concat", ["c", "grid"], ["d"], axis=1),
        NODE("Conv", ["d", "w3"], ["y"]),
    ]
    weights = {
        "w1": convolution(rng, 16, 8), "w2": convolution(rng, 16, 17), "w3": convolution(rng, 8, 17),
        "grid": np.linspace(-1, 1, 144, dtype=np.float32).reshape(1, 1, 12, 12),
    }  # fmt: skip
    model = build(nodes, weights, {"x": [1, 8, 12, 12]})
    assert sqnr(model, quantize(model, images, scheme="static").model, images) > 25


@pytest.mark.parametrize("last", ["Relu", ""])
def test_concats_in_a_chain_share_what_the_last_one_has(  # type: ignore[no-untyped-def]
    last, build, images, quantize, sqnr, rng, loaded_operators
) -> None:
    """All operands have one scale where all are rectified; where the last is not, those before share among themselves,
    and their Relus stay absorbed."""
    nodes = [
        *(NODE("Conv", ["x", f"w{n}"], [f"c{n}"]) for n in (1, 2, 3)),
        *(NODE("Relu", [f"c{n}"], [f"r{n}"]) for n in ((1, 2, 3) if last else (1, 2))),
        NODE("Concat", ["r1", "r2"], ["inner"], axis=1),
        NODE("Concat", ["inner", "r3" if last else "c3"], ["outer"], axis=1),
        NODE("Conv", ["outer", "w4"], ["y"]),
    ]
    weights = {f"w{n}": n * convolution(rng, 16, 8) for n in (1, 2, 3)} | {"w4": convolution(rng, 8, 48)}
    model = build(nodes, weights, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    scales = {name: scale_of(result.model, name) for name in ("r1", "r2", "inner", "outer")}
    assert scales["r1"] == scales["r2"] == scales["inner"]
    assert (scales["inner"] == scales["outer"]) is bool(last)
    assert not {"Conv", "FusedConv", "Relu"} & set(loaded_operators(result.model))
    assert sqnr(model, result.model, images) > 25


def test_an_operand_in_float32_is_quantized_for_its_concat(
    build, images, quantize, sqnr, rng, loaded_operators
) -> None:  # type: ignore[no-untyped-def]
    """An 8-bit convolution and a ConvTranspose, which has no 8-bit kernel, meet in integers."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["one"], pads=[1, 1, 1, 1]),
        NODE("ConvTranspose", ["x", "w2"], ["two"], pads=[1, 1, 1, 1]),
        NODE("Concat", ["one", "two"], ["both"], axis=1),
        NODE("Conv", ["both", "w3"], ["y"]),
    ]
    weights = {"w1": convolution(rng, 16, 8), "w2": convolution(rng, 8, 16), "w3": convolution(rng, 8, 32)}
    model = build(nodes, weights, {"x": ["n", 8, 12, 12]})
    result = quantize(model, images, scheme="static")
    loaded = loaded_operators(result.model)
    assert "QLinearConcat" in loaded
    assert "Concat" not in loaded
    assert sqnr(model, result.model, images) > 25


@pytest.mark.parametrize("moves", [("Transpose",), ("MaxPool", "Transpose"), ("Identity", "Transpose"), ("Identity",)])
def test_no_moved_value_in_8_bits_is_for_a_subgraph(moves, build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Opened, a model with one would abort the process (onnxruntime 1.31): the layer in front stays in float32, with
    the reason. What a subgraph reads as it is may be in 8 bits."""
    nodes, read = [NODE("Conv", ["x", "w1"], ["c0"], "first"), NODE("Conv", ["c0", "w2"], ["c"], "second")], "c"
    for kind in moves:
        options = {"kernel_shape": [2, 2]} if kind == "MaxPool" else {}
        nodes.append(NODE(kind, [read], [f"{read}_{kind}"], **options))
        read += f"_{kind}"
    branches = {
        f"{name}_branch": helper.make_graph(
            [NODE(kind, [read], [name])], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )
        for name, kind in (("then", "Neg"), ("else", "Abs"))
    }
    nodes += [
        NODE("ReduceMean", ["c"], ["mean"], keepdims=0),
        NODE("Greater", ["mean", "most"], ["is"]),
        NODE("If", ["is"], ["y"], **branches),
    ]
    weights = {"w1": convolution(rng, 16, 8), "w2": convolution(rng, 8, 16), "most": np.asarray(9, np.float32)}
    model = build(nodes, weights, {"x": ["n", 8, 14, 14]})
    x = {"x": rng.normal(0, 1, (6, 8, 14, 14)).astype(np.float32)}
    result = quantize(model, x, scheme="static")
    assert sqnr(model, result.model, x) > 25
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert ("subgraph" in reasons.get("second", "")) == (moves[-1] == "Transpose")
    assert result.changes["Conv"] == 2 - len(reasons)
