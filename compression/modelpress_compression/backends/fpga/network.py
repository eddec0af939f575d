"""The part of an ONNX graph that becomes hardware, as a list of layers.

    Linear      a product with constant weights, dense or a convolution, and a bias
    Add         the sum of two values (residual connections)
    MaxPool, MeanPool, Relu, Reshape, Transpose

Batches are gone: shapes are those of one sample. A Relu behind a layer belongs to it, also where a MaxPool stands
between: both orders give the same numbers, and this one pools fewer bits. So does a Clip that begins at 0 (Relu6): it
is a Relu with a ceiling. What turns answers into probabilities at the
end (Softmax and its kind) stays with the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.backends.fpga.formats import Reals
from modelpress_compression.errors import UnsupportedOperatorError
from modelpress_compression.model import read_graph

Shape = tuple[int, ...]
# Done by the host at the very end; the order of the classes does not depend on them.
HOST_OPERATORS = ("Softmax", "LogSoftmax", "Sigmoid")
_NOTHING_DONE = ("Identity", "Dropout", "Cast")
# Of sizes, which exported networks compute from a value's shape where they flatten it.
_OF_SIZES = ("Shape", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Cast")
_LEAST_RANK = 2


@dataclass(frozen=True)
class Linear:
    """`weight` [outputs, inputs / group, *kernel], no kernel for a dense layer; `pads`: begins, then ends."""

    weight: Reals
    bias: Reals
    strides: Shape = ()
    pads: Shape = ()
    dilations: Shape = ()
    group: int = 1

    @property
    def kernel(self) -> Shape:
        return self.weight.shape[2:]


@dataclass(frozen=True)
class Pool:
    """The largest (`mean`: the mean) of each window."""

    mean: bool
    kernel: Shape
    strides: Shape
    pads: Shape = (0, 0, 0, 0)


@dataclass(frozen=True)
class Add:
    """Of two values of one shape."""


@dataclass(frozen=True)
class Relu:
    """On its own: where others take the value before it as well. `ceiling`: larger results become it."""

    ceiling: float = inf

    def ceiling_at(self, fraction: int) -> float:
        """The nearest with so many bits behind the point."""
        return self.ceiling if self.ceiling == inf else floor(self.ceiling * 2.0**fraction + 0.5) / 2.0**fraction


@dataclass(frozen=True)
class Reshape:
    """To the layer's shape, elements in order."""


@dataclass(frozen=True)
class Transpose:
    """`axes`: of a sample."""

    axes: Shape


Operation = Linear | Pool | Add | Relu | Reshape | Transpose


