"""`as_strided` as torch's exporter writes it, back to a Reshape.

    x -> Reshape [-1] -> Gather (the constant places 0, 1, 2, ... in the shape of the result)

With fixed extents it writes the end of a network so that pools its image (torch 2.13, decompositions of mean and
adaptive pooling for channels last). A Gather from a flat view hides from everything downstream which axis is which.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array, extent, int_attribute, is_op, rank, required
from modelpress_compression.model import Model


def reshape_strided_views(model: Model) -> int:
    """Rewrites in place; how many there were."""
    found = [node for node in model.nodes() if _is_view(node)]
    editor = Editor(model) if found else None
    for node in found:
        if editor is None:
            break
        places = required(node, 1)
        shape = editor.constant(editor.ir.graph, np.asarray(places.shape, np.int64), f"{places.name}_shape")
        flat = required(node, 0).producer()
        source = required(flat, 0) if flat is not None else required(node, 0)
        editor.replace(node, [node], [editor.make_like(node, "Reshape", [source, shape])])
    return len(found)


def _is_view(node: onnx_ir.Node) -> bool:
    """Whether the node takes every element of a flat view, one after the other."""
    if not is_op(node, "Gather") or int_attribute(node, "axis", 0) != 0:
        return False
    flat = required(node, 0)
    if not is_op(flat.producer(), "Reshape") or rank(flat) != 1:
        return False
    places = constant_array(required(node, 1))
    size = extent(flat, 0)
    return places is not None and places.size == size and bool(np.array_equal(places.reshape(-1), np.arange(size)))
