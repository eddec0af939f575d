"""Rules by family of operators; importing this package registers them all."""

from modelpress_compression.channels.ops import (
    attention,
    control,
    convolution,
    einsum,
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
    "control",
    "convolution",
    "einsum",
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
