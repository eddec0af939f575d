"""Training of quantized models: integers become float weights behind fake quantization, and integers again.

    unfold    a copy of the model in which every quantized weight is a float weight ("latent") that fake quantization
              brings onto its grid; gradients pass as they are (straight-through, Bengio et al., arXiv:1308.3432)
    fold      the model as it was, with the integers of the trained weights; scales, zero points and nodes stay

So that a model that was quantized after training becomes one that was trained for its quantization (QAT). What computes
in integers itself, as dynamic quantization does, passes no gradient: it is left as it is, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from modelpress_compression.encodings.products import split_products
from modelpress_compression.graph.edit import Editor, replace_numbers
from modelpress_compression.graph.read import MICROSOFT, constant_tensor, is_op, label
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip, is_excluded
from modelpress_compression.passes.distill.fake_quantization.forms import form_of
from modelpress_compression.passes.distill.fake_quantization.grid import Emitter

__all__ = ["Unfolded", "unfold"]

# Quantization along an axis came with this version.
_LEAST_OPSET = 13
_INTEGERS = (
    "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear",
)  # fmt: skip
_INTEGERS_MICROSOFT = (
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QGemm", "QLinearAdd",
    "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool",
)  # fmt: skip


@dataclass(frozen=True)
class Unfolded:
    """`model`: what is trained. `latents`: by the name of each trained constant, the constant that stores it in the
    model as it was, and how its integers are made. `skipped`: nodes without gradients."""

    model: Model
    latents: dict[str, tuple[str, Callable[[Array], Array]]]
    skipped: tuple[Skip, ...]
    integers_multiplied: bool = False  # whether 8-bit weights meet 8-bit activations, as under static quantization

    def fold(self, trained: Model, into: Model) -> Model:
        """A copy of `into`, the model that was unfolded, with the numbers of the trained one."""
        written = into.clone()
        mine, theirs = (dict(_constants(model)) for model in (written, trained))
        for name, value in mine.items():
            found = constant_tensor(theirs.get(name))
            if found is not None and found.dtype.is_floating_point() and found is not constant_tensor(value):
                replace_numbers(value, np.asarray(found.numpy()))
        for latent, (stored, pack) in self.latents.items():
            tensor = constant_tensor(theirs[latent])
            if tensor is not None:
                replace_numbers(mine[stored], pack(np.asarray(tensor.numpy())))
        return written


def unfold(model: Model, exclude: tuple[str, ...]) -> Unfolded:
    """Weights that match `exclude`, by their own name or that of a node that uses them, stay as they are."""
    work = model.clone()
    split_products(work, Editor(work))
    latents: dict[str, tuple[str, Callable[[Array], Array]]] = {}
    skipped = []
    multiplied = False
    for node in list(work.nodes()):
        if is_op(node, *_INTEGERS) or is_op(node, *_INTEGERS_MICROSOFT, domain=MICROSOFT):
            skipped.append(Skip(label(node), _NO_GRADIENT.format(op_type=node.op_type)))
            continue
        form = form_of(node) if work.opset >= _LEAST_OPSET else None
        graph = node.graph
        if form is None or not isinstance(graph, onnx_ir.Graph) or not form.stored.name:
            continue
        if _is_excluded(node, form.stored, exclude):
            continue
        name = f"{form.stored.name}__latent"
        emitter = Emitter(graph, node, f"{label(node)}__trained")
        value = form.replace(emitter, emitter.constant(form.latent, name))
        output = node.outputs[0]
        value.type, value.shape = output.type, output.shape
        onnx_ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        if value.producer() is not None:
            # Under its old name it is an output still, and matched with the original's.
            output.name, value.name = f"{output.name}__stored", output.name
        latents[name] = (form.stored.name, form.pack)
        multiplied = multiplied or is_op(node, "DequantizeLinear")
    if latents:
        RemoveUnusedNodesPass()(work.ir)
    return Unfolded(work, latents, tuple(skipped), multiplied)


_NO_GRADIENT = (
    "{op_type} computes in integers, which have no gradient: it and the weights before it learn nothing through it. "
    "Distill before quantizing, or quantize with scheme static or weight_only."
)


def _is_excluded(node: onnx_ir.Node, stored: onnx_ir.Value, exclude: tuple[str, ...]) -> bool:
    names = [stored.name, node.name, *(user.name for user in node.outputs[0].consumers())]
    return any(is_excluded(name, exclude) for name in names)


def _constants(model: Model) -> Iterator[tuple[str, onnx_ir.Value]]:
    """Initializers and outputs of Constant nodes by name, the main graph's last, so that they count."""
    for node in model.nodes():
        if is_op(node, "Constant") and node.outputs[0].name:
            yield node.outputs[0].name, node.outputs[0]
    for graph in reversed(list(model.graphs())):
        yield from graph.initializers.items()
