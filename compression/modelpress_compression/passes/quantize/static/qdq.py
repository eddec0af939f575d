"""Writes a plan into the graph as QuantizeLinear and DequantizeLinear pairs, the form that onnxruntime turns into int8.

    x -> Q -> DQ -> Conv(., DQ(Wq), DQ(bq)) -> [Relu] -> Q -> DQ -> ...

For TensorRT (`target.DEVICES`: symmetric) activations are int8 without zero points, and b stays in float32.

Wq: 8 bits, a scale per output channel: axis 0 of [out_channels, in_channels / group, ...], the last axis of MatMul's
[K, N]. bq: int32 of scale `x_scale * w_scale`, added to the accumulator as it is; a weight's scale is raised where its
bias would not fit otherwise (a channel of nearly zero weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings import qdq
from modelpress_compression.encodings.weight import StoredWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array, input_of, label, required
from modelpress_compression.passes.quantize.plan import Activation, Plan
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters
from modelpress_compression.passes.quantize.weights import WeightStore

_INT32_ROOM = float(1 << 30)  # half of the accumulator for the bias

Parameters = Mapping[str, ActivationParameters]  # by the name of a plan's activation


@dataclass
class QdqWriter:
    """Writes into a graph that belongs to the caller; weights go through `store`, so that shared ones stay shared.

    `float_biases`: biases stay as they are, as TensorRT wants them.
    """

    editor: Editor
    store: WeightStore
    float_biases: bool = False
    _weights: dict[tuple[object, ...], StoredWeight] = field(default_factory=dict)

    def write(self, plan: Plan, parameters: Parameters) -> None:
        """Puts the pairs on the plan's activations and the weights of its layers."""
        least: dict[onnx_ir.Value, NDArray[np.float64]] = {}
        for node in plan.layers:
            bias = self._bias(node)
            if bias is not None:
                source, x = required(node, 1), parameters[required(node, 0).name or ""]
                least[source] = np.maximum(least.get(source, np.zeros(1)), _least_scale(bias, x))
        for node in plan.layers:
            self.quantize_weights(node, parameters[required(node, 0).name or ""], least.get(required(node, 1)))
        self.write_activations(plan, parameters)

    def write_activations(self, plan: Plan, parameters: Parameters) -> None:
        """Puts the pairs on the plan's activations; weights stay as they are."""
        for activation in plan.activations.values():
            self._insert_pair(plan, activation, parameters[activation.value.name or ""])

    def quantize_weights(
        self, node: onnx_ir.Node, x: ActivationParameters, least: NDArray[np.float64] | None = None
    ) -> None:
        """Replaces weight and bias of a layer by dequantized 8- and 32-bit ones.

        `least`: scales that the weight has at least, where other layers share it; None: it is this layer's alone.
        """
        bias = self._bias(node)
        if least is None and bias is not None:
            least = _least_scale(bias, x)
        stored = self._weight(node, least)
        node.replace_input_with(1, qdq.write(self.editor, node, stored, f"{label(node)}_weight"))
        if bias is None:
            return
        scale = np.asarray(np.float64(x.scale) * stored.weight.scale.astype(np.float64), np.float32)
        node.replace_input_with(2, qdq.write_bias(self.editor, node, bias, scale, f"{label(node)}_bias"))

    def pair(self, graph: onnx_ir.Graph, value: onnx_ir.Value, x: ActivationParameters) -> onnx_ir.Value:
        """QuantizeLinear and DequantizeLinear right behind a value; returns the dequantized value."""
        name = value.name or "activation"
        scale = self.editor.constant(graph, np.asarray(x.scale, np.float32), f"{name}_scale")
        zero_point = self.editor.constant(graph, np.asarray(x.zero_point, x.dtype), f"{name}_zero_point")
        pair = qdq.make_pair(self.editor, value, scale, zero_point)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], pair)
        else:
            graph.insert_after(producer, pair)
        return pair[1].outputs[0]

    def _bias(self, node: onnx_ir.Node) -> NDArray[np.float32] | None:
        constant = constant_array(input_of(node, 2)) if node.op_type != "MatMul" and not self.float_biases else None
        return None if constant is None else np.asarray(constant, np.float32)

    def _weight(self, node: onnx_ir.Node, least: NDArray[np.float64] | None) -> StoredWeight:
        source = required(node, 1)
        quantized = self.store.layer(node, least)
        key = (source, self.store.summation(node), quantized.scale.tobytes())
        if key not in self._weights:
            self._weights[key] = self.store.store(source, quantized)
        return self._weights[key]

    def _insert_pair(self, plan: Plan, activation: Activation, x: ActivationParameters) -> None:
        value = activation.value
        uses = [(user, index) for user, index in value.uses() if plan.reads(activation, user, index)]
        is_output = value.is_graph_output()
        dequantized = self.pair(plan.graph, value, x)
        for user, index in uses:
            user.replace_input_with(index, dequantized)
        if is_output and activation.all_consumers:
            self._become_output(plan.graph, value, dequantized)

    def _become_output(self, graph: onnx_ir.Graph, value: onnx_ir.Value, dequantized: onnx_ir.Value) -> None:
        """The dequantized value takes the output's place and name; the float32 one keeps only its reader."""
        name, dequantized.type, dequantized.shape = value.name, value.type, value.shape
        for position, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[position] = dequantized
        value.name = self.editor.name(f"{name}_float")
        dequantized.name = name


def _least_scale(bias: NDArray[np.float32], x: ActivationParameters) -> NDArray[np.float64]:
    """The scale that a weight needs, by output channel, for the bias to fit into the accumulator."""
    return np.asarray(np.abs(bias.astype(np.float64)) / (np.float64(x.scale) * _INT32_ROOM))
