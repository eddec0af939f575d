"""A report made from plain pieces, and one from nothing but what must be there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.measure.latency import LatencyRow, Quantiles, Speedup
from modelpress_compression.measure.stats import LayerStats, ModelStats
from modelpress_compression.model import Provenance
from modelpress_compression.recipe import Recipe
from modelpress_compression.report.build import ReportInputs, StepRow


def stats(parameters: int, nonzero: int, macs: int | None, *layers: LayerStats) -> ModelStats:
    return ModelStats(parameters, nonzero, macs, 4 * parameters, 17, {"Conv": 2}, layers)


def layer(name: str, op_type: str, size_bytes: int) -> LayerStats:
    return LayerStats(name, op_type, size_bytes // 4, size_bytes, None)


def latency_row(median: float, low: float, high: float, batch_size: int = 1) -> LatencyRow:
    return LatencyRow(
        execution_provider="CPUExecutionProvider",
        threads=1,
        batch_size=batch_size,
        rounds=50,
        runs_per_round=(1, 1),
        contention=1.0,
        clock="wall",
        original=Quantiles(4.0, 5.0, 6.0, 4.2),
        optimized=Quantiles(4.0 / median, 5.0 / median, 6.0 / median, 4.2 / median),
        speedup=Speedup(median, low, high),
    )


@pytest.fixture
def bare_inputs() -> ReportInputs:
    """Only what every job has: nothing was measured, nothing done."""
    return ReportInputs(
        job="",
        recipe=Recipe().to_dict(),
        provenance=Provenance("onnx", "a" * 64, 1000),
        original_onnx_size_bytes=1000,
        original=stats(100, 100, None),
        optimized_sha256="b" * 64,
        optimized_size_bytes=1000,
        optimized=stats(100, 100, None),
    )


@pytest.fixture
def inputs(bare_inputs: ReportInputs) -> ReportInputs:
    """Something of everything."""
    skipped = [(f"conv_{index}", "depthwise") for index in range(40)] + [("head", "excluded")]
    return replace(
        bare_inputs,
        job="projects/default/jobs/j1",
        recipe=Recipe.preset("default").to_dict(),
        provenance=Provenance("torchscript", "a" * 64, 4_100_000),
        original_onnx_size_bytes=4_000_000,
        original=stats(1_000_000, 1_000_000, 5_000_000, layer("conv_1", "Conv", 4000), layer("fc", "Gemm", 80)),
        optimized_size_bytes=1_000_000,
        optimized=stats(1_000_000, 500_000, 5_000_000, layer("conv_1_quant", "QLinearConv", 1000)),
        latency=[latency_row(2.0, 1.8, 2.2), latency_row(0.7, 0.6, 0.8, batch_size=8)],
        fidelity=Fidelity(
            "synthetic",
            32,
            {"y": OutputFidelity(0.9991, 27.5, 0.1), "i": OutputFidelity(None, None, None, equal=0.95)},
            top1_agreement=0.997,
            agreement=0.997,
        ),
        steps=[
            StepRow("fuse", {"exclude": []}, {"conv_batchnorm": 20, "gelu": 0}, [], 3_900_000, 0.5),
            StepRow("quantize", {"scheme": "auto"}, {"static": 12}, skipped, 1_000_000, 30.0),
        ],
        candidates=[
            {
                "id": "c1",
                "name": "quantize dynamic",
                "size_bytes": 1_100_000,
                "chosen": False,
                "reason": "slower than in float32",
                "downloadable": False,
            },
            {
                "id": "c2",
                "name": "quantize static",
                "size_bytes": 1_000_000,
                "speedup": {"median": 2.0, "low": 1.9, "high": 2.1},
                "agreement": 0.997,
                "drop": None,
                "chosen": True,
                "reason": "",
                "downloadable": True,
            },
        ],
        warnings=["calibrated on synthetic inputs", "calibrated on synthetic inputs"],
        violations=["top1 falls by 0.02, more than max_drop 0.01"],
    )
