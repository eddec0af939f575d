"""One model in which any one activation or weight can be in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from modelpress_compression.graph.edit import Editor, replace_numbers
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import make_plan
from modelpress_compression.passes.quantize.ranges.switches import Switches, add_switches
from modelpress_compression.passes.quantize.rounding.affine import Range, activation_parameters
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.runtime import run, session_of
from modelpress_compression.target import Target


def store_of(model: Model) -> WeightStore:
    return WeightStore(Editor(model), QuantizeConfig(scheme="static"), NearestRounder(), Target())


def switched(model: Model) -> tuple[Model, Switches]:
    """A copy of `mlp` with switches at its two plain products."""
    copy = model.clone()
    plan = make_plan(copy.graph, [node for node in copy.graph if node.op_type == "MatMul"])
    return copy, add_switches(plan, store_of(copy))


def answer(model: Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    with session_of(model) as session:
        return run(session, feeds)


@pytest.fixture
def x(vectors: Mapping[str, Array]) -> Array:
    return np.asarray(vectors["x"][:1])


def test_nothing_selected_is_the_float_model(mlp: Model, x: Array) -> None:
    """The same outputs under the same names (atol 1e-6), and the extremes of what the products read (exactly)."""
    model, switches = switched(mlp)
    found = answer(model, {"x": x, **switches.feed()})
    np.testing.assert_allclose(found["y"], answer(mlp, {"x": x})["y"], atol=1e-6)
    assert set(switches.weights) == {"m1", "m2"}
    assert {"x", "t1"} <= set(switches.activations)
    low, high = switches.extremes["x"]
    assert (float(found[low]), float(found[high])) == (float(x.min()), float(x.max()))


def test_a_selected_activation_is_rounded(mlp: Model, x: Array) -> None:
    """With x selected, the model answers as it does to an x that was rounded by hand (atol 1e-5)."""
    model, switches = switched(mlp)
    parameters = activation_parameters(Range(-1.0, 2.0), "uint8")
    found = answer(model, {"x": x, **switches.feed(switches.activations["x"], parameters)})
    by_hand = answer(mlp, {"x": parameters.fake_quantize(x).astype(np.float32)})
    np.testing.assert_allclose(found["y"], by_hand["y"], atol=1e-5)
    assert not np.allclose(found["y"], answer(mlp, {"x": x})["y"], atol=1e-2)


@pytest.mark.parametrize("name", ["m1", "m2"])
def test_a_selected_weight_is_rounded(name: str, mlp: Model, x: Array) -> None:
    """With a weight selected, the model answers as it does with that weight rounded, and no other (atol 1e-5)."""
    model, switches = switched(mlp)
    by_hand = mlp.clone()
    node = next(node for node in by_hand.graph if node.outputs[0].name == name)
    assert node.inputs[1] is not None
    replace_numbers(node.inputs[1], store_of(by_hand).layer(node).dequantize())
    found = answer(model, {"x": x, **switches.feed(switches.weights[name])})
    np.testing.assert_allclose(found["y"], answer(by_hand, {"x": x})["y"], atol=1e-5)
    assert not np.array_equal(found["y"], answer(model, {"x": x, **switches.feed()})["y"])


BRANCHING = """
<ir_version: 9, opset_import: ["": 17]>
branching (float[n, 8, 6, 6] x, bool[1] c) => (float[n, 8, 6, 6] s, float[n, 8, 6, 6] y)
{
  a = Conv <pads: ints = [1, 1, 1, 1]> (x, w)
  s = Add (a, a)
  r = Conv <pads: ints = [1, 1, 1, 1]> (s, w)
  y = If (c) <
    then_branch = yes () => (float[n, 8, 6, 6] yes_out) { yes_out = Add (s, r) },
    else_branch = no () => (float[n, 8, 6, 6] no_out) { no_out = Neg (s) }
  >
}
"""


def test_readers_in_branches_see_the_switched_activation(model_from_text: Callable[..., Model]) -> None:
    """What nothing holds in float32 is rounded for a reader inside an If and as an output of the graph, too."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 8, 6, 6)).astype(np.float32)
    model = model_from_text(BRANCHING, {"w": weight})
    plan = make_plan(model.graph, [node for node in model.graph if node.op_type == "Conv"])
    switches = add_switches(plan, store_of(model))
    parameters = activation_parameters(Range(-4.0, 4.0), "uint8")
    feeds = {"x": x, "c": np.asarray([False])}
    plain = answer(model, {**feeds, **switches.feed()})
    found = answer(model, {**feeds, **switches.feed(switches.activations["s"], parameters)})
    # A sum half way between two steps may fall to either side: its last bit differs between kernels.
    step = float(parameters.scale)
    np.testing.assert_allclose(found["s"], parameters.fake_quantize(plain["s"]), atol=1.01 * step)
    assert np.abs(found["s"]).max() <= 4.0 + step
    np.testing.assert_array_equal(found["y"], -found["s"])
