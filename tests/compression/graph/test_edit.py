"""New names, one thing in the place of another, and other numbers for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.graph.edit import Editor, clean, replace_numbers, set_input
from modelpress_compression.graph.read import constant_array
from modelpress_compression.model import Model

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


@pytest.fixture
def chain(model_from_text: Callable[..., Model]) -> Model:
    """y = Neg(Relu(x) + w), its nodes without names."""
    text = f"{HEAD} g (float[N,2] x) => (float[N,2] y) {{ a = Relu(x)  b = Add(a, w)  y = Neg(b) }}"
    return model_from_text(text, {"w": np.float32([1, 2])})


def _ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_new_names_are_numbered_and_never_taken(model_from_text: Callable[..., Model]) -> None:
    """Names of inputs, initializers, values and nodes, in subgraphs too, are met by none; numbers rise from 1."""
    text = (
        f"{HEAD} g (float[2] x, bool c) => (float[2] y) {{ [chooser] y = If(c) <"
        "then_branch = one () => (float[2] u) { u = Relu(x) }, else_branch = two () => (float[2] v) { v = Neg(x) }> }"
    )
    editor = Editor(model_from_text(text, {"w": np.float32([1, 2])}))
    assert [editor.name(wish) for wish in ("x", "w", "y", "u", "v", "chooser", "new")] == [
        "x_1", "w_1", "y_1", "u_1", "v_1", "chooser_1", "new",
    ]  # fmt: skip
    assert [editor.name("x") for _ in range(2)] == ["x_2", "x_3"]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_constants_keep_their_shape(chain: Model, shape: tuple[int, ...]) -> None:
    """Of any rank, 0 included, and in whatever order the array lies in memory."""
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape[::-1]).T
    value = Editor(chain).constant(chain.graph, array, "w")
    assert value.name == "w_1"
    assert chain.graph.initializers["w_1"] is value
    np.testing.assert_array_equal(constant_array(value), array, strict=True)


def test_emitted_nodes_lie_before_their_user(chain: Model, outputs_of: Callable[[Model, Any], Any]) -> None:
    """The model with one more node computes what it says."""
    editor = Editor(chain)
    user = chain.graph[-1]
    (doubled,) = editor.emit(user, "Mul", [user.inputs[0], editor.constant(chain.graph, np.float32(2), "two")], "b")
    user.replace_input_with(0, doubled)
    assert _ops(chain) == ["Relu", "Add", "Mul", "Neg"]
    np.testing.assert_array_equal(outputs_of(chain, np.float32([[1, -1]])), [[-4, -4]])


def test_domains_are_imported_where_their_operators_are(chain: Model) -> None:
    """An operator of another domain brings its import along."""
    editor = Editor(chain)
    editor.make("Gelu", [chain.graph.inputs[0]], "x", domain="com.microsoft")
    editor.make_like(chain.graph[0], "Scale", [chain.graph.inputs[0]], domain="other")
    assert dict(chain.graph.opset_imports) == {"": 17, "com.microsoft": 1, "other": 1}


def test_nodes_replace_others_under_their_names(chain: Model) -> None:
    """Two for two: the first keeps the name, the second gets one of its own, the last the name of the output."""
    editor = Editor(chain)
    relu, add, neg = chain.graph
    neg.name = "last"
    one = editor.make_like(neg, "Abs", [chain.graph.inputs[0]])
    two = editor.make_like(neg, "Sqrt", [one.outputs[0]], {})
    editor.replace(neg, [relu, add, neg], [one, two])
    assert [(node.op_type, node.name) for node in chain.graph] == [("Abs", "last"), ("Sqrt", "last.1")]
    assert chain.graph.outputs[0] is two.outputs[0]
    assert two.outputs[0].name == "y"


def test_what_others_use_is_not_removed(chain: Model) -> None:
    """Of the replaced nodes those stay whose outputs go elsewhere as well."""
    editor = Editor(chain)
    relu, add, neg = chain.graph
    chain.graph.outputs.append(relu.outputs[0])
    editor.replace(neg, [relu, add, neg], [editor.make_like(neg, "Abs", [chain.graph.inputs[0]])])
    assert _ops(chain) == ["Relu", "Abs"]


def test_hand_over_keeps_the_names_of_outputs(chain: Model) -> None:
    """An output of the graph is that of the new node, under the old name; `clean` takes the old node and its weight."""
    editor = Editor(chain)
    (made,) = editor.emit(chain.graph[-1], "Exp", [chain.graph.inputs[0]], "y")
    editor.hand_over(chain.graph[-1].outputs[0], made)
    clean(chain)
    assert chain.graph.outputs[0] is made
    assert made.name == "y"
    assert _ops(chain) == ["Exp"]
    assert not chain.graph.initializers


@pytest.mark.parametrize("inferred", [None, onnx_ir.Shape(["unk__1", 2])])
def test_what_becomes_an_output_keeps_what_is_declared(
    model_from_text: Callable[..., Model], inferred: onnx_ir.Shape | None
) -> None:
    """The declared output has the names of dimensions, and where nothing is inferred the only shape that there is."""
    text = f"{HEAD} g (float[N,2] x) => (float[N,2] y) {{ a = Relu(x)  y = Identity(a) }}"
    model = model_from_text(text, {})
    relu, identity = model.graph
    relu.outputs[0].shape, relu.outputs[0].type = inferred, None
    declared = model.outputs
    assert Editor.bypass(identity, relu.outputs[0])
    assert model.outputs == declared


def test_bypassed_nodes_pass_their_names_on(model_from_text: Callable[..., Model]) -> None:
    """The value before takes the output's name; an input of the graph cannot, and the node stays."""
    text = f"{HEAD} g (float[2] x) => (float[2] y, float[2] z) {{ a = Relu(x)  y = Identity(a)  z = Identity(x) }}"
    model = model_from_text(text)
    relu, first, second = model.graph
    assert Editor.bypass(first, relu.outputs[0])
    assert not Editor.bypass(second, model.graph.inputs[0])
    assert _ops(model) == ["Relu", "Identity"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    ("constant", "expected"),
    [
        ("Constant <value = float {1}> ()", np.float32(2.5)),
        ("Constant <value_floats = [1.0, 2.0]> ()", np.float32([2.5, 3])),
        ("Constant <value_int = 1> ()", np.int64(2)),
    ],
)
def test_numbers_of_constant_nodes(model_from_text: Callable[..., Model], constant: str, expected: Any) -> None:
    """They are replaced whatever attribute holds them, keep their element type, and run."""
    model = model_from_text(f"{HEAD} g (float[2] x) => (float[2] y) {{ c = {constant}  y = CastLike(c, x) }}")
    value = model.graph[0].outputs[0]
    replace_numbers(value, expected.astype(np.float64))
    np.testing.assert_array_equal(constant_array(value), expected, strict=True)
    assert list(model.graph[0].attributes) == ["value"]


def test_numbers_of_initializers(chain: Model) -> None:
    """Other numbers, then fewer of them: the value's shape follows."""
    value = chain.graph.initializers["w"]
    replace_numbers(value, np.array([0.5, 0.25]))
    np.testing.assert_array_equal(constant_array(value), np.float32([0.5, 0.25]), strict=True)
    replace_numbers(value, np.array([[3.0]]))
    assert value.shape == onnx_ir.Shape([1, 1])


def test_only_constants_have_numbers_to_replace(chain: Model) -> None:
    """Anything else is an error that names the value."""
    with pytest.raises(TypeError, match="'a' is not constant"):
        replace_numbers(chain.graph[0].outputs[0], np.zeros(2))


def test_inputs_may_lie_beyond_those_that_are_there(model_from_text: Callable[..., Model]) -> None:
    """What lies between is left out; an input that is there is replaced."""
    model = model_from_text(f"{HEAD} g (float[2] x, float[2] z) => (float[2] y) {{ y = Clip(x) }}")
    x, z = model.graph.inputs
    node = model.graph[0]
    set_input(node, 2, z)
    assert tuple(node.inputs) == (x, None, z)
    set_input(node, 0, z)
    assert tuple(node.inputs) == (z, None, z)
