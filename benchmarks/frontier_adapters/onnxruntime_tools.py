"""onnxruntime's own tools: dynamic, static, 4 and 8 bits in blocks, float16, and its optimizer for transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from points import Job, Point, Reader, main

onnxruntime.set_default_logger_severity(3)
MATRIX_PRODUCTS = ["MatMul", "Gemm"]


class OwnReader(Reader, CalibrationDataReader):
    """It wants a subclass of its own class."""


def preprocessed(job: Job) -> Path:
    """The model after onnxruntime's pre-processing; as it was where that fails."""
    target = job.output / "preprocessed.onnx"
    try:
        quant_pre_process(str(job.model), str(target), skip_symbolic_shape=True)
    except Exception as error:  # noqa: BLE001 - it raises anything; a careful user then goes on without it
        print("quant_pre_process failed:", error)
        return job.model
    return target


def dynamic(job: Job, **options: Any) -> None:
    """`DefaultTensorType` is what its error message asks for where types are not inferred."""
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(str(preprocessed(job)), str(job.result), extra_options=extra, **options)


def static(
    job: Job,
    method: str,
    *,
    weights: QuantType = QuantType.QInt8,
    activations: QuantType = QuantType.QUInt8,
    form: QuantFormat = QuantFormat.QDQ,
    per_channel: bool = True,
    operators: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Where adjusting weight scales to int32 biases fails, which it does on some models, once more without it."""
    model = preprocessed(job)
    for more in ({}, {"QDQDisableWeightAdjustForInt32Bias": True}):
        try:
            quantize_static(
                str(model),
                str(job.result),
                OwnReader(job.feeds()),
                quant_format=form,
                op_types_to_quantize=operators,
                per_channel=per_channel,
                activation_type=activations,
                weight_type=weights,
                calibrate_method=CalibrationMethod[method],
                extra_options={**(extra or {}), **more},
            )
        except ValueError:
            if more:
                raise
        else:
            return


def blocks(job: Job, config: Any) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(job.model), algo_config=config(job))
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.result))


def rounded(job: Job, **options: Any) -> Any:
    """Configuration of rounding to nearest."""
    return DefaultWeightOnlyQuantConfig(**options)


def float16(job: Job) -> None:
    onnx.save(convert_float_to_float16(onnx.load(job.model), keep_io_types=True), job.result)


def fused(job: Job) -> Any:
    """Its optimizer for transformers, which finds heads and widths itself."""
    from onnxruntime.transformers.optimizer import optimize_model

    return optimize_model(str(job.model), model_type="bert", num_heads=0, hidden_size=0, opt_level=0)


def transformer(job: Job) -> None:
    fused(job).save_model_to_file(str(job.result))


def transformer_float16(job: Job) -> None:
    optimized = fused(job)
    optimized.convert_float_to_float16(keep_io_types=True)
    optimized.save_model_to_file(str(job.result))


def transformer_dynamic(job: Job, **options: Any) -> None:
    path = job.output / "fused.onnx"
    fused(job).save_model_to_file(str(path))
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(str(path), str(job.result), extra_options=extra, **options)


POINTS: dict[str, Point] = {
    "dynamic, S8 per channel": partial(dynamic, per_channel=True, weight_type=QuantType.QInt8),
    "dynamic, S8 per tensor": partial(dynamic, weight_type=QuantType.QInt8),
    "dynamic, U8 per tensor": partial(dynamic, weight_type=QuantType.QUInt8),
    "dynamic, 7 bits per channel": partial(dynamic, per_channel=True, reduce_range=True),
    "dynamic, products alone": partial(dynamic, per_channel=True, op_types_to_quantize=MATRIX_PRODUCTS),
    "static, minmax": partial(static, method="MinMax"),
    "static, entropy": partial(static, method="Entropy"),
    "static, percentile": partial(static, method="Percentile"),
    "static, minmax, moving average": partial(static, method="MinMax", extra={"CalibMovingAverage": True}),
    "static, minmax, symmetric S8S8": partial(
        static, method="MinMax", activations=QuantType.QInt8, extra={"ActivationSymmetric": True}
    ),
    "static, percentile, U8U8": partial(static, method="Percentile", weights=QuantType.QUInt8),
    "static, minmax, per tensor": partial(static, method="MinMax", per_channel=False),
    "static, percentile, per tensor": partial(static, method="Percentile", per_channel=False),
    "static, minmax, convolutions and products": partial(
        static, method="MinMax", operators=["Conv", "ConvTranspose", *MATRIX_PRODUCTS]
    ),
    "static, percentile, convolutions and products": partial(
        static, method="Percentile", operators=["Conv", "ConvTranspose", *MATRIX_PRODUCTS]
    ),
    "static, minmax, QOperator": partial(static, method="MinMax", form=QuantFormat.QOperator),
    "static, percentile, QOperator": partial(static, method="Percentile", form=QuantFormat.QOperator),
    "static, percentile, 4-bit weights": partial(static, method="Percentile", weights=QuantType.QInt4),
    "4 bits, blocks of 32": partial(blocks, config=partial(rounded, block_size=32)),
    "4 bits, blocks of 128": partial(blocks, config=partial(rounded, block_size=128)),
    "4 bits, symmetric, int8 products": partial(
        blocks, config=partial(rounded, block_size=32, is_symmetric=True, accuracy_level=4)
    ),
    "4 bits, tables too": partial(
        blocks,
        config=partial(
            rounded, block_size=32, op_types_to_quantize=("MatMul", "Gather"), quant_axes=(("MatMul", 0), ("Gather", 1))
        ),
    ),
    "4 bits, HQQ": partial(blocks, config=lambda job: HQQWeightOnlyQuantConfig(block_size=32)),
    "4 bits, GPTQ": partial(
        blocks,
        config=lambda job: GPTQWeightOnlyQuantConfig(
            calibration_data_reader=OwnReader(job.feeds()), block_size=32, op_types_to_quantize=("MatMul",)
        ),
    ),
    "4 bits, RTN": partial(blocks, config=lambda job: RTNWeightOnlyQuantConfig()),
    "8 bits, blocks of 32": partial(blocks, config=partial(rounded, block_size=32, bits=8)),
    "float16": float16,
    "transformer optimizer": transformer,
    "transformer optimizer, float16": transformer_float16,
    "transformer optimizer, dynamic": partial(transformer_dynamic, per_channel=True, weight_type=QuantType.QInt8),
}

if __name__ == "__main__":
    main(POINTS)
