"""The executor as a module: parts of graphs, parameters, subgraphs, writing back, memory, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression import runtime
from modelpress_compression.errors import InvalidInputsError, ModelNotRunnableError
from modelpress_compression.executor import Executor, NotExecutableError, unsupported_nodes, weights
from modelpress_compression.graph.read import constant_array
from modelpress_compression.model import Model

ModelFromText = Callable[..., Model]
_NET = """
<ir_version: 9, opset_import: ["": 17]>
net (float[n, 3, 8, 8] x) => (float[n, 5] y) {
    c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w, b)
    r = Relu (c)
    s = Sigmoid (r)
    g = Mul (r, s)
    a = Add (g, c)
    p = GlobalAveragePool (a)
    f = Flatten (p)
    y = Gemm (f, v)
}
"""
_BRANCHES = """
<ir_version: 9, opset_import: ["": 17]>
net (float[2] x, bool c) => (float[2] y) {
    h = Mul (x, outer)
    y = If (c) <
        then_branch = one () => (float[2] t) { k = Constant <value = float[2] {1, 2}> () t = Mul (h, k) },
        else_branch = two () => (float[2] e) { k = Constant <value = float[2] {3, 4}> () e = Add (h, k) }
    >
}
"""


def _weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 5)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def net(model_from_text: ModelFromText) -> Model:
    """A small convolutional net with a residual and a gate."""
    return model_from_text(_NET, _weights())


@pytest.fixture
def image() -> np.ndarray:
    """Two images."""
    return np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_equals_onnxruntime_with_and_without_gradients(net: Model, image: np.ndarray) -> None:
    """rtol 1e-4; without gradients activations and sums overwrite their inputs, and nothing changes."""
    with runtime.session_of(net) as session:
        expected = runtime.run(session, {"x": image})["y"]
    executor = Executor(net, trainable=weights)
    kept = executor({"x": torch.from_numpy(image)})["y"]
    np.testing.assert_allclose(executor.run({"x": image})["y"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_feeds_are_never_changed(net: Model, image: np.ndarray) -> None:
    """A run without gradients leaves the caller's arrays, and the next run gives the same."""
    before, executor = image.copy(), Executor(net)
    first = executor.run({"x": image})["y"]
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(executor.run({"x": image})["y"], first)


@pytest.mark.parametrize("gradients", [True, False])
def test_returns_intermediate_values_that_were_asked_for(net: Model, image: np.ndarray, gradients: bool) -> None:
    """Also those that a fused or overwriting step would otherwise not keep."""
    executor = Executor(net, outputs=["c", "r", "s", "g", "a", "y"])
    with torch.set_grad_enabled(gradients):
        found = executor({"x": torch.from_numpy(image)})
    torch.testing.assert_close(found["r"], found["c"].clamp(min=0))
    torch.testing.assert_close(found["s"], torch.sigmoid(found["r"]))
    torch.testing.assert_close(found["g"], found["r"] * found["s"])
    torch.testing.assert_close(found["a"], found["g"] + found["c"])


def test_a_block_between_two_values_runs_alone(net: Model, image: np.ndarray) -> None:
    """Cut at both ends: from r and c to a, without the convolution before and the classifier behind."""
    whole = Executor(net, outputs=["c", "r", "a"])
    values = whole({"x": torch.from_numpy(image)})
    block = Executor(net, inputs=["r", "c"], outputs=["a"], trainable=[])
    assert len(block._plan.steps) == 2
    torch.testing.assert_close(block({"r": values["r"], "c": values["c"]})["a"], values["a"])


def test_trained_values_are_written_into_a_clone(net: Model, image: np.ndarray) -> None:
    """One SGD step; the clone then gives in onnxruntime what the executor gives, and the original is as it was."""
    executor = Executor(net, trainable=weights)
    assert set(executor.parameters_by_name) == {"w", "b", "v"}
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.1)
    executor({"x": torch.from_numpy(image)})["y"].square().mean().backward()
    optimizer.step()
    student = net.clone()
    executor.write_back(student)
    with runtime.session_of(student) as session:
        np.testing.assert_allclose(
            runtime.run(session, {"x": image})["y"], executor.run({"x": image})["y"], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(constant_array(net.graph.initializers["w"]), _weights()["w"])


def test_writing_back_keeps_the_element_type(model_from_text: ModelFromText) -> None:
    """float16 stays float16."""
    text = '<ir_version: 9, opset_import: ["": 17]> g (float16[2] x) => (float16[2] y) { y = Mul (x, w) }'
    model = model_from_text(text, {"w": np.array([1, 2], np.float16)})
    executor = Executor(model, trainable=["w"])
    with torch.no_grad():
        executor.parameters_by_name["w"].mul_(3)
    executor.write_back(model)
    found = constant_array(model.graph.initializers["w"])
    assert found is not None
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, [3, 6])


def test_a_shared_initializer_stays_one(model_from_text: ModelFromText) -> None:
    """Two nodes read w: one parameter, both gradients in it."""
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { a = Mul (x, w) y = Mul (a, w) }'
    executor = Executor(model_from_text(text, {"w": np.array([2, 3], np.float32)}), trainable=weights)
    executor({"x": torch.ones(2)})["y"].sum().backward()
    (parameter,) = executor.parameters()
    assert parameter.grad is not None
    np.testing.assert_allclose(parameter.grad.numpy(), [4, 6])


