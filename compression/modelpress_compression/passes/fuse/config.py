"""Options of `fuse`."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option


@dataclass(frozen=True)
class FuseConfig(Config):
    """Lossless rewriting."""

    activations: bool = option(
        True, 1, "Bring hard-swish and hard-sigmoid chains into the forms that onnxruntime fuses into Conv."
    )
    transformers: bool = option(
        True, 2, "Fuse attention, LayerNormalization, GELU and skip connections of transformers."
    )
    exclude: tuple[str, ...] = option((), 3, "Names of nodes to leave alone, with * and ?.")
