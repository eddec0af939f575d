"""Bias correction: rounding shifts the mean of a layer's outputs; the bias takes the shift back.

    b' = b - E[ op(Q(x), Q(W)) - op(x, W) ]        per output channel, over the data

Both sides read the float model's activations, so that each layer answers for its own error alone and one run over the
data serves all (the empirical form of Nagel et al., arXiv:1906.04721, section 4.2, without its order of layers, which
`full_bias_correction` keeps).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.products import added_bias
from modelpress_compression.graph.edit import Editor, set_input
from modelpress_compression.graph.read import constant_array, graph_of, input_of, is_constant, label
from modelpress_compression.graph.watch import stream
from modelpress_compression.graph.watch.portions import portions
from modelpress_compression.inputs import Array
from modelpress_compression.passes.quantize.plan import Plan
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.qdq import Parameters, QdqWriter

MAX_SAMPLES = 32  # each has many positions in most layers

Shifts = Mapping[str, NDArray[np.float64]]  # [channels], by the name of the layer's output


def mean_shifts(setup: QuantizationSetup, parameters: Parameters) -> Shifts:
    """The mean error of each output channel of the plan's layers that have a bias, or can have one.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    copy = setup.model.clone()
    editor = Editor(copy)
    writer = QdqWriter(editor, setup.weight_store(editor))
    twins = {
        node.outputs[0].name or "": (_add_twin(node, parameters, writer), channel_axis(node))
        for node in setup.plan.on(copy.graph).layers
        if can_shift(node)
    }
    sums = {name: (np.zeros(1), 0) for name in twins}
    pairs = [(name, twin.name or "") for name, (twin, _) in twins.items()]
    samples = setup.context.data.spread(MAX_SAMPLES)
    for part in portions(copy, pairs, samples):
        together = [pairs[place] for place in part]
        names = [name for pair in together for name in pair]
        for tensors in stream(copy, names, samples, setup.context.check_time, padding=False):
            for name, twin in together:
                changed, plain = (channel_sums(tensors[one], twins[name][1]) for one in (twin, name))
                total, count = sums[name]
                sums[name] = (total + (changed[0] - plain[0]), count + plain[1])
    return {name: total / count for name, (total, count) in sums.items() if count and np.isfinite(total).all()}


def correct(plan: Plan, shifts: Shifts, editor: Editor) -> int:
    """Takes the shifts out of the biases of a float graph that is about to be quantized; returns of how many nodes."""
    found = [(node, shifts[node.outputs[0].name or ""]) for node in plan.layers if node.outputs[0].name in shifts]
    for node, shift in found:
        _subtract(node, shift, editor)
    return len(found)


def _add_twin(node: onnx_ir.Node, parameters: Parameters, writer: QdqWriter) -> onnx_ir.Value:
    """The output of a copy of the node, before it in its graph, that reads input and weight in 8 bits."""
    source = node.inputs[0]
    if source is None:
        raise ValueError(f"Node {label(node)!r} has no input.")
    x = parameters[source.name or ""]
    twin = writer.editor.make(node.op_type, [writer.pair(graph_of(node), source, x), *node.inputs[1:]], label(node))
    twin.attributes.update(node.attributes)
    graph_of(node).insert_before(node, twin)
    writer.quantize_weights(twin, x)
    return twin.outputs[0]


def channel_axis(node: onnx_ir.Node) -> int:
    """Of a layer's output."""
    return 1 if node.op_type == "Conv" else -1


def channel_sums(values: Array, axis: int) -> tuple[NDArray[np.float64], int]:
    """The sum over the positions of each channel, [channels], and how many positions there are."""
    others = tuple(np.delete(np.arange(values.ndim), axis).tolist())
    return values.sum(axis=others, dtype=np.float64), values.size // max(values.shape[axis], 1)


def can_shift(node: onnx_ir.Node) -> bool:
    """Whether a layer has a bias, or can have one."""
    if node.op_type == "MatMul":
        return added_bias(node) is not None
    bias = input_of(node, 2)
    return bias is None or is_constant(bias)


def _subtract(node: onnx_ir.Node, shift: NDArray[np.float64], editor: Editor) -> None:
    user, index = node, 2
    if node.op_type == "MatMul":
        found = added_bias(node)
        if found is None:
            return
        user, index = found
    old = constant_array(input_of(user, index))
    bias = (-shift if old is None else np.asarray(old, np.float64) - shift).astype(np.float32)
    value = editor.constant(graph_of(user), bias, f"{label(node)}_bias_corrected")
    set_input(user, index, value)
