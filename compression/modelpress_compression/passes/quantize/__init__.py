"""Quantization: `Quantize(config)`, schemes static, dynamic and float16.

- static: 8-bit weights and activations, ranges from calibration (static.py).
- dynamic: 8-bit weights, activations quantized by the range that they have in each run (dynamic.py).
- float16: weights in half precision (float16.py).

Whether the result runs and is finite is the pipeline's to check, as it does for every pass.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded
from modelpress_compression.passes.quantize.certificate import certify, summary
from modelpress_compression.passes.quantize.edit import Editor, clean
from modelpress_compression.passes.quantize.expand import expand_fused
from modelpress_compression.passes.quantize.float16 import store_in_float16
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.static import quantize_nodes, quantize_static
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.techniques import QuantizeConfig

__all__ = ["Quantize"]

# Per-axis scales came with opset 13.
MIN_OPSET = 13
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
        work = model.clone()
        if self._config.scheme == "float16":
            store_in_float16(work, self._config.exclude, findings)
        else:
            self._to_8_bits(work, context, findings)
            clean(work)
        certificates = certify(work)
        note = summary(certificates, context.target)
        return PassResult(
            work if any(findings.changes.values()) else model,
            dict(findings.changes),
            tuple(findings.skipped),
            tuple(findings.warnings),
            details=tuple(item.row() for item in certificates),
            notes=(note,) if note else (),
        )

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
        quantize_nodes(list(work.nodes()), config, editor, WeightStore(editor, config, context.target), findings)


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
