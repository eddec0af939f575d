"""What exporters write beside the graph for debugging: Python stack traces, module paths, doc strings.

It can be a third of a small model, and it tells the paths of the machine that exported it. The model's own metadata
(`metadata_props` of the whole model: vocabularies, class names) is the user's and stays.
"""

from __future__ import annotations

import onnx_ir


def clear_debug_metadata(ir: onnx_ir.Model) -> int:
    """Removes it in place from graphs, nodes and values; returns how many nodes had some."""
    cleared = 0
    for graph in (ir.graph, *ir.graph.subgraphs()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            _clear_value(value)
        for node in graph:
            if node.metadata_props or node.doc_string:
                cleared += 1
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                _clear_value(value)
    return cleared


def _clear_value(value: onnx_ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
