"""Messages of the API to the engine's types and back; names of formats, severities and artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modelpress_compression.inspection import Inspection
from modelpress_compression.model import Provenance
from modelpress_compression.recipe import Recipe
from modelpress_compression.specs import TensorSpec
from modelpress_protos import recipe as recipe_language
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, recipe_pb2

_Kind = job_service_pb2.Artifact.Kind
_KINDS: Mapping[str, job_service_pb2.Artifact.Kind.ValueType] = {
    "model": _Kind.KIND_OPTIMIZED_MODEL,
    "report.json": _Kind.KIND_REPORT_JSON,
    "report.html": _Kind.KIND_REPORT_HTML,
    "candidate": _Kind.KIND_CANDIDATE_MODEL,
    "project": _Kind.KIND_TARGET_PROJECT,
}
_VERDICTS: Mapping[str, job_service_pb2.SpeedVerdict.ValueType] = {
    "": job_service_pb2.SPEED_VERDICT_UNSPECIFIED,
    "faster": job_service_pb2.SPEED_VERDICT_FASTER,
    "slower": job_service_pb2.SPEED_VERDICT_SLOWER,
    "not distinguishable": job_service_pb2.SPEED_VERDICT_NOT_DISTINGUISHABLE,
}


def spec_from_proto(message: common_pb2.TensorSpec) -> TensorSpec:
    """A tensor's name, type and shape; a dimension with neither number nor name is unknown."""
    dims: list[int | str | None] = []
    for dim in message.shape:
        kind = dim.WhichOneof("dim")
        dims.append(dim.value if kind == "value" else dim.symbol if kind == "symbol" else None)
    return TensorSpec(message.name, message.dtype, tuple(dims))


def spec_to_proto(spec: TensorSpec) -> common_pb2.TensorSpec:
    """The inverse of `spec_from_proto`."""
    message = common_pb2.TensorSpec(name=spec.name, dtype=spec.dtype)
    for dim in spec.shape:
        if isinstance(dim, int):
            message.shape.add(value=dim)
        elif isinstance(dim, str):
            message.shape.add(symbol=dim)
        else:
            message.shape.add()
    return message


def format_to_proto(name: str) -> common_pb2.ModelFormat.ValueType:
    """The engine's `torch_export` is MODEL_FORMAT_TORCH_EXPORT. Raises ValueError for an unknown name."""
    return common_pb2.ModelFormat.Value(f"MODEL_FORMAT_{name.upper()}")


def format_from_proto(value: common_pb2.ModelFormat.ValueType) -> str:
    """The engine's name of a format; an unspecified one is `unspecified`."""
    return common_pb2.ModelFormat.Name(value).removeprefix("MODEL_FORMAT_").lower()


def provenance_from_proto(message: model_service_pb2.SourceFile) -> Provenance:
    """What the model was before the client converted it."""
    digest = message.digest
    return Provenance(format_from_proto(message.format), digest.sha256.hex(), digest.size_bytes)


def recipe_from_proto(message: recipe_pb2.Recipe) -> Recipe:
    """The engine's recipe. Raises InvalidRecipeError."""
    return Recipe.from_dict(recipe_language.to_dict(message))


def inspection_to_proto(inspection: Inspection) -> model_service_pb2.Inspection:
    """What was found in a model."""
    message = model_service_pb2.Inspection(
        inputs=_specs_to_proto(inspection.inputs),
        outputs=_specs_to_proto(inspection.outputs),
        op_counts=inspection.op_counts,
        parameter_count=inspection.parameter_count,
        weight_bytes=inspection.weight_bytes,
        macs=inspection.macs,
        opset=inspection.opset,
        producer=inspection.producer,
    )
    for finding in inspection.findings:
        severity = model_service_pb2.Finding.Severity.Value(f"SEVERITY_{finding.severity}")
        message.findings.add(severity=severity, code=finding.code, detail=finding.detail)
    return message


def summary_from_report(report: Mapping[str, Any]) -> job_service_pb2.ReportSummary:
    """The main figures of report.json; what was not measured stays unset."""
    latency = report["latency"]
    accuracy = report["accuracy"]
    fidelity = report["fidelity"] or {}
    speedup = latency[0]["speedup"] if latency else None
    measurement = report["measurement"] if latency else {}
    return job_service_pb2.ReportSummary(
        original_size_bytes=report["original"]["onnx_size_bytes"],
        optimized_size_bytes=report["optimized"]["size_bytes"],
        speedup=speedup["median"] if speedup else None,
        accuracy_drop=accuracy["drop"] if accuracy else None,
        top1_agreement=fidelity.get("top1_agreement"),
        constraints_met=report["constraints"]["met"],
        speedup_low=speedup["low"] if speedup else None,
        speedup_high=speedup["high"] if speedup else None,
        speed_verdict=_VERDICTS[speedup["verdict"] if speedup else ""],
        contention=measurement.get("contention"),
        trusted=measurement.get("trusted"),
    )


def kind_to_proto(kind: str) -> job_service_pb2.Artifact.Kind.ValueType:
    """The kind of an artifact that the engine wrote."""
    return _KINDS[kind]


def _specs_to_proto(specs: Iterable[TensorSpec]) -> list[common_pb2.TensorSpec]:
    return [spec_to_proto(spec) for spec in specs]
