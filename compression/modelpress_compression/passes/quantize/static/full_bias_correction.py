"""Bias correction in the order of the layers: each takes back what is left of all errors before it, its own included.

    b' = b - E[ y^ - y ]        per output channel, over the data

y^: the layer's output in the quantized model, whose earlier layers have their corrected biases already; y: in the float
model (Nagel et al., arXiv:1906.04721, section 4.2; NNCF calls it full bias correction). Means of the outputs are right
then, where `bias_correction` by itself makes each layer right for inputs that it will not get.

Behind each layer of a copy lies an Add of a constant, zero at first. When the layer's outputs have been seen that gets
its correction, and what comes next runs with it: one run over the data for all layers (see `Wavefront`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, replace_numbers
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.read import graph_of, label
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.bias_correction import (
    MAX_SAMPLES,
    Shifts,
    can_shift,
    channel_axis,
    summed_difference,
)
from modelpress_compression.passes.quantize.static.qdq import Parameters, QdqWriter

MAX_KEPT_BYTES = 256 * 1024**2  # 256 MiB of activations, of each of the two models


def full_shifts(setup: QuantizationSetup, parameters: Parameters) -> Shifts:
    """The mean error that is left at each output channel of the plan's layers that have a bias, or can have one.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    copy = setup.model.clone()
    editor = Editor(copy)
    plan, store = setup.plan.on(copy.graph), setup.weight_store(editor)
    rounded = {layer: store.layer(layer).dequantize() for layer in plan.layers}
    plain_names = {layer: layer.outputs[0].name or "" for layer in plan.layers}  # an output of the graph gets another
    QdqWriter(editor, store).write_activations(plan, parameters)
    for layer, numbers in rounded.items():
        layer.replace_input_with(1, editor.constant(copy.graph, numbers, f"{label(layer)}_rounded"))
    layers = [layer for layer in plan.layers if can_shift(layer)]
    corrections = {layer: _add_correction(layer, numbers.shape, editor) for layer, numbers in rounded.items()}
    names = [(layer.outputs[0].name or "", plain_names[layer]) for layer in layers]
    samples = setup.context.data.spread(MAX_SAMPLES)
    mine, theirs = (
        Wavefront(model, samples, [pair[place] for pair in names], MAX_KEPT_BYTES, setup.context.check_time)
        for place, model in enumerate((copy, setup.model))
    )
    found: dict[str, NDArray[np.float64]] = {}
    for layer, (own_name, name) in zip(layers, names, strict=True):
        total: NDArray[np.float64] | float = 0.0
        count, axis = 0, channel_axis(layer)
        for feed, own, plain in zip(samples.feeds(1), mine.advance([own_name]), theirs.advance([name]), strict=True):
            mask = counted_positions(feed)
            pair = without_padding(own[own_name], mask), without_padding(plain[name], mask)
            shift, positions = summed_difference(*pair, axis)
            total, count = total + shift, count + positions
        shift = np.asarray(total) / max(count, 1)
        if count and np.isfinite(shift).all():
            found[name] = shift
            correction = corrections[layer]
            shape = correction.shape
            replace_numbers(correction, (-shift).astype(np.float32).reshape(shape.numpy() if shape is not None else -1))
    return found


def _add_correction(layer: onnx_ir.Node, weight: tuple[int, ...], editor: Editor) -> onnx_ir.Value:
    """The constant that is added to the layer's output from now on."""
    output = layer.outputs[0]
    channels = weight[0] if layer.op_type == "Conv" else _columns(layer, weight)
    shape = (1, channels, *(1 for _ in weight[2:])) if layer.op_type == "Conv" else (channels,)
    correction = editor.constant(graph_of(layer), np.zeros(shape, np.float32), f"{label(layer)}_correction")
    if not output.is_graph_output():
        add = editor.make("Add", [output, correction], f"{label(layer)}_corrected")
        output.replace_all_uses_with(add.outputs[0])
        add.replace_input_with(0, output)
        graph_of(layer).insert_after(layer, add)
    return correction


def _columns(layer: onnx_ir.Node, weight: tuple[int, ...]) -> int:
    transposed = "transB" in layer.attributes and bool(layer.attributes["transB"].value)
    return weight[0] if layer.op_type == "Gemm" and transposed else weight[-1]
