"""What is to be quantized, and how: what every measurement and every writer of static quantization starts from."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpress_compression.graph.edit import Editor
from modelpress_compression.measure.fidelity import KnownOutputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import Plan
from modelpress_compression.passes.quantize.rounding.rounder import Rounder
from modelpress_compression.passes.quantize.weights import WeightStore


@dataclass(frozen=True)
class QuantizationSetup:
    """A float model, which values and layers of it are in 8 bits (`plan`), and how its weights are rounded.

    Nothing here is changed by those who use it: they write into copies of the model. `known`: what is kept of its
    outputs. `wide`: names of weights that have 8 bits where the others have 4.
    """

    model: Model
    plan: Plan
    config: QuantizeConfig
    rounder: Rounder
    context: Context
    known: KnownOutputs = field(default_factory=KnownOutputs)
    wide: frozenset[str] = frozenset()

    def weight_store(self, editor: Editor) -> WeightStore:
        """Quantizes weights into the editor's model, a copy of this one."""
        return WeightStore(editor, self.config, self.rounder, self.context.target, self.wide)
