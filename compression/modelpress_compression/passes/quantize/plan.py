"""What runs in 8 bits under static quantization, and which activations get a scale for it.

Three kinds of nodes take part:

1. layers: Conv, MatMul and Gemm with constant weights. Compute-bound ones are what is to be gained.
2. own range: memory-bound layers (depthwise Convs, stems), Add, Mul, Concat, pooling: computed in 8 bits where all they
   read is in 8 bits already and a quantized node reads what they write, so that no detour through float32 lies between
   two compute-bound layers. On their own they mostly lose: a depthwise Conv takes 1.4 times float32's time, yet less
   than the detour. A small network, whose layers are all memory-bound or nearly so, can gain by a `full` plan all the
   same. Concat needs one operand in 8 bits: it is cheaper to quantize the others than what they make together.
3. same range: MaxPool, Reshape, Split, Resize to the nearest, ...: move values about; outputs and input share scale and
   zero point.

A Relu or Clip that alone reads a node of 1 or 2 is absorbed: the range of its output, ending at the bounds, does its
work, and onnxruntime removes it. References: onnxruntime's QDQ selectors, qdq_selector_action_transformer.cc.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx_ir

from modelpress_compression.graph.read import (
    attribute,
    constant_array,
    input_of,
    is_constant,
    is_op,
    only_consumer,
    required,
)
from modelpress_compression.passes.quantize.dead_ends import dead_ends
from modelpress_compression.passes.quantize.eligible import why_not_matrix, why_not_weight
from modelpress_compression.passes.quantize.plain_forms import has_8_bit_pooling

LAYER_OPERATORS = ("Conv", "MatMul", "Gemm")
_OWN_RANGE = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool")
_SAME_RANGE = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice", "Gather", "DepthToSpace",
    "Resize",
)  # fmt: skip
_ACTIVATION_FUNCTIONS = ("Relu", "Clip")
# A Conv that sums up fewer products for each output is memory-bound: the integer kernel does not win.
MIN_PRODUCTS = 32
# A product of fewer weights likewise: the heads of two small classifiers, of 500 and 640, cost them 4 to 6 % of their
# time in 8 bits, unless their input is in 8 bits already.
MIN_WEIGHTS = 1024


@dataclass(frozen=True)
class Activation:
    """One value that goes through QuantizeLinear and DequantizeLinear, with the range of `range_of`."""

    value: onnx_ir.Value
    range_of: onnx_ir.Value
    # All consumers read the 8-bit form: the float32 one does not exist where its producer computes in 8 bits.
    all_consumers: bool
    # It can have a range of its own: in this plan, or in a smaller one, without the Concat that lends it the whole's.
    has_own_range: bool = True


@dataclass(frozen=True)
class Plan:
    """`nodes` in the graph's order; `activations` by their value; `full`: see `make_plan`."""

    graph: onnx_ir.Graph
    nodes: Sequence[onnx_ir.Node]
    activations: Mapping[onnx_ir.Value, Activation]
    full: bool

    @cached_property
    def members(self) -> frozenset[onnx_ir.Node]:
        """The nodes, for the question whether one is among them."""
        return frozenset(self.nodes)

    @cached_property
    def layers(self) -> Sequence[onnx_ir.Node]:
        """The Conv, MatMul and Gemm nodes among them."""
        return [node for node in self.nodes if node.op_type in LAYER_OPERATORS]

    def on(self, graph: onnx_ir.Graph) -> Plan:
        """The same plan for a clone of the graph."""
        names = {node.outputs[0].name for node in self.layers}
        layers = [node for node in graph if node.op_type in LAYER_OPERATORS and node.outputs[0].name in names]
        return make_plan(graph, layers, full=self.full)

    def observed(self) -> list[onnx_ir.Value]:
        """The values whose ranges calibration must find, each once: those of smaller plans among them."""
        return list(dict.fromkeys(value for item in self.activations.values() for value in (item.range_of, item.value)))

    def reads(self, activation: Activation, user: onnx_ir.Node, index: int) -> bool:
        """Whether a use of the activation's value reads its 8-bit form."""
        return activation.all_consumers or (user in self.members and index < len(activations_of(user)))


