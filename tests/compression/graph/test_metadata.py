"""Debugging leftovers of exporters."""

import onnx_ir as ir
from modelpress_compression.graph.metadata import clear_debug_metadata


def test_traces_go_and_the_users_metadata_stays() -> None:
    """Nodes and values lose what exporters wrote there; the model keeps its own entries. A second run finds nothing."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Relu", [x], name="relu")
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File '/home/me/model.py'"
    node.outputs[0].name, node.outputs[0].doc_string = "y", "from /home/me"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10, metadata_props={"classes": "cat,dog"})
    assert clear_debug_metadata(model) == 1
    assert "/home/me" not in str(ir.to_proto(model))
    assert model.metadata_props == {"classes": "cat,dog"}
    assert clear_debug_metadata(model) == 0
