"""A report made from plain pieces, and one from nothing but what must be there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from modelpress_compression.model import Provenance
from modelpress_compression.recipe import Recipe
from modelpress_compression.report.build import ReportInputs, StepRow


@dataclass(frozen=True)
class Layer:
    """As analysis.stats.LayerStats."""

    name: str
    op_type: str
    bytes: int


@dataclass(frozen=True)
class Figures:
    """As analysis.stats.ModelStats."""

    parameters: int
    nonzero_parameters: int
    macs: int | None
    opset: int = 17
    ops: dict[str, int] = field(default_factory=lambda: {"Conv": 2})
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """As passes.base.Skip."""

    node: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """As a result of `measure`."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.values


def latency_row(median: float, low: float, high: float, batch_size: int = 1) -> Measured:
    times = {"p50_ms": 4.0, "p90_ms": 5.0, "p99_ms": 6.0, "mean_ms": 4.2}
    return Measured(
        {
            "execution_provider": "CPUExecutionProvider",
            "threads": 1,
            "batch_size": batch_size,
            "rounds": 50,
            "original": times,
            "optimized": {name: value / median for name, value in times.items()},
            "speedup": {"median": median, "low": low, "high": high},
        }
    )


@pytest.fixture
def bare_inputs() -> ReportInputs:
    """Only what every job has: nothing was measured, nothing done."""
    return ReportInputs(
        job="",
        recipe=Recipe().to_dict(),
        provenance=Provenance("onnx", "a" * 64, 1000),
        original_onnx_size_bytes=1000,
        original=Figures(100, 100, None),
        optimized_sha256="b" * 64,
        optimized_size_bytes=1000,
        optimized=Figures(100, 100, None),
    )


@pytest.fixture
def inputs(bare_inputs: ReportInputs) -> ReportInputs:
    """Something of everything."""
    skipped = [Skipped(f"conv_{index}", "depthwise") for index in range(40)] + [Skipped("head", "excluded")]
    return replace(
        bare_inputs,
        job="projects/default/jobs/j1",
        recipe=Recipe.preset("default").to_dict(),
        provenance=Provenance("torchscript", "a" * 64, 4_100_000),
        original_onnx_size_bytes=4_000_000,
        original=Figures(
            1_000_000, 1_000_000, 5_000_000, layers=(Layer("conv_1", "Conv", 4000), Layer("fc", "Gemm", 80))
        ),
        optimized_size_bytes=1_000_000,
        optimized=Figures(1_000_000, 500_000, 5_000_000, layers=(Layer("conv_1_quant", "QLinearConv", 1000),)),
        latency=[latency_row(2.0, 1.8, 2.2), latency_row(0.7, 0.6, 0.8, batch_size=8)],
        fidelity=Measured(
            {
                "data": "synthetic",
                "samples": 32,
                "outputs": {
                    "y": {"cosine": 0.9991, "sqnr_db": 27.5, "max_abs_error": 0.1},
                    "i": {"cosine": None, "sqnr_db": None, "max_abs_error": None, "equal": 0.75},
                },
                "top1_agreement": 0.997,
                "agreement": 0.997,
                "notes": [],
            }
        ),
        steps=[
            StepRow("fuse", {"exclude": []}, {"conv_batchnorm": 20, "gelu": 0}, [], 3_900_000, 0.5),
            StepRow("quantize", {"scheme": "auto"}, {"static": 12}, skipped, 1_000_000, 30.0),
        ],
        candidates=[
            {"name": "quantize dynamic", "size_bytes": 1_100_000, "chosen": False, "reason": "slower than in float32"},
            {
                "name": "quantize static",
                "size_bytes": 1_000_000,
                "speedup": {"median": 2.0, "low": 1.9, "high": 2.1},
                "agreement": 0.997,
                "drop": None,
                "chosen": True,
                "reason": "",
            },
        ],
        warnings=["calibrated on synthetic inputs", "calibrated on synthetic inputs"],
        violations=["top1 falls by 0.02, more than max_drop 0.01"],
    )
