"""Sensitivity: the error at the model's outputs when one activation, or one weight, alone is in 8 bits.

    error = sum |y' - y|^2 / sum |y|^2        y: all float outputs, y': with that one in 8 bits

Such errors are small and nearly uncorrelated, so that those of a whole plan add up: on a sentence encoder the sum was
within 0.4 dB of what was measured.

One session serves all: every activation of the plan goes through an `If` that quantizes it where the number fed is its
own, with a scale and zero point that are fed too; every layer through an `If` with a twin of quantized weights. So a
trial costs a run of the model a sample, and no session, and the trials are linear in the layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir
import onnxruntime as ort
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.outputs import score_node
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.read import graph_of, label
from modelpress_compression.graph.watch import Listener
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.plan import Activation, Plan
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters, Range, activation_parameters
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.runtime import run, session_of

MAX_SAMPLES = 8
DISTANCE_SAMPLES = 32
BUDGET_S = 20.0
# Trials that would take longer than this on one sample are not made.
LIMIT_S = 60.0
_NONE = -1  # selects nothing
_FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


@dataclass(frozen=True)
class Trial:
    """One thing in 8 bits: an activation by its name, or the weight of a layer by the name of its output.

    `parameters`: of an activation; None: those of its range in each run, as dynamic quantization has them.
    """

    name: str
    is_weight: bool = False
    parameters: ActivationParameters | None = None


@dataclass(frozen=True)
class Distances:
    """Of two models' outputs: [feeds], sums of squares over all float outputs."""

    errors: NDArray[np.float64]
    signals: NDArray[np.float64]

    @property
    def error(self) -> float:
        """As above, over all feeds."""
        signal = float(self.signals.sum())
        return float(self.errors.sum()) / signal if signal else math.inf


def output_distances(original: Model, changed: Model, context: Context) -> Distances:
    """How far a changed model's outputs are, feed by feed, on `DISTANCE_SAMPLES` samples."""
    errors, signals = [], []
    models = [_without_softmax(model) for model in (original, changed)]
    with session_of(models[0], threads=2) as first, session_of(models[1], threads=2) as second:
        for feed in context.data.spread(DISTANCE_SAMPLES).feeds(batch_size=1):
            context.check_time()
            mask = counted_positions(feed)
            before, after = (
                {name: without_padding(array, mask) for name, array in run(session, feed).items()}
                for session in (first, second)
            )
            floats = {name: array for name, array in before.items() if array.dtype.kind == "f"}
            errors.append(_squared_distance(floats, after))
            signals.append(sum(float(np.square(_finite(array)).sum()) for array in floats.values()))
    return Distances(np.asarray(errors), np.asarray(signals))


def _without_softmax(model: Model) -> Model:
    """A copy whose outputs are what went into the softmax that they came from."""
    copy = model.clone()
    for node in {id(node): node for value in copy.graph.outputs if (node := score_node(value)) is not None}.values():
        if node.op_type == "Softmax" and node.domain == "":
            node.op_type = "Identity"
            node.attributes.clear()
    return copy


class ErrorProbe:
    """Tries things out on one model, that of `setup`; made by `open_probe`."""

    def __init__(
        self, setup: QuantizationSetup, session: ort.InferenceSession, switches: _Switches, samples: InputData
    ) -> None:
        self.setup, self._session, self._switches, self._samples = setup, session, switches, samples

    def errors(self, trials: Sequence[Trial], done: Listener | None = None) -> list[float] | None:
        """The error of each trial, infinite where outputs are not finite; None: that would take too long.

        Takes as many of the samples as `BUDGET_S` allows, one at least. Raises TimeLimitError.
        """
        sums, signal = [0.0] * len(trials), 0.0
        began = time.monotonic()
        for index, feed in enumerate(self._samples.feeds(batch_size=1)):
            started = time.monotonic()
            if index and started - began + (started - began) / index > BUDGET_S:
                break
            plain = self._answers(feed)
            if not index and (time.monotonic() - started) * len(trials) > LIMIT_S:
                return None
            signal += sum(float(np.square(_finite(array)).sum()) for array in plain.outputs.values())
            for number, trial in enumerate(trials):
                self.setup.context.check_time()
                sums[number] += _squared_distance(plain.outputs, self._answers(feed, trial, plain).outputs)
                if done is not None and not index:
                    done((number + 1) / len(trials))
        return [total / signal if signal else math.inf for total in sums]

    def _answers(self, feed: Feeds, trial: Trial | None = None, plain: _Answers | None = None) -> _Answers:
        selected, parameters = _NONE, activation_parameters(Range(0, 0), self._switches.dtype)
        if trial is not None:
            selected = (self._switches.weights if trial.is_weight else self._switches.tensors)[trial.name]
            if trial.parameters is not None:
                parameters = trial.parameters
            elif plain is not None and not trial.is_weight:
                parameters = activation_parameters(plain.ranges[trial.name], self._switches.dtype)
        fed = dict(zip(self._switches.inputs, _scalars(selected, parameters), strict=True))
        return self._switches.read(run(self._session, {**feed, **fed}), feed)


