"""Forms around 8-bit nodes that onnxruntime's optimizer neither takes apart nor completes.

It merges and quantizes nodes by patterns of its own before it looks for integer kernels. Where one of them meets what
is written here, a node computes in float32 that should not, or in 8 bits that should not.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.encodings.products import added_bias
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_tensor, input_of, is_op, label, only_consumer, rank
from modelpress_compression.model import Model
from modelpress_compression.passes.base import is_excluded
from modelpress_compression.passes.quantize.eligible import why_not_matrix


def take_in_biases(model: Model, exclude: tuple[str, ...]) -> int:
    """Makes a Gemm of each product of two matrices and the bias behind it, under the product's name; returns how many.

        x [M, K] @ W [K, N] + bias [N]    ->    Gemm(x, W, bias)

    onnxruntime does the same (MatMulAddFusion), but in float32: the bias that it brings in is no integer, so that no
    integer kernel takes the Gemm, and its weight is dequantized in every run, which took some 20 times as long as the
    integer kernel for 256 x 256 weights.
    """
    editor, taken = Editor(model), 0
    for node in list(model.graph):
        found = added_bias(node) if is_op(node, "MatMul") and rank(node.inputs[0]) == 2 else None
        if found is None or is_excluded(node.name, exclude) or why_not_matrix(node):
            continue
        add, index = found
        weight, bias = constant_tensor(node.inputs[1]), constant_tensor(add.inputs[index])
        if weight is None or bias is None or tuple(bias.shape) != tuple(weight.shape)[1:]:
            continue
        gemm = editor.make("Gemm", [*node.inputs, add.inputs[index]], label(node))
        model.graph.insert_before(add, gemm)
        editor.hand_over(add.outputs[0], gemm.outputs[0])
        model.graph.remove([add, node], safe=True)
        gemm.name = node.name
        taken += 1
    return taken


def keep_sums_apart(graph: onnx_ir.Graph) -> int:
    """Keeps onnxruntime from merging an integer product with the sum behind it; returns how many were kept apart.

    The merged Gemm would have a float32 summand, hence no integer kernel (see `take_in_biases`). MatMulAddFusion merges
    an Add into a MatMul, GemmSumFusion a Sum into a Gemm. Either operator adds the same, so that the other one serves.
    """
    apart = 0
    for node in graph:
        user = only_consumer(node.outputs[0])
        if user is None or not all(is_op(_maker(node, index), "DequantizeLinear") for index in (0, 1)):
            continue
        if is_op(node, "MatMul") and is_op(user, "Add") and _may_become_gemm(node.outputs[0]):
            user.op_type = "Sum"
        elif is_op(node, "Gemm") and input_of(node, 2) is None and is_op(user, "Sum") and len(user.inputs) == 2:
            user.op_type = "Add"
        else:
            continue
        apart += 1
    return apart


def _may_become_gemm(product: onnx_ir.Value) -> bool:
    """A product of more than two axes is merged only where every extent is known, by a Reshape before and behind it."""
    shape = product.shape
    return shape is None or len(shape) == 2 or all(isinstance(extent, int) for extent in shape)


def guard_float_nodes(graph: onnx_ir.Graph, editor: Editor) -> int:
    """Keeps onnxruntime from quantizing the nodes that were left float32 on purpose; returns how many were guarded.

    Its WeightBiasQuantization rewrites DQ -> Conv -> [Relu] -> Q with a float32 weight into 8 bits for the whole
    tensor, which cost EfficientNet-Lite 14 dB. A Sum of one operand, which it does not see through, breaks the pattern
    for the price of a copy.
    """
    guarded = 0
    for node in list(graph):
        if not is_op(node, "Conv", "ConvTranspose", "Gemm"):
            continue
        if is_op(_maker(node, 0), "DequantizeLinear") and not is_op(_maker(node, 1), "DequantizeLinear"):
            node.replace_input_with(0, editor.emit(node, "Sum", [node.inputs[0]], f"{label(node)}_float")[0])
            guarded += 1
    return guarded


def _maker(node: onnx_ir.Node, index: int) -> onnx_ir.Node | None:
    value = input_of(node, index)
    return value.producer() if value is not None else None
