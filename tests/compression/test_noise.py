"""Random operators that draw the same numbers in every run, for judging."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model, Provenance
from modelpress_compression.noise import fix_noise, random_nodes
from modelpress_compression.runtime import open_session, run, session_of
from onnx import TensorProto, helper, numpy_helper

NODE = helper.make_node
FLOAT = TensorProto.FLOAT


def _model(nodes, outputs, weights=None, opset: int = 17) -> Model:  # type: ignore[no-untyped-def]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 400])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))


def _fixed(model: Model, x) -> list[dict[str, np.ndarray]]:  # type: ignore[no-untyped-def, type-arg]
    """Outputs of two runs in one session and one in another."""
    with session_of(model) as session:
        answers = [run(session, {"x": x}) for _ in range(2)]
    with session_of(model) as session:
        return [*answers, run(session, {"x": x})]


DRAWS = [
    (NODE("RandomNormalLike", ["x"], ["y"], mean=2.0, scale=3.0), FLOAT, 2.0, 3.0),
    (NODE("RandomUniformLike", ["x"], ["y"], low=-1.0, high=5.0), FLOAT, 2.0, 6 / 12**0.5),
    (NODE("RandomNormal", [], ["y"], shape=[20, 400], mean=1.0), FLOAT, 1.0, 1.0),
    (NODE("RandomUniform", [], ["y"], shape=[20, 400], seed=3.0), FLOAT, 0.5, 1 / 12**0.5),
    (NODE("RandomNormalLike", ["x"], ["y"], dtype=TensorProto.DOUBLE), TensorProto.DOUBLE, 0.0, 1.0),
    (NODE("Bernoulli", ["x"], ["y"]), FLOAT, 0.3, 0.21**0.5),
]


@pytest.mark.parametrize(("node", "kind", "mean", "deviation"), DRAWS)
def test_draws_the_same_numbers_of_the_same_distribution(node, kind, mean, deviation) -> None:  # type: ignore[no-untyped-def]
    """Runs and sessions agree bit for bit; mean and deviation are those that the operator states, within 5 %."""
    model = _model([node], {"y": kind})
    x = np.full((20, 400), 0.3, np.float32)
    first, second, third = (answer["y"] for answer in _fixed(model, x))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    assert first.dtype == helper.tensor_dtype_to_np_dtype(kind)
    assert first.shape == (20, 400)
    assert abs(first.mean() - mean) < 0.05 * max(1.0, deviation)
    assert abs(first.std() - deviation) < 0.05 * deviation
    assert [other.op_type for other in model.graph] == [node.op_type]


def test_dropout_in_training_mode() -> None:
    """A quarter of the numbers is dropped, the others grow; at inference it is no random operator."""
    weights = {"ratio": np.float32(0.25), "on": np.bool_(True), "off": np.bool_(False)}
    nodes = [
        NODE("Dropout", ["x", "ratio", "on"], ["y", "mask"], "drop"),
        NODE("Dropout", ["x", "ratio", "off"], ["z"]),
    ]
    model = _model(nodes, {"y": FLOAT, "mask": TensorProto.BOOL, "z": FLOAT}, weights)
    assert [node.name for node in random_nodes(model.ir)] == ["drop"]
    x = np.ones((20, 400), np.float32)
    answers = _fixed(model, x)
    np.testing.assert_array_equal(answers[0]["y"], answers[2]["y"])
    np.testing.assert_allclose(answers[0]["y"], answers[0]["mask"] / 0.75, rtol=1e-6, atol=0)
    assert abs(answers[0]["mask"].mean() - 0.75) < 0.02
    np.testing.assert_array_equal(answers[0]["z"], x)


def test_multinomial_follows_the_scores() -> None:
    """Of two classes with odds of 3 to 1, three quarters of the samples are the first."""
    weights = {"scores": np.log(np.array([[0.75, 0.25]] * 2, np.float32))}
    nodes = [NODE("Multinomial", ["scores"], ["y"], sample_size=3000), NODE("Identity", ["x"], ["z"])]
    model = _model(nodes, {"y": TensorProto.INT32, "z": FLOAT}, weights)
    first, _, third = (answer["y"] for answer in _fixed(model, np.ones((1, 400), np.float32)))
    np.testing.assert_array_equal(first, third)
    assert first.shape == (2, 3000)
    assert first.dtype == np.int32
    assert abs(first.mean() - 0.25) < 0.03


def test_noise_inside_a_branch() -> None:
    """A subgraph draws the same numbers as well."""
    branch = helper.make_graph(
        [NODE("RandomNormalLike", ["x"], ["inner"], "noise")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    nodes = [NODE("If", ["true"], ["y"], then_branch=branch, else_branch=branch)]
    model = _model(nodes, {"y": FLOAT}, {"true": np.bool_(True)})
    first, second, _ = (answer["y"] for answer in _fixed(model, np.ones((2, 400), np.float32)))
    np.testing.assert_array_equal(first, second)


def test_two_files_are_compared_with_one_noise(tmp_path: Path) -> None:
    """A random model agrees with itself, though its file draws other numbers each time; nothing is left behind."""
    nodes = [NODE("RandomNormalLike", ["x"], ["noise"], "noise"), NODE("Add", ["x", "noise"], ["y"], "add")]
    model = _model(nodes, {"y": FLOAT})
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    for path in (first, second):
        path.parent.mkdir()
        model.save(path)
    x = np.zeros((4, 400), np.float32)
    session = open_session(first)
    assert (run(session, {"x": x})["y"] != run(session, {"x": x})["y"]).any()
    fidelity = compare_outputs(first, second, InputData(model.inputs, {"x": x}))
    assert fidelity.cosine == 1.0
    assert fidelity.outputs["y"].max_abs_error == 0
    assert [path.name for path in first.parent.iterdir()] == ["model.onnx"]


def test_a_model_without_noise_stays() -> None:
    """Nothing is replaced."""
    model = _model([NODE("Relu", ["x"], ["y"])], {"y": FLOAT})
    assert fix_noise(model.ir) == 0
