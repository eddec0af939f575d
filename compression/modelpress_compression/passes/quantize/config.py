"""Options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Checks


@dataclass(frozen=True)
class QuantizeConfig:
    """Fewer bits. `scheme` auto tries none, dynamic and static and keeps the fastest that agrees with the original.

    `block_size`: weight_only, how many weights share a scale at most. `smooth_quant`, `equalize`, `bias_correction`:
    static alone. `rounding`: how the weights of Conv, MatMul and Gemm are rounded.
    """

    scheme: str = "auto"
    weights: str = "int8"
    activations: str = "uint8"
    per_channel: bool = True
    calibration: str = "auto"
    exclude: tuple[str, ...] = ()
    block_size: int = 32
    smooth_quant: bool = True
    equalize: bool = False
    bias_correction: bool = True
    rounding: str = "auto"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("scheme", ("auto", "dynamic", "static", "weight_only", "float16"))
        checks.one_of("weights", ("int8", "uint8", "int4"))
        if self.weights == "int4" and self.scheme != "weight_only":
            checks.refuse("weights", "'int4' needs scheme weight_only")
        checks.one_of("activations", ("uint8", "int8"))
        checks.one_of("calibration", ("auto", "minmax", "moving_average", "percentile", "entropy", "mse"))
        checks.within("block_size", 16 <= self.block_size <= 256, "[16, 256]")
        if self.block_size & (self.block_size - 1):
            checks.refuse("block_size", f"{self.block_size} is no power of two")
        checks.one_of("rounding", ("auto", "nearest", "gptq"))
        checks.finish()
