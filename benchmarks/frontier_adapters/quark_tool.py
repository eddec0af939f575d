"""AMD's Quark: its ready-made configurations, and U8 activations with S8 weights per channel as suits this CPU."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

from onnxruntime.quantization import CalibrationDataReader
from points import Job, Point, Reader, main
from quark.onnx import (
    A8W8_ADAROUND_QCONFIG,
    A8W8_QCONFIG,
    XINT8_QCONFIG,
    BiasCorrectionConfig,
    CLEConfig,
    Int8Spec,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    SmoothQuantConfig,
    UInt8Spec,
)
from quark.onnx.quantization.config.spec import CalibMethod, QuantGranularity


class OwnReader(Reader, CalibrationDataReader):
    """It wants a subclass of onnxruntime's class."""


def quantized(job: Job, config: QConfig) -> None:
    quantizer = ModelQuantizer(deepcopy(config))
    quantizer.quantize_model(str(job.model), str(job.result), OwnReader(job.feeds()))


def mixed(method: str, *algorithms: Any, signed: bool = False) -> QConfig:
    """Activations by this method, weights per channel."""
    activation = Int8Spec if signed else UInt8Spec
    return QConfig(
        QLayerConfig(
            activation=activation(calibration_method=CalibMethod[method]),
            weight=Int8Spec(calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel),
        ),
        algo_config=list(algorithms),
    )


POINTS: dict[str, Point] = {
    "A8W8": partial(quantized, config=A8W8_QCONFIG),
    "XINT8": partial(quantized, config=XINT8_QCONFIG),
    "A8W8, AdaRound": partial(quantized, config=A8W8_ADAROUND_QCONFIG),
    "U8S8 per channel, minmax": partial(quantized, config=mixed("MinMax")),
    "U8S8 per channel, percentile": partial(quantized, config=mixed("Percentile")),
    "U8S8 per channel, layerwise percentile": partial(quantized, config=mixed("LayerwisePercentile")),
    "U8S8 per channel, entropy": partial(quantized, config=mixed("Entropy")),
    "U8S8 per channel, MSE": partial(quantized, config=mixed("MinMSE")),
    "U8S8 per channel, percentile, CLE": partial(quantized, config=mixed("Percentile", CLEConfig())),
    "U8S8 per channel, percentile, bias correction": partial(
        quantized, config=mixed("Percentile", BiasCorrectionConfig())
    ),
    "U8S8 per channel, percentile, SmoothQuant": partial(quantized, config=mixed("Percentile", SmoothQuantConfig())),
}

if __name__ == "__main__":
    main(POINTS)
