"""The smallest file by channels and bits together: how wide each group of channels stays, and the form of each weight.

    prices      of every width of every group (widths.py) and every form of every weight (mixed_bits.py), the error at
                the outputs with it alone
    choice      the least bytes whose errors add up to a budget (joint_solver.py)
    model       the groups cut to their widths and repaired, trained where the answers are lost and training is
                permitted; then its weights in their forms, judged as a whole

Budgets are halved as in `budgets`. A model of loose widths and few bits competes with a narrow one of 8 bits, which
cutting first and quantizing then never compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from modelpress_compression.channels import Group, find_groups
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.weight_only.mixed_bits import MixedBits
from modelpress_compression.recipe import Step
from modelpress_compression.search.budgets import between, decibels
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.joint_solver import Weight, Width, solve
from modelpress_compression.search.levers import Cut, LeverSearch
from modelpress_compression.search.mixed_bits import MixedBitsSearch
from modelpress_compression.search.quantization import SchemeSearch, pattern_of
from modelpress_compression.search.solver import Option
from modelpress_compression.search.steps import StepRecord
from modelpress_compression.search.widths import owned_axes, width_errors

# The first budget is what training brings back at best; by the last one, answers are kept without.
FIRST_DB, LAST_DB = 10.0, 30.0
HALVINGS = 5
_PRUNE = PruneConfig(structure="channel", scope="layer", sparsity=0.0, criterion="activation")


@dataclass
class JointSearch:
    """`whole`: the search of schemes on the model that `start` ends with; `bits`: its prices of bits. `lever`: cuts it,
    judges and trains. `quantized`: makes the search of schemes on what a chain of steps has made.
    """

    whole: SchemeSearch
    bits: MixedBitsSearch
    lever: LeverSearch
    start: tuple[StepRecord, ...]
    quantized: Callable[[tuple[StepRecord, ...]], SchemeSearch]
    _made: list[Cut] = field(default_factory=list)

    def cuts(self) -> Iterator[Cut]:
        """One model after the other, each nearer to the smallest that keeps the answers; and what they are made from.

        Raises ModelNotRunnableError, TimeLimitError.
        """
        if not any(len(widths) > 1 for widths in self._widths) or not self._weights:
            return
        for _ in between(FIRST_DB, LAST_DB, self._solved, self._built, HALVINGS):
            yield from self._made
            self._made.clear()

    def _solved(self, error: float) -> list[int] | None:
        return solve(self._widths, self._weights, error)

    @cached_property
    def _groups(self) -> Sequence[Group]:
        return find_groups(self.whole.model).groups

    @cached_property
    def _widths(self) -> list[list[Width]]:
        def measure() -> dict[str, Any]:
            found = width_errors(self.whole.model, _PRUNE, self.whole.context)
            return {name: sorted(errors.items()) for name, errors in found.items()}

        known = self.whole.known("prices of widths", measure)
        return [[Width(0.0, 0.0), *(Width(*pair) for pair in known.get(group.id, ()))] for group in self._groups]

    @cached_property
    def _weights(self) -> list[Weight]:
        return [
            Weight(
                [Option(form.size_bytes, form.error) for form in forms],
                owned_axes(self.whole.model, self._groups, name),
            )
            for name, forms in self.bits.forms.items()
        ]

    def _built(self, choice: Sequence[int]) -> Candidate | None:
        count = len(self._groups)
        widths = [own[place] for own, place in zip(self._widths, choice[:count], strict=True)]
        forms = {name: own[place] for (name, own), place in zip(self.bits.forms.items(), choice[count:], strict=True)}
        gone = {group.id: width.gone for group, width in zip(self._groups, widths, strict=True) if width.gone}
        if not gone:
            return None  # bits alone are another search
        promised = decibels(sum(width.error for width in widths) + sum(form.error for form in forms.values()))
        overrides = tuple((pattern_of(name), share) for name, share in gone.items())
        step = Step("prune", replace(_PRUNE, overrides=overrides))
        variant = f"{len(gone)} of {count} groups of channels by their prices, for {promised:.0f} dB with the bits"
        found = self.lever.tried(step, self.start, variant)
        self._made += found
        if not found or found[-1].candidate.reason:
            return found[-1].candidate if found else None
        chain = found[-1].chain
        search = self.quantized(chain)
        names = {name: form.name for name, form in forms.items()}
        candidate = search.add(
            "weight_only",
            lambda: MixedBits(search.model, search.step.config, search.context).store(names),
            f"bits chosen with the widths, priced at {promised:.0f} dB",
            asked=[sorted(names.items())],
        )
        self._made.append(Cut(candidate, chain))
        return candidate
