"""Rules by family of operators; importing this package registers them all."""

from modelpress_compression.channels.ops import (
    attention,
    control_flow,
    convolution,
    elementwise,
    layout,
    matmul,
    normalization,
    quantization,
    recurrent,
    reduction,
    reshape,
    selection,
    spatial,
)
from modelpress_compression.channels.ops.registry import RULES

__all__ = [
    "RULES",
    "attention",
    "control_flow",
    "convolution",
    "elementwise",
    "layout",
    "matmul",
    "normalization",
    "quantization",
    "recurrent",
    "reduction",
    "reshape",
    "selection",
    "spatial",
]
