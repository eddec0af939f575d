"""BatchNormalization behind Conv, ConvTranspose or Gemm becomes part of the weights.

At inference it is an affine map of each channel, which `linear_operators` absorbs; in `Gemm` the channels are columns.
See Jacob et al., "Quantization and Training of Neural Networks ..." (arXiv:1712.05877), section 3.2.

It must not fire when the operator's weight is shared or not constant, when its output has another consumer or is an
output of the graph, in training mode, or when the statistics are not constant.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import int_attribute, is_op, only_consumer
from modelpress_compression.passes.fuse.linear_operators import LINEAR, batchnorm_affine, linear_operator_of
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope


class FuseConvBatchNorm:
    """Merges inference-mode BatchNormalization into the linear operator before it."""

    name: ClassVar[str] = "conv_batchnorm"
    op_types: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:  # noqa: PLR0911 - a return for each reason
        if (reason := self._why_not(node, scope)) is not None:
            return f"BatchNormalization stays: {reason}."
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None:
            return None
        linear = linear_operator_of(source)
        if isinstance(linear, str):
            return f"BatchNormalization stays: {linear}."
        affine = batchnorm_affine(node)
        if affine is None:
            return "BatchNormalization stays: its statistics are not constant."
        scale, shift = affine
        if scale.size != linear.channels:
            return "BatchNormalization stays: it has another number of channels than the operator before it."
        if not np.isfinite(scale).all():
            return "BatchNormalization stays: its variances are not positive numbers."
        scope.replace(node, [source, node], [linear.scaled(scale, shift, scope)])
        return FIRED

    def _why_not(self, node: onnx_ir.Node, scope: Scope) -> str | None:
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if not is_op(source, *LINEAR):
            return f"its input comes from {'a graph input' if source is None else source.op_type}, not from a Conv"
        if scope.excluded(source):
            return "the operator before it is excluded"
        if int_attribute(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
            return "it is in training mode"
        if only_consumer(source.outputs[0]) is None:
            return f"the output of {source.op_type} is used elsewhere as well"
        if source.graph is not node.graph:
            return f"{source.op_type} is outside of this subgraph"
        return None
