"""Options of `fuse`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FuseConfig:
    """Lossless rewriting: `activations` into Conv and Gemm, `transformers` for attention, LayerNorm, GELU and skips."""

    activations: bool = True
    transformers: bool = True
    exclude: tuple[str, ...] = ()
