"""Rules by family of operators; importing this package registers them all."""

from modelpress_compression.analysis.channels.ops import (
    convolution,
    elementwise,
    layout,
    matmul,
    normalization,
    reduction,
    reshape,
    selection,
    spatial,
)
from modelpress_compression.analysis.channels.ops.registry import RULES

__all__ = [
    "RULES", "convolution", "elementwise", "layout", "matmul", "normalization", "reduction", "reshape", "selection",
    "spatial",
]  # fmt: skip
