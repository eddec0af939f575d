"""QDrop (Wei et al., arXiv:2203.05740): while weights learn their rounding, activations are quantized at random only.

    x  ->  Where(RandomUniformLike(x) < THRESHOLD, DequantizeLinear(QuantizeLinear(x)), x)

for every activation of a block, element by element. THRESHOLD 1: all are, as the finished model has it; 0.5: half of
them. What is learned with it lies on flatter ground, and holds on samples that were not seen.
"""

from __future__ import annotations

import numpy as np

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import graph_of, is_op, required
from modelpress_compression.model import Model

THRESHOLD = "modelpress_drop_threshold"


def add_dropping(model: Model) -> str:
    """Puts the choice behind every pair of quantization in the main graph, in place; returns the name of the constant
    that says how many."""
    editor = Editor(model)
    threshold = editor.constant(model.graph, np.asarray(1.0, np.float32), THRESHOLD)
    for node in list(model.graph):
        quantizer = required(node, 0).producer() if is_op(node, "DequantizeLinear") else None
        if quantizer is None or not is_op(quantizer, "QuantizeLinear"):
            continue
        x, quantized = required(quantizer, 0), node.outputs[0]
        chance = editor.make("RandomUniformLike", [x], "drop")
        kept = editor.make("Less", [chance.outputs[0], threshold], "drop")
        chosen = editor.make("Where", [kept.outputs[0], x, x], "drop")
        editor.hand_over(quantized, chosen.outputs[0])
        quantized.name = editor.name("drop_quantized")
        chosen.replace_input_with(1, quantized)
        graph_of(node).insert_after(node, [chance, kept, chosen])
    return threshold.name or THRESHOLD
