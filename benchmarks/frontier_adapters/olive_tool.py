"""Olive: its passes for ONNX models on the CPU, one each, as its workflows run them."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"  # read when Olive is imported

from olive.data.config import DataConfig
from olive.data.registry import Registry
from olive.hardware import DEFAULT_CPU_ACCELERATOR
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.float16_conversion import OnnxFloatToFloat16
from olive.passes.onnx.hqq_quantization import OnnxHqqQuantization
from olive.passes.onnx.kquant_quantization import OnnxKQuantQuantization
from olive.passes.onnx.peephole_optimizer import OnnxPeepholeOptimizer
from olive.passes.onnx.quantization import OnnxDynamicQuantization, OnnxStaticQuantization
from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization
from olive.passes.onnx.transformer_optimization import OrtTransformersOptimization
from points import Feed, Job, Point, main

FEEDS: list[tuple[Feed, int]] = []  # with a label each, which nothing reads


@Registry.register_dataset("calibration_feeds")
def calibration_feeds(data_dir: str | None = None, **options: Any) -> list[tuple[Feed, int]]:
    return FEEDS


def data_of(job: Job) -> DataConfig:
    FEEDS[:] = [(feed, 0) for feed in job.feeds()]
    return DataConfig(
        name="calibration",
        type="DataContainer",
        load_dataset_config={"type": "calibration_feeds"},
        pre_process_data_config={"type": "skip_pre_process"},
        dataloader_config={"type": "no_auto_batch_dataloader"},
    )


def run(job: Job, *passes: tuple[Any, dict[str, Any]]) -> None:
    """The passes one after the other."""
    model = ONNXModelHandler(str(job.model))
    for number, (which, config) in enumerate(passes):
        if which is OnnxStaticQuantization:
            config = {"data_config": data_of(job), **config}  # noqa: PLW2901
        one = create_pass_from_dict(which, config, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
        folder = job.output / f"pass-{number}"
        folder.mkdir()  # some passes want it to be there
        model = one.run(model, str(folder / "model.onnx"))
    made = Path(model.model_path)
    for path in made.parent.glob(f"{made.name}*"):
        shutil.copy(path, job.output / path.name.replace(made.name, "model.onnx"))


def static(**config: Any) -> tuple[Any, dict[str, Any]]:
    """U8 activations and S8 weights per channel, as its examples for the CPU have it."""
    types = {"activation_type": "uint8", "precision": "int8", "per_channel": True}
    return OnnxStaticQuantization, types | config


PEEPHOLE = (OnnxPeepholeOptimizer, {})
TRANSFORMER = (OrtTransformersOptimization, {"model_type": "bert"})
DYNAMIC = (OnnxDynamicQuantization, {"per_channel": True})


def point(*passes: tuple[Any, dict[str, Any]]) -> Point:
    return partial(_run_in_order, passes=passes)


def _run_in_order(job: Job, passes: tuple[tuple[Any, dict[str, Any]], ...]) -> None:
    run(job, *passes)


POINTS: dict[str, Point] = {
    "peephole optimizer": point(PEEPHOLE),
    "dynamic": point(DYNAMIC),
    "peephole optimizer, dynamic": point(PEEPHOLE, DYNAMIC),
    "static, its defaults": point((OnnxStaticQuantization, {})),
    "static, minmax": point(static()),
    "static, entropy": point(static(calibrate_method="Entropy")),
    "static, percentile": point(static(calibrate_method="Percentile")),
    "static, percentile, QOperator": point(static(calibrate_method="Percentile", quant_format="QOperator")),
    "4 bits, RTN": point((OnnxBlockWiseRtnQuantization, {"block_size": 32})),
    "8 bits, RTN": point((OnnxBlockWiseRtnQuantization, {"block_size": 32, "bits": 8})),
    "4 bits, HQQ": point((OnnxHqqQuantization, {"block_size": 32})),
    "4 bits, k-quant": point((OnnxKQuantQuantization, {})),
    "float16": point((OnnxFloatToFloat16, {"keep_io_types": True})),
    "transformer optimizer": point(TRANSFORMER),
    "transformer optimizer, dynamic": point(TRANSFORMER, DYNAMIC),
}

if __name__ == "__main__":
    main(POINTS)
