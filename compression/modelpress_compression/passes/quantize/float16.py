"""Weights in half precision, arithmetic in float32: a Cast stands before each weight's first use.

On GPUs (`target.DEVICES`: half) the arithmetic is in float16, too.

onnxruntime folds the casts when it loads the model, so that half of the file is all that changes: on four real models
the latency stays within 4 % of float32's. Computing in float16 would cost time on a CPU (1.24 times float32's for
EfficientNet-Lite0), and activations beyond 65504 would overflow. Weights that do not fit the type stay float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings import folded
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array, constant_tensor
from modelpress_compression.model import Model
from modelpress_compression.passes.base import is_excluded
from modelpress_compression.passes.quantize.eligible import why_not_float16
from modelpress_compression.passes.quantize.report import Findings

# Scalars and the like: a Cast costs more than they save.
_MIN_ELEMENTS = 16


def store_in_float16(model: Model, exclude: tuple[str, ...], findings: Findings) -> None:
    """Rewrites every float32 weight of the model's graphs in place into float16 and a Cast."""
    editor = Editor(model)
    stored: set[onnx_ir.Node] = set()
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if not _is_weight(value) or value.is_graph_input() or value.is_graph_output():
                continue
            users = [user for user, _ in value.uses()]
            if any(is_excluded(user.name, exclude) for user in users):
                findings.skip(users[0], "excluded by the recipe")
                continue
            weight = _array(value)
            if reason := why_not_float16(weight):
                findings.skip(users[0], f"weight {value.name!r} {reason}")
                continue
            real = folded.write_half(editor, graph, weight, value.name or "weight")
            onnx_ir.convenience.replace_all_uses_with(value, real)
            stored.update(users)
    findings.changes.update(node.op_type for node in stored)
    clean(model)


def compute_in_float16(model: Model, exclude: tuple[str, ...], findings: Findings) -> Model:
    """The model computing in float16, for GPUs; inputs and outputs stay float32, and so do `exclude`d nodes.

    By onnxruntime's own converter, which leaves operators in float32 that have no kernel in float16. Weights beyond the
    type are cut to its largest number: whoever judges the answers sees it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16 as convert  # of many modules

    kept = [node.name for node in model.graph if node.name and is_excluded(node.name, exclude)]
    proto: Any = onnx_ir.to_proto(model.ir)
    before = {value.name for value in proto.graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    made = convert(proto, keep_io_types=True, disable_shape_infer=True, node_block_list=kept)
    half = {value.name for value in made.graph.initializer if value.data_type == onnx.TensorProto.FLOAT16} & before
    findings.changes.update(
        node.op_type for node in made.graph.node if any(name in half for name in node.input) and node.op_type != "Cast"
    )
    ir = onnx_ir.from_proto(made)
    ir.graph.sort()  # the casts of inputs stand behind those who read them
    return replace(model, ir=ir)


def _is_weight(value: onnx_ir.Value) -> bool:
    tensor = constant_tensor(value)
    return (
        value.is_initializer()
        and bool(value.uses())
        and tensor is not None
        and tensor.dtype == onnx_ir.DataType.FLOAT
        and tensor.size >= _MIN_ELEMENTS
    )


def _array(value: onnx_ir.Value) -> NDArray[np.float32]:
    return np.asarray(constant_array(value), np.float32)