@dataclass(frozen=True)
class _Answers:
    """Float outputs, of the positions that count, and the range of each tensor that has one in `_Switches.ranges`."""

    outputs: Mapping[str, Array]
    ranges: Mapping[str, Range]


@dataclass(frozen=True)
class _Switches:
    """`inputs`: names of selector, scale and zero point; numbers that select; `ranges`: outputs that hold extremes."""

    inputs: tuple[str, str, str]
    tensors: Mapping[str, int]
    weights: Mapping[str, int]
    ranges: Mapping[str, tuple[str, str]]
    dtype: str

    def read(self, outputs: Mapping[str, Array], feed: Feeds) -> _Answers:
        mask = counted_positions(feed)
        extremes = {name for pair in self.ranges.values() for name in pair}
        answers = {
            name: without_padding(array, mask)
            for name, array in outputs.items()
            if name not in extremes and array.dtype.kind == "f"
        }
        ranges = {key: Range(*(float(outputs[name]) for name in pair)) for key, pair in self.ranges.items()}
        return _Answers(answers, ranges)


@contextmanager
def open_probe(setup: QuantizationSetup, samples: InputData | None = None) -> Iterator[ErrorProbe]:
    """A probe for the activations and weights of the setup's plan; `samples`: `MAX_SAMPLES` of the data where None.

    Raises ModelNotRunnableError.
    """
    copy = _without_softmax(setup.model)
    switches = _Builder(setup.plan.on(copy.graph), setup.weight_store(Editor(copy))).build()
    with session_of(copy, threads=2) as session:
        yield ErrorProbe(setup, session, switches, samples or setup.context.data.spread(MAX_SAMPLES))


