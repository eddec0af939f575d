"""NNCF's ONNX backend: post-training quantization by its presets, and compression of weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import nncf
import onnx
import onnx.version_converter
from points import Job, Point, main

Mode = nncf.CompressWeightsMode
BLOCKS_OPSET = 21  # scales for blocks of weights


def dataset(job: Job) -> nncf.Dataset:
    return nncf.Dataset(job.feeds())


def quantized(job: Job, **options: Any) -> None:
    onnx.save(nncf.quantize(onnx.load(job.model), dataset(job), **options), job.result)


def weights(job: Job, mode: Mode, *, data: bool = False, **options: Any) -> None:
    """`data`: what rounds by the calibration inputs."""
    if data:
        options["dataset"] = dataset(job)
    if "group_size" in options:  # the default is to give up where a layer has another number of inputs
        options["advanced_parameters"] = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
        )
    model = onnx.version_converter.convert_version(onnx.load(job.model), BLOCKS_OPSET)
    onnx.save(nncf.compress_weights(model, mode=mode, **options), job.result)


POINTS: dict[str, Point] = {
    "performance": quantized,
    "mixed": partial(quantized, preset=nncf.QuantizationPreset.MIXED),
    "transformer": partial(quantized, model_type=nncf.ModelType.TRANSFORMER),
    "mixed, thorough bias correction": partial(
        quantized, preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False
    ),
    "weights in 8 bits": partial(weights, mode=Mode.INT8_ASYM),
    "weights in 8 bits, symmetric": partial(weights, mode=Mode.INT8_SYM),
    "weights in 4 bits": partial(weights, mode=Mode.INT4_ASYM, group_size=32, all_layers=True),
    "weights in 4 bits, symmetric": partial(weights, mode=Mode.INT4_SYM, group_size=32, all_layers=True),
    "weights in 4 bits, AWQ and scales": partial(
        weights, mode=Mode.INT4_SYM, group_size=32, all_layers=True, data=True, awq=True, scale_estimation=True
    ),
}

if __name__ == "__main__":
    main(POINTS)
