"""Options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option
from modelpress_compression.schema import Needs


@dataclass(frozen=True)
class QuantizeConfig(Config):
    """Fewer bits."""

    @property
    def is_narrow(self) -> bool:
        """Whether weights have less than 8 bits."""
        return self.weights in ("int4", "int2")

    scheme: str = option(
        "auto",
        1,
        "auto takes the fastest of none, dynamic and static that keeps the agreement with the original.",
        choices=("auto", "dynamic", "static", "weight_only", "float16"),
    )
    weights: str = option(
        "int8",
        2,
        "Type of quantized weights; int4: static and weight_only alone, in short rows int8 instead; int2: likewise, in "
        "embeddings and products of weight_only over 256 or more inputs, elsewhere int4.",
        choices=("int8", "uint8", "int4", "int2"),
        needs=Needs(("int4", "int2"), "scheme", "weight_only", ("static",)),
    )
    activations: str = option("uint8", 3, "Type of quantized activations (static).", choices=("uint8", "int8"))
    per_channel: bool = option(True, 4, "One scale an output channel instead of one a tensor.")
    calibration: str = option(
        "auto",
        5,
        "static: how the range of an activation is found; auto takes, tensor by tensor, the one of the least error at "
        "the outputs.",
        choices=("auto", "minmax", "moving_average", "percentile", "entropy", "mse"),
    )
    exclude: tuple[str, ...] = option((), 6, "Names of nodes to leave in float, with * and ?.")
    block_size: int = option(
        32,
        7,
        "weight_only: weights of one column that share a scale; a power of two.",
        gte=16,
        lte=256,
        power_of_two=True,
    )
    smooth_quant: bool = option(
        True,
        8,
        "static: moves outliers of activations into the weights (SmoothQuant), where it lessens a layer's error.",
    )
    equalize: bool = option(
        False,
        9,
        "static: evens out the ranges of channels between neighbouring convolutions (cross-layer equalization).",
    )
    bias_correction: bool = option(
        True,
        10,
        "static: takes the mean error of each channel back through the biases, where data is given and the outputs "
        "gain by it.",
    )
    rounding: str = option(
        "auto",
        11,
        "How weights are rounded: gptq makes later weights take up the error of earlier ones; adaround learns it "
        "layer by layer, brecq block by block, which takes minutes; all three need representative inputs. auto takes "
        "gptq for less than 8 bits, and under static layer by layer where that helps the outputs.",
        choices=("auto", "nearest", "gptq", "adaround", "brecq"),
    )
    rounding_steps: int = option(
        500, 12, "adaround and brecq: steps of gradient descent for each layer or block.", gte=1, lte=100_000
    )
    rotate: str = option(
        "auto",
        13,
        "Rotations of residual streams, which spread outliers of single channels over all, inside the weights (QuaRot, "
        "SpinQuant): auto where the outputs for samples held out gain by it, always wherever the graph allows it.",
        choices=("auto", "none", "always"),
    )
