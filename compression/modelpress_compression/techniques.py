"""The table of techniques: all that the engine knows of one besides its own folder is its row here.

docs/writing_a_pass.md walks through adding one. This module imports neither torch nor onnx: the server reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from modelpress_compression.options import Config, schema_of
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.schema import Option, Schema

if TYPE_CHECKING:
    from modelpress_compression.passes.base import Pass


class Chooser(NamedTuple):
    """What runs a step that is more than one run of its pass: where `runs` says so of its configuration, the function
    (`module:name`)."""

    runs: Callable[[Any], bool]
    function: str


@dataclass(frozen=True)
class Technique:
    """One row. What it names as `module:name` is imported when it is first used.

    `name`: as a recipe spells it, in snake case. `number`: of its field in the API's Step, never used for another.
    `weight`: how much of a job's progress a step is; measuring weighs 3.
    """

    name: str
    number: int
    summary: str
    config_class: type[Config]
    pass_class: str = field(repr=False)
    chooser: Chooser | None = None
    weight: float = 3.0

    def make_pass(self, config: Any) -> Pass:
        """The pass with its configuration."""
        made: Pass = _imported(self.pass_class)(config)
        return made

    def chooser_for(self, config: Any) -> Callable[..., Any] | None:
        """What runs a step with this configuration (see `pipeline`) in place of its pass; None: the pass alone."""
        if self.chooser is None or not self.chooser.runs(config):
            return None
        function: Callable[..., Any] = _imported(self.chooser.function)
        return function


def step_schema(techniques: Iterable[Technique]) -> Schema:
    """What a step can be: one of the techniques, with its options."""
    options = (
        Option(row.name, row.number, schema_of(row.config_class, _message_name(row.name)), row.summary)
        for row in techniques
    )
    return Schema("Step", tuple(options), choice="technique")


def _message_name(technique: str) -> str:
    """LowRankStep for low_rank."""
    return "".join(word.capitalize() for word in technique.split("_")) + "Step"


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


TECHNIQUES = MappingProxyType(
    {
        technique.name: technique
        for technique in (
            Technique(
                "fuse",
                1,
                "Folds constants, removes dead code and merges operators; lossless up to float rounding.",
                FuseConfig,
                "modelpress_compression.passes.fuse.fuse:Fuse",
            ),
            Technique(
                "prune",
                2,
                "Removes weights or whole channels by importance.",
                PruneConfig,
                "modelpress_compression.passes.prune.prune:Prune",
                Chooser(lambda config: config.in_rounds, "modelpress_compression.search.rounds:prune_in_rounds"),
            ),
            Technique(
                "quantize",
                3,
                "Stores weights, and computes where it pays, in fewer bits.",
                QuantizeConfig,
                "modelpress_compression.passes.quantize.quantize:Quantize",
                Chooser(
                    lambda config: config.scheme == "auto",
                    "modelpress_compression.search.quantization:choose_quantization",
                ),
            ),
            Technique(
                "distill",
                4,
                "Trains the model as it stands towards the answers of the model as it was uploaded.",
                DistillConfig,
                "modelpress_compression.passes.distill.distill:Distill",
                weight=12.0,
            ),
            Technique(
                "factorize",
                5,
                "Puts two or three products of a lower rank in the place of one, where these cost less.",
                FactorizeConfig,
                "modelpress_compression.passes.factorize.factorize:Factorize",
            ),
        )
    }
)
