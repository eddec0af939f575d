"""Affine maps around linear operators: the algebra that all merges into weights share.

With W and b of an operator y = W x + b, an affine map behind it is absorbed by

    s * (W x + b) + t  =  (s W) x + (s b + t)

where s and t hold one number for each output channel:

    Conv           W [out, in/group, k...]           axis 0
    ConvTranspose  W [in, out/group, k...]           channel c of group g is g * (out/group) + c
    Gemm           W [in, out], with transB [out, in]; alpha is part of W and beta of b

BatchNormalization at inference is such a map. With eps inside the root,

    BN(y) = gamma * (y - mean) / sqrt(var + eps) + beta  =  s * y + t
    s = gamma / sqrt(var + eps)        t = beta - s * mean

where gamma, beta, mean and var have shape [channels].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    constant_tensor,
    float_attribute,
    graph_of,
    input_of,
    int_attribute,
    required,
)
from modelpress_compression.passes.fuse.rewriting import Floats, Scope, float_array

LINEAR = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class LinearOperator:
    """A Conv, ConvTranspose or Gemm with a weight of its own.

    `bias`: [channels], None where it has none; `channels`: how many output channels it has; `rank`: of its output.
    """

    node: onnx_ir.Node
    weight: Floats
    bias: Floats | None
    channels: int
    rank: int

    def scaled(self, scale: Floats, shift: Floats, scope: Scope) -> onnx_ir.Node:
        """The same operator followed by `scale * y + shift`; both have shape [channels], float64. Not yet placed."""
        node, graph = self.node, graph_of(self.node)
        weight, bias = required(node, 1), input_of(node, 2)
        alpha, beta = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
        old = np.zeros(self.channels) if self.bias is None else self.bias.astype(np.float64) * beta
        values = (self.weight * self._spread(scale * alpha)).astype(self.weight.dtype)
        shifted = (old * scale + shift).astype(self.weight.dtype)
        inputs = [
            node.inputs[0],
            scope.constant(graph, values, weight.name or "weight"),
            scope.constant(graph, shifted, (bias and bias.name) or f"{node.name or node.op_type}.bias"),
        ]
        kept = [attribute for attribute in node.attributes.values() if attribute.name not in ("alpha", "beta")]
        return scope.make_like(node, node.op_type, inputs, kept)

    def _spread(self, scale: Floats) -> Floats:
        """`scale` in a shape that broadcasts against the weight."""
        factors: Floats = scale.astype(np.float64 if self.weight.dtype == np.float64 else np.float32)
        if self.node.op_type == "Gemm":
            return factors[:, None] if int_attribute(self.node, "transB", 0) else factors[None, :]
        trailing = (1,) * (self.weight.ndim - 2)
        if self.node.op_type == "Conv":
            return factors.reshape(-1, 1, *trailing)
        groups = int_attribute(self.node, "group", 1)
        per_group = self.weight.shape[0] // groups
        spread: Floats = np.repeat(factors.reshape(groups, -1), per_group, axis=0).reshape(
            self.weight.shape[0], self.weight.shape[1], *trailing
        )
        return spread


def linear_operator_of(node: onnx_ir.Node) -> LinearOperator | str:
    """The operator with its numbers, or the reason why its weights cannot be changed."""
    weight, bias = node.inputs[1], input_of(node, 2)
    if (reason := why_fixed(node)) is not None:
        return reason
    if bias is not None and constant_tensor(bias) is None:
        return f"the bias of {node.op_type} is not constant"
    array = float_array(weight)
    if array is None or array.ndim < 2:
        return f"the weight of {node.op_type} is not a float tensor"
    channels = _channels(node, array)
    old = float_array(bias)
    if old is not None and old.size not in (1, channels):
        return f"the bias of {node.op_type} is not one number for each output channel"
    old = None if old is None else np.broadcast_to(old.reshape(-1), (channels,))
    return LinearOperator(node, array, old, channels, array.ndim)


def why_fixed(node: onnx_ir.Node) -> str | None:
    """Why the weight of a linear operator or MatMul cannot be changed; None: it can."""
    weight = node.inputs[1]
    if weight is None or constant_tensor(weight) is None:
        return f"the weight of {node.op_type} is not constant"
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return f"the weight of {node.op_type} is shared: changing it here would change its other users"
    return None


def _channels(node: onnx_ir.Node, weight: Floats) -> int:
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * int_attribute(node, "group", 1)
    if node.op_type == "Gemm" and not int_attribute(node, "transB", 0):
        return int(weight.shape[1])
    return int(weight.shape[0])


def per_channel(array: Floats, channels: int, rank: int) -> Floats | None:
    """A constant that meets an activation of `rank` axes with its `channels` on axis 1, as [channels]; None if it
    varies along other axes: [C, 1, 1], [1, C, 1, 1] and one number will do."""
    if array.ndim > rank:
        return None
    if array.size == 1:
        return np.full(channels, float(array.reshape(-1)[0]))
    full = (1,) * (rank - array.ndim) + array.shape
    return array.reshape(-1).astype(np.float64) if full == (1, channels) + (1,) * (rank - 2) else None


def batchnorm_affine(node: onnx_ir.Node) -> tuple[Floats, Floats] | None:
    """(s, t) of a BatchNormalization, each [channels]; None where its statistics are not constant."""
    gamma, beta, mean, variance = (float_array(value) for value in node.inputs[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    gamma, beta, mean, variance = (array.astype(np.float64).reshape(-1) for array in (gamma, beta, mean, variance))
    scale: Floats = gamma / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
    return scale, beta - scale * mean
