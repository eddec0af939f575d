"""Techniques that take a little, or more and more, of a model away: each as far as the answers permit.

    prune        a share of the channels, those of the least activations for what they cost, wherever they are; repaired
    factorize    layers as products of smaller ones, until a share of the cost is gone; repaired

How far a lever goes is found by measuring: the share grows until the answers are lost, and then the gap is halved. What
has lost its answers, but still resembles the original, is trained towards it (`distill`) and judged once more where the
goal permits training; the original is the teacher. Further cuts are made into what training has saved, in rounds, which
costs less than one deep cut (Han et al., arXiv:1506.02626); where nothing was trained they are made into the whole
model, whose answers repair knows. Each lever begins where the one before it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from modelpress_compression.errors import TimeLimitError, UnsupportedOperatorError
from modelpress_compression.measure.task import model_digest
from modelpress_compression.model import file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.recipe import FASTEST, SMALLEST, Step
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.recovery import recovery
from modelpress_compression.search.steps import StepRecord

# A goal looks for a share with so many models, a longer search with more.
FEW_CUTS, MANY_CUTS = 3, 5
FIRST_SHARE, STEP, MOST = 0.25, 0.2, 0.9
# Shares that differ by less are the same.
CLOSE_ENOUGH = 0.04
# Training takes this part of the time that is left for the search.
TRAINING_SHARE = 0.25
# What resembles the original less is beyond what training brings back in such a time.
LEAST_COSINE = 0.6
EPOCHS, PATIENCE = 200, 30


# What goes counts by what it costs: where time counts by measured time, since a quarter of the channels of a small
# ResNet saves 24 % of it when they are chosen so, and 15 % when they are chosen by multiplications. Times differ a
# little from run to run, and what is chosen by them may; all other objectives choose by what is counted.
_COSTS = MappingProxyType({SMALLEST: "parameters", FASTEST: "latency"})


def _pruned(share: float, objective: str) -> Step:
    cost = _COSTS.get(objective, "macs")
    return Step(
        "prune",
        PruneConfig(structure="channel", scope="global", sparsity=share, criterion="activation", normalize=cost),
    )


def _factorized(share: float, objective: str) -> Step:
    return Step("factorize", FactorizeConfig(budget=1 - share, budget_of=_COSTS.get(objective, "macs")))


# Each makes the step that takes a share away, for an objective.
LEVERS: Mapping[str, Callable[[float, str], Step]] = MappingProxyType({"prune": _pruned, "factorize": _factorized})
_TAKEN = MappingProxyType({"prune": "of the channels", "factorize": "of the cost, by factors"})


@dataclass(frozen=True)
class Cut:
    """A candidate that a lever made. `before`: the steps before its own."""

    candidate: Candidate
    before: tuple[StepRecord, ...]

    @property
    def chain(self) -> tuple[StepRecord, ...]:
        """All steps that made it."""
        return (*self.before, self.candidate.record)


class LeverSearch:
    """One lever on one model. `trains`: whether candidates may be trained; `cuts`: how many shares are tried.

    `apply`: runs a step on the model of the record; `judge`: a candidate's answers. `left_s`: seconds that the search
    still has; infinite: it has no limit.
    """

    def __init__(
        self,
        technique: str,
        objective: str,
        context: Context,
        *,
        apply: Callable[[StepRecord, Context], StepRecord],
        judge: Callable[[Candidate], Candidate],
        left_s: Callable[[], float],
        trains: bool,
        cuts: int,
    ) -> None:
        self._technique, self._objective, self._context = technique, objective, context
        self._apply, self._judge, self._left_s = apply, judge, left_s
        self._trains, self._cuts = trains, cuts

    def cuts(self, start: tuple[StepRecord, ...], shares: tuple[float, ...] = ()) -> Iterator[Cut]:
        """Candidates on the model that `start` ends with; those that keep the answers come with rising shares.

        `shares`: those to try, in place of looking for them. Ends early where nothing is left to take, or one waits for
        its score.
        """
        kept, lost = 0.0, MOST + STEP
        base, gone = start, 0.0  # what is cut, and the share that has gone from it before
        # By the digest of a cut model: channels and ranks go in steps, so that several shares may give the same one.
        known: dict[str, list[Cut]] = {}
        for number in range(len(shares) or self._cuts):
            share = shares[number] if shares else _next_share(kept, lost)
            if lost - kept < CLOSE_ENOUGH or self._is_over:
                return
            left = (share - gone) / (1 - gone)
            step = LEVERS[self._technique](left, self._objective)
            variant = f"{100 * left:.0f} % {_TAKEN[self._technique]}"
            with self._context.span("candidate", f"{self._technique} {variant}"):
                record = self._made(step, base)
                if not record.changes:
                    return
                digest = model_digest(record.path)
                new = [] if digest in known else self._judged(record, base, variant)
            yield from new
            found = known.setdefault(digest, new)
            last = found[-1].candidate
            if last.unscored:
                return  # how much more may go is known when this has been scored
            if last.reason:
                if shares:
                    return
                lost = share
            else:
                kept = share
                if last.technique == "distill":
                    base, gone = found[-1].chain, share

    def after(self, step: Step, start: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
        """`start` with one more step, whose model nobody judges."""
        record = self._made(step, start)
        return (*(start if start[-1].changes else start[:-1]), record) if record.changes else start

    def _made(self, step: Step, start: tuple[StepRecord, ...]) -> StepRecord:
        """The record of a step on the model that `start` ends with."""
        return self._apply(replace(start[-1], step=step, changes={}), self._context)

    def tried(self, step: Step, start: tuple[StepRecord, ...], variant: str) -> list[Cut]:
        """The candidate that a step makes of the model that `start` ends with; and, where it has lost its answers, the
        same after training. Empty: the step changes nothing."""
        with self._context.span("candidate", f"{self._technique} {variant}"):
            record = self._made(step, start)
            return self._judged(record, start, variant) if record.changes else []

    def _judged(self, record: StepRecord, start: tuple[StepRecord, ...], variant: str) -> list[Cut]:
        """The candidate; and, where it has lost its answers, the same after training."""
        before = start if start[-1].changes else start[:-1]
        candidate = Candidate(variant, record, file_size_bytes(record.path), technique=self._technique)
        return self.also_trained(self._judge(candidate), before)

    def also_trained(self, judged: Candidate, before: tuple[StepRecord, ...]) -> list[Cut]:
        """A judged candidate, and the same after training where that can bring its answers back. `before`: the steps
        before its own."""
        found = [Cut(judged, before)]
        if not self._trains or not judged.reason or judged.unscored or judged.cosine < LEAST_COSINE or self._is_over:
            return found
        trained = self._trained(judged.record)
        if trained is not None:
            again = Candidate("", trained, file_size_bytes(trained.path), technique="distill")
            found.append(Cut(self._judge(again), (*before, judged.record)))
        return found

    def _trained(self, record: StepRecord) -> StepRecord | None:
        """The model trained towards the original; None where that brought nothing, or cannot be done."""
        left_s = TRAINING_SHARE * self._left_s()
        deadline = None if math.isinf(left_s) else self._context.clock() + left_s
        deadline = min((one for one in (deadline, self._context.deadline) if one is not None), default=None)
        step = recovery(record.model, self._context.data, EPOCHS, PATIENCE)
        try:
            trained = self._apply(replace(record, step=step, changes={}), replace(self._context, deadline=deadline))
        except (UnsupportedOperatorError, TimeLimitError) as error:
            self._context.check_time()
            self._context.log(f"not trained: {error.message}")
            return None
        return trained if trained.changes else None

    @property
    def _is_over(self) -> bool:
        return self._left_s() <= 0


def _next_share(kept: float, lost: float) -> float:
    """The next share to try, between what kept the answers and what lost them."""
    if lost > MOST:  # nothing has lost them yet
        return min(MOST, kept + STEP) if kept else FIRST_SHARE
    return (kept + lost) / 2