def why_not_static(node: onnx_ir.Node, barred: Mapping[onnx_ir.Value, str]) -> str | None:
    """Why a layer is not quantized statically; None: it can be. `barred`: the `dead_ends` of its graph."""
    if reason := next((barred[value] for value in outputs_of(node) if value in barred), None):
        return reason
    if node.op_type != "Conv":
        return why_not_matrix(node) or _why_not_gemm(node)
    # A small kernel can still do much work: it runs once for every pixel.
    if reason := why_not_weight(node, 1, least=1):
        return reason
    if input_of(node, 2) is not None and not is_constant(input_of(node, 2)):
        return "its bias is computed at run time"
    return None


def _why_not_gemm(node: onnx_ir.Node) -> str | None:
    if node.op_type == "Gemm" and not all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")):
        return "it scales its operands (alpha, beta)"
    if node.op_type == "Gemm" and input_of(node, 2) is not None:
        bias = constant_array(input_of(node, 2))
        if bias is None or bias.ndim != 1:
            return "its bias is no constant vector"
    return None


def is_memory_bound(node: onnx_ir.Node) -> bool:
    """Whether a layer computes so little for what it reads and writes that 8 bits alone make it slower: a Conv that
    sums up few products, or a product of few weights."""
    weight = node.inputs[1] if node.op_type in LAYER_OPERATORS else None
    if weight is None or weight.shape is None:
        return False
    extents = [int(extent) for extent in weight.shape if isinstance(extent, int)]
    return math.prod(extents[1:]) < MIN_PRODUCTS if node.op_type == "Conv" else math.prod(extents) < MIN_WEIGHTS


def make_plan(graph: onnx_ir.Graph, layers: Iterable[onnx_ir.Node], *, full: bool = False) -> Plan:
    """The plan for one graph with these layers, in one pass forward and one backward.

    `full`: memory-bound layers are in 8 bits wherever they stand, not only between others, and so are sums of values
    that are in 8 bits, even where float32 goes on behind them: one value is dequantized then instead of two.
    """
    chosen = frozenset(layers)
    paying = frozenset(node for node in chosen if full or not is_memory_bound(node))
    # Forward: what can be in 8 bits. A layer that pays is worth a QuantizeLinear of its input; all others are not, and
    # wait for an input that is there in 8 bits.
    available: set[onnx_ir.Value] = set()
    candidates: list[onnx_ir.Node] = []
    barred = dead_ends(graph)
    for node in graph:
        if node in paying or (node in chosen and node.inputs[0] in available) or _connects(node, available, barred):
            candidates.append(node)
            available.update(outputs_of(node))
    # Backward: what is worth it. A chain in 8 bits that no layer reads in the end would be dequantized for nothing;
    # only products give float32 out of 8 bits without a DequantizeLinear.
    kept: set[onnx_ir.Node] = set()
    for node in reversed(candidates):
        ends = (node in chosen and node.op_type != "Conv") or (full and node.op_type == "Add")
        if node in paying or ends or _is_read(node, kept):
            kept.add(node)
    nodes = tuple(node for node in candidates if node in kept)
    return Plan(graph, nodes, _activations(nodes, kept), full)


def _connects(node: onnx_ir.Node, available: Collection[onnx_ir.Value], barred: Collection[onnx_ir.Value]) -> bool:
    """Whether the node passes on in 8 bits what it gets in 8 bits."""
    if node.domain or node.op_type not in (*_OWN_RANGE, *_SAME_RANGE) or not _has_8_bit_form(node):
        return False
    if any(value in barred for value in outputs_of(node)):
        return False
    there = [value in available for value in activations_of(node)]
    if node.op_type == "Concat":
        return any(there) and not any(is_constant(value) for value in node.inputs)
    return bool(there) and all(there)


def _has_8_bit_form(node: onnx_ir.Node) -> bool:
    """Whether onnxruntime runs it in 8 bits as it stands."""
    if node.op_type == "Split":
        return all(output.uses() or output.is_graph_output() for output in node.outputs)
    if any(output.uses() for output in node.outputs[1:]):
        return False
    if node.op_type == "Resize":
        return _moves_only(node)
    return node.op_type != "AveragePool" or has_8_bit_pooling(node)


