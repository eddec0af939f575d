"""The fixed-point network as ONNX files.

    plain    operators of ONNX alone: onnxruntime computes what the hardware does. Behind it stands what the host does
    qonnx    `Quant` nodes of qonnx.custom_op.general, which FINN and hls4ml read; weights are those of the hardware

Layers are rounded by adding half a step and cutting off (FLOOR): the half is part of the bias. The input is rounded to
even (ROUND). Reference: QONNX, arXiv 2206.07527, and the node's definition in the qonnx package.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelpress_compression.backends.fpga.emulator import (
    Design,
    fraction_of_values,
    mean_factor,
    mean_fraction,
    sum_bits,
)
from modelpress_compression.backends.fpga.formats import Fixed, Reals
from modelpress_compression.backends.fpga.network import (
    Add,
    Layer,
    Linear,
    Network,
    Pool,
    Relu,
    Transpose,
)

QUANT_DOMAIN = "qonnx.custom_op.general"
OPSET, IR_VERSION = 17, 8
# What float32 holds of an integer: sums of more bits may be rounded in the plain form.
FLOAT32_BITS = 24


def plain_onnx(network: Network, design: Design, output: str) -> onnx.ModelProto:
    """With the `output` name of the original."""
    return _Writer(network, design, quant_nodes=False).write(output, host=True)


def qonnx(network: Network, design: Design, output: str) -> onnx.ModelProto:
    """As `plain_onnx`; it ends where the hardware does."""
    return _Writer(network, design, quant_nodes=True).write(output, host=False)


class _Writer:
    def __init__(self, network: Network, design: Design, *, quant_nodes: bool) -> None:
        self._network, self._design, self._quant_nodes = network, design, quant_nodes
        self._fractions = fraction_of_values(network, design)
        self._bits = sum_bits(network, design)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def write(self, output: str, *, host: bool) -> onnx.ModelProto:
        network = self._network
        names = {network.input: self._rounded(network.input, network.input, given=True)}
        for layer in network.layers:
            names[layer.output] = self._layer(layer, [names[name] for name in layer.inputs])
        last = names[network.output]
        for place, (operator, attributes) in enumerate(network.host if host else ()):
            last = self._node(operator, [last], f"host_{place}", **attributes)
        self._end(last, output)
        # FINN and hls4ml know one sample at a time.
        batch = 1 if self._quant_nodes else "batch"
        given = helper.make_tensor_value_info(network.input, TensorProto.FLOAT, [batch, *network.input_shape])
        made = helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, *network.shape_of(network.output)])
        graph = helper.make_graph(self._nodes, "fixed_point", [given], [made], self._weights)
        opsets = [helper.make_opsetid("", OPSET)]
        if self._quant_nodes:
            opsets.append(helper.make_opsetid(QUANT_DOMAIN, 1))
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="modelpress")
        onnx.checker.check_model(proto)
        return proto

    def _end(self, last: str, output: str) -> None:
        """The value `last` becomes the model's output; hls4ml takes no Identity for one."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == last:
                        names[place] = output

    def _layer(self, layer: Layer, sources: list[str]) -> str:
        operation, name = layer.operation, layer.output
        if isinstance(operation, Linear):
            result = self._linear(layer, operation, sources[0])
        elif isinstance(operation, Pool):
            result = self._pool(layer, operation, sources[0])
        elif isinstance(operation, Add):
            result = self._node("Add", sources, f"{name}_sum")
        elif isinstance(operation, Relu):
            return self._rectified(f"{name}_relu", sources[0], operation.ceiling_at(self._fractions[layer.output]))
        elif isinstance(operation, Transpose):
            return self._node("Transpose", sources, f"{name}_t", perm=[0, *(axis + 1 for axis in operation.axes)])
        else:
            shape = self._constant(f"{name}_shape", np.array([-1, *layer.shape], np.int64))
            return self._node("Reshape", [*sources, shape], f"{name}_reshaped")
        if not layer.rounds:
            return result
        if not isinstance(operation, Linear):
            half = self._constant(f"{name}_half", _float32(self._half(layer)))
            result = self._node("Add", [result, half], f"{name}_raised")
        return self._rounded(name, result, relu=layer.relu, ceiling=self._design.ceiling(layer))

    def _linear(self, layer: Layer, operation: Linear, source: str) -> str:
        fraction = self._fractions[layer.inputs[0]]
        form = self._design.weights[layer.name]
        weight = self._design.rounded_weight(layer, operation)
        bias = self._design.rounded_bias(layer, operation, fraction) + self._half(layer)
        name = layer.output
        if operation.kernel:
            axes = len(operation.kernel)
            inputs = [source, self._weight(f"{name}_weight", weight, form), self._bias(layer, bias, fraction)]
            attributes: dict[str, Any] = {
                "kernel_shape": operation.kernel,
                "strides": operation.strides or (1,) * axes,
                "pads": operation.pads or (0,) * 2 * axes,
                "dilations": operation.dilations or (1,) * axes,
                "group": operation.group,
            }
            return self._node("Conv", inputs, f"{name}_sum", **attributes)
        product = self._node("MatMul", [source, self._weight(f"{name}_weight", weight.T, form)], f"{name}_product")
        return self._node("Add", [product, self._bias(layer, bias, fraction)], f"{name}_sum")

    def _half(self, layer: Layer) -> float:
        """Half a step of the layer's format, as far as its sums have one."""
        own = self._design.values[layer.output]
        return own.step / 2 if self._sum_fraction(layer) > own.fraction else 0.0

    def _sum_fraction(self, layer: Layer) -> int:
        fraction = max(self._fractions[name] for name in layer.inputs)
        if isinstance(layer.operation, Linear):
            return self._design.sum_fraction(layer, fraction)
        return fraction + mean_fraction(layer.operation) if isinstance(layer.operation, Pool) else fraction

    def _pool(self, layer: Layer, operation: Pool, source: str) -> str:
        shape = {"kernel_shape": operation.kernel, "strides": operation.strides}
        if not operation.mean:
            return self._node("MaxPool", [source], f"{layer.output}_pooled", pads=operation.pads, **shape)
        count = operation.kernel[0] * operation.kernel[1]
        # A sum: AveragePool divides, which is exact for powers of two alone.
        channels = layer.shape[0]
        ones = self._constant(f"{layer.output}_ones", np.ones((channels, 1, *operation.kernel), np.float32))
        total = self._node("Conv", [source, ones], f"{layer.output}_total", group=channels, **shape)
        factor = self._constant(f"{layer.output}_{count}th", _float32(mean_factor(operation)))
        return self._node("Mul", [total, factor], f"{layer.output}_mean")

    def _rectified(self, name: str, source: str, ceiling: float) -> str:
        """Between 0 and the `ceiling`."""
        if ceiling == inf:
            return self._node("Relu", [source], name)
        ends = [self._constant(f"{name}_{end}", _float32(value)) for end, value in (("low", 0.0), ("high", ceiling))]
        return self._node("Clip", [source, *ends], name)

    def _rounded(self, name: str, source: str, *, given: bool = False, relu: bool = False, ceiling: float = inf) -> str:
        """The `source` in the format of the value `name`, not above the `ceiling`."""
        form = self._design.values[name]
        if self._quant_nodes:
            if relu:
                source = self._rectified(f"{name}_relu", source, ceiling if ceiling < form.high else inf)
            return self._quant(f"{name}_quant", source, form, "ROUND" if given else "FLOOR")
        steps = self._node("Mul", [source, self._constant(f"{name}_steps", _float32(2.0**form.fraction))], f"{name}_up")
        whole = self._node("Round" if given else "Floor", [steps], f"{name}_whole")
        low = max(form.low, 0.0) if relu else form.low
        ends = [
            self._constant(f"{name}_{end}", _float32(value * 2.0**form.fraction))
            for end, value in (("low", low), ("high", min(form.high, ceiling)))
        ]
        inside = self._node("Clip", [whole, *ends], f"{name}_inside")
        return self._node("Mul", [inside, self._constant(f"{name}_step", _float32(form.step))], f"{name}_fixed")

    def _weight(self, name: str, values: Reals, form: Fixed) -> str:
        constant = self._constant(name, _float32(values))
        return self._quant(f"{name}_quant", constant, form, "ROUND") if self._quant_nodes else constant

    def _bias(self, layer: Layer, values: Reals, fraction: int) -> str:
        constant = self._constant(f"{layer.output}_bias", _float32(values))
        if not self._quant_nodes:
            return constant
        steps = self._sum_fraction(layer)
        form = Fixed(True, self._bits[layer.name] - steps, steps)
        return self._quant(f"{layer.output}_bias_quant", constant, form, "ROUND")

    def _quant(self, name: str, source: str, form: Fixed, rounding: str) -> str:
        inputs = [
            source,
            self._constant(f"{name}_scale", _float32(form.step)),
            self._constant(f"{name}_zero", _float32(0.0)),
            self._constant(f"{name}_bits", _float32(form.width)),
        ]
        return self._node(
            "Quant", inputs, name, domain=QUANT_DOMAIN, signed=int(form.signed), narrow=0, rounding_mode=rounding
        )

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self._weights.append(numpy_helper.from_array(values, name))
        return name


def _float32(values: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)
