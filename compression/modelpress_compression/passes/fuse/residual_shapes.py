"""Keeps onnxruntime from a fusion that is slower: Add and LayerNormalization into SkipLayerNormalization.

onnxruntime fuses the two when it loads a model if it knows the shapes of both summands. On CPU its fused kernel is the
slower one: a sentence encoder of six layers takes 0.93 of the time with that fusion disabled, and 0.90 together with
the other rewrites of the group (onnxruntime 1.31, one thread, 128 tokens; 1.09 when shapes are written into a file
that had none). Shapes of computed values are hints that nothing depends on, so models with such sums are written
without them; where onnxruntime infers them all the same, it fuses as before.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.graph.read import is_op


def forget_residual_shapes(model: onnx_ir.Model) -> int:
    """Drops the shapes of all computed values, in place, if sums are normalized anywhere; how many such sums there are.

    All of them: from any one that is left, onnxruntime infers those of the sums.
    """
    count = sum(_normalizes_a_sum(node) for node in model.graph.all_nodes())
    for node in model.graph.all_nodes() if count else ():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    return count


def _normalizes_a_sum(node: onnx_ir.Node) -> bool:
    """LayerNormalization of a sum, or a sum minus its mean, as normalization begins where it is written out."""
    source = node.inputs[0] if is_op(node, "LayerNormalization", "Sub") else None
    if source is None or not is_op(source.producer(), "Add"):
        return False
    mean = node.inputs[1].producer() if node.op_type == "Sub" and node.inputs[1] is not None else None
    return node.op_type == "LayerNormalization" or (
        mean is not None and is_op(mean, "ReduceMean") and mean.inputs[0] is source
    )
