"""The layers that can be factorized: MatMul, Gemm and Conv with a constant float weight, and Gather of the rows of a
table (see `tables`); each weight once.

Left alone, with a reason: weights that others read as well, or that are read in different ways (other strides, another
graph), weights that are quantized or computed, and numbers that nothing can be made of. How much a layer multiplies
comes from the shapes of the values on one sample; where those are not known, one position of its output stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.linear import Convolution, Linear, Matrix, linear_of
from modelpress_compression.graph.read import (
    MICROSOFT,
    constant_array,
    constant_tensor,
    graph_of,
    input_of,
    is_constant,
    is_op,
    label,
)
from modelpress_compression.graph.shapes import Shape, shape_of, static_shapes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip, is_excluded
from modelpress_compression.passes.factorize.tables import MIN_NUMBERS, Lookup, is_lookup, lookup_of

# By domain; those that are no plain product with one weight are told of, and left.
_PRODUCTS = {
    "": ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU", "RNN"),
    MICROSOFT: ("FusedConv", "FusedGemm", "FusedMatMul", "Attention"),
}
# The largest side of a matrix whose eigenvectors are looked for: a minute or two of one core.
MAX_SIDE = 4096
# Largest magnitudes whose energies, squared once more by a decomposition, are numbers of float64.
_SQUARABLE = (1e-60, 1e60)


@dataclass(frozen=True)
class Positions:
    """How often a weight is applied to one sample, over all nodes that read it.

    `outputs`: positions of the output. `inputs`: of the input. `between`: of the output's first axis and the input's
    others, as many as there are between a column and a row.
    """

    outputs: int
    inputs: int
    between: int


@dataclass(frozen=True)
class Layer:
    """One weight and the nodes that multiply by it, all in the same way. `groups`, `inputs` and `answers`: extents of
    the weight as a matrix [g, K, O], of a table [1, rows, columns]; `kernel`: of a convolution, () of a product.
    `shape`: of what the first node reads; None where that is not known."""

    weight: onnx_ir.Value
    nodes: tuple[onnx_ir.Node, ...]
    linear: Linear | Lookup
    positions: Positions
    groups: int
    inputs: int
    answers: int
    shape: Shape | None = None

    @property
    def name(self) -> str:
        return label(self.nodes[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.linear.kernel if isinstance(self.linear, Convolution) else ()

    @property
    def points(self) -> int:
        """Of the kernel."""
        return math.prod(self.kernel)

    @property
    def channels(self) -> int:
        """That each group reads."""
        return self.inputs // self.points

    @property
    def parameters(self) -> int:
        return self.groups * self.inputs * self.answers

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up, which multiplies nothing."""
        return isinstance(self.linear, Lookup)

    @property
    def macs(self) -> int:
        """On one sample."""
        return 0 if self.is_table else self.parameters * self.positions.outputs

    @property
    def matrix(self) -> Matrix:
        """The weight as [g, K, O], float64; of a convolution K runs over channels, then the kernel."""
        array = constant_array(self.weight)
        if array is None:
            raise TypeError(f"the weight of {self.name!r} is not constant")
        return self.linear.matrix(array)


def find_layers(
    model: Model, exclude: tuple[str, ...], input_shapes: Mapping[str, Shape]
) -> tuple[list[Layer], list[Skip]]:
    """The layers in the graph's order, and why others are left alone. `input_shapes`: of one sample, by input."""
    shapes = _shapes(model, input_shapes)
    users: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
    skipped: list[Skip] = []
    for node in model.nodes():
        multiplies = any(is_op(node, *names, domain=domain) for domain, names in _PRODUCTS.items())
        weight = input_of(node, 0) if is_lookup(node) else input_of(node, 1) if multiplies else None
        if weight is None:
            continue
        if is_constant(weight):
            users.setdefault(weight, []).append(node)
        elif _is_weight(node, weight):
            skipped.append(Skip(label(node), "Its weight is quantized or computed; factorize before quantizing."))
    layers = []
    for weight, nodes in users.items():
        found = _layer(weight, tuple(nodes), exclude, shapes)
        if isinstance(found, Layer):
            layers.append(found)
        else:
            skipped.append(Skip(label(nodes[0]), found))
    return layers, skipped


