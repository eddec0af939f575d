"""The content of report.json, put together from typed pieces; `report.schema.json` beside this file describes it.

This package stands beside `measure`, `analysis` and `passes` and imports none of them: it says by protocols what it
needs to know of their results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Protocol

from modelpress_compression.model import Provenance
from modelpress_compression.report.environment import environment
from modelpress_compression.report.layers import LayerFigures, layer_rows

SCHEMA_VERSION = 1


class HasDict(Protocol):
    """A result that knows its shape in the report: LatencyRow, Fidelity, Accuracy."""

    def to_dict(self) -> dict[str, Any]: ...


class ModelFigures(Protocol):
    """What the report takes from `graph.stats.ModelStats`."""

    @property
    def parameters(self) -> int: ...
    @property
    def nonzero_parameters(self) -> int: ...
    @property
    def macs(self) -> int | None: ...
    @property
    def opset(self) -> int: ...
    @property
    def ops(self) -> Mapping[str, int]: ...
    @property
    def layers(self) -> Sequence[LayerFigures]: ...


class SkippedNode(Protocol):
    """What the report takes from `passes.base.Skip`."""

    @property
    def node(self) -> str: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class StepRow:
    """One step of the recipe. `size_bytes`: of the model after it, as a file; `config` with its defaults.

    `details`: figures of single layers; rows of the same keys belong together. `notes`: sentences on its result.
    """

    name: str
    config: Mapping[str, Any]
    changes: Mapping[str, int | float]
    skipped: Sequence[SkippedNode]
    size_bytes: int
    duration_s: float
    details: Sequence[Mapping[str, str | int | float]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ReportInputs:
    """Everything that a report says.

    `recipe`: in the shape of the YAML, defaults written out. `provenance`: of the upload; `original_onnx_size_bytes`:
    of the same model as ONNX, external data included, as `optimized_size_bytes` is. `accuracy` None: no labels.
    `fidelity` None: not measured. `candidates`: what `auto` tried, each a row with `name`, `chosen`, `reason`, and
    figures or None. `violations`: one sentence for each constraint that is not met.
    """

    job: str
    recipe: Mapping[str, Any]
    provenance: Provenance
    original_onnx_size_bytes: int
    original: ModelFigures
    optimized_sha256: str
    optimized_size_bytes: int
    optimized: ModelFigures
    latency: Sequence[HasDict] = ()
    fidelity: HasDict | None = None
    accuracy: HasDict | None = None
    steps: Sequence[StepRow] = ()
    candidates: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    violations: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=environment)


def build_report(inputs: ReportInputs) -> dict[str, Any]:
    """The dictionary that is report.json: JSON types only, figures that are not finite as None."""
    provenance = inputs.provenance
    report = {
        "schema_version": SCHEMA_VERSION,
        "job": inputs.job,
        "recipe": inputs.recipe,
        "original": {
            "format": provenance.format,
            "sha256": provenance.sha256,
            "size_bytes": provenance.size_bytes,
            "onnx_size_bytes": inputs.original_onnx_size_bytes,
            **_figures(inputs.original),
        },
        "optimized": {
            "format": "onnx",
            "sha256": inputs.optimized_sha256,
            "size_bytes": inputs.optimized_size_bytes,
            **_figures(inputs.optimized),
        },
        "size_ratio": inputs.original_onnx_size_bytes / max(inputs.optimized_size_bytes, 1),
        "latency": [row.to_dict() for row in inputs.latency],
        "fidelity": inputs.fidelity.to_dict() if inputs.fidelity is not None else None,
        "accuracy": inputs.accuracy.to_dict() if inputs.accuracy is not None else None,
        "constraints": {"met": not inputs.violations, "violations": list(inputs.violations)},
        "steps": [_step(step) for step in inputs.steps],
        "candidates": [dict(candidate) for candidate in inputs.candidates],
        "layers": layer_rows(inputs.original.layers, inputs.optimized.layers),
        "warnings": list(dict.fromkeys(inputs.warnings)),
        "environment": dict(inputs.environment),
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    text = (files("modelpress_compression.report") / "report.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _figures(figures: ModelFigures) -> dict[str, Any]:
    return {
        "parameters": figures.parameters,
        "nonzero_parameters": figures.nonzero_parameters,
        "macs": figures.macs,
        "opset": figures.opset,
        "ops": dict(figures.ops),
    }


def _step(step: StepRow) -> dict[str, Any]:
    return {
        "name": step.name,
        "config": step.config,
        "changes": step.changes,
        "skipped": [{"node": skip.node, "reason": skip.reason} for skip in step.skipped],
        "size_bytes": step.size_bytes,
        "duration_s": step.duration_s,
        "details": [dict(row) for row in step.details],
        "notes": list(step.notes),
    }


def _plain(value: Any) -> Any:
    """JSON types only. NaN and infinities, which JSON does not have, become null: not measured."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
