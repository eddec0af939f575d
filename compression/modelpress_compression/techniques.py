"""The table of techniques: it ties each one's configuration to its pass.

Adding one is a folder under `passes` with its config and its pass, a row here, and a message in recipe.proto;
docs/writing_a_pass.md walks through it. This module imports neither torch nor onnx: the server reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig

if TYPE_CHECKING:
    from modelpress_compression.passes.base import Pass


@dataclass(frozen=True)
class Technique:
    """One registry row: the name in a recipe, its config class, and where its pass is (imported when first used)."""

    name: str
    summary: str
    config_class: type[Any]
    pass_class: str = field(repr=False)

    def make_pass(self, config: Any) -> Pass:
        """Imports the pass and gives it its configuration."""
        module, _, name = self.pass_class.partition(":")
        made: Pass = getattr(import_module(module), name)(config)
        return made


TECHNIQUES = MappingProxyType(
    {
        technique.name: technique
        for technique in (
            Technique(
                "fuse",
                "Folds constants, removes dead code and merges operators; lossless up to float rounding.",
                FuseConfig,
                "modelpress_compression.passes.fuse.fuse:Fuse",
            ),
            Technique(
                "prune",
                "Removes weights or whole channels by importance.",
                PruneConfig,
                "modelpress_compression.passes.prune.prune:Prune",
            ),
            Technique(
                "quantize",
                "Stores weights, and computes where it pays, in fewer bits.",
                QuantizeConfig,
                "modelpress_compression.passes.quantize.quantize:Quantize",
            ),
            Technique(
                "distill",
                "Trains the model as it stands towards the answers of the model as it was uploaded.",
                DistillConfig,
                "modelpress_compression.passes.distill.distill:Distill",
            ),
        )
    }
)