@dataclass(frozen=True)
class Layer:
    """`name`: of its output, unless the node has one. `shape`: of its output. `relu`: negative results become 0, and
    those above `ceiling` become it."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    output: str
    shape: Shape
    relu: bool = False
    ceiling: float = inf

    @property
    def rounds(self) -> bool:
        """Whether a format is chosen for its output: where numbers get longer."""
        return isinstance(self.operation, Linear | Add) or (isinstance(self.operation, Pool) and self.operation.mean)


@dataclass(frozen=True)
class Network:
    """`host`: the operators behind it that the host does, with attributes, in order. `outputs`: as the model names
    them."""

    input: str
    input_shape: Shape
    layers: tuple[Layer, ...]
    output: str
    host: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def linear(self) -> list[tuple[Layer, Linear]]:
        """The layers with weights."""
        return [(layer, layer.operation) for layer in self.layers if isinstance(layer.operation, Linear)]

    def shape_of(self, value: str) -> Shape:
        if value == self.input:
            return self.input_shape
        return next(layer.shape for layer in self.layers if layer.output == value)

    def products(self, layer: Layer) -> int:
        """Multiplications of one sample."""
        operation = layer.operation
        return operation.weight.size * self.positions(layer) if isinstance(operation, Linear) else 0

    def positions(self, layer: Layer) -> int:
        """How often its weights are used for one sample."""
        return prod(layer.shape[1:]) if isinstance(layer.operation, Linear) and layer.operation.kernel else 1


def read_network(path: Path) -> Network:
    """The network in a file. Raises UnsupportedOperatorError, which says what does not become hardware."""
    return _Reader(read_graph(path)).read()


class _Reader:
    """Goes through the nodes in order."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._layers: list[Layer] = []
        self._host: list[tuple[str, Mapping[str, Any]]] = []
        self._names: dict[str, str] = {}  # of values that are others
        self._shapes: dict[str, Shape] = {}
        self._sizes: dict[str, list[int]] = {}  # values that are sizes; 0: the batch
        self._end = ""

    def read(self) -> Network:
        given = [value for value in self._graph.inputs if value.name not in self._graph.initializers]
        if len(given) != 1 or len(self._graph.outputs) != 1:
            raise _refusal(
                f"a design has one input and one output, and the model has {len(given)} and {len(self._graph.outputs)}"
            )
        name, shape = given[0].name or "", given[0].shape
        dims = [dim if isinstance(dim, int) else None for dim in shape or ()]
        if len(dims) < _LEAST_RANK or any(dim is None for dim in dims[1:]):
            raise _refusal(f"input {name!r} needs a batch axis and fixed sizes behind it, not {shape}")
        self._shapes[name] = tuple(dim for dim in dims[1:] if dim is not None)
        for node in self._graph:
            self._take(node)
        output = self._value(self._graph.outputs[0])
        if self._end:
            if output != self._end:
                raise _refusal("Softmax and its kind can stand at the end alone")
            output = self._layers_end
        if not any(isinstance(layer.operation, Linear) for layer in self._layers):
            raise _refusal("it has no layer with weights")
        return Network(name, self._shapes[name], tuple(self._layers), output, tuple(self._host))

    def _take(self, node: onnx_ir.Node) -> None:
        operator = node.op_type
        if operator == "Constant":
            return
        if operator in HOST_OPERATORS and not node.domain:
            self._begin_host(node)
            return
        if self._end:
            raise _refusal(f"{operator} stands behind {self._host[-1][0]}, which the host does", operator)
        if operator in _OF_SIZES and not node.domain and self._take_sizes(node):
            return
        if operator in _NOTHING_DONE:
            self._names[node.outputs[0].name or ""] = self._value(node.inputs[0])
            return
        method: Callable[[onnx_ir.Node], None] | None = getattr(self, f"_take_{operator.lower()}", None)
        if node.domain or method is None:
            raise _refusal(f"it has the operator {operator} ({node.name or node.outputs[0].name})", operator)
        method(node)

    def _begin_host(self, node: onnx_ir.Node) -> None:
        value = self._value(node.inputs[0])
        if not self._end:
            self._layers_end = value
        elif value != self._end:
            raise _refusal("Softmax and its kind can stand at the end alone")
        axis = node.attributes.get_int("axis", -1)
        self._host.append((node.op_type, {} if node.op_type == "Sigmoid" else {"axis": axis}))
        self._end = node.outputs[0].name or ""

    def _take_sizes(self, node: onnx_ir.Node) -> bool:
        """Whether the node computes with sizes, as far as is known."""
        operator, name = node.op_type, node.outputs[0].name or ""
        if operator == "Shape":
            self._sizes[name] = [0, *self._shape(node.inputs[0])]
            return True
        known = [self._sizes_of(value) for value in node.inputs]
        if known[0] is None or not any((value.name or "") in self._sizes for value in node.inputs if value is not None):
            return False
        if any(sizes is None for sizes in known):
            raise _refusal(f"{name!r} is a size that depends on more than the shape of a value", operator)
        self._sizes[name] = _SIZES[operator](*(sizes for sizes in known if sizes is not None))
        return True

    def _sizes_of(self, value: onnx_ir.Value | None) -> list[int] | None:
        if value is not None and (value.name or "") in self._sizes:
            return self._sizes[value.name or ""]
        found = self._known(value)
        return None if found is None else [int(number) for number in np.atleast_1d(found)]

    # Operators, by their names in lower case.

    def _take_gemm(self, node: onnx_ir.Node) -> None:
        weight = self._constant(node, 1)
        if node.attributes.get_int("transA", 0):
            raise _refusal(f"{node.name} takes its input transposed", "Gemm")
        if not node.attributes.get_int("transB", 0):
            weight = weight.T
        weight = weight * node.attributes.get_float("alpha", 1.0)
        bias = np.zeros(len(weight))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = bias + self._constant(node, 2) * node.attributes.get_float("beta", 1.0)
        self._dense(node, weight, bias)

    def _take_matmul(self, node: onnx_ir.Node) -> None:
        weight = self._constant(node, 1).T
        if weight.ndim != 2:
            raise _refusal(f"the weights of {node.name} have {weight.ndim} axes", "MatMul")
        self._dense(node, weight, np.zeros(len(weight)))

    def _dense(self, node: onnx_ir.Node, weight: Reals, bias: Reals) -> None:
        source = self._shape(node.inputs[0])
        if source != weight.shape[1:]:
            raise _refusal(f"{node.name} is a product over more than one vector of a sample", node.op_type)
        self._append(node, Linear(weight, bias), (len(weight),))

    def _take_conv(self, node: onnx_ir.Node) -> None:
        weight, source = self._constant(node, 1), self._shape(node.inputs[0])
        axes = weight.ndim - 2
        bias = self._constant(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(len(weight))
        strides, dilations = (_ints(node, name, (1,) * axes) for name in ("strides", "dilations"))
        pads = _pads(node, axes)
        sizes = tuple(
            (source[1 + axis] + pads[axis] + pads[axes + axis] - dilations[axis] * (weight.shape[2 + axis] - 1) - 1)
            // strides[axis]
            + 1
            for axis in range(axes)
        )
        group = node.attributes.get_int("group", 1)
        self._append(node, Linear(weight, bias, strides, pads, dilations, group), (len(weight), *sizes))

    def _take_maxpool(self, node: onnx_ir.Node) -> None:
        self._pool(node, mean=False)

    def _take_averagepool(self, node: onnx_ir.Node) -> None:
        self._pool(node, mean=True)

    def _pool(self, node: onnx_ir.Node, *, mean: bool) -> None:
        kernel = _ints(node, "kernel_shape", ())
        source, axes = self._shape(node.inputs[0]), len(kernel)
        strides, pads = _ints(node, "strides", (1,) * axes), _pads(node, axes)
        plain = not node.attributes.get_int("ceil_mode", 0) and set(_ints(node, "dilations", (1,))) == {1}
        if axes != 2 or not plain or (mean and any(pads)) or len(node.outputs) > 1:
            raise _refusal(f"{node.name} pools in a way that is not supported", node.op_type)
        sizes = tuple(
            (source[1 + axis] + pads[axis] + pads[axes + axis] - kernel[axis]) // strides[axis] + 1 for axis in (0, 1)
        )
        self._append(node, Pool(mean, kernel, strides, pads), (source[0], *sizes))

    def _take_globalaveragepool(self, node: onnx_ir.Node) -> None:
        source = self._shape(node.inputs[0])
        if len(source) != 3:
            raise _refusal(f"{node.name} pools over {len(source) - 1} axes", node.op_type)
        self._append(node, Pool(True, source[1:], source[1:]), (source[0], 1, 1))

    def _take_add(self, node: onnx_ir.Node) -> None:
        constants = [self._known(value) for value in node.inputs]
        if constants[0] is not None or constants[1] is not None:
            self._add_bias(node, 0 if constants[0] is None else 1, constants)
            return
        first, second = (self._shape(value) for value in node.inputs)
        if first != second:
            raise _refusal(f"{node.name} adds values of two shapes, {first} and {second}", "Add")
        self._append(node, Add(), first, inputs=2)

    def _add_bias(self, node: onnx_ir.Node, place: int, constants: Sequence[Any]) -> None:
        """Into the product before it."""
        value = self._value(node.inputs[place])
        layer = next((layer for layer in self._layers if layer.output == value), None)
        bias = np.asarray(constants[1 - place], np.float64)
        if layer is None or not isinstance(layer.operation, Linear) or layer.relu or self._uses(node.inputs[place]) > 1:
            raise _refusal(f"{node.name} adds a constant to what is no product", "Add")
        if bias.size not in {1, layer.shape[0]} or (bias.size > 1 and bias.shape[-len(layer.shape)] != bias.size):
            raise _refusal(f"{node.name} adds a constant of shape {bias.shape}", "Add")
        operation = replace(layer.operation, bias=layer.operation.bias + bias.reshape(-1))
        output = node.outputs[0].name or ""
        self._layers[self._layers.index(layer)] = replace(layer, operation=operation, output=output)
        self._shapes[output] = layer.shape

    def _take_relu(self, node: onnx_ir.Node) -> None:
        self._rectify(node, inf)

    def _take_clip(self, node: onnx_ir.Node) -> None:
        low, high = (self._bound(node, place) for place in (1, 2))
        if low != 0 or high is None or high <= 0:
            raise _refusal(f"{node.name} clips to {low} ... {high}, and only a Clip that begins at 0 is a Relu", "Clip")
        self._rectify(node, high)

    def _bound(self, node: onnx_ir.Node, place: int) -> float | None:
        """Of a Clip: an input, and an attribute before opset 11; None: there is none."""
        name = ("min", "max")[place - 1]
        if name in node.attributes:
            return node.attributes.get_float(name)
        value = node.inputs[place] if place < len(node.inputs) else None
        return None if value is None else float(self._constant(node, place))

    def _rectify(self, node: onnx_ir.Node, ceiling: float) -> None:
        value = node.inputs[0]
        name, alone = self._value(value), self._uses(value) == 1
        while alone:
            layer = next((layer for layer in self._layers if layer.output == name), None)
            if layer is None:
                break
            if layer.rounds:
                lowest = min(layer.ceiling, ceiling)
                self._layers[self._layers.index(layer)] = replace(layer, relu=True, ceiling=lowest)
                self._names[node.outputs[0].name or ""] = self._value(value)
                return
            if isinstance(layer.operation, Relu):
                break
            name = layer.inputs[0]
            alone = sum(each.inputs.count(name) for each in self._layers) == 1
        self._append(node, Relu(ceiling), self._shape(value))

    def _take_flatten(self, node: onnx_ir.Node) -> None:
        if node.attributes.get_int("axis", 1) != 1:
            raise _refusal(f"{node.name} does not keep samples apart", "Flatten")
        self._append(node, Reshape(), (prod(self._shape(node.inputs[0])),))

    def _take_reshape(self, node: onnx_ir.Node) -> None:
        computed = self._sizes_of(node.inputs[1])
        source = self._shape(node.inputs[0])
        wanted = [int(size) for size in self._constant(node, 1)] if computed is None else computed
        sizes = [source[place - 1] if size == 0 and place else size for place, size in enumerate(wanted)][1:]
        if -1 in sizes:
            known = prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = prod(source) // max(known, 1)
        if prod(sizes) != prod(source):
            raise _refusal(f"{node.name} does not keep samples apart", "Reshape")
        self._append(node, Reshape(), tuple(sizes))

    def _take_transpose(self, node: onnx_ir.Node) -> None:
        source = self._shape(node.inputs[0])
        axes = _ints(node, "perm", tuple(reversed(range(len(source) + 1))))
        if axes[0] != 0:
            raise _refusal(f"{node.name} does not keep samples apart", "Transpose")
        order = tuple(axis - 1 for axis in axes[1:])
        self._append(node, Transpose(order), tuple(source[axis] for axis in order))

    # What the operators stand on.

    def _append(self, node: onnx_ir.Node, operation: Operation, shape: Shape, inputs: int = 1) -> None:
        output = node.outputs[0].name or ""
        sources = tuple(self._value(value) for value in node.inputs[:inputs])
        self._layers.append(Layer(node.name or output, operation, sources, output, shape))
        self._shapes[output] = shape

    def _value(self, value: onnx_ir.Value | None) -> str:
        name = (value.name if value is not None else "") or ""
        return self._names.get(name, name)

    def _shape(self, value: onnx_ir.Value | None) -> Shape:
        name = self._value(value)
        if name not in self._shapes:
            raise _refusal(f"it takes {name!r}, which is no value that depends on the input")
        return self._shapes[name]

    def _uses(self, value: onnx_ir.Value | None) -> int:
        return 0 if value is None else len(tuple(value.uses())) + value.is_graph_output()

    def _known(self, value: onnx_ir.Value | None) -> Any:
        """Its number, where it is constant."""
        if value is None:
            return None
        tensor = value.const_value
        producer = value.producer()
        if tensor is None and producer is not None and producer.op_type == "Constant":
            attribute = producer.attributes.get("value")
            tensor = attribute.as_tensor() if attribute is not None else None
        return None if tensor is None else tensor.numpy()

    def _constant(self, node: onnx_ir.Node, place: int) -> Reals:
        found = self._known(node.inputs[place])
        if found is None:
            name = node.name or node.outputs[0].name
            raise _refusal(f"{name} ({node.op_type}) takes two values that both depend on the input", node.op_type)
        numbers = np.asarray(found, np.float64)
        if not np.isfinite(numbers).all():
            raise _refusal(f"{node.name or node.outputs[0].name} has a weight that is no finite number", node.op_type)
        return numbers


_SIZES: Mapping[str, Callable[..., list[int]]] = {
    "Gather": lambda sizes, places: [sizes[place] for place in places],
    "Unsqueeze": lambda sizes, *_: sizes,
    "Squeeze": lambda sizes, *_: sizes,
    "Cast": lambda sizes: sizes,
    "Concat": lambda *parts: [size for part in parts for size in part],
    "Slice": lambda sizes, start, end, *more: sizes[start[0] : end[0] : more[1][0] if len(more) > 1 else 1],
}


def _refusal(reason: str, operator: str = "") -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"The model does not become an FPGA design: {reason}. Networks of dense layers, convolutions, Relu, Relu6, "
        f"pooling, sums and BatchNormalization do; for others take the target cpu.",
        op_type=operator,
    )


def _ints(node: onnx_ir.Node, name: str, default: Shape) -> Shape:
    return tuple(node.attributes.get_ints(name, default))


def _pads(node: onnx_ir.Node, axes: int) -> Shape:
    if node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        raise _refusal(f"{node.name} has auto_pad; export the model with explicit pads", node.op_type)
    return _ints(node, "pads", (0,) * (2 * axes))
