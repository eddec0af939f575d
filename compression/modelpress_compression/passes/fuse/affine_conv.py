"""A multiplication or addition with constants before Conv becomes part of the weights.

With W [out, in/group, k...] and c, d of one number or one for each input channel i,

    sum_ik W[o,i,k] (c_i x_ik + d_i)  =  sum_ik (W[o,i,k] c_i) x_ik  +  sum_ik W[o,i,k] d_i

    Mul   W' = W c                        padding is no hindrance, since c * 0 = 0
    Add   b' = b + sum_ik W[o,i,k] d_i    only without padding: at the border the padded zeros carry no d
    Mul, Add before a padded Conv:  c x + d = c (x + d / c), so that the Mul goes and the Add stays

It must not fire when the weight is shared or not constant, or when a value between has another consumer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    constant_tensor,
    graph_of,
    int_attribute,
    ints_attribute,
    only_consumer,
    rank,
    string_attribute,
)
from modelpress_compression.passes.fuse.channels import linear_of
from modelpress_compression.passes.fuse.rewriting import FIRED, Floats, Outcome, Scope, float_array

# d / c must not blow up: rounding of x + d / c is relative to the larger of the two.
_MAX_QUOTIENT = 64.0


class FuseAffineConv:
    """Merges Mul and Add with a constant per channel into the Conv behind it."""

    name: ClassVar[str] = "affine_conv"
    op_types: ClassVar[frozenset[str]] = frozenset({"Conv"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:  # noqa: PLR0911 - a return for each reason
        source = _constant_operand(node.inputs[0], scope)
        if source is None:
            return None
        linear = linear_of(node)
        if isinstance(linear, str):
            return f"{source[0].op_type} with a constant before Conv stays: {linear}."
        if only_consumer(source[0].outputs[0]) is None or source[0].graph is not node.graph:
            return f"{source[0].op_type} with a constant before Conv stays: its result is used elsewhere as well."
        weight, group = linear.weight, int_attribute(node, "group", 1)
        numbers = _per_input_channel(source[2], weight, group)
        if numbers is None or rank(source[1]) != weight.ndim:
            return f"{source[0].op_type} with a constant before Conv stays: it is not one number for each channel."
        if source[0].op_type == "Mul":
            return _merge_scale(node, source, numbers, (weight, group), scope)
        bias = np.zeros(linear.channels) if linear.bias is None else linear.bias.astype(np.float64)
        if not _padded(node):
            shift = (weight.astype(np.float64) * _spread(numbers, weight, group)).sum(axis=tuple(range(1, weight.ndim)))
            _replace(node, source, weight, bias + shift, scope)
            return FIRED
        return _swap(node, source, numbers, (weight, group), scope)


_Source = tuple[onnx_ir.Node, onnx_ir.Value, Floats]


def _constant_operand(value: onnx_ir.Value | None, scope: Scope) -> _Source | None:
    """(node, its varying operand, its constant operand) if the value is a product or sum with a constant."""
    node = scope.producer(value, "Mul", "Add")
    if node is None:
        return None
    position = 0 if constant_tensor(node.inputs[0]) is not None else 1
    constant, varying = float_array(node.inputs[position]), node.inputs[1 - position]
    return None if constant is None or varying is None else (node, varying, constant)


def _per_input_channel(array: Floats, weight: Floats, group: int) -> Floats | None:
    channels = weight.shape[1] * group
    if array.ndim > weight.ndim or not np.isfinite(array).all():
        return None
    if array.size == 1:
        return np.full(channels, float(array.reshape(-1)[0]))
    full = (1,) * (weight.ndim - array.ndim) + array.shape
    return array.reshape(-1).astype(np.float64) if full == (1, channels) + (1,) * (weight.ndim - 2) else None


def _spread(numbers: Floats, weight: Floats, group: int) -> Floats:
    """One number for each input channel in a shape that broadcasts against the weight [out, in/group, k...]."""
    rows = np.repeat(numbers.reshape(group, -1), weight.shape[0] // group, axis=0)
    spread: Floats = rows.reshape(weight.shape[0], weight.shape[1], *(1,) * (weight.ndim - 2))
    return spread


def _padded(node: onnx_ir.Node) -> bool:
    automatic = string_attribute(node, "auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or (automatic == "NOTSET" and any(ints_attribute(node, "pads") or ()))


def _merge_scale(
    node: onnx_ir.Node, source: _Source, numbers: Floats, kernel: tuple[Floats, int], scope: Scope
) -> Outcome:
    weight, group = kernel
    scaled = (weight * _spread(numbers, weight, group).astype(weight.dtype)).astype(weight.dtype)
    _replace(node, source, scaled, None, scope)
    return FIRED


def _swap(node: onnx_ir.Node, source: _Source, numbers: Floats, kernel: tuple[Floats, int], scope: Scope) -> Outcome:
    """Mul, Add, padded Conv: the Mul moves over the Add into the weight."""
    weight, group = kernel
    add, varying, constant = source
    product = _constant_operand(varying, scope)
    if product is None or product[0].op_type != "Mul" or only_consumer(varying) is None:
        return "Add with a constant before Conv stays: at the border the padding of Conv would miss it."
    scale = _per_input_channel(product[2], weight, group)
    if scale is None or rank(product[1]) != weight.ndim or product[0].graph is not node.graph:
        return "Mul and Add before Conv stay: they are not one number for each channel."
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = numbers / scale
    if not (np.abs(quotient) < _MAX_QUOTIENT).all():
        return "Mul and Add before Conv stay: dividing by the factor would lose precision."
    shape = (1,) * weight.ndim if np.ptp(quotient) == 0 else (1, -1, *(1,) * (weight.ndim - 2))
    values = np.unique(quotient) if np.ptp(quotient) == 0 else quotient
    graph = graph_of(node)
    shift = scope.constant(graph, values.reshape(shape).astype(constant.dtype), f"{add.outputs[0].name}.shift")
    scaled = (weight * _spread(scale, weight, group).astype(weight.dtype)).astype(weight.dtype)
    shifted = scope.make_like(add, "Add", [product[1], shift])
    kernel_value = scope.constant(graph, scaled, (node.inputs[1].name if node.inputs[1] else None) or "weight")
    made = scope.make_like(node, "Conv", [shifted.outputs[0], kernel_value, *node.inputs[2:]], node.attributes.values())
    scope.replace(node, [product[0], add, node], [shifted, made])
    return FIRED


def _replace(node: onnx_ir.Node, source: _Source, weight: Floats, bias: Floats | None, scope: Scope) -> None:
    """Conv on the varying operand; `weight` as given, `bias` where it changes."""
    graph, old = graph_of(node), node.inputs[1]
    kernel = old
    if weight is not float_array(old):
        kernel = scope.constant(graph, weight, (old.name if old is not None else None) or "weight")
    inputs = [source[1], kernel, *node.inputs[2:]]
    if bias is not None:
        inputs[2:] = [scope.constant(graph, bias.astype(weight.dtype), f"{node.name or 'Conv'}.bias")]
    scope.replace(node, [source[0], node], [scope.make_like(node, "Conv", inputs, node.attributes.values())])
