"""The smallest file that keeps the answers: 2, 4 or 8 bits for each weight, chosen by what they take and what they err.

1. Prices: of every weight in every form, its bytes, and the error at the outputs with it alone in that form.
2. Solver: the fewest bytes for which the errors add up to no more than a budget (solver.py).
3. The cheapest forms of all are built and judged first. Where they do not keep the answers, the budget is halved on a
   scale of decibels between their error and that of 8 bits, as often as `_HALVINGS`, and every model is judged as a
   whole: prices choose, they decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from modelpress_compression.passes.quantize.weight_only.mixed_bits import EIGHT, FLOAT, Form, MixedBits
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.solver import Option, cheapest

_HALVINGS = 4


class MixedBitsSearch:
    """On the float model of a `SchemeSearch`, to which its candidates go."""

    def __init__(self, search: SchemeSearch) -> None:
        self._search = search

    def candidates(self) -> Iterator[Candidate]:
        """One after the other, each nearer to the smallest that keeps the answers. Raises TimeLimitError."""
        names, parts = list(self._forms), [_options(forms) for forms in self._forms.values()]
        if not any(form.name not in (EIGHT, FLOAT) for forms in self._forms.values() for form in forms):
            return
        # In decibels: what certainly holds, and what is the least that there is.
        most = sum(min(options, key=lambda one: one.price).error for options in parts)
        closest = sum(next(form.error for form in forms if form.name == EIGHT) for forms in self._forms.values())
        high, low = -10 * math.log10(max(closest, 1e-12)), -10 * math.log10(max(most, 1e-12))
        tried = set()
        decibels = low - 0.1  # the roundings of the solver
        for _ in range(1 + _HALVINGS):
            choice = cheapest(parts, 10 ** (-decibels / 10))
            if choice is None:
                return
            forms = {name: self._forms[name][place] for name, place in zip(names, choice, strict=True)}
            key = tuple(choice)
            if key in tried:
                return
            tried.add(key)
            candidate = self._built(forms)
            yield candidate
            if not candidate.reason:
                if decibels < low:
                    return  # there is nothing smaller
                high = decibels
            else:
                low = max(low, decibels)
            decibels = (low + high) / 2

    @cached_property
    def _bits(self) -> MixedBits:
        return MixedBits(self._search.model, self._search.step.config, self._search.context)

    @cached_property
    def _forms(self) -> Mapping[str, tuple[Form, ...]]:
        def measure() -> dict[str, Any]:
            return {
                name: [[form.name, form.size_bytes, form.error] for form in forms]
                for name, forms in self._bits.options.items()
            }

        known = self._search.known("prices of bits", measure)
        return {name: tuple(Form(*form) for form in forms) for name, forms in known.items()}

    def _built(self, forms: Mapping[str, Form]) -> Candidate:
        names = {name: form.name for name, form in forms.items()}
        few = sum(name not in (EIGHT, FLOAT) for name in names.values())
        predicted = sum(form.error for form in forms.values())
        variant = (
            f"{few} of {len(names)} weights in blocks of 4 bits or less, priced at {-10 * math.log10(predicted):.0f} dB"
        )
        return self._search.add("weight_only", lambda: self._bits.store(names), variant, asked=[sorted(names.items())])


def _options(forms: Sequence[Form]) -> list[Option]:
    return [Option(form.size_bytes, form.error) for form in forms]
