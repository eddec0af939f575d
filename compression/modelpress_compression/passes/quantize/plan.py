"""What runs in 8 bits under static quantization, and which tensors get a scale for it.

Three kinds of nodes take part:

1. heavy: Conv, MatMul and Gemm with constant weights; what is gained is gained here.
2. own range: light Convs (depthwise ones, stems), Add, Mul, Concat, pooling: computed in 8 bits where all they read is
   in 8 bits already and a quantized node reads what they write, so that no detour through float32 lies between two
   heavy nodes. On their own they mostly lose: a depthwise Conv takes 1.4 times float32's time, yet less than the
   detour. A small network, whose layers are all light or nearly so, can gain by a `wide` plan all the same.
   Concat needs one operand in 8 bits: it is cheaper to quantize the others than what they make together.
3. same range: MaxPool, Reshape, Split, Resize to the nearest, ...: move values about; outputs and input share scale and
   zero point.

A Relu or Clip that alone reads a node of 1 or 2 is absorbed: the range of its output, ending at the bounds, does its
work, and onnxruntime removes it. References: onnxruntime's QDQ selectors, qdq_selector_action_transformer.cc.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir

from modelpress_compression.graph.read import attribute, constant_array, input_of, is_constant, is_op
from modelpress_compression.passes.quantize.weights import why_not_matrix, why_not_weight

HEAVY = ("Conv", "MatMul", "Gemm")
_OWN_RANGE = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool")
_SAME_RANGE = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice", "Gather", "DepthToSpace",
    "Resize",
)  # fmt: skip
_ACTIVATIONS = ("Relu", "Clip")
# Products summed up per output of a Conv: with fewer the integer kernel does not win.
LIGHT_PRODUCTS = 32
# Weights of a product: the heads of two small classifiers, of 500 and 640, cost them 4 to 6 % of their time in 8 bits,
# unless their input is in 8 bits already.
LIGHT_WEIGHTS = 1024


@dataclass(frozen=True)
class Tensor:
    """One tensor that goes through QuantizeLinear and DequantizeLinear. `range_of`: the value whose range it has."""

    value: onnx_ir.Value
    range_of: onnx_ir.Value
    # All consumers read the 8-bit form: the float32 one does not exist where its producer computes in 8 bits.
    all_consumers: bool
    # It has another's range because that joins it, and has its own in plans where that runs in float32.
    joined: bool = False

    @property
    def has_own_range(self) -> bool:
        """In this plan, or in a smaller one."""
        return self.joined or self.range_of is self.value


@dataclass
class Plan:
    """`nodes` in the graph's order; `tensors` by the id of their value."""

    graph: onnx_ir.Graph
    nodes: list[onnx_ir.Node]
    wide: bool
    tensors: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def members(self) -> frozenset[onnx_ir.Node]:
        """The nodes, for the question whether one is among them."""
        return frozenset(self.nodes)

    @property
    def heavy(self) -> list[onnx_ir.Node]:
        """The nodes of the first kind, and light Convs."""
        return [node for node in self.nodes if node.op_type in HEAVY]

    def on(self, graph: onnx_ir.Graph) -> Plan:
        """The same plan for a clone of the graph."""
        names = {node.outputs[0].name for node in self.heavy}
        heavy = [node for node in graph if node.op_type in HEAVY and node.outputs[0].name in names]
        return make_plan(graph, heavy, wide=self.wide)

    def observed(self) -> list[onnx_ir.Value]:
        """The values whose ranges calibration must find, each once: those of smaller plans among them."""
        values = [value for tensor in self.tensors.values() for value in (tensor.range_of, tensor.value)]
        return list({id(value): value for value in values}.values())


def why_not_static(node: onnx_ir.Node) -> str | None:
    """Why a heavy node is not quantized statically; None: it can be."""
    if node.op_type != "Conv":
        reason = why_not_matrix(node)
        return reason or _why_not_gemm(node)
    # A small kernel can still do much work: it runs once for every pixel.
    if reason := why_not_weight(node, 1, least=1):
        return reason
    if input_of(node, 2) is not None and not is_constant(input_of(node, 2)):
        return "its bias is computed at run time"
    return None


def is_light(node: onnx_ir.Node) -> bool:
    """Whether a node does so little that 8 bits alone make it slower: a Conv that sums up few products, or a product of
    few weights."""
    weight = node.inputs[1] if node.op_type in HEAVY else None
    if weight is None or weight.shape is None:
        return False
    extents = [int(extent) for extent in weight.shape if isinstance(extent, int)]
    return math.prod(extents[1:]) < LIGHT_PRODUCTS if node.op_type == "Conv" else math.prod(extents) < LIGHT_WEIGHTS