def _is_weight(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    """Whether the operand is made of constants alone; a product of two activations is nothing to speak of."""
    producer = value.producer()
    made = [] if producer is None else [one for one in producer.inputs if one is not None]
    return node.op_type not in ("MatMul", "FusedMatMul", "Gather") or (
        bool(made) and all(is_constant(one) for one in made)
    )


def _layer(
    weight: onnx_ir.Value, nodes: tuple[onnx_ir.Node, ...], exclude: tuple[str, ...], shapes: Mapping[str, Shape]
) -> Layer | str:
    """The layer, or why it is left alone."""
    if any(is_excluded(name, exclude) for name in (weight.name, *(node.name for node in nodes))):
        return "Excluded by the recipe."
    if len(weight.uses()) != len(nodes) or weight.is_graph_output():
        return "Others read its weight as well."
    linear = _linear_of(nodes[0])
    if isinstance(linear, str):
        return f"It cannot be factorized: {linear}."
    if any(_linear_of(node) != linear or graph_of(node) is not graph_of(nodes[0]) for node in nodes[1:]):
        return "Its weight is shared by nodes that read it in different ways."
    groups, inputs, answers = linear.matrix(np.zeros(_extents(weight), np.bool_)).shape
    data = nodes[0].inputs[1 if isinstance(linear, Lookup) else 0]
    shape = shapes.get(data.name or "") if data is not None else None
    layer = Layer(weight, nodes, linear, _positions(nodes, linear, shapes), groups, inputs, answers, shape)
    return _of_size(layer) or _of_numbers(layer) or layer


def _linear_of(node: onnx_ir.Node) -> Linear | Lookup | str:
    return lookup_of(node) if is_lookup(node) else linear_of(node)


def _extents(weight: onnx_ir.Value) -> tuple[int, ...]:
    tensor = constant_tensor(weight)
    return () if tensor is None else tuple(int(extent) for extent in tensor.shape.numpy())


def _of_size(layer: Layer) -> str:
    """Why it is too small or too large; "" where it is neither."""
    side = min(layer.inputs, layer.answers)
    if side < 2:
        return "It has one input or one answer in each group: its rank is 1."
    if layer.is_table and layer.parameters < MIN_NUMBERS:
        return f"Its {layer.parameters} numbers are too few to pay for a product."
    return f"It has over {MAX_SIDE} inputs and answers: finding its factors takes too long." if side > MAX_SIDE else ""


def _of_numbers(layer: Layer) -> str:
    """Why nothing can be made of the numbers of a weight; "" where something can."""
    array = constant_array(layer.weight)
    if array is None or not np.isfinite(array).all():
        return "Its weight holds NaN or infinity."
    largest = float(np.abs(array).max())
    if not largest:
        return "Its weight is zero throughout."
    low, high = _SQUARABLE
    return "" if low < largest < high else "The squares of its numbers exceed what float64 holds."


def _shapes(model: Model, input_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """By the name of the value, where they are known."""
    ir = static_shapes(model, input_shapes)
    named = ((value.name, shape_of(value)) for value in _values(ir))
    return {name: shape for name, shape in named if name and shape is not None}


def _values(ir: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    yield from ir.graph.inputs
    for node in ir.graph.all_nodes():
        yield from node.outputs


def _positions(nodes: tuple[onnx_ir.Node, ...], linear: Linear | Lookup, shapes: Mapping[str, Shape]) -> Positions:
    each = [_of_node(node, linear, shapes) for node in nodes]
    return Positions(*(sum(getattr(one, name) for one in each) for name in ("outputs", "inputs", "between")))


def _of_node(node: onnx_ir.Node, linear: Linear | Lookup, shapes: Mapping[str, Shape]) -> Positions:
    data, output = (shapes.get(value.name or "") for value in (node.inputs[0], node.outputs[0]) if value is not None)
    if not isinstance(linear, Convolution):
        count = math.prod(output[:-1]) if output else 1
        return Positions(count, count, count)
    if data is None or output is None or len(data) != len(output) or len(data) != 2 + len(linear.kernel):
        return Positions(1, math.prod(linear.strides), math.prod(linear.strides[1:]))
    batch = output[0]
    return Positions(
        batch * math.prod(output[2:]),
        batch * math.prod(data[2:]),
        batch * output[2] * math.prod(data[3:]),
    )