def test_constants_inside_branches_are_trained_apart(model_from_text: ModelFromText) -> None:
    """Both branches name theirs k; the gradient reaches the branch that ran, and the outer constant through it."""
    model = model_from_text(_BRANCHES, {"outer": np.array([5, 6], np.float32)})
    executor = Executor(model, trainable=weights)
    assert set(executor.parameters_by_name) == {"outer", "k", "k#2"}
    executor({"x": torch.ones(2), "c": torch.tensor(True)})["y"].sum().backward()
    gradients = {name: parameter.grad for name, parameter in executor.parameters_by_name.items()}
    then, other = gradients["k"], gradients["k#2"]
    assert then is not None
    assert other is None
    np.testing.assert_allclose(then.numpy(), [5, 6])
    np.testing.assert_allclose(gradients["outer"].numpy(), [1, 2])
    with torch.no_grad():
        executor.parameters_by_name["k#2"].add_(1)
    executor.write_back(model)
    with runtime.session_of(model) as session:
        found = runtime.run(session, {"x": np.ones(2, np.float32), "c": np.array(False)})["y"]
    np.testing.assert_allclose(found, [9, 11])


def test_statistics_and_single_numbers_are_no_weights(model_from_text: ModelFromText) -> None:
    """Of BatchNormalization scale and bias are trained, mean and variance are not; nor is a divisor."""
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[n, 2] x) => (float[n, 2] y) {
        h = BatchNormalization (x, scale, bias, mean, var)
        y = Div (h, eight)
    }"""
    vectors = {name: np.ones(2, np.float32) for name in ("scale", "bias", "mean", "var")}
    model = model_from_text(text, {**vectors, "eight": np.array(8, np.float32)})
    assert set(Executor(model, trainable=weights).parameters_by_name) == {"scale", "bias"}


def test_memory_is_freed_after_the_last_reader(model_from_text: ModelFromText) -> None:
    """In a chain of a hundred sums no more than three of the values live at once."""
    lines = "".join(f"v{i + 1} = Abs (v{i})\n" for i in range(100))
    text = f'<ir_version: 9, opset_import: ["": 17]> g (float[4] v0) => (float[4] v100) {{ {lines} }}'
    executor = Executor(model_from_text(text))
    live = most = 0
    for step in executor._plan.steps:
        live += len(step.outputs)
        most = max(most, live)
        live -= len(step.frees)
    assert most <= 3


def test_unknown_operators_are_named_without_running(model_from_text: ModelFromText) -> None:
    """Operator, domain, version and node; compiling raises the same."""
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = TfIdfVectorizer (x) }'
    model = model_from_text(text)
    (missing,) = unsupported_nodes(model)
    assert (missing.node, missing.op_type, missing.domain, missing.version) == ("y", "TfIdfVectorizer", "ai.onnx", 17)
    with pytest.raises(NotExecutableError, match=r"'y'.*ai\.onnx\.TfIdfVectorizer of opset 17"):
        Executor(model)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_states_of_another_batch_are_refused(model_from_text: ModelFromText, kind: str, gates: int) -> None:
    """A state of one sequence for two: torch's own LSTM would write beyond its end, and take the process with it."""
    states = "float[1, b, 4] h" + (", float[1, b, 4] c" if kind == "LSTM" else "")
    read = "h, c" if kind == "LSTM" else "h"
    text = f"""<ir_version: 9, opset_import: ["": 17]>
    net (float[t, n, 3] x, {states}) => (float[t, 1, n, 4] y) {{
        y = {kind} <hidden_size = 4{", linear_before_reset = 1" if kind == "GRU" else ""}> (x, w, r, , , {read})
    }}"""
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 4 * gates, 3), "r": (1, 4 * gates, 4)}
    model = model_from_text(text, {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()})
    feeds = {"x": np.zeros((5, 2, 3), "f4"), "h": np.zeros((1, 1, 4), "f4"), "c": np.zeros((1, 1, 4), "f4")}
    with pytest.raises(ModelNotRunnableError, match=rf"\({kind}\).*state 0 has shape \[1, 1, 4\]"):
        Executor(model).run(feeds)


def test_values_that_do_not_fit_name_the_node(net: Model) -> None:
    """A wrong number of channels."""
    with pytest.raises(ModelNotRunnableError, match=r"'c' \(Conv\)"):
        Executor(net).run({"x": np.zeros((1, 2, 8, 8), np.float32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["nothing"]}, "nothing"),
        ({"outputs": ["nothing"]}, "no value 'nothing'"),
        ({"inputs": ["nothing"]}, "no value 'nothing'"),
    ],
)
def test_names_that_the_graph_does_not_have_are_refused(net: Model, options: dict[str, Any], message: str) -> None:
    """By the name that was asked for."""
    with pytest.raises(InvalidInputsError, match=message):
        Executor(net, **options)


def test_a_missing_input_is_named(net: Model) -> None:
    """And what the executor takes."""
    with pytest.raises(InvalidInputsError, match="'x' is missing"):
        Executor(net)({})


def test_integers_cannot_be_trained(model_from_text: ModelFromText) -> None:
    """Said by name and type."""
    text = '<ir_version: 9, opset_import: ["": 17]> g (int64[2] x) => (int64[2] y) { y = Mul (x, w) }'
    with pytest.raises(InvalidInputsError, match="'w' is of type INT64"):
        Executor(model_from_text(text, {"w": np.array([1, 2])}), trainable=["w"])
