"""The content of report.json, made from measured figures; `report.schema.json` beside this file describes it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from modelpress_compression.measure.accuracy import Accuracy
from modelpress_compression.measure.damage import damage_of
from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import LatencyRow
from modelpress_compression.measure.stats import LayerStats, ModelStats
from modelpress_compression.model import Provenance
from modelpress_compression.report.environment import environment
from modelpress_compression.report.ledger import Ledger
from modelpress_compression.report.left_alone import folded_reasons

SCHEMA_VERSION = 1
MAX_LAYERS = 40
# Quantizers and fusions append these to the name of a node that they replace.
_SUFFIX = re.compile(
    r"(?:[_/](?:quant(?:ized)?|fused|Q|DQ|\w*Integer|QuantizeLinear|DequantizeLinear|DynamicQuantize\w+|MatMulNBits"
    r"|GatherBlockQuantized|QAttention))+$"
)


@dataclass(frozen=True)
class StepRow:
    """One step of the recipe. `size_bytes`: of the model after it, as a file; `config` with its defaults.

    `skipped`: (node, reason). `details`: figures of single layers; rows with the same keys make a table. `notes`:
    sentences about the result.
    """

    name: str
    config: Mapping[str, Any]
    changes: Mapping[str, int | float]
    skipped: Sequence[tuple[str, str]]
    size_bytes: int
    duration_s: float
    details: Sequence[Mapping[str, str | int | float]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ReportInputs:
    """All that goes into a report.

    `recipe`: in the shape of the YAML, defaults written out. `provenance`: of the upload. `original_onnx_size_bytes`,
    `optimized_size_bytes`: of both models as ONNX, external data included. `accuracy` None: no labels. `fidelity` None:
    not measured. `candidates`: a row for each candidate that `auto` tried, with `name`, `chosen`, `reason`, and figures
    or None. `violations`: one sentence for each constraint that is not met.
    `measurement`: what disturbed the timing; None: nothing was timed. `goal`: in the shape of the YAML; None:
    there were steps. `search`: how long that took, and what it left out. `advice`: what other options would have
    brought, each with `text` and `command`.
    `reused`: how much of each kind came from earlier jobs on the same model and data.
    `verdict`: what was asked and what was got, in one sentence. `ledger` None: layers were not timed.
    `target`: figures of what was built for the target, JSON types; None: it runs the ONNX file.
    """

    job: str
    recipe: Mapping[str, Any]
    provenance: Provenance
    original_onnx_size_bytes: int
    original: ModelStats
    optimized_sha256: str
    optimized_size_bytes: int
    optimized: ModelStats
    latency: Sequence[LatencyRow] = ()
    fidelity: Fidelity | None = None
    accuracy: Accuracy | None = None
    steps: Sequence[StepRow] = ()
    candidates: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    violations: Sequence[str] = ()
    measurement: Mapping[str, Any] | None = None
    goal: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    advice: Sequence[Mapping[str, str]] = ()
    reused: Mapping[str, int] = field(default_factory=dict)
    verdict: str = ""
    ledger: Ledger | None = None
    target: Mapping[str, Any] | None = None
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
        "measurement": inputs.measurement,
        "target": inputs.target,
        "goal": inputs.goal,
        "search": inputs.search,
        "verdict": inputs.verdict,
        "advice": [dict(item) for item in inputs.advice],
        "reused": dict(inputs.reused),
        "fidelity": inputs.fidelity.to_dict() if inputs.fidelity is not None else None,
        "accuracy": inputs.accuracy.to_dict() if inputs.accuracy is not None else None,
        "damage": damage_of(inputs.fidelity, inputs.accuracy),
        "constraints": {"met": not inputs.violations, "violations": list(inputs.violations)},
        "steps": [_step(step, {str(row["name"]) for row in inputs.candidates}) for step in inputs.steps],
        "candidates": [dict(candidate) for candidate in inputs.candidates],
        "layers": layer_rows(inputs.original.layers, inputs.optimized.layers, inputs.ledger),
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


def _figures(figures: ModelStats) -> dict[str, Any]:
    return {
        "parameters": figures.parameters,
        "nonzero_parameters": figures.nonzero_parameters,
        "macs": figures.macs,
        "opset": figures.opset,
        "ops": dict(figures.ops),
    }


def layer_rows(
    original: Sequence[LayerStats], optimized: Sequence[LayerStats], ledger: Ledger | None = None
) -> list[dict[str, Any]]:
    """The report's `layers`, largest first; `original_bytes` or `optimized_bytes` is None where there is no such layer.

    Layers of both models are paired by name, without the suffixes that rewrites append. Those that take most, in bytes
    or in time, have rows. Beyond 40, the rest is summed in a last row, whose `layers` says how many it stands for.
    """
    before, after = _bytes_by_name(original), _bytes_by_name(optimized)
    operators = {_layer_name(layer.name): layer.op_type for layer in (*optimized, *original)}
    weighted = before.keys() | after.keys()
    timed = ledger and ledger.paired(_layer_name)
    names = weighted | (timed.long_layers() if timed else set())
    ranked = sorted(names, key=lambda name: (-max(before[name], after[name]), name))
    shown = _shown(ranked, before, after, timed)
    shares = timed.shares() if timed else {}
    rows = []
    for name in (each for each in ranked if each in shown):
        op_type = operators.get(name) or (timed.op_type(name) if timed else "")
        row = _layer_row(name, op_type, before.get(name), after.get(name))
        rows.append(row | (timed.fields(name, name in weighted, shares.get(name)) if timed else {}))
    rest = [name for name in ranked if name not in shown]
    if rest:
        total = [sum(sizes.get(name, 0) for name in rest) for sizes in (before, after)]
        times = timed.sums(rest) if timed else {}
        rows.append(_layer_row("other layers", "", *total) | {"layers": len(rest)} | times)
    return rows


def _shown(ranked: Sequence[str], before: Counter[str], after: Counter[str], ledger: Ledger | None) -> set[str]:
    """The names that have rows: by their largest share of bytes or time in either model."""
    shares: defaultdict[str, float] = defaultdict(float)
    tables: list[Mapping[str, float]] = [before, after]
    if ledger is not None:
        tables += [{name: time.ms for name, time in times.items()} for times in (ledger.original, ledger.optimized)]
    for table in tables:
        total = sum(table.values()) or 1
        for name in ranked:
            shares[name] = max(shares[name], table.get(name, 0) / total)
    return set(sorted(ranked, key=lambda name: -shares[name])[:MAX_LAYERS])


def _layer_row(name: str, op_type: str, original_bytes: int | None, optimized_bytes: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "op_type": op_type,
        "original_bytes": original_bytes,
        "optimized_bytes": optimized_bytes,
        "layers": 1,
    }


def _layer_name(name: str) -> str:
    return _SUFFIX.sub("", name) or name


def _bytes_by_name(layers: Sequence[LayerStats]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for layer in layers:
        sizes[_layer_name(layer.name)] += layer.bytes
    return sizes


def _step(step: StepRow, candidates: Collection[str]) -> dict[str, Any]:
    return {
        "name": step.name,
        "config": step.config,
        "changes": step.changes,
        "skipped": [{"node": node, "reason": reason} for node, reason in step.skipped],
        "left_alone": folded_reasons(step.skipped, candidates),
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
