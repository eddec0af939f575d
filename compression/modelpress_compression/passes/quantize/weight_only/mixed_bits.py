"""Weights in 2, 4 or 8 bits or float32, each as its caller says; and what each form of each weight costs.

    options    of every weight: bytes, and the error at the outputs with it alone in that form
    store      a model with each weight in the form chosen for it

Forms are those of `scheme: weight_only` with `weights: int2`, `int4` and `int8`: products over many inputs in blocks,
tables in blocks, everything else in the arithmetic that is folded when the model is loaded. Fewer than 8 bits are
rounded by GPTQ where there is data; that is done once, and remembered for every model that is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_tensor
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.gptq import make_rounder
from modelpress_compression.passes.quantize.rounding.rounder import (
    NearestRounder,
    RememberingRounder,
    Rounder,
    rounded_nodes,
)
from modelpress_compression.passes.quantize.views import hide_views, restore_views
from modelpress_compression.passes.quantize.weight_only.storage import own_weights, weight_probe
from modelpress_compression.passes.quantize.weight_only.store import storable_weights
from modelpress_compression.passes.quantize.weight_only.writer import WeightWriter

TWO, FOUR, LONG_FOUR, EIGHT, FLOAT = "2 bits", "4 bits", "4 bits in long blocks", "8 bits", "float32"
_BITS: Mapping[str, int] = MappingProxyType({TWO: 2, FOUR: 4, LONG_FOUR: 4, EIGHT: 8})
# A scale for 128 weights instead of 32: 4.3 bits a weight, not 5.1.
_CHANGES: Mapping[str, Mapping[str, str | int]] = MappingProxyType(
    {
        TWO: {"weights": "int2"},
        FOUR: {"weights": "int4"},
        LONG_FOUR: {"weights": "int4", "block_size": 128},
        EIGHT: {"weights": "int8"},
    }
)


@dataclass(frozen=True)
class Form:
    """A weight in `name`: what it takes in the file, and the error that it makes alone, as a share of the outputs'
    power."""

    name: str
    size_bytes: int
    error: float


class MixedBits:
    """Of one float model, whose clone it works on. Weights are tried out when `options` is first asked for."""

    def __init__(self, model: Model, config: QuantizeConfig, context: Context) -> None:
        self._config, self._context = replace(config, scheme="weight_only"), context
        self._model = model.clone()
        hide_views(self._model, turned=False)
        four = self._narrow_rounder()
        self._rounders = {TWO: four, FOUR: four, LONG_FOUR: four, EIGHT: NearestRounder()}

    def _narrow_rounder(self) -> Rounder:
        """GPTQ where there is data, which does its work once."""
        config = replace(self._config, weights="int4")
        rounder = make_rounder(self._model, config, self._context, Findings())
        if isinstance(rounder, NearestRounder):
            return rounder
        return RememberingRounder(rounder, rounded_nodes(self._model))

    def _writer(self, form: str, model: Model) -> WeightWriter:
        config = replace(self._config, **_CHANGES[form])  # type: ignore[arg-type]
        return WeightWriter(Editor(model), config, self._rounders[form])

    @cached_property
    def options(self) -> dict[str, tuple[Form, ...]]:
        """By the weight's name, the forms that it may have. Raises ModelNotRunnableError, TimeLimitError."""
        weights = own_weights(self._model, self._config)
        writers = {form: self._writer(form, self._model) for form in _CHANGES}
        found = {}
        with weight_probe(self._model, list(weights), self._context) as error:
            for number, (name, weight) in enumerate(weights.items()):
                forms = []
                for form, writer in writers.items():
                    values, stored = writer.quantized(weight)
                    if stored.bits == _BITS[form]:
                        forms.append(Form(form, stored.stored_bytes, error(name, values)))
                tensor = constant_tensor(weight)
                found[name] = (*forms, Form(FLOAT, tensor.nbytes if tensor is not None else 0, 0.0))
                share = (number + 1) / len(weights)
                self._context.progress(share, f"weighing the bits of {number + 1} of {len(weights)} weights")
        return found

    def store(self, forms: Mapping[str, str]) -> PassResult:
        """A model with each weight in the form of its name; those that are not named are in 8 bits.

        Raises TimeLimitError.
        """
        work, findings = self._model.clone(), Findings()
        writers = {form: self._writer(form, work) for form in _CHANGES}
        for graph, weight in list(storable_weights(work, self._config)):
            form = forms.get(weight.name or "", EIGHT)
            if form != FLOAT:
                self._context.check_time()
                writers[form].store(graph, weight)
                findings.changes[f"weights_in_{_BITS[form]}_bits"] += 1
        clean(work)
        restore_views(work)
        return findings.result(work)