class _Builder:
    """Puts the switches into a model that belongs to it, that of the plan and the store."""

    def __init__(self, plan: Plan, store: WeightStore) -> None:
        self._graph, self._plan, self._store = plan.graph, plan, store
        self._editor, config = store.editor, store.config
        kind = onnx_ir.DataType.UINT8 if config.activations == "uint8" else onnx_ir.DataType.INT8
        types = (onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT, kind)
        self._inputs = tuple(
            onnx_ir.Value(name=self._editor.name(name), type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape([]))
            for name, dtype in zip(("selected", "scale", "zero_point"), types, strict=True)
        )

    def build(self) -> _Switches:
        first, second, third = (value.name or "" for value in self._inputs)
        products = {id(node.inputs[0]) for node in self._plan.layers if node.op_type != "Conv"}
        tensors = [tensor for tensor in self._plan.activations.values() if tensor.has_own_range]
        ranges = {
            tensor.value.name or "": self._extremes(tensor.value)
            for tensor in tensors
            if id(tensor.value) in products and not tensor.all_consumers
        }
        weights = {node.outputs[0].name or "": number for number, node in enumerate(self._plan.layers)}
        names = {tensor.value.name or "": len(weights) + number for number, tensor in enumerate(tensors)}
        for tensor, number in zip(tensors, names.values(), strict=True):
            self._switch_tensor(tensor, number)
        # Afterwards, since they give the outputs of layers, which may be activations of the plan, to other nodes.
        for node, number in zip(self._plan.layers, weights.values(), strict=True):
            self._switch_weight(node, number)
        self._graph.inputs.extend(self._inputs)
        return _Switches((first, second, third), names, weights, ranges, self._store.config.activations)

    def _extremes(self, value: onnx_ir.Value) -> tuple[str, str]:
        """Names of two outputs that hold the smallest and the largest value of a tensor."""
        names = []
        for op_type in ("ReduceMin", "ReduceMax"):
            node = self._editor.make(op_type, [value], value.name or "tensor", attributes={"keepdims": 0})
            self._graph.append(node)
            node.outputs[0].type, node.outputs[0].shape = _FLOAT, onnx_ir.Shape([])
            self._graph.outputs.append(node.outputs[0])
            names.append(node.outputs[0].name or "")
        return names[0], names[1]

    def _switch_weight(self, node: onnx_ir.Node, number: int) -> None:
        output = node.outputs[0]
        twin = self._editor.make(node.op_type, node.inputs, label(node))
        twin.attributes.update(node.attributes)
        # In float32 again: of DequantizeLinear and MatMul onnxruntime would make something else.
        weight = self._store.layer(node).dequantize()
        twin.replace_input_with(1, self._editor.constant(self._graph, weight, f"{label(node)}_weight"))
        switch = self._switch(node, output, number)
        self._editor.hand_over(output, switch.outputs[0])
        output.name = self._editor.name(f"{label(node)}_float")
        self._fill(switch, [twin], [node])

    def _switch_tensor(self, tensor: Activation, number: int) -> None:
        value, (_, scale, zero_point) = tensor.value, self._inputs
        uses = [(user, index) for user, index in value.uses() if self._plan.reads(tensor, user, index)]
        is_output = value.is_graph_output() and tensor.all_consumers
        producer = value.producer()
        switch = self._switch(producer, value, number)
        quantize = self._editor.make("QuantizeLinear", [value, scale, zero_point], value.name or "")
        dequantize = self._editor.make("DequantizeLinear", [quantize.outputs[0], scale, zero_point], value.name or "")
        same = self._editor.make("Identity", [value], value.name or "")
        if is_output:
            self._editor.hand_over(value, switch.outputs[0])
            value.name = self._editor.name("float")
            for user in (quantize, same):
                user.replace_input_with(0, value)
        else:
            # Readers in bodies of If and Loop see the switched value as well: they lie behind it.
            for user, index in uses:
                user.replace_input_with(index, switch.outputs[0])
        self._fill(switch, [quantize, dequantize], [same])

    def _switch(self, after: onnx_ir.Node | None, value: onnx_ir.Value, number: int) -> onnx_ir.Node:
        """An If without branches yet, behind what makes the value, or at the start."""
        name = value.name or "tensor"
        mine = self._editor.constant(self._graph, np.asarray(number, np.int64), f"{name}_number")
        equal = self._editor.make("Equal", [self._inputs[0], mine], f"{name}_chosen")
        switch = self._editor.make("If", [equal.outputs[0]], f"{name}_switch")
        if after is None:
            self._graph.insert_before(self._graph[0], [equal, switch])
        else:
            self._graph.insert_after(after, [equal, switch])
        return switch

    def _fill(self, switch: onnx_ir.Node, then: Sequence[onnx_ir.Node], otherwise: Sequence[onnx_ir.Node]) -> None:
        for key, nodes in (("then_branch", then), ("else_branch", otherwise)):
            inside = [node for node in nodes if node.graph is not None]
            if inside:
                graph_of(inside[0]).remove(inside)
            output = nodes[-1].outputs[0]
            output.type = _FLOAT
            name = self._editor.name(f"{switch.name}_{key}")
            switch.attributes[key] = onnx_ir.AttrGraph(key, onnx_ir.Graph([], [output], nodes=nodes, name=name))


def _scalars(selected: int, parameters: ActivationParameters) -> tuple[Array, Array, Array]:
    return (
        np.asarray(selected, np.int64),
        np.asarray(parameters.scale, np.float32),
        np.asarray(parameters.zero_point, parameters.dtype),
    )


def _squared_distance(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """Over the elements that are finite in `before`; infinite where one of them is not in `after`."""
    total = 0.0
    for name, array in before.items():
        if array.shape != after[name].shape:
            return math.inf
        total += float(np.square(after[name][np.isfinite(array)].astype(np.float64) - _finite(array)).sum())
    return total if math.isfinite(total) else math.inf


def _finite(array: Array) -> NDArray[np.float64]:
    return array[np.isfinite(array)].astype(np.float64)
