"""How much each heavy node alone suffers from 8 bits: the signal-to-quantization-noise ratio of its output.

Beside each heavy node of a copy of the model stands a twin that reads the quantized input and weight, and the graph
itself sums the squares: two scalars a node come out of each run, so that no tensor is kept.

    SQNR = 10 log10( sum y^2 / sum (y' - y)^2 )  [dB],   y = op(x, W),   y' = op(QDQ(x), DQ(Wq))
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.affine import ActivationParameters
from modelpress_compression.passes.quantize.edit import Editor, graph_of, label, required
from modelpress_compression.passes.quantize.plan import HEAVY
from modelpress_compression.passes.quantize.qdq import QdqWriter
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.runtime import run, session_of
from modelpress_compression.techniques import QuantizeConfig

SAMPLES = 16


def sqnr_per_node(
    model: Model, parameters: Mapping[str, ActivationParameters], config: QuantizeConfig, context: Context
) -> dict[str, float]:
    """SQNR in dB by the name of the heavy node's output; `parameters` by the same name: those of the node's input."""
    copy = model.clone()
    editor = Editor(copy)
    writer = QdqWriter(editor, WeightStore(editor, config, context.target))
    nodes = {node.outputs[0].name: node for node in copy.graph if node.op_type in HEAVY and not node.domain}
    sums: dict[str, tuple[str, str]] = {}
    outputs: list[onnx_ir.Value] = []
    for name, x in parameters.items():
        signal, noise = _add_twin(nodes[name], x, writer)
        outputs += [signal, noise]
        sums[name] = (signal.name or "", noise.name or "")
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    totals = dict.fromkeys((value.name or "" for value in outputs), 0.0)
    with session_of(copy) as session:
        for feed in context.data.spread(SAMPLES).feeds(batch_size=1):
            context.check_time()
            for name, total in run(session, feed).items():
                totals[name] += float(total)
    return {name: _decibels(totals[signal], totals[noise]) for name, (signal, noise) in sums.items()}


def _add_twin(node: onnx_ir.Node, x: ActivationParameters, writer: QdqWriter) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    editor, name = writer.editor, label(node)
    source = required(node, 0)
    twin = editor.make(node.op_type, [writer.pair(graph_of(node), source, x), *node.inputs[1:]], name)
    twin.attributes.update(node.attributes)
    graph_of(node).insert_before(node, twin)
    writer.quantize_weights(twin, x)
    difference = editor.make("Sub", [twin.outputs[0], node.outputs[0]], name)
    noise = editor.make("ReduceSumSquare", [difference.outputs[0]], f"{name}_noise", attributes={"keepdims": 0})
    signal = editor.make("ReduceSumSquare", [node.outputs[0]], f"{name}_signal", attributes={"keepdims": 0})
    graph_of(node).insert_after(node, [difference, noise, signal])
    for made in (noise, signal):
        made.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        made.outputs[0].shape = onnx_ir.Shape([])
    return signal.outputs[0], noise.outputs[0]


def _decibels(signal: float, noise: float) -> float:
    """Infinite where nothing is lost, minus infinity where the sums are not finite."""
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
