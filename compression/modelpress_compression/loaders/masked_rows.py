"""Attention rows that see nothing: torch gives zeros for them, and its exporter writes that so that it never happens.

    scores + Where(mask, 0, lowest) -> Softmax -> Where(IsNaN(.), 0, .)

The last Where is for rows whose mask hides everything: their scores should all be -inf, of which Softmax makes NaN.
With the lowest float in its place (onnxscript 0.7) they are all alike instead, and the row becomes the mean of all
values: a model with a sliding window that reads a short text in a long batch then answers otherwise behind its end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array, graph_of, input_of, is_op
from modelpress_compression.model import Model


def hide_whole_rows(model: Model) -> int:
    """Writes -inf for the lowest float where that is meant, in place; how often."""
    editor, changed = Editor(model), 0
    for node in list(model.nodes()):
        if not is_op(node, "Softmax") or not _is_guarded(node.outputs[0]):
            continue
        total = node.inputs[0].producer() if node.inputs[0] is not None else None
        for mask in total.inputs if is_op(total, "Add") else ():
            where = mask.producer() if mask is not None else None
            if not is_op(where, "Where") or where is None:
                continue
            lowest: Any = constant_array(input_of(where, 2))
            if lowest is None or lowest.size != 1 or lowest.dtype.kind != "f" or lowest != np.finfo(lowest.dtype).min:
                continue
            where.replace_input_with(2, editor.constant(graph_of(where), np.full_like(lowest, -np.inf), "hidden"))
            changed += 1
    return changed


def _is_guarded(value: onnx_ir.Value) -> bool:
    """Whether all that reads the value is IsNaN, and a Where that puts zeros in the place of NaN."""
    readers = [user for user, _ in value.uses()]
    tests = [user for user in readers if is_op(user, "IsNaN")]
    guards = [user for user in readers if is_op(user, "Where") and input_of(user, 2) is value]
    if not tests or not guards or len(tests) + len(guards) != len(readers) or value.is_graph_output():
        return False
    found = {test.outputs[0] for test in tests}
    return all(guard.inputs[0] in found and _is_zero(input_of(guard, 1)) for guard in guards)


def _is_zero(value: onnx_ir.Value | None) -> bool:
    array = constant_array(value)
    return array is not None and not array.any()
