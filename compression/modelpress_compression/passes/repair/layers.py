"""The layers of a cut model that repair can fit anew, in the order in which it must."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, replace_numbers, set_input
from modelpress_compression.graph.linear import Linear, Matrix, linear_of
from modelpress_compression.graph.read import (
    constant_array,
    graph_of,
    input_of,
    int_attribute,
    is_constant,
    is_op,
    label,
    only_consumer,
    other_operand,
)
from modelpress_compression.graph.subgraphs import read_values
from modelpress_compression.graph.watch import observable
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip


@dataclass(frozen=True)
class Layer:
    """One node of a cut model, and the Add of a constant vector behind it, if there is one.

    `level`: how many other such layers lie before it on the longest way from the inputs: layers of one level do not
    depend on each other. `intact`: name of what it reads in the uncut model; None where its weight is another, that of
    the last of several factors. `sum` and `other`: where the answers are added to something else, names of the sum and
    of the other summand, whose drift the layer can make up for (He et al., arXiv:1707.06168, section 3.3). `twins`:
    nodes of the same weight and bias, which are fitted as one with it: a head over the levels of a pyramid, a siamese
    net.
    """

    node: onnx_ir.Node
    linear: Linear
    level: int
    intact: str | None
    add: onnx_ir.Node | None
    sum: str | None = None
    other: str | None = None
    twins: tuple[Layer, ...] = ()

    @property
    def all(self) -> tuple[Layer, ...]:
        """Itself and its twins."""
        return (self, *self.twins)

    @property
    def name(self) -> str:
        return label(self.node)

    @property
    def data(self) -> str:
        """Name of the value that it reads."""
        value = self.node.inputs[0]
        return (value.name or "") if value is not None else ""

    @property
    def output(self) -> str:
        """Name of the value that it makes."""
        return (self.add or self.node).outputs[0].name or ""

    @property
    def names_full(self) -> list[str]:
        """Values of the uncut model that a fit needs."""
        return [name for one in self.all for name in (one.intact, one.output, one.sum) if name]

    @property
    def names_cut(self) -> list[str]:
        """Values of the cut model that a fit needs."""
        return [name for one in self.all for name in (one.data, one.other) if name]

    @property
    def weight(self) -> onnx_ir.Value:
        value = self.node.inputs[1]
        if value is None:
            raise TypeError(f"node {self.name!r} has no weight")
        return value

    @property
    def output_axis(self) -> int:
        """The axis of the weight along which its outputs lie."""
        return _output_axis(self.node)

    @property
    def numbers(self) -> Array:
        """Those of the weight."""
        array = constant_array(self.weight)
        if array is None:
            raise TypeError(f"the weight of {self.name!r} is not constant")
        return array

    @property
    def takes_bias(self) -> bool:
        """Whether a bias is there or can be given to the node."""
        return self.add is not None or is_op(self.node, "Conv", "Gemm")

    @property
    def bias(self) -> NDArray[np.float64]:
        """The bias that is in its answers; zeros where there is none."""
        node, place = self._bias_place()
        old = constant_array(input_of(node, place)) if self.takes_bias else None
        channels = self.numbers.shape[self.output_axis]
        return np.zeros(channels) if old is None else np.broadcast_to(old.astype(np.float64).reshape(-1), channels)

    def correct(self, weight: Matrix, bias: Matrix, editor: Editor) -> None:
        """Adds `weight` [g, K, O] and, where it takes one, `bias` [g, 1, O]."""
        old = self.numbers
        replace_numbers(self.weight, old.astype(np.float64) + self.linear.weight(weight, old.shape))
        if self.takes_bias:
            self._shift(bias.reshape(-1), editor)

    def _shift(self, by: NDArray[np.float64], editor: Editor) -> None:
        node, place = self._bias_place()
        value = input_of(node, place)
        old = constant_array(value)
        if value is not None and old is not None and len(value.uses()) == len(self.all) and old.size == by.size:
            replace_numbers(value, old.astype(np.float64) + by.reshape(old.shape))
            return
        dtype = self.weight.dtype or onnx_ir.DataType.FLOAT
        numbers = (self.bias + by).astype(dtype.numpy())
        shifted = editor.constant(graph_of(node), numbers, f"{self.weight.name}_repaired_bias")
        for one in self.all:
            set_input(*one._bias_place(), shifted)

    def _bias_place(self) -> tuple[onnx_ir.Node, int]:
        if self.add is None:
            return self.node, 2
        return self.add, 1 if self.add.inputs[0] is self.node.outputs[0] else 0


def find_layers(
    pruned: Model, touched: frozenset[str], readers: frozenset[str], full: Mapping[str, onnx_ir.Node]
) -> tuple[list[Layer], list[Skip]]:
    """The layers among `readers` (labels), those that read cut channels, and why others of them cannot be fitted.

    `touched`: names of the tensors that were cut; `full`: the nodes of the uncut model by label. Depthwise
    convolutions of it, which pass cut channels on, are layers as well.
    """
    layers: list[Layer] = []
    skipped: list[Skip] = []
    levels: dict[onnx_ir.Value, int] = {}  # of values that are not what they were
    for node in pruned.graph:
        read = read_values(node)
        known = [levels[value] for value in read if value in levels]
        level = max(known, default=0)
        changed = bool(known) or any(value.name in touched for value in read)
        if label(node) in readers or (known and _is_depthwise(node) and label(node) in full):
            found = _layer(node, level, pruned, full, levels)
            if isinstance(found, Layer):
                layers.append(found)
                level += 1
            else:
                skipped.append(Skip(label(node), f"Not fitted anew: {found}."))
        if changed:
            levels.update((value, level) for value in node.outputs)
    united, apart = _united(layers)
    return united, [*skipped, *apart]


def _united(layers: list[Layer]) -> tuple[list[Layer], list[Skip]]:
    """Layers of one weight as one, in their order; those whose weight has other users fall out."""
    by_weight: dict[onnx_ir.Value, list[Layer]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
    found: list[Layer] = []
    skipped: list[Skip] = []
    for weight, (first, *twins) in by_weight.items():
        if len(weight.uses()) == 1 + len(twins) and all(_is_twin(first, twin) for twin in twins):
            found.append(replace(first, twins=tuple(twins)))
        else:
            reason = "Not fitted anew: others use its weight as well."
            skipped += [Skip(layer.name, reason) for layer in (first, *twins)]
    return found, skipped


def _is_twin(first: Layer, other: Layer) -> bool:
    """Whether one fit can serve both: neither depends on the other, and they add the same bias."""
    biases = [input_of(*one._bias_place()) for one in (first, other)] if first.takes_bias else [None, None]
    same_form = first.linear == other.linear and first.takes_bias == other.takes_bias
    return first.level == other.level and same_form and biases[0] is biases[1]


def _is_depthwise(node: onnx_ir.Node) -> bool:
    return is_op(node, "Conv") and int_attribute(node, "group", 1) > 1


def _layer(
    node: onnx_ir.Node,
    level: int,
    pruned: Model,
    full: Mapping[str, onnx_ir.Node],
    levels: Mapping[onnx_ir.Value, int],
) -> Layer | str:
    """The layer, or why it cannot be fitted."""
    linear = linear_of(node)
    if isinstance(linear, str):
        return linear
    weight, original = node.inputs[1], full.get(label(node))
    if weight is None or weight.is_graph_output():
        return "others use its weight as well"
    if original is None or original.outputs[0].name != node.outputs[0].name:
        return "the uncut model has no such node"
    if not observable(node.inputs[0], pruned) or not node.outputs[0].name:
        return "its activations have no name"
    if is_op(node, "Conv", "Gemm") and (bias := input_of(node, 2)) is not None and not is_constant(bias):
        return "its bias is computed"
    add = None if is_op(node, "Conv", "Gemm") else _bias_add(node)
    output = (add or node).outputs[0]
    total, other = _residual(output, level, levels)
    if total not in {value.name for one in _consumers(original, add) for value in one.outputs}:
        total = other = None
    read = original.inputs[0]
    former = original.inputs[1]
    same = former is not None and former.name == weight.name
    intact = read.name if same and read is not None else None
    return Layer(node, linear, level, intact, add, total, other)


def _consumers(original: onnx_ir.Node, add: onnx_ir.Node | None) -> Iterator[onnx_ir.Node]:
    """What reads the answers in the uncut model."""
    output = original.outputs[0]
    follower = only_consumer(output) if add is not None else None
    yield from (follower.outputs[0] if follower is not None else output).consumers()


def _bias_add(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The Add that puts a constant vector on the product, and on nothing else."""
    add = only_consumer(node.outputs[0])
    if add is None or not is_op(add, "Add") or not add.outputs[0].name:
        return None
    array = constant_array(other_operand(add, node.outputs[0]))
    weight = node.inputs[1]
    outputs = weight.shape[_output_axis(node)] if weight is not None and weight.shape is not None else None
    return add if array is not None and array.ndim and array.shape[-1] == array.size == outputs else None


def _residual(
    output: onnx_ir.Value, level: int, levels: Mapping[onnx_ir.Value, int]
) -> tuple[str, str] | tuple[None, None]:
    """The sum that the output goes into, and what it is added to, if that drifted and is known before the fit."""
    add = only_consumer(output)
    if add is None or not is_op(add, "Add") or not add.outputs[0].name:
        return None, None
    other = other_operand(add, output)
    if other is None or not other.name or levels.get(other, level + 1) > level:
        return None, None
    return add.outputs[0].name, other.name


def _output_axis(node: onnx_ir.Node) -> int:
    if is_op(node, "Conv"):
        return 0
    return 0 if is_op(node, "Gemm") and int_attribute(node, "transB", 0) else 1
