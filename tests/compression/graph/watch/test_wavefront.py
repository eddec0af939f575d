"""A model in pieces answers as it does in one."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression import parallel
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.watch import taps, wavefront
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.inputs import InputData
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper

NAMES = ("c1", "r1", "c2", "r2", "p", "f")


def front_of(model: Any, x: Any, wanted: Any, budget_bytes: int = 10**9) -> Wavefront:
    """Over the samples x, one at a time."""
    samples = InputData.from_arrays({"x": x}, model.inputs)
    return Wavefront(model, samples, wanted, budget_bytes, lambda: None)


@settings(max_examples=12)
@given(
    asked=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
    budget_bytes=st.sampled_from([0, 20_000, 10**9]),
)
def test_pieces_give_what_the_whole_gives(asked: list[str], budget_bytes: int, chain: Any, images: Any) -> None:
    """Whatever is asked for, in the order of the graph, and however little may be kept: as in one run (1e-5)."""
    model, x = chain(), images(3)
    order = [*sorted(asked, key=NAMES.index), "y"]
    front = front_of(model, x, order, budget_bytes)
    found = {name: [values[name] for values in front.advance([name])] for name in order}
    with session_of(model) as session:
        np.testing.assert_allclose(np.concatenate(found["y"]), run(session, {"x": x})["y"], rtol=1e-5, atol=1e-5)
    assert [len(values) for values in found.values()] == [3] * len(order)


@pytest.mark.parametrize(("budget_bytes", "runs"), [(10**9, 1), (0, 2)])
def test_nodes_run_once_where_memory_permits(
    budget_bytes: int, runs: int, chain: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first convolution is in one piece only, unless nothing may be kept."""
    ran: list[str] = []
    original = wavefront.extract

    def extract(*arguments: Any) -> Any:
        part = original(*arguments)
        ran.extend(node.name for node in part.graph)
        return part

    monkeypatch.setattr(wavefront, "extract", extract)
    front = front_of(chain(), images(2), ["r1", "y"], budget_bytes)
    for name in ("r1", "y"):
        list(front.advance([name]))
    assert ran.count("conv1") == runs
    assert ran.count("fc") == 1


@pytest.mark.parametrize("budget_bytes", [0, 20_000, 50_000])
def test_memory_is_bounded(budget_bytes: int, chain: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time no more is alive than two budgets and what one sample makes, of the 20 samples' 300 KB and more.

    Beside that come the samples that are run ahead, which have a bound of their own.
    """
    monkeypatch.setattr(parallel, "AHEAD_BYTES", 0)
    model, x, order = chain(), images(20), ["r1", "r2", "f", "y"]
    with taps(model, [*NAMES, "y"]) as look:
        sample_bytes = sum(array.nbytes for array in look({"x": x[:1]}).values())
    made: list[weakref.ref[Any]] = []
    original = wavefront.run

    def run(*arguments: Any) -> Any:
        found = original(*arguments)
        made.extend(weakref.ref(array) for array in found.values())
        return found

    monkeypatch.setattr(wavefront, "run", run)
    front = front_of(model, x, order, budget_bytes)
    most = 0
    for name in order:
        for values in front.advance([name]):
            assert values[name].size
            alive = [array for reference in made if (array := reference()) is not None]
            most = max(most, sum(array.nbytes for array in alive))
            del alive
    assert len(made) >= len(order) * len(x)
    assert most <= 2 * budget_bytes + sample_bytes


def test_weights_may_change_between_pieces(chain: Any, images: Any) -> None:
    """What changes behind the front counts for the next piece."""
    model, x = chain(), images(2)
    front = front_of(model, x, ["p", "y"])
    list(front.advance(["p"]))
    replace_numbers(model.graph.initializers["w3"], np.zeros((10, 32)))
    bias = model.graph.initializers["b3"].const_value.numpy()
    for values in front.advance(["y"]):
        np.testing.assert_allclose(values["y"][0], bias, rtol=1e-6)


def test_branches_that_read_values_from_outside(channel_model: Any) -> None:
    """An If in a later piece finds what its branches read of an earlier one."""
    branch = {
        name: helper.make_graph(
            [helper.make_node(op, ["r", "k"], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name, op in (("yes", "Add"), ("no", "Mul"))
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("ReduceSum", ["r"], ["s"], name="sum", keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"], name="greater"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch["yes"], else_branch=branch["no"]),
    ]
    model = channel_model(nodes, {"k": np.full(3, 2.0), "zero": np.array(0.0)}, ["n", 3], ["n", 3])
    front = front_of(model, np.array([[1.0, -1.0, 2.0]], np.float32), ["c", "y"])
    assert [bool(values["c"]) for values in front.advance(["c"])] == [True]
    (found,) = (values["y"] for values in front.advance(["y"]))
    np.testing.assert_array_equal(found, [[3.0, 2.0, 4.0]])


def test_inputs_can_be_asked_for(chain: Any, images: Any) -> None:
    """A graph's input is what the feed holds."""
    x = images(2)
    for index, values in enumerate(front_of(chain(), x, ["x"]).advance(["x"])):
        np.testing.assert_array_equal(values["x"], x[index : index + 1])


def test_constants_as_nodes(channel_model: Any) -> None:
    """A constant that several pieces read is in each of them."""
    constant = helper.make_node(
        "Constant", [], ["k"], name="k", value=numpy_helper.from_array(np.full(3, 2, np.float32), "k")
    )
    nodes = [constant, helper.make_node("Add", ["x", "k"], ["a"]), helper.make_node("Mul", ["a", "k"], ["y"])]
    model = channel_model(nodes, {}, ["n", 3], ["n", 3])
    front = front_of(model, np.ones((1, 3), np.float32), ["a", "y"])
    assert [values["a"].tolist() for values in front.advance(["a"])] == [[[3, 3, 3]]]
    assert [values["y"].tolist() for values in front.advance(["y"])] == [[[6, 6, 6]]]
