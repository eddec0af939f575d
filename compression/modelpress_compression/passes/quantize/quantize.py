"""Quantization: `Quantize(config)`, schemes static, dynamic, weight_only and float16.

- static: 8-bit weights and activations, ranges from calibration (static/, ranges/, scaling/).
- dynamic: 8-bit weights, activations quantized by the range that they have in each run (dynamic.py).
- weight_only: weights in 4 or 8 bits, activations in float32 (weight_only/).
- float16: weights in half precision (float16.py).

Whether the result runs and is finite is the pipeline's to check, as it does for every pass.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import onnx_ir

from modelpress_compression.encodings.operands import is_quantized
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.precision import OTHER_FLOATS, compute_in_float32, computes_in
from modelpress_compression.graph.read import MICROSOFT, is_op
from modelpress_compression.graph.shapes import infer_shapes
from modelpress_compression.mapped import is_large
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded
from modelpress_compression.passes.integers.certificate import certified
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.dynamic import quantize_nodes
from modelpress_compression.passes.quantize.expand import expand_fused
from modelpress_compression.passes.quantize.expand_products import expand_products
from modelpress_compression.passes.quantize.float16 import compute_in_float16, store_in_float16
from modelpress_compression.passes.quantize.plain_forms import make_plain
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.reconstruction.rounders import METHODS, learn_rounding
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rotate import ROTATED, why_not_rotated, with_rotated_streams
from modelpress_compression.passes.quantize.rounding.gptq import make_rounder
from modelpress_compression.passes.quantize.rounding.rounder import (
    NearestRounder,
    RememberingRounder,
    Rounder,
    rounded_nodes,
)
from modelpress_compression.passes.quantize.static.preparation import prepare
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.passes.quantize.views import hide_views, restore_views
from modelpress_compression.passes.quantize.weight_only.store import store_weights
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.target import DEVICES

# Per-axis scales came with opset 13.
MIN_OPSET = 13
_FLOAT_ALONE = ("GRU", "RNN", "ConvTranspose", "DeformConv")
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")


class Quantize:
    """One configured quantization; `scheme` auto is resolved by the pipeline, which tries the schemes."""

    def __init__(self, config: QuantizeConfig) -> None:
        if config.scheme == "auto":
            raise ValueError("Scheme 'auto' is no scheme of its own: run 'static' and 'dynamic', keep the better one.")
        self._config = config

    def __call__(self, model: Model, context: Context) -> PassResult:
        """Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError if time is up."""
        if reason := _why_not(model):
            return PassResult(model, skipped=(Skip("model", reason),))
        if self._config.scheme == "static":
            quantizer = prepare_static(model, self._config, context)
            result = quantizer.result() if quantizer is not None else PassResult(model)
        else:
            findings = Findings(warnings=_unmatched(model, self._config.exclude))
            result = certified(findings.result(self._apply(model.clone(), context, findings)), context.target)
        return result if result.changed else replace(result, model=model, skipped=(*_overall(model), *result.skipped))

    def _apply(self, work: Model, context: Context, findings: Findings) -> Model:
        config = self._config
        if config.scheme == "float16":
            _widen(work, (onnx_ir.DataType.DOUBLE,), findings)
            if DEVICES[context.target.device].half and not is_large(work.weight_bytes()):
                return compute_in_float16(work, config.exclude, findings)
            store_in_float16(work, config.exclude, findings)
            return work
        _expand(work, config, findings)
        work = with_rotated_streams(work, config, context, findings, self._quickly)
        rounder = make_rounder(work, config, context, findings)
        if config.rounding in METHODS and context.data.can_be_fitted:
            rounder, _ = learn_rounding(
                work, work.clone(), RememberingRounder(rounder, rounded_nodes(work)),
                {"as it is": lambda rounder: self._written(work.clone(), rounder, context, Findings())},
                config, context, findings,
            )  # fmt: skip
        written = self._written(work, rounder, context, findings)
        if set(findings.changes) == {ROTATED}:  # which by itself is not worth a change
            findings.changes.clear()
        return written

    def _quickly(self, model: Model, context: Context) -> Model:
        return self._written(model.clone(), NearestRounder(), context, Findings())

    def _written(self, work: Model, rounder: Rounder, context: Context, findings: Findings) -> Model:
        """The model with its weights in integers; in place."""
        config = self._config
        if config.scheme == "weight_only":
            store_weights(work, config, context, rounder, findings)
            clean(work)
            restore_views(work)
            return work
        if config.activations == "int8":
            findings.warnings.append("Scheme dynamic makes activations uint8; 'activations: int8' has no effect.")
        editor = Editor(work)
        store = WeightStore(editor, config, rounder, context.target)
        quantize_nodes(list(work.nodes()), config, editor, store, findings)
        store.finish()
        clean(work)
        restore_views(work)
        return work


def prepare_static(
    model: Model, config: QuantizeConfig, context: Context, *, for_time_alone: bool = False
) -> StaticQuantizer | None:
    """Calibrates a clone of the model for static quantization, once for as many results as are wanted.

    `for_time_alone`: nobody will use the answers of the results, and their errors are not measured.
    None: the model cannot be quantized; the pass says why. Raises ModelNotRunnableError, TimeLimitError.
    """
    if _why_not(model):
        return None
    findings = Findings(warnings=_unmatched(model, config.exclude))
    work = model.clone()
    _expand(work, config, findings)
    if for_time_alone:
        return prepare(work, config, context, findings, for_time_alone=True)
    plainly, rotating = replace(config, rounding="nearest"), Findings()
    turned = with_rotated_streams(
        work, config, context, rotating,
        lambda one, few: prepare(one.clone(), plainly, few, Findings(), for_time_alone=True).quantize()[0],
    )  # fmt: skip
    if turned is work or config.rotate == "always":
        return prepare(turned, config, context, findings.plus(rotating))
    # Better ranges and biases make up for part of what a rotation gains: both forms are made, and compared.
    first = replace(context, progress=lambda share, message: context.progress(share / 2, message))
    second = replace(context, progress=lambda share, message: context.progress((1 + share) / 2, message))
    plain = prepare(work, config, first, findings.plus(Findings()))
    return _better(plain, prepare(turned, config, second, findings.plus(rotating)))


def _better(plain: StaticQuantizer, turned: StaticQuantizer) -> StaticQuantizer:
    """The one with rotated streams, where it errs less."""
    before, after = (
        output_distances(form.setup.model, form.quantize()[0], form.setup.context, form.setup.known).error
        for form in (plain, turned)
    )
    reason = why_not_rotated(before, after)
    if reason is None:
        return turned
    return replace(plain, findings=plain.findings.plus(Findings(skipped=[reason])))


def _expand(work: Model, config: QuantizeConfig, findings: Findings) -> None:
    """Brings fused nodes into forms that can be in 8 bits, and says of the others why they cannot."""
    _widen(work, OTHER_FLOATS, findings)
    expand_fused(work, Editor(work))
    if config.scheme == "static":
        make_plain(work, Editor(work))
    if expand_products(work, Editor(work)):
        infer_shapes(work.ir)
    # Stored weights are made into floats when the model is loaded, and then transposed for those who want them so.
    hide_views(work, turned=config.scheme != "weight_only")
    for node in work.nodes():
        if is_excluded(node.name, config.exclude) and node.op_type in _WEIGHTED:
            findings.skip(node, "excluded by the recipe")
        elif config.scheme == "weight_only":
            continue
        elif is_op(node, *_FLOAT_ALONE) or is_op(node, "MoE", "EmbedLayerNormalization", domain=MICROSOFT):
            findings.skip(node, "onnxruntime has no 8-bit kernel for it")
        elif node.op_type == "Conv" and config.scheme == "dynamic":
            findings.skip(node, "dynamic quantization makes it 3 to 10 times slower; scheme static does not")


def _widen(work: Model, dtypes: Collection[onnx_ir.DataType], findings: Findings) -> None:
    """Layers that compute in other floats have no kernels in 8 bits: they compute in float32 from here on."""
    if not computes_in(work, dtypes):
        return
    names = ", ".join(sorted({tensor.dtype.numpy().name for tensor in work.tensors() if tensor.dtype in dtypes}))
    if compute_in_float32(work, dtypes):
        infer_shapes(work.ir)
        findings.warnings.append(f"The model computes in {names}; the result computes in float32 where not in 8 bits.")


def _why_not(model: Model) -> str | None:
    if model.opset < MIN_OPSET:
        return f"the model is of opset {model.opset}; quantization needs {MIN_OPSET} or later"
    return None


def _overall(model: Model) -> tuple[Skip, ...]:
    """What is true of the whole of a model in which there was nothing left to quantize."""
    if any(is_quantized(node) for node in model.nodes()):
        return (Skip("model", "the model is quantized already"),)
    if any(tensor.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16) for tensor in model.tensors()):
        return (Skip("model", "the model has 16-bit weights already"),)
    return ()


def _unmatched(model: Model, patterns: tuple[str, ...]) -> list[str]:
    names = [node.name for node in model.nodes()]
    return [
        f"exclude: {pattern!r} matches no node."
        for pattern in patterns
        if not any(is_excluded(name, (pattern,)) for name in names)
    ]
