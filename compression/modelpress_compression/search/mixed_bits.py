"""The smallest file that keeps the answers: 2, 4 or 8 bits for each weight, chosen by what they take and what they err.

Prices: of every weight in every form, its bytes, and the error at the outputs with it alone in that form. Budgets of
error come from `budgets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from modelpress_compression.passes.quantize.weight_only.mixed_bits import EIGHT, FLOAT, Form, MixedBits
from modelpress_compression.search.budgets import by_budget, decibels
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.solver import Option


class MixedBitsSearch:
    """On the float model of a `SchemeSearch`, to which its candidates go."""

    def __init__(self, search: SchemeSearch) -> None:
        self._search = search

    def candidates(self) -> Iterator[Candidate]:
        """One after the other, each nearer to the smallest that keeps the answers. Raises TimeLimitError."""
        forms = self.forms.values()
        if any(form.name not in (EIGHT, FLOAT) for own in forms for form in own):
            yield from by_budget([[Option(form.size_bytes, form.error) for form in own] for own in forms], self._built)

    @cached_property
    def _bits(self) -> MixedBits:
        return MixedBits(self._search.model, self._search.step.config, self._search.context)

    @cached_property
    def forms(self) -> Mapping[str, tuple[Form, ...]]:
        """Of each weight, with their prices. Raises ModelNotRunnableError, TimeLimitError."""

        def measure() -> dict[str, Any]:
            return {
                name: [[form.name, form.size_bytes, form.error] for form in forms]
                for name, forms in self._bits.options.items()
            }

        known = self._search.known("prices of bits", measure)
        return {name: tuple(Form(*form) for form in forms) for name, forms in known.items()}

    def _built(self, choice: Sequence[int]) -> Candidate:
        forms = {name: own[place] for (name, own), place in zip(self.forms.items(), choice, strict=True)}
        names = {name: form.name for name, form in forms.items()}
        few = sum(name not in (EIGHT, FLOAT) for name in names.values())
        promised = decibels(sum(form.error for form in forms.values()))
        variant = f"{few} of {len(names)} weights in blocks of 4 bits or less, priced at {promised:.0f} dB"
        return self._search.add("weight_only", lambda: self._bits.store(names), variant, asked=[sorted(names.items())])
