"""The smallest or fastest model by channels, branches and arithmetic together: how wide each group stays, which
branches beside skip connections go, and each layer's form.

    prices      of every width of every group, and of every branch, the error at the outputs with it alone (widths.py);
                of every weight's forms (joint_forms.py) that error too, and bytes or milliseconds, whole and narrower
    choice      the least total whose errors add up to a budget (joint_solver.py), where a branch is a group that owns
                all of its weights
    model       the groups cut to their widths, the branches gone, and the rest repaired, trained where the answers are
                lost and training is permitted; then its layers in their forms, judged as a whole, and trained again

Budgets are halved as in `budgets`. A model of loose widths and few bits competes with a narrow one of 8 bits, and one
whose channels go where 8 bits gain the least with one that is cut for its time in float32, which cutting first and
quantizing then never compares.

Factors of a layer are no option here. As one they promise fewer bytes, of two classifiers of 28 x 28 pixels by 40 and
18 % at 24 dB. But widths together err less than the sum of their prices, and factors hardly do: within four minutes,
what kept the answers came out 10 and 2 % larger than without them. Of a sentence encoder they promise 1 to 2 %: its
weights in 4 bits err less than factors of half their numbers do. As a lever (levers.py) they are fitted to what earlier
cuts have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from modelpress_compression.channels import Group, find_groups
from modelpress_compression.passes.prune.blocks import Branch, find_branches
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.recipe import Step
from modelpress_compression.search.budgets import between, decibels
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.joint_forms import Forms
from modelpress_compression.search.joint_solver import Weight, Width, solve
from modelpress_compression.search.levers import Cut, LeverSearch
from modelpress_compression.search.quantization import SchemeSearch, pattern_of
from modelpress_compression.search.steps import StepRecord
from modelpress_compression.search.widths import branch_errors, width_errors

# The first budget is what training brings back at best; by the last one, answers are kept without.
FIRST_DB, LAST_DB = 10.0, 30.0
HALVINGS = 5
CHOICES = 1 + HALVINGS  # that are built at the most
PRUNE = PruneConfig(structure="channel", scope="layer", sparsity=0.0, criterion="activation")
BLOCKS = PruneConfig(structure="block", sparsity=0.0)
_ALL = 0.99  # a recipe's sparsity is less than 1


@dataclass
class JointSearch:
    """`whole`: the search of schemes on the model that `start` ends with; `forms`: of its weights. `lever`: cuts it,
    judges and trains. `quantized`: makes the search of schemes on what a chain of steps has made. `prune`: how channels
    are chosen.
    """

    whole: SchemeSearch
    forms: Forms
    lever: LeverSearch
    start: tuple[StepRecord, ...]
    quantized: Callable[[tuple[StepRecord, ...]], SchemeSearch]
    prune: PruneConfig = PRUNE
    _made: list[Cut] = field(default_factory=list)

    def cuts(self) -> Iterator[Cut]:
        """One model after the other, each nearer to the cheapest that keeps the answers; and what they are made from.

        Raises ModelNotRunnableError, TimeLimitError.
        """
        if not any(len(widths) > 1 for widths in self._parts) or not self._weights:
            return
        for _ in between(FIRST_DB, LAST_DB, self._solved, self._built, HALVINGS):
            yield from self._made
            self._made.clear()

    def _solved(self, error: float) -> list[int] | None:
        return solve(self._parts, self._weights, error)

    @cached_property
    def _groups(self) -> Sequence[Group]:
        return find_groups(self.whole.model).groups

    @cached_property
    def _widths(self) -> list[list[Width]]:
        def measure() -> dict[str, Any]:
            found = width_errors(self.whole.model, self.prune, self.whole.context)
            return {name: sorted(errors.items()) for name, errors in found.items()}

        known = self.whole.known(f"prices of widths by {self.prune.criterion}", measure)
        return [[Width(0.0, 0.0), *(Width(*pair) for pair in known.get(group.id, ()))] for group in self._groups]

    @cached_property
    def _branches(self) -> Sequence[Branch]:
        return find_branches(self.whole.model, self.whole.context.data)[0]

    @cached_property
    def _parts(self) -> list[list[Width]]:
        """Of each group its widths; then of each branch that it stays or goes."""

        def measure() -> dict[str, Any]:
            return {"errors": branch_errors(self.whole.model, self._branches, BLOCKS, self.whole.context)}

        errors = self.whole.known("prices of branches", measure)["errors"]
        return [*self._widths, *([Width(0.0, 0.0), Width(1.0, error)] for error in errors)]

    @cached_property
    def _weights(self) -> list[Weight]:
        return self.forms.weights(self._groups, self._branches)

    def _built(self, choice: Sequence[int]) -> Candidate | None:
        count = len(self._parts)
        parts = [own[place] for own, place in zip(self._parts, choice[:count], strict=True)]
        forms = [own.forms[place] for own, place in zip(self._weights, choice[count:], strict=True)]
        steps = cutting_steps(self._groups, self._branches, parts, self.prune)
        if not steps:
            return None  # forms alone are another search
        promised = decibels(sum(part.error for part in parts) + sum(form.error for form in forms))
        found = self._cut(steps, self._variant(parts, promised))
        if not found or found[-1].candidate.reason:
            return found[-1].candidate if found else None
        chain = found[-1].chain
        variant = f"chosen with the widths, priced at {promised:.0f} dB"
        candidate = self.forms.built(self.quantized(chain), choice[count:], variant)
        if candidate is None:
            return found[-1].candidate
        self._made += self.lever.also_trained(candidate, chain)
        return self._made[-1].candidate

    def _cut(self, steps: Sequence[Step], variant: str) -> list[Cut]:
        """All steps as one; what was made of them."""
        start = self.start
        for step in steps[:-1]:
            start = self.lever.after(step, start)
        found = self.lever.tried(steps[-1], start, variant)
        self._made += found
        return found

    def _variant(self, parts: Sequence[Width], promised: float) -> str:
        count = len(self._groups)
        named = (("groups of channels", parts[:count]), ("branches", parts[count:]))
        gone = [(sum(1 for part in own if part.gone), f"of {len(own)} {name}") for name, own in named]
        cut = ", ".join(f"{some} {of}" for some, of in gone if some)
        return f"{cut} by their prices, for {promised:.0f} dB with {self.forms.what}"


def cutting_steps(
    groups: Sequence[Group], branches: Sequence[Branch], parts: Sequence[Width], prune: PruneConfig = PRUNE
) -> list[Step]:
    """The steps that bring each group to its width, and take out each branch that goes; none where nothing goes."""
    ids = [*(group.id for group in groups), *(branch.id for branch in branches)]
    gone = [(pattern_of(name), min(part.gone, _ALL)) for name, part in zip(ids, parts, strict=True)]
    steps = []
    for config, pairs in ((prune, gone[: len(groups)]), (BLOCKS, gone[len(groups) :])):
        overrides = tuple((name, share) for name, share in pairs if share)
        if overrides:
            steps.append(Step("prune", replace(config, overrides=overrides)))
    return steps
