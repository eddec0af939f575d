"""Small patterns that run as one function, and functions that may overwrite what they read.

Exporters write SiLU as x * Sigmoid(x) and hard swish as x * HardSigmoid(x), which takes two passes over memory and one
more saved tensor for the gradient. Without gradients, an activation or a sum overwrites its input where no other node
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.dtypes import INTEGER_RANGES
from modelpress_compression.executor.ops.layout import broadcast
from modelpress_compression.executor.registry import Function
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import (
    constant_tensor,
    float_attribute,
    input_of,
    int_attribute,
    is_op,
    only_consumer,
)


@dataclass(frozen=True)
class Fused:
    """Runs in place of a node, on these `inputs` in place of the node's own."""

    function: Function
    in_place: Function
    inputs: tuple[onnx_ir.Value, ...]


def gated_activations(
    nodes: Sequence[onnx_ir.Node], kept: Sequence[onnx_ir.Value]
) -> tuple[dict[onnx_ir.Node, Fused], set[onnx_ir.Node]]:
    """(replacements of the products, gates that are not needed any more); values in `kept` must be computed."""
    fused: dict[onnx_ir.Node, Fused] = {}
    gone: set[onnx_ir.Node] = set()
    present, wanted = set(nodes), set(kept)
    for node in nodes:
        if not is_op(node, "Mul"):
            continue
        for value, gated in (node.inputs, node.inputs[::-1]):
            gate = gated.producer() if gated is not None else None
            if gate is None or value is None or gate not in present or gated in wanted or gated is None:
                continue
            functions = _gate(gate)
            if functions is not None and gate.inputs[0] is value and only_consumer(gated) is node:
                fused[node] = Fused(*functions, (value,))
                gone.add(gate)
                break
    return fused, gone


def _gate(node: onnx_ir.Node) -> tuple[Function, Function] | None:
    if is_op(node, "Sigmoid"):
        return F.silu, lambda x: F.silu(x, inplace=True)
    sixth = is_op(node, "HardSigmoid") and abs(float_attribute(node, "alpha", 0.2) - 1 / 6) < 1e-6
    if sixth and float_attribute(node, "beta", 0.5) == 0.5:
        return F.hardswish, lambda x: F.hardswish(x, inplace=True)
    return None


def fake_quantization(
    node: onnx_ir.Node, kept: Sequence[onnx_ir.Value], constant: Callable[[onnx_ir.Value | None], Tensor | None]
) -> Fused | None:
    """The replacement of a DequantizeLinear right behind a QuantizeLinear of 8 bits or less, with constant scales and
    zero points: one kernel of torch instead of five, with the same straight-through gradient."""
    source = node.inputs[0].producer() if is_op(node, "DequantizeLinear") and node.inputs[0] is not None else None
    if source is None or not is_op(source, "QuantizeLinear") or source.outputs[0] in kept:
        return None
    if source.graph is not node.graph:
        return None
    x, quantized = source.inputs[0], source.outputs[0]
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    dtype = _zero_point_type(source)
    simple = all(
        int_attribute(item, name, 0) == 0 for item in (node, source) for name in ("block_size", "output_dtype")
    )
    same = list(node.inputs[1:]) == list(source.inputs[1:]) and only_consumer(quantized) is node
    axis = int_attribute(node, "axis", 1)
    if not (simple and same and axis == int_attribute(source, "axis", 1)) or x is None or constant(x) is not None:
        return None
    if scale is None or zero is None or scale.dtype != torch.float32 or dtype not in _FAKE_TYPES:
        return None
    low, high = INTEGER_RANGES[dtype]
    if scale.numel() == 1:
        factor, offset = float(scale), int(zero)
        function = lambda x: torch.fake_quantize_per_tensor_affine(x, factor, offset, low, high)  # noqa: E731
    else:
        offsets = zero.to(torch.int32)
        function = lambda x: torch.fake_quantize_per_channel_affine(x, scale, offsets, axis % x.dim(), low, high)  # noqa: E731
    return Fused(function, function, (x,))


def _zero_point_type(node: onnx_ir.Node) -> onnx_ir.DataType | None:
    """Element type of the third input."""
    value = input_of(node, 2)
    tensor = constant_tensor(value)
    return tensor.dtype if tensor is not None else (None if value is None else value.dtype)


_FAKE_TYPES = frozenset((onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8, onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4))

# Operators whose result is always new memory, no view of an input.
_FRESH = frozenset(
    (
        "Add", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Div", "Gemm", "GlobalAveragePool",
        "InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mul", "Relu", "Sigmoid", "Sub", "Tanh",
    )
)  # fmt: skip


def _added(a: Tensor, b: Tensor) -> Tensor:
    return a.add_(b) if a.shape == b.shape and a.dtype == b.dtype else torch.add(a, b)


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    fits = a.dtype == b.dtype and a.dim() >= b.dim() and broadcast(a.shape, b.shape) == a.shape
    return a.mul_(b) if fits else torch.mul(a, b)


def _clip(site: Site) -> Function | None:
    bounds = [site.constant(index) for index in (1, 2)]
    if any(bound is None and site.has(index) for index, bound in enumerate(bounds, 1)):
        return None
    low, high = (None if bound is None else bound.item() for bound in bounds)
    return None if low is None and high is None else lambda x, *_: x.clamp_(low, high)


_IN_PLACE: Mapping[str, Callable[[Site], Function | None]] = {
    "Relu": lambda _: torch.relu_,
    "Sigmoid": lambda _: torch.sigmoid_,
    "Tanh": lambda _: torch.tanh_,
    "HardSwish": lambda _: lambda x: F.hardswish(x, inplace=True),
    "LeakyRelu": lambda site: lambda x: F.leaky_relu(x, site.number("alpha", 0.01), inplace=True),
    "Clip": _clip,
    "Add": lambda _: _added,
    "Mul": lambda _: _multiplied,
}


def in_place(site: Site) -> Function | None:
    """The node's function for a first input that may be overwritten; None where there is none."""
    build = _IN_PLACE.get(site.node.op_type) if site.node.domain in ("", "ai.onnx") else None
    return None if build is None else build(site)


def may_overwrite(value: onnx_ir.Value | None, kept: Sequence[onnx_ir.Value], given: Collection[onnx_ir.Value]) -> bool:
    """Whether the value is memory of its own that only one node reads: neither kept nor given from outside."""
    if value is None or value in kept or value in given or only_consumer(value) is None:
        return False
    producer = value.producer()
    return producer is not None and (producer.domain or "") in ("", "ai.onnx") and producer.op_type in _FRESH
