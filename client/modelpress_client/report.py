"""report.json as typed objects. What was not measured is None; nothing is estimated."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from modelpress_client.errors import ServerError

ItemT = TypeVar("ItemT")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelFigures:
    """One of the two models. `onnx_size_bytes` includes external data and is known of the original only."""

    format: str
    sha256: str
    size_bytes: int
    onnx_size_bytes: int | None
    parameters: int | None
    nonzero_parameters: int | None
    macs: int | None
    opset: int | None
    ops: dict[str, int]


@dataclass(frozen=True)
class Percentiles:
    """Latency of one model, in milliseconds."""

    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float | None


@dataclass(frozen=True)
class Speedup:
    """original / optimized of interleaved rounds: median with a 95 % interval."""

    median: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LatencyRow:
    """One measurement of both models."""

    execution_provider: str
    threads: int | None
    batch_size: int | None
    rounds: int | None
    original: Percentiles
    optimized: Percentiles
    speedup: Speedup


@dataclass(frozen=True)
class OutputFidelity:
    """How close one output is to the original's; sqnr_db in decibels."""

    cosine: float | None
    sqnr_db: float | None
    max_abs_error: float | None


@dataclass(frozen=True)
class Fidelity:
    """How close the outputs are. data: `provided` or `synthetic`."""

    data: str
    samples: int | None
    outputs: dict[str, OutputFidelity]
    top1_agreement: float | None


@dataclass(frozen=True)
class Accuracy:
    """The metric of the task, with labels. `drop` > 0: the result is worse, whichever way the metric points."""

    metric: str
    samples: int | None
    original: float | None
    optimized: float | None
    drop: float | None
    lower_is_better: bool = False