def _why_not_gemm(node: onnx_ir.Node) -> str | None:
    if node.op_type == "Gemm" and not all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")):
        return "it scales its operands (alpha, beta)"
    if node.op_type == "Gemm" and input_of(node, 2) is not None:
        bias = constant_array(input_of(node, 2))
        if bias is None or bias.ndim != 1:
            return "its bias is no constant vector"
    return None


def make_plan(graph: onnx_ir.Graph, heavy: Iterable[onnx_ir.Node], *, wide: bool = False) -> Plan:
    """The plan for one graph with these heavy nodes, in one pass forward and one backward.

    `wide`: light Convs are in 8 bits wherever they stand, not only between others, and so are sums of tensors that are
    in 8 bits, even where float32 goes on behind them: one tensor is dequantized then instead of two.
    """

    def waits(node: onnx_ir.Node) -> bool:
        return not wide and is_light(node)

    selected = set(heavy)
    available: set[int] = set()  # ids of values that exist in 8 bits if the nodes so far are kept
    candidates: list[onnx_ir.Node] = []
    for node in graph:
        if (node in selected and not (waits(node) and id(node.inputs[0]) not in available)) or _is_glue(
            node, available
        ):
            candidates.append(node)
            available.update(map(id, outputs_of(node)))
    kept: set[onnx_ir.Node] = set()
    for node in reversed(candidates):
        # A product gives float32 out of 8 bits for nothing.
        ends = (wide and node.op_type == "Add") or (node in selected and node.op_type != "Conv")
        if ends or (node in selected and not waits(node)) or _is_read(node, kept):
            kept.add(node)
    plan = Plan(graph, [node for node in candidates if node in kept], wide)
    _collect_tensors(plan, kept)
    return plan


def _collect_tensors(plan: Plan, kept: set[onnx_ir.Node]) -> None:
    rectified: set[int] = set()
    for node in plan.nodes:
        for value in activations_of(node):
            if id(value) not in plan.tensors:
                plan.tensors[id(value)] = Tensor(value, value, all_consumers=False)
        if node.op_type == "Concat":
            _share_range(node, plan, rectified)
        # A matrix product may also give float32, which is more exact where no quantized node reads it.
        if node.op_type in ("MatMul", "Gemm") and not _is_read(node, kept):
            continue
        for output in outputs_of(node):
            source = plan.tensors[id(node.inputs[0])].range_of if node.op_type in _SAME_RANGE else output
            plan.tensors[id(output)] = Tensor(output, source, all_consumers=True)
    for key, tensor in plan.tensors.items():
        root = tensor.range_of
        while plan.tensors[id(root)].range_of is not root:
            root = plan.tensors[id(root)].range_of
        plan.tensors[key] = replace(tensor, range_of=root)


def _share_range(concat: onnx_ir.Node, plan: Plan, rectified: set[int]) -> None:
    """What only a Concat reads takes the range of the whole at once, so that no second rounding brings it to that.

    The end of a tensor's own range may do the work of a Relu: so does that of a whole which holds no others. A Clip's
    upper end is its own. `rectified`: ids of the wholes so far that hold no others.
    """
    operands, whole = [plan.tensors[id(value)] for value in activations_of(concat)], output_of(concat)
    relus = [_is_rectified(operand.value, rectified) for operand in operands]
    if all(relus) or is_op(whole.producer(), "Relu"):
        rectified.add(id(whole))
    for operand, relu in zip(operands, relus, strict=True):
        bounded = is_op(operand.value.producer(), "Clip") or (relu and id(whole) not in rectified)
        alone = len(operand.value.uses()) == 1 and not operand.value.is_graph_output()
        if alone and not bounded and operand.range_of is operand.value:
            plan.tensors[id(operand.value)] = replace(operand, range_of=whole, joined=True)


def _is_rectified(value: onnx_ir.Value, rectified: set[int]) -> bool:
    return id(value) in rectified or is_op(value.producer(), "Relu")


def _is_read(node: onnx_ir.Node, kept: set[onnx_ir.Node]) -> bool:
    """Whether a kept node reads any of its outputs."""
    return any(user in kept for output in outputs_of(node) for user in output.consumers())


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
    users = tuple(output.uses())
    if node.op_type in _SAME_RANGE or output.is_graph_output() or len(users) != 1:
        return output
    user = users[0].node
    if user.op_type not in _ACTIVATIONS or user.domain or user.graph is not node.graph or users[0].idx:
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


def _is_glue(node: onnx_ir.Node, available: set[int]) -> bool:
    if node.domain or node.op_type not in (*_OWN_RANGE, *_SAME_RANGE) or not _has_8_bit_form(node):
        return False
    there = [id(value) in available for value in activations_of(node)]
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
    return node.op_type != "AveragePool" or not attribute(node, "ceil_mode", 0)


def _moves_only(resize: onnx_ir.Node) -> bool:
    """Whether every output is one of the inputs."""
    cropping = attribute(resize, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return attribute(resize, "mode", "nearest") == "nearest" and not cropping
