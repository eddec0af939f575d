"""com.microsoft FusedConv and FusedGemm back into Conv or Gemm and its activation, since only those can be quantized.

    FusedConv(X, W, B, Z; activation, activation_params) = activation(Conv(X, W, B) + Z)
    FusedGemm(A, B, C; activation, activation_alpha, activation_beta) = activation(Gemm(A, B, C))

Reference: onnxruntime's docs/ContribOperators.md. A node with an activation that is not known here is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import MICROSOFT, attribute, graph_of, input_of, label
from modelpress_compression.model import Model

# Activation -> the names of its parameters, in the order of activation_params.
_PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Relu": (),
        "Tanh": (),
        "Sigmoid": (),
        "LeakyRelu": ("alpha",),
        "HardSigmoid": ("alpha", "beta"),
        "Clip": ("min", "max"),
    }
)
_FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
_OWN = ("activation", "activation_params", "activation_alpha", "activation_beta", "activation_gamma")


def expand_fused(model: Model, editor: Editor) -> int:
    """Expands in place; returns how many nodes."""
    nodes = [node for node in model.nodes() if node.domain == MICROSOFT and node.op_type in _FUSED]
    return sum(_expand(node, editor) for node in nodes)


def _expand(node: onnx_ir.Node, editor: Editor) -> bool:
    activation = attribute(node, "activation", "")
    if activation not in _PARAMETERS:
        return False
    is_conv = node.op_type == "FusedConv"
    kept = {name: value for name, value in node.attributes.items() if name not in _OWN}
    inputs = [input_of(node, index) for index in range(3)]
    plain = editor.make(_FUSED[node.op_type], inputs, label(node))
    plain.attributes.update(kept)
    plain.name = node.name  # globs of the recipe go on matching
    graph_of(node).insert_before(node, plain)
    (result,) = plain.outputs
    residual = input_of(node, 3) if is_conv else None
    if residual is not None:
        (result,) = editor.emit(node, "Add", [result, residual], label(node))
    result = _activation(node, activation, result, editor)
    editor.hand_over(node.outputs[0], result)
    graph_of(node).remove(node, safe=True)
    return True


def _activation(node: onnx_ir.Node, activation: str, value: onnx_ir.Value, editor: Editor) -> onnx_ir.Value:
    parameters = _activation_parameters(node, activation)
    if activation == "Clip":
        graph = graph_of(node)
        bounds = [
            editor.constant(graph, np.asarray(parameters[name], np.float32), f"{label(node)}_{name}")
            if name in parameters
            else None
            for name in ("min", "max")
        ]
        return editor.emit(node, "Clip", [value, *bounds], label(node))[0]
    return editor.emit(node, activation, [value], label(node), attributes=parameters)[0]


def _activation_parameters(node: onnx_ir.Node, activation: str) -> dict[str, Any]:
    names = _PARAMETERS[activation]
    if node.op_type == "FusedGemm":
        given = {"alpha": attribute(node, "activation_alpha", None), "beta": attribute(node, "activation_beta", None)}
        return {name: given[name] for name in names if given.get(name) is not None}
    return dict(zip(names, attribute(node, "activation_params", ()), strict=False))
