"""A multiplication or addition with constants before Conv becomes part of the weights.

With W [out, in/group, k...] and c, d of one number or one for each input channel i,

    sum_ik W[o,i,k] (c_i x_ik + d_i)  =  sum_ik (W[o,i,k] c_i) x_ik  +  sum_ik W[o,i,k] d_i

    1. Mul   W' = W c                        padding is no hindrance, since c * 0 = 0
    2. Add   b' = b + sum_ik W[o,i,k] d_i    only without padding: at the border the padded zeros carry no d
    3. Mul, Add before a padded Conv:  c x + d = c (x + d / c), so that the Mul goes and the Add stays

It must not fire when the weight is shared or not constant, or when a value between has another consumer.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    required,
    string_attribute,
)
from modelpress_compression.passes.fuse.linear_operators import LinearOperator, linear_operator_of, per_channel
from modelpress_compression.passes.fuse.rewriting import FIRED, Floats, Outcome, Scope, float_array

# d / c must not blow up: rounding of x + d / c is relative to the larger of the two.
_MAX_QUOTIENT = 64.0


@dataclass(frozen=True)
class _Affine:
    """A product or a sum of a varying operand and a constant."""

    node: onnx_ir.Node
    varying: onnx_ir.Value
    constant: Floats


class FuseAffineConv:
    """Merges Mul and Add with a constant per channel into the Conv behind it."""

    name: ClassVar[str] = "affine_conv"
    op_types: ClassVar[frozenset[str]] = frozenset({"Conv"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        source = _affine_of(node.inputs[0], scope)
        if source is None:
            return None
        stays = f"{source.node.op_type} with a constant before Conv stays"
        conv = linear_operator_of(node)
        if isinstance(conv, str):
            return f"{stays}: {conv}."
        if only_consumer(source.node.outputs[0]) is None or source.node.graph is not node.graph:
            return f"{stays}: its result is used elsewhere as well."
        numbers = _per_input_channel(source, conv)
        if numbers is None:
            return f"{stays}: it is not one number for each channel."
        case = _merge_scale if source.node.op_type == "Mul" else _move_scale if _padded(node) else _merge_shift
        return case(source, numbers, conv, scope)


def _affine_of(value: onnx_ir.Value | None, scope: Scope) -> _Affine | None:
    node = scope.producer(value, "Mul", "Add")
    if node is None:
        return None
    position = 0 if constant_tensor(node.inputs[0]) is not None else 1
    constant, varying = float_array(node.inputs[position]), node.inputs[1 - position]
    return None if constant is None or varying is None else _Affine(node, varying, constant)


def _per_input_channel(source: _Affine, conv: LinearOperator) -> Floats | None:
    """The constant as [in]; None where it is anything else, or might broadcast the varying operand."""
    channels = conv.weight.shape[1] * int_attribute(conv.node, "group", 1)
    if rank(source.varying) != conv.rank or not np.isfinite(source.constant).all():
        return None
    return per_channel(source.constant, channels, conv.rank)


def _spread(numbers: Floats, conv: LinearOperator) -> Floats:
    """One number for each input channel in a shape that broadcasts against the weight [out, in/group, k...]."""
    outputs, inputs = conv.weight.shape[:2]
    group = int_attribute(conv.node, "group", 1)
    rows = np.repeat(numbers.reshape(group, -1), outputs // group, axis=0)
    spread: Floats = rows.reshape(outputs, inputs, *(1,) * (conv.weight.ndim - 2))
    return spread


def _scaled(numbers: Floats, conv: LinearOperator, scope: Scope) -> onnx_ir.Value:
    """A new weight W c."""
    weight = (conv.weight * _spread(numbers, conv).astype(conv.weight.dtype)).astype(conv.weight.dtype)
    return scope.constant(graph_of(conv.node), weight, required(conv.node, 1).name or "weight")


def _padded(node: onnx_ir.Node) -> bool:
    automatic = string_attribute(node, "auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or (automatic == "NOTSET" and any(ints_attribute(node, "pads") or ()))


def _merge_scale(source: _Affine, numbers: Floats, conv: LinearOperator, scope: Scope) -> Outcome:
    node = conv.node
    inputs = [source.varying, _scaled(numbers, conv, scope), *node.inputs[2:]]
    scope.replace(node, [source.node, node], [scope.make_like(node, "Conv", inputs, node.attributes.values())])
    return FIRED


def _merge_shift(source: _Affine, numbers: Floats, conv: LinearOperator, scope: Scope) -> Outcome:
    node = conv.node
    bias = np.zeros(conv.channels) if conv.bias is None else conv.bias.astype(np.float64)
    shift = (conv.weight.astype(np.float64) * _spread(numbers, conv)).sum(axis=tuple(range(1, conv.weight.ndim)))
    made = scope.constant(graph_of(node), (bias + shift).astype(conv.weight.dtype), f"{node.name or 'Conv'}.bias")
    inputs = [source.varying, node.inputs[1], made]
    scope.replace(node, [source.node, node], [scope.make_like(node, "Conv", inputs, node.attributes.values())])
    return FIRED


def _move_scale(add: _Affine, numbers: Floats, conv: LinearOperator, scope: Scope) -> Outcome:
    """Mul, Add, padded Conv: the Mul moves over the Add into the weight."""
    node = conv.node
    product = _affine_of(add.varying, scope)
    if product is None or product.node.op_type != "Mul" or only_consumer(add.varying) is None:
        return "Add with a constant before Conv stays: at the border the padding of Conv would miss it."
    scale = _per_input_channel(product, conv)
    if scale is None or product.node.graph is not node.graph:
        return "Mul and Add before Conv stay: they are not one number for each channel."
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = numbers / scale
    if not (np.abs(quotient) < _MAX_QUOTIENT).all():
        return "Mul and Add before Conv stay: dividing by the factor would lose precision."
    if np.ptp(quotient) == 0:
        quotient = quotient[:1]
    array = quotient.reshape(1, -1, *(1,) * (conv.rank - 2)).astype(add.constant.dtype)
    shift = scope.constant(graph_of(node), array, f"{add.node.outputs[0].name}.shift")
    shifted = scope.make_like(add.node, "Add", [product.varying, shift])
    inputs = [shifted.outputs[0], _scaled(scale, conv, scope), *node.inputs[2:]]
    made = scope.make_like(node, "Conv", inputs, node.attributes.values())
    scope.replace(node, [product.node, add.node, node], [shifted, made])
    return FIRED
