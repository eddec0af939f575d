"""Operators that draw random numbers, and models in which they draw the same in every run.

Outputs of a random model differ from run to run; comparing two models by them compares their dice. For judging, each
operator is replaced, in a copy of either model, by numbers from a table that depends on its place among the model's
random operators and on the shape alone:

    u = table[(0, 1, ..., size - 1) mod 8191], reshaped            table: 8191 numbers of N(0, 1) or U[0, 1)

    RandomNormal(Like)     mean + scale u            Bernoulli(p)       u < p
    RandomUniform(Like)    low + (high - low) u      Dropout(x, r)      x (u >= r) / (1 - r), in training mode
    Multinomial(x)         argmax(x - log(-log(u))), the trick of Gumbel

Neither seeds nor the order of runs would do: onnxruntime mixes the place of a node into its seed and goes on with each
run, and several samples run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

_NORMAL = ("RandomNormal", "RandomNormalLike")
_UNIFORM = ("RandomUniform", "RandomUniformLike")
RANDOM = frozenset({*_NORMAL, *_UNIFORM, "Multinomial", "Bernoulli", "Dropout"})
_TABLE = 8191  # a prime: rows of a usual length do not begin alike
_LEAST_UNIFORM = 1e-6  # its logarithm's logarithm is taken
_FLOAT, _INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64


def random_nodes(ir: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    """The nodes that draw random numbers, in the graph's order, those of subgraphs included."""
    for node in ir.graph.all_nodes():
        if node.domain in ("", "ai.onnx") and node.op_type in RANDOM and (node.op_type != "Dropout" or _trains(node)):
            yield node


def fix_noise(ir: onnx_ir.Model) -> int:
    """Replaces them in place, as described above; how many."""
    nodes = list(random_nodes(ir))
    for number, node in enumerate(nodes):
        _Fixing(node, number).replace()
    return len(nodes)


def _trains(node: onnx_ir.Node) -> bool:
    """Whether a Dropout drops: its third input says so, or is computed."""
    flag = node.inputs[2] if len(node.inputs) > 2 else None
    if flag is None:
        return False
    producer = flag.producer()
    tensor = flag.const_value
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        tensor = producer.attributes["value"].as_tensor()
    return tensor is None or bool(np.asarray(tensor.numpy()).any())


class _Fixing:
    """The nodes in the place of one; `number`: its place among the model's random operators."""

    def __init__(self, node: onnx_ir.Node, number: int) -> None:
        self._node = node
        self._graph = node.graph
        self._prefix = f"modelpress.noise.{number}"
        self._count = 0
        self._generator = np.random.default_rng(number)

    def replace(self) -> None:
        node = self._node
        results = self._results()
        for old, new in zip(node.outputs, results, strict=False):
            name, new.type, new.shape = old.name, old.type, old.shape
            onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name = None
            new.name = name
        assert self._graph is not None  # noqa: S101  # nodes of a model lie in its graphs
        self._graph.remove(node, safe=True)

    def _results(self) -> list[onnx_ir.Value]:
        node = self._node
        if node.op_type in (*_NORMAL, *_UNIFORM):
            return [self._typed(self._scaled())]
        if node.op_type == "Bernoulli":
            return [self._typed(self._emit("Less", self._uniform(self._shape()), self._real(node.inputs[0])))]
        return self._dropout() if node.op_type == "Dropout" else [self._typed(self._multinomial())]

    def _scaled(self) -> onnx_ir.Value:
        if self._node.op_type in _NORMAL:
            offset, factor = self._number("mean", 0.0), self._number("scale", 1.0)
            drawn = self._draw(self._shape(), self._generator.standard_normal(_TABLE))
        else:
            offset = self._number("low", 0.0)
            factor = self._number("high", 1.0) - offset
            drawn = self._uniform(self._shape())
        return self._emit("Add", self._emit("Mul", drawn, self._constant(factor)), self._constant(offset))

    def _dropout(self) -> list[onnx_ir.Value]:
        node = self._node
        given = node.inputs[1] if node.inputs[1] is not None else self._constant(0.5)
        ratio = self._real(given)
        flag = node.inputs[2]
        ratio = self._emit("Mul", ratio, self._real(flag))
        mask = self._emit("GreaterOrEqual", self._uniform(self._shape()), ratio)
        kept = self._emit("Div", self._real(mask), self._emit("Sub", self._constant(1.0), ratio))
        value = self._emit("Mul", node.inputs[0], self._emit("CastLike", kept, node.inputs[0]))
        return [value, mask]

    def _multinomial(self) -> onnx_ir.Value:
        """[batch, classes] into [batch, sample_size]."""
        count = int(attribute.value) if (attribute := self._node.attributes.get("sample_size")) else 1
        scores = self._real(self._node.inputs[0])
        sizes = self._emit("Shape", scores)
        parts = [self._emit("Gather", sizes, self._integers([axis])) for axis in (0, 1)]
        shape = self._emit("Concat", parts[0], self._integers([count]), parts[1], axis=0)
        drawn = self._uniform(shape)
        gumbel = self._emit("Neg", self._emit("Log", self._emit("Neg", self._emit("Log", drawn))))
        spread = self._emit("Unsqueeze", scores, self._integers([1]))
        return self._emit("ArgMax", self._emit("Add", spread, gumbel), axis=-1, keepdims=0)

    def _uniform(self, shape: onnx_ir.Value) -> onnx_ir.Value:
        return self._draw(shape, self._generator.uniform(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM, _TABLE))

    def _draw(self, shape: onnx_ir.Value, table: NDArray[np.float64]) -> onnx_ir.Value:
        size = self._emit("ReduceProd", shape, keepdims=0)
        places = self._emit("Range", self._integers(0), size, self._integers(1))
        places = self._emit("Mod", places, self._integers(_TABLE))
        return self._emit("Reshape", self._emit("Gather", self._constant(table), places), shape)

    def _shape(self) -> onnx_ir.Value:
        stated = self._node.attributes.get("shape")
        return self._emit("Shape", self._node.inputs[0]) if stated is None else self._integers(list(stated.as_ints()))

    def _typed(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """In the type that the operator gives."""
        node = self._node
        stated = node.attributes.get("dtype")
        if stated is not None:
            return self._emit("Cast", value, to=int(stated.value))
        if node.op_type == "Multinomial":
            return self._emit("Cast", value, to=onnx_ir.DataType.INT32.value)
        return self._emit("CastLike", value, node.inputs[0]) if node.inputs else value

    def _real(self, value: onnx_ir.Value | None) -> onnx_ir.Value:
        return self._emit("Cast", value, to=_FLOAT.value)

    def _number(self, name: str, default: float) -> float:
        attribute = self._node.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    def _integers(self, numbers: int | list[int]) -> onnx_ir.Value:
        return self._initializer(np.asarray(numbers, np.int64))

    def _constant(self, numbers: float | NDArray[np.float64]) -> onnx_ir.Value:
        return self._initializer(np.asarray(numbers, np.float32))

    def _initializer(self, array: NDArray[Any]) -> onnx_ir.Value:
        """As a Constant node: a table that a graph inside needs may lie inside."""
        return self._emit("Constant", value=onnx_ir.Tensor(array))

    def _emit(self, op_type: str, *inputs: onnx_ir.Value | None, **attributes: Any) -> onnx_ir.Value:
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        made = onnx_ir.node(op_type, inputs, attributes, outputs=[onnx_ir.Value(name=name)], name=name)
        assert self._graph is not None  # noqa: S101  # nodes of a model lie in its graphs
        self._graph.insert_before(self._node, made)
        return made.outputs[0]