def _moves_only(resize: onnx_ir.Node) -> bool:
    """Whether every output is one of the inputs."""
    cropping = attribute(resize, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return attribute(resize, "mode", "nearest") == "nearest" and not cropping


def _is_read(node: onnx_ir.Node, kept: Collection[onnx_ir.Node]) -> bool:
    """Whether a kept node reads any of its outputs."""
    return any(user in kept for output in outputs_of(node) for user in output.consumers())


def _activations(nodes: Sequence[onnx_ir.Node], kept: Collection[onnx_ir.Node]) -> dict[onnx_ir.Value, Activation]:
    """What the nodes read and write in 8 bits, in the graph's order."""
    found: dict[onnx_ir.Value, Activation] = {}
    rectified: set[onnx_ir.Value] = set()
    for node in nodes:
        for value in activations_of(node):
            # None of the nodes so far writes it: it comes in float32, and stays so for those who are not in the plan.
            found.setdefault(value, Activation(value, value, all_consumers=False))
        if node.op_type == "Concat":
            _share_range(node, found, rectified)
        # A matrix product may also give float32, which is more exact where no quantized node reads it.
        if node.op_type in ("MatMul", "Gemm") and not _is_read(node, kept):
            continue
        moves = node.op_type in _SAME_RANGE
        for output in outputs_of(node):
            source = found[required(node, 0)].range_of if moves else output
            found[output] = Activation(output, source, all_consumers=True, has_own_range=not moves)
    return {value: replace(item, range_of=_root(item.range_of, found)) for value, item in found.items()}


def _root(value: onnx_ir.Value, found: Mapping[onnx_ir.Value, Activation]) -> onnx_ir.Value:
    """Where a chain of borrowed ranges ends: a Concat may lend what it was lent by the next one."""
    while found[value].range_of is not value:
        value = found[value].range_of
    return value


def _share_range(concat: onnx_ir.Node, found: dict[onnx_ir.Value, Activation], rectified: set[onnx_ir.Value]) -> None:
    """What only a Concat reads takes the range of the whole at once, so that no second rounding brings it to that.

    The end of a value's own range may do the work of a Relu: so does that of a whole which holds no others. A Clip's
    upper end is its own. `rectified`: the wholes so far that hold no others.
    """
    operands, whole = [found[value] for value in activations_of(concat)], output_of(concat)
    relus = [operand.value in rectified or is_op(operand.value.producer(), "Relu") for operand in operands]
    if all(relus) or is_op(whole.producer(), "Relu"):
        rectified.add(whole)
    for operand, relu in zip(operands, relus, strict=True):
        bounded = is_op(operand.value.producer(), "Clip") or (relu and whole not in rectified)
        alone = len(operand.value.uses()) == 1 and not operand.value.is_graph_output()
        if alone and not bounded and operand.range_of is operand.value:
            found[operand.value] = replace(operand, range_of=whole)


def activations_of(node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
    """The inputs that are activations and take part in 8 bits."""
    count = len(node.inputs) if node.op_type in _OWN_RANGE else 1
    return [value for value in node.inputs[:count] if value is not None]


def outputs_of(node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
    """The outputs that are in 8 bits: all of a Split's, else the one of `output_of`."""
    return node.outputs if node.op_type == "Split" else (output_of(node),)


def output_of(node: onnx_ir.Node) -> onnx_ir.Value:
    """The node's output, or that of the Relu or Clip which it absorbs."""
    output = node.outputs[0]
    user = only_consumer(output)
    if user is None or node.op_type in _SAME_RANGE or not is_op(user, *_ACTIVATION_FUNCTIONS):
        return output
    if user.graph is not node.graph or user.inputs[0] is not output:
        return output
    bounds = [value for value in user.inputs[1:] if value is not None]
    return user.outputs[0] if all(is_constant(bound) for bound in bounds) and _holds_zero(user) else output


def _holds_zero(activation: onnx_ir.Node) -> bool:
    """Quantized ranges hold zero always, so a Clip to an interval without zero cannot be absorbed."""
    if activation.op_type == "Relu":
        return True
    low, high = constant_array(input_of(activation, 1)), constant_array(input_of(activation, 2))
    return (low is None or low.size != 1 or float(low.item()) <= 0) and (
        high is None or high.size != 1 or float(high.item()) >= 0
    )
