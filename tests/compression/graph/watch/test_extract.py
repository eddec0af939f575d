"""A part of a model is a model: it holds what its outputs need, and answers as the whole does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.graph.watch import taps
from modelpress_compression.graph.watch.extract import extract
from modelpress_compression.runtime import run, session_of

BRANCHING = """
<ir_version: 8, opset_import: ["": 17]>
branching (bool[1] c, float[2] x, float[2] k) => (float[2] y)
<float[1] two = {2}, float[2] k = {5, 5}>
{
  a = Mul(x, two)
  b = Add(x, k)
  y = If (c) <
    then_branch = yes () => (float[2] yes_out) { yes_out = Add(a, k) },
    else_branch = no () => (float[2] no_out) { no_out = Neg(a) }
  >
}
"""


def inputs_of(model: Any) -> list[str]:
    return [value.name for value in model.graph.inputs]


def test_what_is_not_needed_stays_behind(chain: Any) -> None:
    """Nodes behind the outputs and their weights are not in the part."""
    part = extract(chain(), ["r1"])
    assert [node.name for node in part.graph] == ["conv1", "relu1"]
    assert list(part.graph.initializers) == ["w1"]
    assert inputs_of(part) == ["x"]
    assert [value.name for value in part.graph.outputs] == ["r1"]


def test_from_these_values_to_those(chain: Any, images: Any) -> None:
    """Cut at r1, the rest makes of r1 what the whole makes of x (atol 1e-5)."""
    model, x = chain(), images(2)
    part = extract(model, ["p", "y"], ["r1"])
    assert inputs_of(part) == ["r1"]
    assert part.graph[0].name == "conv2"
    with taps(model, ["r1", "p", "y"]) as look, session_of(part) as session:
        whole = look({"x": x})
        found = run(session, {"r1": whole["r1"]})
    for name in ("p", "y"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=1e-5)


def test_the_model_stays_as_it_was(chain: Any) -> None:
    """The part shares tensors with the model, and nothing else."""
    model = chain()
    part = extract(model, ["c1"])
    assert part.graph.initializers["w1"].const_value is model.graph.initializers["w1"].const_value
    assert len(list(model.graph)) == 7
    assert model.graph[0].outputs[0].shape is not None
    assert part.graph[0].outputs[0].shape is None


def test_branches_bring_what_they_capture(model_from_text: Any) -> None:
    """What only a branch reads is part of it; a default that a caller may override can be, and need not be, given."""
    part = extract(model_from_text(BRANCHING), ["y"])
    assert [node.op_type for node in part.graph] == ["Mul", "If"]
    assert sorted(inputs_of(part)) == ["c", "k", "x"]
    feeds = {"c": np.array([True]), "x": np.ones(2, np.float32)}
    with session_of(part) as session:
        np.testing.assert_array_equal(run(session, feeds)["y"], [7, 7])


def test_a_name_that_no_node_makes(chain: Any) -> None:
    """Neither an input nor an unknown name can be an output of a part."""
    with pytest.raises(KeyError, match="'x'"):
        extract(chain(), ["x"])
