"""The forms that a weight may have in the joint choice, with what each costs, and a model with each in its form.

StoredForms      2, 4 or 8 bits or float32 in the file: bytes, in proportion to what is left of the weight
ComputedForms    float32 or 8-bit arithmetic: milliseconds on this machine, measured at several widths
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from modelpress_compression.channels import Group
from modelpress_compression.passes.prune.blocks import Branch
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.weight_only.mixed_bits import MixedBits
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.joint_solver import Form, Weight
from modelpress_compression.search.mixed_bits import MixedBitsSearch
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.width_times import Curve, width_times
from modelpress_compression.search.widths import owned_axes


class Forms(Protocol):
    """`what`: is chosen beside the widths, for the name of a candidate."""

    @property
    def what(self) -> str: ...

    def weights(self, groups: Sequence[Group], branches: Sequence[Branch]) -> list[Weight]:
        """Of the whole model; the axes as `owned_axes` gives them. Raises ModelNotRunnableError, TimeLimitError."""

    def built(self, search: SchemeSearch, places: Sequence[int], variant: str) -> Candidate | None:
        """The cut model of a search with each weight in the form of this place; None: that is the model itself."""


@dataclass
class StoredForms:
    """By the prices of `bits`, of the model of `whole`."""

    whole: SchemeSearch
    bits: MixedBitsSearch
    what: str = "the bits"

    def weights(self, groups: Sequence[Group], branches: Sequence[Branch]) -> list[Weight]:
        return [
            Weight(
                [Form(form.size_bytes, form.error) for form in forms],
                owned_axes(self.whole.model, groups, name, branches),
            )
            for name, forms in self.bits.forms.items()
        ]

    def built(self, search: SchemeSearch, places: Sequence[int], variant: str) -> Candidate:
        names = {name: own[place].name for (name, own), place in zip(self.bits.forms.items(), places, strict=True)}
        return search.add(
            "weight_only",
            lambda: MixedBits(search.model, search.step.config, search.context).store(names),
            f"bits {variant}",
            asked=[sorted(names.items())],
        )


@dataclass
class ComputedForms:
    """By the times of layers of the model of `whole` under cuts of `prune`."""

    whole: SchemeSearch
    prune: PruneConfig
    what: str = "the arithmetic"
    _outputs: list[str] = field(default_factory=list)  # of the layers, in the order of their weights

    def weights(self, groups: Sequence[Group], branches: Sequence[Branch]) -> list[Weight]:
        """Float32 comes first, and 8 bits, where a layer has such a form, second."""

        def measure() -> dict[str, Any]:
            search = self.whole
            curves = width_times(search.model, groups, self.prune, search.step.config, search.context, search.threads)
            return {"layers": [asdict(curve) for curve in curves]}

        rows = self.whole.known("times of widths", measure)["layers"]
        self._outputs = [row["output"] for row in rows]
        return [
            Weight(
                [
                    _form(row["in_float"], 0.0),
                    *([_form(row["in_8_bits"], self._errors[row["output"]])] if self._has_8_bits(row) else []),
                ],
                owned_axes(self.whole.model, groups, row["tensor"], branches),
            )
            for row in rows
        ]

    def _has_8_bits(self, row: dict[str, Any]) -> bool:
        return bool(row["in_8_bits"]) and row["output"] in self._errors

    @cached_property
    def _errors(self) -> dict[str, float]:
        """By the output of a layer that can be in 8 bits, the error at the model's outputs with it alone so."""

        def measure() -> dict[str, float]:
            quantizer = self.whole.quantizer
            if quantizer is None or not quantizer.ranges.weight_errors:
                return {}
            plan = replace(quantizer, full=True).plan
            return {node.outputs[0].name or "": quantizer.ranges.error_saved(node, plan) for node in plan.layers}

        return dict(self.whole.known("errors of layers", measure))

    def built(self, search: SchemeSearch, places: Sequence[int], variant: str) -> Candidate | None:
        integer = [output for output, place in zip(self._outputs, places, strict=True) if place]
        if not integer:
            return None
        kept = [output for output in self._errors if output not in integer]
        return search.add_static(f"{len(integer)} of {len(places)} layers {variant}", kept, full=True)


def _form(curve: Sequence[Sequence[float]], error: float) -> Form:
    points: Curve = tuple((share, ms) for share, ms in curve)
    return Form(points[-1][1], error, points)
