"""Values that may not be in 8 bits, for what onnxruntime would make of the nodes behind them.

onnxruntime puts an operator between DequantizeLinear and QuantizeLinear into 8 bits, whether it is in the plan or not,
and moves DequantizeLinear and the Transposes of convolutions through what follows. Seen with version 1.31:

1. AveragePool with dilations, which QLinearAveragePool does not know: the file does not open. One that counts padding
   under ceil_mode gets other answers.
2. Resize and Pad along some axes, behind a Conv, through whatever a Transpose can be moved: scales, sizes and pads are
   reordered as if there was one for every axis. The file does not open, or fails when it runs.
3. An If or Loop that reads what only moves a value about: the process is aborted.

`plain_forms` rewrites what it can of 1 and 2 before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir

from modelpress_compression.graph.read import is_op
from modelpress_compression.passes.quantize.plain_forms import axes_in_part, has_8_bit_pooling

# Behind these onnxruntime moves a DequantizeLinear (qdq_propagation.cc).
_DEQUANTIZED_BEHIND = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
# Before these no Transpose is moved.
_OPAQUE = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def dead_ends(graph: onnx_ir.Graph) -> Mapping[onnx_ir.Value, str]:
    """The values of one graph that may not be in 8 bits, each with the reason."""
    found: dict[onnx_ir.Value, str] = {}
    for node in graph:
        if is_op(node, "AveragePool") and not has_8_bit_pooling(node):
            reason = "onnxruntime has no right form in 8 bits of the AveragePool that reads it"
            found.update((value, reason) for value, _ in _moved_from(node.inputs[0]))
        elif is_op(node, "Resize", "Pad") and axes_in_part(node) is not None:
            reason = f"onnxruntime would reorder the axes of the {node.op_type} behind it, and cannot"
            found.update(dict.fromkeys(_before(node), reason))
        for output in node.outputs:
            if any(user.graph is not graph for user in output.consumers()):
                reason = "a subgraph reads what only moves its output about, and onnxruntime cannot open that in 8 bits"
                found.update((value, reason) for value, moved in _moved_from(output) if moved)
    return found


def _moved_from(value: onnx_ir.Value | None) -> Iterator[tuple[onnx_ir.Value, bool]]:
    """The value and those of which it is made by moving alone; with whether there was more than an Identity."""
    moved = False
    while value is not None:
        yield value, moved
        producer = value.producer()
        if not is_op(producer, *_DEQUANTIZED_BEHIND, "Identity") or producer.outputs[0] is not value:
            return
        moved = moved or producer.op_type != "Identity"
        value = producer.inputs[0]


def _before(node: onnx_ir.Node) -> set[onnx_ir.Value]:
    """What it is computed of, back to the layers and with what these write."""
    found: set[onnx_ir.Value] = set()
    frontier = [node.inputs[0]]
    while frontier:
        value = frontier.pop()
        if value is None or value in found:
            continue
        found.add(value)
        producer = value.producer()
        if producer is not None and not is_op(producer, *_OPAQUE):
            frontier.extend(producer.inputs)
    return found
