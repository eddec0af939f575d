"""A goal instead of steps: builds what today's passes can make of a model, measures all of it, and takes the best.

    fused                   the float model, with fewer and faster operators
    quantized               stored in fewer bits, or in 8-bit arithmetic where that keeps the answers (schemes.py)
    cut                     with data: channels gone, layers factorized, repaired and trained, as far as labels, or
                            samples that nothing was fitted to, permit (levers.py, grounds.py); then quantized
    cut by prices           widths and bits, or arithmetic, as one choice: where size or time counts (joint.py)

Each candidate is judged by its answers (judge.py); which of them is taken is decided by decision.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path

from modelpress_compression.inputs import InputData
from modelpress_compression.measure.task import GivenScores, Task
from modelpress_compression.memory import Memory
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.recipe import FASTEST, SMALLEST, Goal, Recipe, Step
from modelpress_compression.report.formats import duration
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.decision import BUILT, Decision, Pursuit
from modelpress_compression.search.entries import Entry, size_change
from modelpress_compression.search.grounds import Grounds, grounds
from modelpress_compression.search.joint import CHOICES, PRUNE, JointSearch
from modelpress_compression.search.joint_forms import ComputedForms, Forms, StoredForms
from modelpress_compression.search.judge import Judge
from modelpress_compression.search.levers import FEW_CUTS, LEVERS, MANY_CUTS, LeverSearch
from modelpress_compression.search.mixed_bits import MixedBitsSearch
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.recall import Recall
from modelpress_compression.search.schemes import Schemes
from modelpress_compression.search.search_time import SearchTime
from modelpress_compression.search.steps import StepRecord, apply_step, scaled

# Of channels that go where a metric of the client's judges: it is asked before more goes.
SCORED_SHARES = (0.1, 0.25, 0.4, 0.55)
_JOINT = 0.7  # share of the progress when the levers' models are quantized
_QUANTIZED = 2  # of what the levers made, those that went the furthest
_BALANCE = 0.2  # share of the progress of a balance that a far search may follow
_WHOLE = 0.3  # share of the progress when the candidates of the whole model are built and judged
# Of a limited time, what is kept for cuts while the whole model is quantized, where time counts. Else all of it went by
# before the first one where the metric of the user's own takes long.
_FOR_CUTS = 0.6


def pursue(
    recipe: Recipe,
    goal: Goal,
    model: Model,
    path: Path,
    given: Context,
    task: Task | None,
    memory: Memory | None = None,
) -> Pursuit:
    """Builds, measures and chooses. `path`: the file of the original `model`. `memory`: of earlier jobs.

    Raises what passes raise.
    """
    # A balance takes a tenth of the time of a far search, and often is within the limits as it is.
    balance_first = (
        goal.objective not in (SMALLEST, FASTEST) and goal.search_time_s is None and not isinstance(task, GivenScores)
    )
    start, stop = 0.0, _BALANCE if balance_first and recipe.searches_far else 1.0  # of the progress

    def progress(share: float, message: str) -> None:
        given.progress(start + (stop - start) * share, message)

    context = replace(given, progress=progress)
    judge = Judge(path, path, context, recipe, task, screens=True, recall=Recall.of(memory, path, context))
    search = GoalSearch(recipe, goal, model, path, context, judge, far=recipe.searches_far and not balance_first)
    search.build()
    pursuit = search.choose()
    if recipe.searches_far and balance_first and pursuit.unmet:
        context.log(f"what a balance gives misses {', '.join(pursuit.unmet)}: searching further")
        start, stop = _BALANCE, 1.0
        search.build_further()
        pursuit = search.choose()
    return pursuit


@dataclass
class GoalSearch:
    """`build` makes all candidates, `choose` takes one of them.

    `path`: file of the original `model`. `far`: whether the search goes as far as it can.
    """

    recipe: Recipe
    goal: Goal
    model: Model
    path: Path
    context: Context
    judge: Judge
    far: bool = False
    entries: list[Entry] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)  # of folders
    time: SearchTime = field(init=False)
    _waiting: list[tuple[Schemes, Iterator[None], tuple[StepRecord, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.time = SearchTime(self.goal.search_time_s, far=self.far)

    def build(self) -> None:
        """All candidates, judged by their answers."""
        fused = self._fused
        if fused.changes:
            candidate = Candidate("", fused, file_size_bytes(fused.path), technique="fuse")
            self._enter([self.judge.answers(candidate)], self.judge)
        if "quantize" in self.goal.techniques:
            self._quantized(self._of_whole, self._before, self._for_cuts)
        self._build_cut()
        self._build_waiting()

    def build_further(self) -> None:
        """What a far search has besides, once `build` has made those of one that was not far."""
        self.far = True
        self.time.goes_far()
        # What levers made is made anew: they go further.
        self.entries = [entry for entry in self.entries if not entry.is_cut]
        if "quantize" in self.goal.techniques:
            search = self._of_whole.search
            search.context = self.time.within(search.context)
            self._add(self._of_whole, self._of_whole.further(), self._before, self._for_cuts)
        self._build_cut()
        self._build_waiting()

    @property
    def _for_cuts(self) -> float:
        """The share of the time that they have to themselves; where size counts, bits gain more than cuts."""
        return _FOR_CUTS if self.far and self.recipe.time_first and self._grounds is not None else 0.0

    def _build_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for schemes, added, before in waiting:
            if not self.time.has_left_out(1):
                self._add(schemes, added, before)

    def _build_cut(self) -> None:
        if self._grounds is not None:
            self._cut(self._fused, self._before, self._grounds)

    @cached_property
    def _of_whole(self) -> Schemes:
        part = self._part(0.1, BUILT if self._grounds is None else _WHOLE)
        search = self._scheme_search(self._fused.model, self._fused.path, part, self.judge)
        return Schemes(search, self.recipe, self.goal, whole=True, far=self.far)

    @property
    def _before(self) -> tuple[StepRecord, ...]:
        """The steps before quantization of the whole model."""
        return (self._fused,) if self._fused.changes else ()

    @property
    def _grounds(self) -> Grounds | None:
        """What levers fit to and are judged by; None: none is pulled.

        Without labels half of the work is for what others permit in full, so that only a far search does it.
        """
        return self._all_grounds if self._levers and (self.judge.task is not None or self.far) else None

    @cached_property
    def _all_grounds(self) -> Grounds | None:
        return grounds(self.judge)

    @property
    def _levers(self) -> list[str]:
        """Those that the goal may pull, in their order. Only who asks for more than a balance waits for all of them."""
        if isinstance(self.judge.task, GivenScores) or not self.far:
            return [name for name in ("prune",) if name in self.goal.techniques]
        return [name for name in LEVERS if name in self.goal.techniques]

    @cached_property
    def _fused(self) -> StepRecord:
        step = Step("fuse", FuseConfig())
        if "fuse" not in self.goal.techniques:
            return StepRecord(step, self.model, self.path)
        before = StepRecord(step, self.model, self.path)
        return self._applied(before, self._part(0.0, 0.1), self._folder("fuse"), self.judge.recall)

    def _applied(self, before: StepRecord, context: Context, target: Path, recall: Recall) -> StepRecord:
        """The record of a step on the model of `before`."""
        return recall.step(
            before, [], target, lambda: apply_step(before.step, before.model, before.path, context, target)
        )

    def _quantized(self, schemes: Schemes, before: tuple[StepRecord, ...], kept: float = 0.0) -> None:
        """Every scheme on one float model, but for those that can wait until all else is there. `kept`: see `_add`."""
        self._add(schemes, schemes.candidates(), before, kept)
        if schemes.waits:
            self._waiting.append((schemes, schemes.rest(), before))

    def _add(self, schemes: Schemes, added: Iterator[None], before: tuple[StepRecord, ...], kept: float = 0.0) -> None:
        """The candidates of these schemes, as they come, one at least. `kept`: share of the time that is not for them;
        those that are left out for that wait."""
        search = schemes.search
        entered = len(search.candidates)
        with self.time.lasts(self.context):
            for _ in added:
                self._enter(search.candidates[entered:], search.judge, before)
                entered = len(search.candidates)
                self.time.first_is_built()
                if self.time.has_left_out(1):
                    break
                if self.time.share_left <= kept:
                    self._waiting.append((schemes, added, before))
                    return
                # From the second on: whatever the time, there is one.
                search.context = self.time.within(search.context)
        self._enter(search.candidates[entered:], search.judge, before)

    def _scheme_search(self, model: Model, path: Path, context: Context, judge: Judge) -> SchemeSearch:
        target = self._folder(f"quantize-{next(self.numbers)}")
        return SchemeSearch(Step("quantize", QuantizeConfig()), model, path, context, target, judge, judge.recall)

    def _cut(self, fused: StepRecord, before: tuple[StepRecord, ...], on: Grounds) -> None:
        """Pulls the levers one after the other, and quantizes what went the furthest."""
        if on.judge is not self.judge:
            held, all_samples = len(on.judge.context.data), len(self.context.data)
            self.context.log(f"nothing is fitted to {held} of {all_samples} samples, which judge what is cut")
        scored = isinstance(self.judge.task, GivenScores)
        start, kept, prune = before or (fused,), [], PRUNE
        levers = self._levers
        # What was cut is quantized as the whole model was: this much of the time is kept for it.
        kept_s = min(_QUANTIZED * self.time.taken_s, self.time.left_s / 2)
        width = (0.6 - _WHOLE) / len(levers)
        for number, technique in enumerate(levers):
            part = self._part(_WHOLE + width * number, _WHOLE + width * (number + 1), on.data)
            lever, tried = self._lever(technique, part, on, kept_s), 0
            with self.time.lasts(self.context):
                for cut in lever.cuts(start, SCORED_SHARES if scored else ()):
                    self._enter([cut.candidate], on.judge, cut.before)
                    tried += cut.candidate.technique == technique
                    if not cut.candidate.reason or cut.candidate.unscored:
                        kept.append(cut)
            self.time.has_left_out(self._most_cuts - tried, kept_s)
            if technique == "prune" and lever.nearest is not None:
                prune = replace(PRUNE, criterion=lever.nearest.config.criterion)
            start = kept[-1].chain if kept else start
        for cut in reversed(kept[-_QUANTIZED:]):
            if "quantize" not in self.goal.techniques:
                break
            if self.time.has_left_out(1):
                continue
            record, built = cut.candidate.record, len(self.entries)
            part = self._part(0.6, BUILT, on.data)
            search = self._scheme_search(record.model, record.path, part, on.judge)
            self._quantized(Schemes(search, self.recipe, self.goal, whole=False, far=self.far), cut.chain)
            held = any(not entry.candidate.reason or entry.candidate.unscored for entry in self.entries[built:])
            if held and not self.far:
                break  # else what was cut less may leave more room for it
        both = {"prune", "quantize"} <= set(self.goal.techniques)
        # By prices a cut may be kept where none that is even over the model was, above all in 8 bits.
        asked = (kept and self.recipe.size_first) or (self.far and self.recipe.time_first)
        if both and asked and not scored:
            self._cut_and_quantized(before or (fused,), on, prune)

    def _lever(self, technique: str, context: Context, on: Grounds, kept_s: float = 0.0) -> LeverSearch:
        """`kept_s`: seconds of the search that are not for it."""
        scored = isinstance(self.judge.task, GivenScores)
        return LeverSearch(
            technique,
            self.goal.objective,
            self.time.within(context),
            apply=lambda record, context: self._applied(
                record, context, self._folder(f"cut-{next(self.numbers)}"), on.judge.recall
            ),
            judge=on.judge.answers,
            left_s=lambda: self.time.left_s - kept_s,
            trains=self.far and not scored and "distill" in self.goal.techniques,
            cuts=self._most_cuts,
        )

    @property
    def _most_cuts(self) -> int:
        """Of a lever."""
        return MANY_CUTS if self.far else FEW_CUTS

    def _cut_and_quantized(self, start: tuple[StepRecord, ...], on: Grounds, prune: PruneConfig) -> None:
        """Widths and forms as one choice. `prune`: how channels are chosen."""
        if self.time.has_left_out(CHOICES):
            return
        last, part = start[-1], self.time.within(self._part(_JOINT, BUILT, on.data))
        whole = self._scheme_search(last.model, last.path, part, on.judge)
        joint = JointSearch(
            whole,
            self._forms(whole, on, prune),
            self._lever("prune", part, on),
            start,
            lambda chain: self._scheme_search(chain[-1].model, chain[-1].path, part, on.judge),
            prune,
        )
        with self.time.lasts(self.context):
            tried = 0
            for cut in joint.cuts():
                self._enter([cut.candidate], on.judge, cut.before)
                tried += cut.candidate.technique == "prune"
                if self.time.has_left_out(CHOICES - tried):
                    break

    def _forms(self, whole: SchemeSearch, on: Grounds, prune: PruneConfig) -> Forms:
        """What is chosen beside the widths: what the goal is about."""
        if self.recipe.time_first:
            return ComputedForms(whole, prune)
        priced = self._of_whole.bits if on.judge is self.judge else None
        return StoredForms(whole, priced or MixedBitsSearch(whole))

    def choose(self) -> Pursuit:
        """Times the candidates that keep the answers, and takes one; it may be asked again."""
        return Decision(self.goal, self.model, self.judge, self.entries, self.time).pursuit()

    def _enter(self, candidates: Sequence[Candidate], judge: Judge, before: tuple[StepRecord, ...] = ()) -> None:
        self.entries += [Entry(judge.proven(candidate), judge, before) for candidate in candidates]

    def _folder(self, name: str) -> Path:
        return self.context.work_directory / "goal" / name / "model.onnx"

    def _part(self, start: float, stop: float, data: InputData | None = None) -> Context:
        """The context for a part of the work; `data`: the samples that it may see, all of them where None."""
        progress = scaled(self._tell, start, stop)
        return replace(self.context, progress=progress, data=self.context.data if data is None else data)

    def _tell(self, share: float, message: str) -> None:
        """Says which candidate is being built, the smallest so far that keeps the answers, and how long it may take."""
        sizes = [entry.candidate.size_bytes for entry in self.entries if not entry.candidate.reason]
        so_far = f"; so far {size_change(min(sizes), file_size_bytes(self.path))}" if sizes else ""
        left = f"; at most {duration(self.time.left_s)} more" if 0 < self.time.left_s < math.inf else ""
        share = BUILT * self.time.share(share / BUILT)
        self.context.progress(share, f"candidate {len(self.entries) + 1}: {message}{so_far}{left}")
