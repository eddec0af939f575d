"""Intel's neural-compressor for ONNX (onnx-neural-compressor 1.0, the last release)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx_neural_compressor.data_reader import CalibrationDataReader
from onnx_neural_compressor.quantization import CalibrationMethod, QuantFormat, QuantType, config, quantize
from onnx_neural_compressor.quantization import matmul_nbits_quantizer as nbits
from points import Job, Point, Reader, main

MAX_IR, MAX_OPSET = 10, 21  # of the onnxruntime that it works with


class OwnReader(Reader, CalibrationDataReader):
    """It wants a subclass of its own class."""


def loadable(job: Job) -> Path:
    """The model in an IR version that its onnxruntime reads."""
    model = onnx.load(job.model)
    if model.ir_version <= MAX_IR:
        return job.model
    model.ir_version = MAX_IR
    target = job.output / "input.onnx"
    onnx.save(model, target)
    return target


def in_one_file(job: Job) -> None:
    """It leaves the weights in a file beside the model."""
    model = onnx.load(job.result)
    for path in job.output.glob("model.onnx*"):
        path.unlink()
    onnx.save(model, job.result)


def dynamic(job: Job) -> None:
    """Without what has a bias, on which it fails."""
    operators = ["MatMul", "Gather", "LSTM", "Attention", "EmbedLayerNormalization"]
    wanted = config.DynamicQuantConfig(weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=operators)
    quantize(str(loadable(job)), str(job.result), wanted)
    in_one_file(job)


def static(job: Job, method: str = "MinMax", **options: Any) -> None:
    wanted = config.StaticQuantConfig(
        calibration_data_reader=OwnReader(job.feeds()),
        calibrate_method=CalibrationMethod[method],
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        **options,
    )
    quantize(str(loadable(job)), str(job.result), wanted)
    in_one_file(job)


def blocks(job: Job, *, data: bool = False, config: Any = None) -> None:
    if data:
        config = config(OwnReader(job.feeds()))
    quantizer = nbits.MatMulNBitsQuantizer(str(loadable(job)), block_size=32, is_symmetric=True, algo_config=config)
    quantizer.process()
    model = quantizer.model
    onnx.save(getattr(model, "model", model), job.result)


POINTS: dict[str, Point] = {
    "dynamic": dynamic,
    "static, minmax": static,
    "static, entropy": partial(static, method="Entropy"),
    "static, percentile": partial(static, method="Percentile"),
    "static, SmoothQuant": partial(static, extra_options={"SmoothQuant": True, "SmoothQuantAlpha": 0.5}),
    "4 bits, RTN": partial(blocks, config=nbits.RTNWeightOnlyQuantConfig()),
    "4 bits, GPTQ": partial(blocks, data=True, config=nbits.GPTQWeightOnlyQuantConfig),
    "4 bits, AWQ": partial(blocks, data=True, config=nbits.AWQWeightOnlyQuantConfig),
}

if __name__ == "__main__":
    main(POINTS)
