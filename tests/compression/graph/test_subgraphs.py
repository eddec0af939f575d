"""What a node reads with its subgraphs, and which nodes some outputs need."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir
import pytest
from modelpress_compression.graph.read import graph_of
from modelpress_compression.graph.subgraphs import captured_values, needed_nodes, read_values, subgraphs

# `w`, `i` and `j` belong to a branch. The fixture takes the Identity nodes away: `a` and `b` are handed out directly.
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (bool[1] c, float[2] x) => (float[2] y) {
  a = Relu(x)
  b = Neg(x)
  unused = Abs(x)
  y = If (c) <
    then_branch = yes () => (float[2] yes_out) <float[2] w = {1, 2}> {
      i = Add(x, w)
      j = If (c) <
        then_branch = inner_yes () => (float[2] same_a) { same_a = Identity(a) },
        else_branch = inner_no () => (float[2] inner_no_out) { inner_no_out = Neg(i) }
      >
      yes_out = Mul(i, j)
    },
    else_branch = no () => (float[2] same_b) { same_b = Identity(b) }
  >
}
"""


@pytest.fixture
def graph() -> onnx_ir.Graph:
    graph = onnx_ir.from_proto(onnx.parser.parse_model(TEXT)).graph
    for node in [node for node in graph.all_nodes() if node.op_type == "Identity"]:
        branch, source = graph_of(node), node.inputs[0]
        assert source is not None
        branch.outputs[0] = source
        branch.remove(node, safe=True)
    return graph


@pytest.fixture
def branching(graph: onnx_ir.Graph) -> onnx_ir.Node:
    return graph[-1]


def names(values: tuple[onnx_ir.Value, ...]) -> list[str]:
    return [value.name or "" for value in values]


def test_subgraphs_by_attribute(branching: onnx_ir.Node, graph: onnx_ir.Graph) -> None:
    """Each subgraph under the name of its attribute; other nodes have none."""
    assert {key: found.name for key, found in subgraphs(branching).items()} == {
        "then_branch": "yes",
        "else_branch": "no",
    }
    assert subgraphs(graph[0]) == {}


def test_what_branches_hand_out_is_captured(branching: onnx_ir.Node) -> None:
    """Outer values that a branch returns without a node count, at any depth; a branch's own values do not."""
    assert sorted(names(captured_values(branching))) == ["a", "b", "c", "x"]


def test_read_values_come_once_and_include_inner_ones(branching: onnx_ir.Node, graph: onnx_ir.Graph) -> None:
    """The inputs first, then everything that is read inside, weights of a branch included."""
    found = names(read_values(branching))
    assert found[0] == "c"
    assert sorted(found) == sorted({"c", "a", "b", "x", "w", "i", "j", "yes_out", "inner_no_out"})
    assert names(read_values(graph[0])) == ["x"]


def test_needed_nodes_follow_captured_values(graph: onnx_ir.Graph) -> None:
    """What a branch hands out is needed; what nobody reads is not; what is given ends the search."""
    outputs = list(graph.outputs)
    assert [node.op_type for node in needed_nodes(graph, (), outputs)] == ["Relu", "Neg", "If"]
    given = graph[0].outputs[0]
    assert [node.op_type for node in needed_nodes(graph, (given,), outputs)] == ["Neg", "If"]
