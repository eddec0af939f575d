"""Techniques that take a little, or more and more, of a model away: each as far as the answers permit.

    prune        a share of the channels, those that the answers need least for what they cost, wherever they are;
                 repaired
    factorize    layers as products of smaller ones, until a share of the cost is gone; repaired

What the answers need least is told by gradients of the answers or by activations. Which of the two is right differs
from model to model: at 0.8 of its multiply-accumulates a sentence encoder keeps its 64.8 % of right neighbours by
gradients, and 61.8 by activations. So the first share is cut both ways, and what errs less goes on. Where neither keeps
the answers, and the task was not asked since outputs differ too much, the next share is cut both ways again: without a
quarter of that encoder's time activations left the nearer outputs, and half as much by them still lost 3.2 points.

How far a lever goes is found by measuring: the share grows until the answers are lost, and then the gap is halved. What
has lost its answers, but still resembles the original, is trained towards it (`distill`) and judged once more where the
goal permits training; the original is the teacher. Further cuts are made into what training has saved, in rounds, which
costs less than one deep cut (Han et al., arXiv:1506.02626); where nothing was trained they are made into the whole
model, whose answers repair knows. Each lever begins where the one before it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
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


def _pruned(criterion: str, share: float, objective: str) -> Step:
    cost = _COSTS.get(objective, "macs")
    return Step(
        "prune",
        PruneConfig(structure="channel", scope="global", sparsity=share, criterion=criterion, normalize=cost),
    )


def _factorized(share: float, objective: str) -> Step:
    return Step("factorize", FactorizeConfig(budget=1 - share, budget_of=_COSTS.get(objective, "macs")))


@dataclass(frozen=True)
class Way:
    """How a lever chooses what goes. `step`: takes a share away, for an objective; `told`: what names say of it."""

    step: Callable[[float, str], Step]
    told: str


# Those of each lever; the first share tells which of them goes on.
LEVERS: Mapping[str, tuple[Way, ...]] = MappingProxyType(
    {
        "prune": (
            Way(partial(_pruned, "taylor"), "of the channels, by gradients"),
            Way(partial(_pruned, "activation"), "of the channels"),
        ),
        "factorize": (Way(_factorized, "of the cost, by factors"),),
    }
)


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
    still has; infinite: it has no limit. `nearest`: the step that took the first share by the way that goes on; None
    before.
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
        self.nearest: Step | None = None

    def cuts(self, start: tuple[StepRecord, ...], shares: tuple[float, ...] = ()) -> Iterator[Cut]:
        """Candidates on the model that `start` ends with; those that keep the answers come with rising shares.

        `shares`: those to try, in place of looking for them. Ends early where nothing is left to take, or one waits for
        its score.
        """
        kept, lost = 0.0, MOST + STEP
        base, gone = start, 0.0  # what is cut, and the share that has gone from it before
        # By the digest of a cut model: channels and ranks go in steps, so that several shares may give the same one.
        known: dict[str, list[Cut]] = {}
        seen: dict[str, Candidate] = {}
        ways = LEVERS[self._technique]
        for number in range(len(shares) or self._cuts):
            share = shares[number] if shares else _next_share(kept, lost)
            if lost - kept < CLOSE_ENOUGH or self._is_over:
                return
            left = (share - gone) / (1 - gone)
            taken = f"{100 * left:.0f} %"
            with self._context.span("candidate", f"{self._technique} {taken}"):
                made = self._made_in(ways, left, base)
                if not made:
                    return
                judged = {
                    digest: self._judge(self._candidate(record, f"{taken} {way.told}"))
                    for digest, (way, record) in made.items()
                    if digest not in seen
                }
                seen |= judged
                nearest = _nearest({digest: seen[digest] for digest in made})
                new = self.also_trained(judged[nearest], _chain(base)) if nearest in judged else []
            yield from (Cut(candidate, _chain(base)) for digest, candidate in judged.items() if digest != nearest)
            yield from new
            if any(candidate.unscored for candidate in judged.values()):
                return  # how much more may go, and in which way, is known when these have been scored
            found = known.setdefault(nearest, new or [Cut(seen[nearest], _chain(base))])
            last = found[-1].candidate
            if len(made) == 1 or not last.reason or _by_task(seen[digest] for digest in made):
                ways = (made[nearest][0],)
                self.nearest = self.nearest or made[nearest][1].step
            if last.unscored:
                return
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
        return (*_chain(start), record) if record.changes else start

    def _made(self, step: Step, start: tuple[StepRecord, ...]) -> StepRecord:
        """The record of a step on the model that `start` ends with."""
        return self._apply(replace(start[-1], step=step, changes={}), self._context)

    def tried(self, step: Step, start: tuple[StepRecord, ...], variant: str) -> list[Cut]:
        """The candidate that a step makes of the model that `start` ends with; and, where it has lost its answers, the
        same after training. Empty: the step changes nothing."""
        with self._context.span("candidate", f"{self._technique} {variant}"):
            record = self._made(step, start)
            return self._judged(record, start, variant) if record.changes else []

    def _made_in(
        self, ways: tuple[Way, ...], share: float, start: tuple[StepRecord, ...]
    ) -> dict[str, tuple[Way, StepRecord]]:
        """By the digest of its model, the record of each way to take a share; empty where none takes anything.

        Ways that give the same model are the first of them. A way that the model does not permit, for an operator
        without a gradient, say, is left where there are others.
        """
        found: dict[str, tuple[Way, StepRecord]] = {}
        for number, way in enumerate(ways):
            try:
                record = self._made(way.step(share, self._objective), start)
            except UnsupportedOperatorError as error:
                if number == len(ways) - 1 and not found:
                    raise
                self._context.log(f"{self._technique}: {error.message}")
                continue
            if record.changes:
                found.setdefault(model_digest(record.path), (way, record))
        return found

    def _candidate(self, record: StepRecord, variant: str) -> Candidate:
        return Candidate(variant, record, file_size_bytes(record.path), technique=self._technique)

    def _judged(self, record: StepRecord, start: tuple[StepRecord, ...], variant: str) -> list[Cut]:
        """The candidate; and, where it has lost its answers, the same after training."""
        return self.also_trained(self._judge(self._candidate(record, variant)), _chain(start))

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


def _chain(start: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
    """The steps before one on the model that `start` ends with: its last may have done nothing."""
    return start if start[-1].changes else start[:-1]


def _nearest(judged: Mapping[str, Candidate]) -> str:
    """The digest of the candidate nearest to the original: what keeps the answers comes before what has lost them, then
    the task decides, or the outputs where it was not asked of all."""
    by_task = _by_task(judged.values())

    def distance(digest: str) -> tuple[bool, float]:
        candidate = judged[digest]
        return bool(candidate.reason), (candidate.drop or 0.0) if by_task else 1.0 - candidate.cosine

    return min(judged, key=distance)


def _by_task(judged: Iterable[Candidate]) -> bool:
    """Whether the task was asked of all."""
    return all(candidate.drop is not None for candidate in judged)


def _next_share(kept: float, lost: float) -> float:
    """The next share to try, between what kept the answers and what lost them."""
    if lost > MOST:  # nothing has lost them yet
        return min(MOST, kept + STEP) if kept else FIRST_SHARE
    return (kept + lost) / 2
