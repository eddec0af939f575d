"""Bias correction in the order of the layers: each takes back what is left of all errors before it, its own included.

    b' = b - E[ y^ - y ]        per output channel, over the data

y^: the layer's output in the quantized model, whose earlier layers have their corrected biases already; y: in the float
model (Nagel et al., arXiv:1906.04721, section 4.2; NNCF calls it full bias correction). Means of the outputs are right
then, where `bias_correction` by itself makes each layer right for inputs that it will not get.

Behind each layer of a copy lies an Add of a constant, zero at first. When the layer's outputs have been seen that gets
its correction, and what comes next runs with it: one run over the data for all layers (see `Wavefront`). What the
float model makes does not depend on any of this, so that its sums are taken before, and one model runs at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, replace_numbers
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.read import graph_of, label, required
from modelpress_compression.graph.shapes import shape_of
from modelpress_compression.graph.watch import stream
from modelpress_compression.graph.watch.portions import portions
from modelpress_compression.graph.watch.wavefront import Wavefront
from modelpress_compression.inputs import InputData
from modelpress_compression.mapped import WeightFile
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.bias_correction import (
    MAX_SAMPLES,
    Shifts,
    can_shift,
    channel_axis,
    channel_sums,
)
from modelpress_compression.passes.quantize.static.qdq import Parameters, QdqWriter

MAX_KEPT_BYTES = 256 * 1024**2  # 256 MiB of the quantized model's activations


def full_shifts(setup: QuantizationSetup, parameters: Parameters) -> Shifts:
    """The mean error that is left at each output channel of the plan's layers that have a bias, or can have one.

    The rounded weights of a large model lie in a file meanwhile. Raises ModelNotRunnableError, TimeLimitError.
    """
    samples = setup.context.data.spread(MAX_SAMPLES)
    axes = {layer.outputs[0].name or "": channel_axis(layer) for layer in setup.plan.layers if can_shift(layer)}
    expected = _means(setup, axes, samples)
    with TemporaryDirectory(dir=setup.context.work_directory, prefix="shifts-") as folder:
        copy = setup.model.clone()
        editor = Editor(copy, WeightFile.for_large(copy.weight_bytes(), Path(folder)))
        corrected = _quantized(copy, setup, parameters, editor)
        names = [layer.outputs[0].name or "" for layer, _ in corrected.values()]
        front = Wavefront(copy, samples, names, MAX_KEPT_BYTES, setup.context.check_time)
        found: dict[str, NDArray[np.float64]] = {}
        for name, (layer, correction) in corrected.items():
            shift = _mean(front, layer, samples) - expected[name]
            if np.isfinite(shift).all():
                found[name] = shift
                shape = correction.shape
                numbers = (-shift).astype(np.float32).reshape(shape.numpy() if shape is not None else -1)
                replace_numbers(correction, numbers)
        return found


def _means(setup: QuantizationSetup, axes: Mapping[str, int], samples: InputData) -> Mapping[str, NDArray[np.float64]]:
    """The mean of each channel of these values, by their names, in the float model; `axes`: of the channels."""
    found = {name: (np.zeros(1), 0) for name in axes}
    names = list(axes)
    for part in portions(setup.model, [(name,) for name in names], samples):
        together = [names[place] for place in part]
        for tensors in stream(setup.model, together, samples, setup.context.check_time, padding=False):
            for name in together:
                found[name] = _added(found[name], channel_sums(tensors[name], axes[name]))
    return {name: total / max(count, 1) for name, (total, count) in found.items()}


def _quantized(
    copy: Model, setup: QuantizationSetup, parameters: Parameters, editor: Editor
) -> dict[str, tuple[onnx_ir.Node, onnx_ir.Value]]:
    """Makes the copy a quantized model that computes in float32. By the name of the float layer's output, the layer and
    the constant that corrects it."""
    plan, store = setup.plan.on(copy.graph), setup.weight_store(editor)
    names = {layer: layer.outputs[0].name or "" for layer in plan.layers}  # an output of the graph gets another
    rounded = {
        layer: editor.constant(copy.graph, store.layer(layer).dequantize(), f"{label(layer)}_rounded")
        for layer in plan.layers
    }
    QdqWriter(editor, store).write_activations(plan, parameters)
    for layer, weight in rounded.items():
        layer.replace_input_with(1, weight)
    return {names[layer]: (layer, _add_correction(layer, editor)) for layer in plan.layers if can_shift(layer)}


def _mean(front: Wavefront, layer: onnx_ir.Node, samples: InputData) -> NDArray[np.float64]:
    """The mean of each channel of the layer's output; NaN where there are no positions."""
    name, found = layer.outputs[0].name or "", (np.zeros(1), 0)
    for feed, values in zip(samples.feeds(1), front.advance([name]), strict=True):
        counted = without_padding(values[name], counted_positions(feed))
        found = _added(found, channel_sums(counted, channel_axis(layer)))
    total, count = found
    return total / count if count else np.full(total.shape, np.nan)


def _added(
    one: tuple[NDArray[np.float64], int], other: tuple[NDArray[np.float64], int]
) -> tuple[NDArray[np.float64], int]:
    return one[0] + other[0], one[1] + other[1]


def _add_correction(layer: onnx_ir.Node, editor: Editor) -> onnx_ir.Value:
    """The constant that is added to the layer's output from now on."""
    output = layer.outputs[0]
    weight = shape_of(required(layer, 1)) or ()
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
