"""A model in which one activation, or one weight, at a time can be in 8 bits.

Three more inputs say which, and how:

    selected             int64[]           the number of that activation or weight; NOTHING: all is float32
    scale, zero_point    float32[], int8   of that activation; a weight brings its own

Every activation of a plan goes through an `If`, and every layer becomes one:

    activation a    selected == its number ?  DequantizeLinear(QuantizeLinear(a))     :  a
    layer           selected == its number ?  the layer with its weight rounded       :  the layer

An `If` runs one of its branches only, so that any number of trials costs one session, and each of them one run of the
float model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import onnx_ir

from modelpress_compression.encodings.qdq import make_pair
from modelpress_compression.graph.read import label
from modelpress_compression.inputs import Feeds
from modelpress_compression.passes.quantize.plan import Activation, Plan
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters, Range, activation_parameters
from modelpress_compression.passes.quantize.weights import WeightStore

NOTHING = -1
_FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


@dataclass(frozen=True)
class Switches:
    """What `add_switches` put into a model.

    `inputs`: names of selected, scale and zero point. `activations`, `weights`: numbers, by the name of the activation
    and by that of the layer's output. `extremes`: for the inputs of products, names of the outputs that hold the least
    and the largest value of a run. `dtype`: of activations, uint8 or int8.
    """

    inputs: tuple[str, str, str]
    activations: Mapping[str, int]
    weights: Mapping[str, int]
    extremes: Mapping[str, tuple[str, str]]
    dtype: str

    def feed(self, selected: int = NOTHING, parameters: ActivationParameters | None = None) -> Feeds:
        """The three inputs; `parameters` where an activation is selected."""
        if parameters is None:
            parameters = activation_parameters(Range(0, 0), self.dtype)  # nothing reads them, but they must be fed
        numbers = (
            np.asarray(selected, np.int64),
            np.asarray(parameters.scale, np.float32),
            np.asarray(parameters.zero_point, parameters.dtype),
        )
        return dict(zip(self.inputs, numbers, strict=True))


def add_switches(plan: Plan, store: WeightStore) -> Switches:
    """Changes the model of the plan and the store in place."""
    return _Builder(plan, store).build()


class _Builder:
    """Adds to the model of a plan and a store."""

    def __init__(self, plan: Plan, store: WeightStore) -> None:
        self._graph, self._plan = plan.graph, plan
        self._store, self._editor = store, store.editor
        self._dtype = store.config.activations
        self._numbers = count()
        zero_point_type = onnx_ir.DataType.UINT8 if self._dtype == "uint8" else onnx_ir.DataType.INT8
        self._selected = self._input("selected", onnx_ir.DataType.INT64)
        self._scale = self._input("scale", onnx_ir.DataType.FLOAT)
        self._zero_point = self._input("zero_point", zero_point_type)

    def build(self) -> Switches:
        # Looked up by the names that they have now: a switch takes over the name of what it stands for.
        activations = {item.value.name or "": item for item in self._plan.activations.values() if item.has_own_range}
        layers = {node.outputs[0].name or "": node for node in self._plan.layers}
        # Of what a product reads and nothing makes in 8 bits the range may be that of each run.
        multiplied = {node.inputs[0] for node in layers.values() if node.op_type != "Conv"}
        extremes = {
            name: (self._reduced("ReduceMin", item.value), self._reduced("ReduceMax", item.value))
            for name, item in activations.items()
            if item.value in multiplied and not item.all_consumers
        }
        # Activations first: behind a layer that has gone into a branch no switch could be put.
        numbers = {name: self._switch_activation(item) for name, item in activations.items()}
        weights = {name: self._switch_weight(node) for name, node in layers.items()}
        inputs = (self._selected, self._scale, self._zero_point)
        self._graph.inputs.extend(inputs)
        selected, scale, zero_point = (value.name or "" for value in inputs)
        return Switches((selected, scale, zero_point), numbers, weights, extremes, self._dtype)

    def _input(self, name: str, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        return onnx_ir.Value(name=self._editor.name(name), type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape([]))

    def _reduced(self, op_type: str, value: onnx_ir.Value) -> str:
        """The name of a new output that holds one number of the value."""
        node = self._editor.make(op_type, [value], value.name or "tensor", attributes={"keepdims": 0})
        self._graph.append(node)
        (output,) = node.outputs
        output.type, output.shape = _FLOAT, onnx_ir.Shape([])
        self._graph.outputs.append(output)
        return output.name or ""

    def _switch_activation(self, activation: Activation) -> int:
        """Puts a switch between the activation and those who read it in 8 bits; returns its number."""
        value = activation.value
        number, switch = self._switch(value)
        if activation.all_consumers:
            self._take_place(value, switch.outputs[0])
        else:
            for user, index in list(value.uses()):
                if self._plan.reads(activation, user, index):
                    user.replace_input_with(index, switch.outputs[0])
        # Only now, since the branches read the value itself.
        same = self._editor.make("Identity", [value], value.name or "")
        self._fill(switch, make_pair(self._editor, value, self._scale, self._zero_point), [same])
        return number

    def _switch_weight(self, node: onnx_ir.Node) -> int:
        """Puts a switch in the place of the node, which goes into a branch of it; returns its number."""
        # The rounded weight as float32 numbers: onnxruntime would fuse a DequantizeLinear with the product.
        weight = self._store.layer(node).dequantize()
        twin = self._editor.make(node.op_type, node.inputs, label(node))
        twin.attributes.update(node.attributes)
        twin.replace_input_with(1, self._editor.constant(self._graph, weight, f"{label(node)}_weight"))
        number, switch = self._switch(node.outputs[0])
        self._take_place(node.outputs[0], switch.outputs[0])
        self._graph.remove(node)
        self._fill(switch, [twin], [node])
        return number

    def _switch(self, value: onnx_ir.Value) -> tuple[int, onnx_ir.Node]:
        """A number, and an If for it behind what makes the value, without branches yet."""
        name, number = value.name or "tensor", next(self._numbers)
        mine = self._editor.constant(self._graph, np.asarray(number, np.int64), f"{name}_number")
        equal = self._editor.make("Equal", [self._selected, mine], f"{name}_chosen")
        switch = self._editor.make("If", [equal.outputs[0]], f"{name}_switch")
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [equal, switch])
        else:
            self._graph.insert_after(producer, [equal, switch])
        return number, switch

    def _take_place(self, value: onnx_ir.Value, switched: onnx_ir.Value) -> None:
        """For every reader, those in bodies of If and Loop included, and as an output of the graph."""
        name = value.name or "tensor"
        self._editor.hand_over(value, switched)
        value.name = self._editor.name(f"{name}_float")

    def _fill(self, switch: onnx_ir.Node, then: Sequence[onnx_ir.Node], otherwise: Sequence[onnx_ir.Node]) -> None:
        """Gives the If its branches, each with the output of its last node."""
        for key, nodes in (("then_branch", then), ("else_branch", otherwise)):
            output = nodes[-1].outputs[0]
            output.type = _FLOAT
            graph = onnx_ir.Graph([], [output], nodes=nodes, name=self._editor.name(f"{switch.name}_{key}"))
            switch.attributes[key] = onnx_ir.AttrGraph(key, graph)
