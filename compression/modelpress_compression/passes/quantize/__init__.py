"""Quantization: `Quantize(config)`, schemes static, dynamic and float16.

- static: 8-bit weights and activations, ranges from calibration (static.py).
- dynamic: 8-bit weights, activations quantized by the range that they have in each run (dynamic.py).
- float16: half precision (float16.py).

Every result is run once on some of the data before it is given back (verify.py): a model that does not load, or gives
infinite or NaN values where the original does not, is thrown away, and the reason takes its place.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded
from modelpress_compression.passes.quantize.edit import Editor, clean
from modelpress_compression.passes.quantize.expand import expand_fused
from modelpress_compression.passes.quantize.float16 import compute_in_float16, store_in_float16, why_not_compute
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.static import quantize_nodes, quantize_static
from modelpress_compression.passes.quantize.verify import why_unusable
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.techniques import QuantizeConfig

__all__ = ["Quantize"]

# Per-axis scales came with opset 13.
MIN_OPSET = 13
# Below this float16 has lost something on the way, such as an overflow; rounding alone leaves over 40 dB.
FLOAT16_FLOOR_DB = 25.0
_QUANTIZED_OPERATORS = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearConv",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QGemm",
        "MatMulNBits",
        "GatherBlockQuantized",
    ]
)
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
        findings = Findings(warnings=_unmatched(model, self._config.exclude))
        if self._config.scheme == "float16":
            return self._to_float16(model, context, findings)
        work = model.clone()
        self._to_8_bits(work, context, findings)
        if not any(findings.changes.values()):
            return _unchanged(model, findings)
        clean(work)
        context.progress(0.95, "checking the quantized model")
        if reason := why_unusable(model, work, context):
            return _unchanged(model, findings, reason)
        return _changed(work, findings)

    def _to_float16(self, model: Model, context: Context, findings: Findings) -> PassResult:
        """Computed in float16 if that stands the check, else stored in it."""
        computed = Findings(warnings=list(findings.warnings))
        reason = why_not_compute(model, context)
        work = None if reason else compute_in_float16(model.clone(), self._config.exclude, computed)
        if work is None:
            reason = reason or "the model is too large for the conversion in memory"
        else:
            context.progress(0.5, "checking the model in float16")
            reason = why_unusable(model, work, context, FLOAT16_FLOOR_DB)
            if reason is None and computed.changes:
                return _changed(work, computed)
        stored = model.clone()
        store_in_float16(stored, self._config.exclude, findings)
        if not findings.changes:
            return _unchanged(model, findings)
        if unusable := why_unusable(model, stored, context):
            return _unchanged(model, findings, unusable)
        findings.skipped.append(Skip("model", f"weights are stored in float16, but computed with in float32: {reason}"))
        return _changed(stored, findings)

    def _to_8_bits(self, work: Model, context: Context, findings: Findings) -> None:
        editor, config = Editor(work), self._config
        expand_fused(work, editor)
        for node in work.nodes():
            if is_excluded(node.name, config.exclude) and node.op_type in _WEIGHTED:
                findings.skip(node, "excluded by the recipe")
            elif node.op_type in ("GRU", "RNN", "ConvTranspose") and not node.domain:
                findings.skip(node, "onnxruntime has no 8-bit kernel for it")
            elif node.op_type == "Conv" and config.scheme == "dynamic":
                findings.skip(node, "dynamic quantization makes it 3 to 10 times slower; scheme static does not")
        if config.scheme == "static":
            quantize_static(work, config, context, editor, findings)
            return
        if config.activations == "int8":
            findings.warnings.append("Scheme dynamic makes activations uint8; 'activations: int8' has no effect.")
        quantize_nodes(list(work.nodes()), config, editor, WeightStore(editor, config), findings)


def _why_not(model: Model) -> str | None:
    if any(node.op_type in _QUANTIZED_OPERATORS for node in model.nodes()):
        return "the model is quantized already"
    if any(tensor.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16) for tensor in model.tensors()):
        return "the model has 16-bit weights already"
    if model.opset < MIN_OPSET:
        return f"the model is of opset {model.opset}; quantization needs {MIN_OPSET} or later"
    return None


def _unmatched(model: Model, patterns: tuple[str, ...]) -> list[str]:
    names = [node.name for node in model.nodes()]
    return [
        f"exclude: {pattern!r} matches no node."
        for pattern in patterns
        if not any(is_excluded(name, (pattern,)) for name in names)
    ]


def _changed(model: Model, findings: Findings) -> PassResult:
    return PassResult(model, dict(findings.changes), tuple(findings.skipped), tuple(findings.warnings))


def _unchanged(model: Model, findings: Findings, reason: str | None = None) -> PassResult:
    own = (Skip("model", reason),) if reason else ()
    return PassResult(model, skipped=(*own, *findings.skipped), warnings=tuple(findings.warnings))
