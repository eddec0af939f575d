"""The content of a model, without compressing it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from modelpress_compression.encodings.operands import is_quantized
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.model import Model
from modelpress_compression.specs import TensorSpec

_RECURRENT = ("LSTM", "GRU", "RNN")
_CONTROL_FLOW = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know. `severity`: INFO, WARNING or BLOCKING; `code` is for machines."""

    severity: str
    code: str
    detail: str


@dataclass(frozen=True)
class Inspection:
    """Figures and findings. `macs`: one run with every dynamic dimension at 1; None where shapes are not known."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: dict[str, int]
    parameter_count: int
    weight_bytes: int
    macs: int | None
    opset: int
    producer: str
    findings: tuple[Finding, ...]


def inspect_model(model: Model) -> Inspection:
    """Reads everything from the graph; nothing is run but what counting MACs needs."""
    stats = model_stats(model)
    producer = " ".join(part for part in (model.ir.producer_name, model.ir.producer_version) if part)
    return Inspection(
        inputs=model.inputs,
        outputs=model.outputs,
        op_counts=dict(stats.ops),
        parameter_count=stats.parameters,
        weight_bytes=stats.weight_bytes,
        macs=stats.macs,
        opset=stats.opset,
        producer=producer,
        findings=_findings(model),
    )


def _findings(model: Model) -> tuple[Finding, ...]:
    ops = Counter(node.op_type for node in model.nodes())
    findings = [Finding("WARNING", "LOADER", warning) for warning in model.warnings]
    if quantized := sum(is_quantized(node) for node in model.nodes()):
        detail = f"Already quantized ({quantized} such nodes): quantize will leave those layers alone."
        findings.append(Finding("WARNING", "ALREADY_QUANTIZED", detail))
    if recurrent := [name for name in _RECURRENT if ops[name]]:
        detail = f"Recurrent layers ({', '.join(recurrent)}): dynamic quantization suits them, static does not."
        findings.append(Finding("INFO", "RECURRENT", detail))
    if control_flow := [name for name in _CONTROL_FLOW if ops[name]]:
        detail = f"Control flow ({', '.join(control_flow)}): weights inside the branches are compressed where possible."
        findings.append(Finding("INFO", "CONTROL_FLOW", detail))
    if defaults := [value.name for value in model.graph.inputs if value.name in model.graph.initializers]:
        detail = f"Inputs with a default, which callers may leave out: {', '.join(map(str, defaults[:20]))}."
        findings.append(Finding("INFO", "DEFAULT_INPUTS", detail))
    if dynamic := sorted({str(dim) for spec in model.inputs for dim in spec.shape if not isinstance(dim, int)}):
        findings.append(Finding("INFO", "DYNAMIC_DIMENSIONS", f"Dynamic dimensions: {', '.join(dynamic)}."))
    return tuple(findings)