@dataclass(frozen=True)
class Skipped:
    """A rewrite that did not happen, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class LeftAlone:
    """Nodes or candidates (`what`) that a step left alone for one reason; `names` of all of them."""

    count: int
    what: str
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        if self.count == 1:
            return f"1 {self.what}: {self.reason}" + (f" ({self.names[0]})" if any(self.names) else "")
        return f"{self.count} {self.what}s: {self.reason}"


@dataclass(frozen=True)
class StepReport:
    """What one step did. notes: sentences on its result as a whole; left_alone: `skipped`, folded by reason."""

    name: str
    config: dict[str, Any]
    changes: dict[str, float]
    skipped: tuple[Skipped, ...]
    size_bytes: int | None
    duration_s: float | None
    notes: tuple[str, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()


@dataclass(frozen=True)
class Constraints:
    """Whether the result holds what the recipe asked for."""

    met: bool
    violations: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """What another option would have brought, as measured, and the command that asks for it."""

    text: str
    command: str


@dataclass(frozen=True)
class Report:
    """A report. `to_dict()` is the document as the server wrote it, with fields that this client may not know.

    damage: by which figure the result no longer resembles the original; empty where it does.
    """

    job: str
    recipe: dict[str, Any]
    original: ModelFigures
    optimized: ModelFigures
    size_ratio: float | None
    latency: tuple[LatencyRow, ...]
    fidelity: Fidelity | None
    accuracy: Accuracy | None
    steps: tuple[StepReport, ...]
    candidates: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    environment: dict[str, Any]
    constraints: Constraints
    verdict: str
    advice: tuple[Advice, ...]
    damage: str
    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """report.json."""
        return self.document

    @classmethod
    def from_json(cls, content: bytes | str) -> Report:
        """Reads report.json. Raises ServerError when it is none."""
        try:
            return cls.from_dict(json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServerError(
                "The server's report has a shape that this client does not understand; update the client.",
                reason="UNREADABLE_REPORT",
            ) from error

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Report:
        """Reads the document of report.json. Raises KeyError, TypeError or ValueError when it is none."""
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {document['schema_version']}; this client reads {SCHEMA_VERSION}")
        return cls(
            job=document["job"],
            recipe=document["recipe"],
            original=_figures(document["original"]),
            optimized=_figures(document["optimized"]),
            size_ratio=document.get("size_ratio"),
            latency=tuple(map(_latency, document.get("latency") or ())),
            fidelity=_optional(_fidelity, document.get("fidelity")),
            accuracy=_optional(_accuracy, document.get("accuracy")),
            steps=tuple(map(_step, document.get("steps") or ())),
            candidates=tuple(document.get("candidates") or ()),
            layers=tuple(document.get("layers") or ()),
            warnings=tuple(map(str, document.get("warnings") or ())),
            environment=document.get("environment") or {},
            constraints=_constraints(document.get("constraints")),
            verdict=str(document.get("verdict") or ""),
            advice=tuple(Advice(str(item["text"]), str(item["command"])) for item in document.get("advice") or ()),
            damage=str(document.get("damage") or ""),
            document=document,
        )


def _optional(build: Callable[[Mapping[str, Any]], ItemT], value: Mapping[str, Any] | None) -> ItemT | None:
    return None if value is None else build(value)


def _figures(value: Mapping[str, Any]) -> ModelFigures:
    return ModelFigures(
        format=value["format"],
        sha256=value["sha256"],
        size_bytes=value["size_bytes"],
        onnx_size_bytes=value.get("onnx_size_bytes"),
        parameters=value.get("parameters"),
        nonzero_parameters=value.get("nonzero_parameters"),
        macs=value.get("macs"),
        opset=value.get("opset"),
        ops=dict(value.get("ops") or {}),
    )


def _latency(value: Mapping[str, Any]) -> LatencyRow:
    speedup = value.get("speedup") or {}
    return LatencyRow(
        execution_provider=value["execution_provider"],
        threads=value.get("threads"),
        batch_size=value.get("batch_size"),
        rounds=value.get("rounds"),
        original=_percentiles(value.get("original")),
        optimized=_percentiles(value.get("optimized")),
        speedup=Speedup(speedup.get("median"), speedup.get("low"), speedup.get("high")),
    )


def _percentiles(value: Mapping[str, Any] | None) -> Percentiles:
    value = value or {}
    return Percentiles(value.get("p50_ms"), value.get("p90_ms"), value.get("p99_ms"), value.get("mean_ms"))


def _fidelity(value: Mapping[str, Any]) -> Fidelity:
    outputs = {
        name: OutputFidelity(figures.get("cosine"), figures.get("sqnr_db"), figures.get("max_abs_error"))
        for name, figures in (value.get("outputs") or {}).items()
    }
    return Fidelity(value.get("data", ""), value.get("samples"), outputs, value.get("top1_agreement"))


def _accuracy(value: Mapping[str, Any]) -> Accuracy:
    return Accuracy(
        value["metric"],
        value.get("samples"),
        value.get("original"),
        value.get("optimized"),
        value.get("drop"),
        bool(value.get("lower_is_better", False)),
    )


def _step(value: Mapping[str, Any]) -> StepReport:
    return StepReport(
        name=value["name"],
        config=value.get("config") or {},
        changes=dict(value.get("changes") or {}),
        skipped=tuple(Skipped(item.get("node", ""), item["reason"]) for item in value.get("skipped") or ()),
        size_bytes=value.get("size_bytes"),
        duration_s=value.get("duration_s"),
        notes=tuple(map(str, value.get("notes") or ())),
        left_alone=tuple(_left_alone(value)),
    )


def _left_alone(step: Mapping[str, Any]) -> Iterator[LeftAlone]:
    """As the server folded it; reports from before it did are folded here."""
    if (rows := step.get("left_alone")) is not None:
        for row in rows:
            yield LeftAlone(int(row["count"]), str(row["what"]), str(row["reason"]), tuple(map(str, row["names"])))
        return
    names: defaultdict[str, list[str]] = defaultdict(list)
    for item in step.get("skipped") or ():
        names[item["reason"]].append(item.get("node", ""))
    for reason, nodes in sorted(names.items(), key=lambda entry: -len(entry[1])):
        yield LeftAlone(len(nodes), "node", reason, tuple(nodes))


def _constraints(value: Mapping[str, Any] | None) -> Constraints:
    """Without the section the recipe had no constraints: all of none are met."""
    if value is None:
        return Constraints(True, ())
    return Constraints(bool(value["met"]), tuple(map(_violation, value.get("violations") or ())))


def _violation(value: object) -> str:
    if isinstance(value, Mapping):
        text = value.get("message") or value.get("description")
        return str(text) if text else ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
