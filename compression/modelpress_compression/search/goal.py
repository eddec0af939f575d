"""A goal instead of steps: builds what today's passes can make of a model, measures all of it, and takes the best.

    fuse                                the float model, with fewer and faster operators
    stored                              weights in 8 bits or float16, computing in float32: what every model gets;
                                        for `accurate` once more, closer than anybody could tell
    dynamic, static, and less static    8 bits where they keep the answers (quantization.py), the rest stored
    blocks                              weights in 8 and 4 bits that products read as they are: where size counts
    cut                                 with data and labels: channels gone, layers factorized, repaired and trained,
                                        as far as the answers permit (levers.py)

Each candidate is judged by its answers (judge.py); those that keep them run in the same rounds as the original, and
`choice.choose` decides. What the goal did not take, but another option would have, becomes advice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import SESSION_SPREAD, Times
from modelpress_compression.measure.task import GivenScores, Task, model_digest
from modelpress_compression.memory import Memory
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.passes.quantize.weight_only.storage import store_all
from modelpress_compression.recipe import ACCURATE, BALANCED, FASTEST, SMALLEST, Constraints, Goal, Recipe, Step
from modelpress_compression.search.candidates import Candidate, pareto_set
from modelpress_compression.search.choice import Choice, Figures, Limits, choose, contenders
from modelpress_compression.search.family import ORIGINAL, FamilyMember, family
from modelpress_compression.search.judge import FLOAT_FLOOR_DB, Judge
from modelpress_compression.search.levers import FEW_CUTS, LEVERS, MANY_CUTS, LeverSearch, time_left
from modelpress_compression.search.mixed_bits import MixedBitsSearch
from modelpress_compression.search.mixed_schemes import MixedSchemeSearch
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.recall import Prices, Recall
from modelpress_compression.search.steps import StepRecord, apply_step, scaled
from modelpress_compression.target import DEVICES, Target

# Of channels that go where a metric of the client's judges: it is asked before more goes.
SCORED_SHARES = (0.1, 0.25, 0.4, 0.55)
ROUNDS, FIRST_ROUNDS = 60, 20
CHECKED_ROUNDS = 15  # of a winner by remembered times
BUDGET_S = 20.0  # of timing, for each batch size
# What `accurate` asks of stored weights: more than what counts as no error (choice.NEGLIGIBLE_ERROR), 40 dB.
CLOSE_FLOOR_DB = 43.0
# Of size or time: less is not worth another command.
_WORTH_ADVICE = 1.1
_WHOLE, _BUILT = 0.3, 0.8  # shares of the progress when candidates of the whole model, and all, are built and judged


@dataclass(frozen=True)
class Pursuit:
    """What came of a goal. `records`: the steps that made the result, none where the original is the best.

    `candidates`: all that were tried, with those models that can be had. `advice`: what would have been better, each
    with `text` and `command`.
    `reused`: how much of each kind earlier jobs had found out. `fidelity`: of the result, as this job has compared it;
    None: the result is the original.
    """

    records: tuple[StepRecord, ...]
    candidates: tuple[FamilyMember, ...]
    advice: tuple[dict[str, str], ...] = ()
    reused: Mapping[str, int] = field(default_factory=dict)
    fidelity: Fidelity | None = None


def pursue(
    recipe: Recipe,
    goal: Goal,
    model: Model,
    path: Path,
    context: Context,
    task: Task | None,
    memory: Memory | None = None,
) -> Pursuit:
    """Builds, measures and chooses. `path`: the file of the original `model`. `memory`: of earlier jobs.

    Raises what passes raise.
    """
    judge = Judge(path, path, context, recipe, task, screens=True, recall=Recall.of(memory, path, context))
    search = GoalSearch(recipe, goal, model, path, context, judge)
    search.build()
    return search.choose()


# What a step before a candidate's own is called in its name; "" where that says nothing.
_BRIEFLY: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "fuse": lambda config: "",
        "prune": lambda config: f"prune {100 * config.sparsity:.0f} %",
        "factorize": lambda config: f"factorize {100 - 100 * config.budget:.0f} %",
        "distill": lambda config: "distill",
    }
)


@dataclass(frozen=True)
class _Entry:
    """A candidate, and the steps before its own."""

    candidate: Candidate
    before: tuple[StepRecord, ...] = ()

    @property
    def name(self) -> str:
        steps = [_BRIEFLY[record.step.technique](record.step.config) for record in self.before]
        return ", ".join([*filter(None, steps), self.candidate.name])


@dataclass
class GoalSearch:
    """`build` makes all candidates, `choose` times them and takes one; it may be asked again.

    `path`: file of the original `model`.
    """

    recipe: Recipe
    goal: Goal
    model: Model
    path: Path
    context: Context
    judge: Judge
    entries: list[_Entry] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    numbers: Iterator[int] = field(default_factory=count)  # of folders

    def build(self) -> None:
        """All candidates, judged by their answers."""
        fused = self._fused()
        before = (fused,) if fused.changes else ()
        if fused.changes:
            self._enter([self.judge.answers(Candidate("", fused, file_size_bytes(fused.path), technique="fuse"))])
        if "quantize" in self.goal.techniques:
            self._quantized(fused.model, fused.path, before, self._part(0.1, _WHOLE if self._cuts else _BUILT))
        if self._cuts:
            self._cut(fused, before)

    @property
    def _cuts(self) -> bool:
        """Levers are pulled only where data repairs them and labels show what it cost.

        The samples that repair fits say nothing of others: judged by them, a net for pictures of clothes kept 97 % of
        its classes with a quarter of its channels gone, and lost 3.2 points on 10,000 other pictures.
        """
        return self.judge.task is not None and bool(self._levers) and self.context.data.vouches

    @property
    def _levers(self) -> list[str]:
        """Those that the goal may pull, in their order. Only who asks for more than a balance waits for all of them."""
        if isinstance(self.judge.task, GivenScores) or not self.recipe.searches_far:
            return [name for name in ("prune",) if name in self.goal.techniques]
        return [name for name in LEVERS if name in self.goal.techniques]

    @property
    def _has_time(self) -> bool:
        left_s = self._left_s()
        return left_s is None or left_s > 0

    def _left_s(self) -> float | None:
        return time_left(self.goal.search_time_s, self.began_s)

    def _fused(self) -> StepRecord:
        step = Step("fuse", FuseConfig())
        if "fuse" not in self.goal.techniques:
            return StepRecord(step, self.model, self.path)
        before = StepRecord(step, self.model, self.path)
        return self._applied(before, self._part(0.0, 0.1), self._folder("fuse"))

    def _applied(self, before: StepRecord, context: Context, target: Path) -> StepRecord:
        """The record of a step on the model of `before`."""
        return self.judge.recall.step(
            before, [], target, lambda: apply_step(before.step, before.model, before.path, context, target)
        )

    def _quantized(self, model: Model, path: Path, before: tuple[StepRecord, ...], context: Context) -> None:
        """Every scheme on one float model."""
        target = self._folder(f"quantize-{len(self.entries)}")
        step = Step("quantize", QuantizeConfig())
        search = SchemeSearch(step, model, path, context, target, self.judge, self.judge.recall)
        for candidates in self._schemes(search, whole=not before or before[-1].step.technique == "fuse"):
            self._enter(candidates, before)
            if not self._has_time:
                break

    def _schemes(self, search: SchemeSearch, *, whole: bool) -> Iterator[list[Candidate]]:
        """The candidates of one scheme after the other. `whole`: nothing was cut from the model before."""
        config = QuantizeConfig(scheme="weight_only")
        search.context.progress(0.0, "storing weights in fewer bits")
        floors = {"weights stored in fewer bits, computing in float32": FLOAT_FLOOR_DB}
        if self.goal.objective == ACCURATE and whole:
            floors["weights stored so that nobody could tell"] = CLOSE_FLOOR_DB
        for variant, floor_db in floors.items():
            store = partial(store_all, search.model, config, search.context, floor_db)
            yield [search.add("weight_only", store, variant, asked=[floor_db])]
        count = len(search.candidates)
        search.dynamic()
        yield search.candidates[count:]
        count = len(search.candidates)
        search.static()
        yield search.candidates[count:]
        if self.recipe.searches_far and self.context.data.vouches:
            yield from ([candidate] for candidate in MixedSchemeSearch(search).candidates())
        count = len(search.candidates)
        search.smaller()
        yield search.candidates[count:]
        if self._wants_size and (whole or self.recipe.searches_far):
            quantize = partial(Quantize(config), search.model, search.context)
            yield [search.add("weight_only", quantize, "8 bits in blocks")]
            if self.recipe.searches_far:
                yield from ([candidate] for candidate in MixedBitsSearch(search).candidates())
            else:
                quantize = partial(Quantize(replace(config, weights="int4")), search.model, search.context)
                yield [search.add("weight_only", quantize, "4 bits in blocks")]

    @property
    def _wants_size(self) -> bool:
        limits = self.recipe.limits
        return self.goal.objective in (SMALLEST, BALANCED) or bool(limits.max_size_bytes or limits.min_ratio)

    def _cut(self, fused: StepRecord, before: tuple[StepRecord, ...]) -> None:
        """Pulls the levers one after the other, and quantizes what went the furthest."""
        scored = isinstance(self.judge.task, GivenScores)
        start, kept = before or (fused,), []
        levers = self._levers
        width = (0.6 - _WHOLE) / len(levers)
        for number, technique in enumerate(levers):
            lever = LeverSearch(
                technique,
                self.goal.objective,
                self._part(_WHOLE + width * number, _WHOLE + width * (number + 1)),
                apply=lambda record, context: self._applied(record, context, self._folder(f"cut-{next(self.numbers)}")),
                judge=self.judge.answers,
                left_s=self._left_s,
                trains=self.recipe.searches_far and not scored and "distill" in self.goal.techniques,
                cuts=MANY_CUTS if self.recipe.searches_far else FEW_CUTS,
            )
            for cut in lever.cuts(start, SCORED_SHARES if scored else ()):
                self._enter([cut.candidate], cut.before)
                if not cut.candidate.reason or cut.candidate.unscored:
                    kept.append(cut)
            start = kept[-1].chain if kept else start
        for cut in reversed(kept[-2:]):
            if not self._has_time or "quantize" not in self.goal.techniques:
                break
            record, built = cut.candidate.record, len(self.entries)
            self._quantized(record.model, record.path, cut.chain, self._part(0.6, _BUILT))
            if any(not entry.candidate.reason or entry.candidate.unscored for entry in self.entries[built:]):
                break  # else what was cut less may leave room for it

    def choose(self) -> Pursuit:
        """Times the candidates that keep the answers in the rounds of the original, and decides."""
        racers = [
            entry
            for entry in self.entries
            if entry.candidate.record.changes and (entry.candidate.unscored or not entry.candidate.reason)
        ]
        figures, remembered = self._priced(racers)
        choice = self._confirmed_choice(racers, figures)
        if remembered and choice.taken and not self._holds(racers[choice.taken - 1], figures, choice.taken):
            self.context.log("what was remembered of the times does not hold any more: all are timed again")
            figures, _ = self._priced(racers, anew=True)
            choice = self._confirmed_choice(racers, figures)
        if choice.taken:
            self._tell_taken(racers[choice.taken - 1], figures[0], figures[choice.taken])
        shown = self._shown(racers, figures, choice)
        for row in shown:
            self.context.log(f"{row['name']}: {row['reason'] or 'taken'}")
        records = () if choice.taken == 0 else _steps(racers[choice.taken - 1], tuple(shown))
        models: list[Model | None] = [entry.candidate.record.model for entry in self.entries]
        if isinstance(self.judge.task, GivenScores):
            shown, models = self._with_digests(shown), [*models, self.model]
        members = family(shown, models, file_size_bytes(self.path))
        advice = tuple(self._advice(figures, choice, racers))
        fidelity = racers[choice.taken - 1].candidate.fidelity if choice.taken else None
        return Pursuit(records, members, advice, dict(self.judge.recall.reused), fidelity)

    def _priced(self, racers: list[_Entry], *, anew: bool = False) -> tuple[list[Figures], bool]:
        """The figures of the original and of all racers, and whether some of the times are remembered.

        A few rounds show which candidates can win. Where those are several, they and the original run on.
        """
        first = self._prices(racers, FIRST_ROUNDS, anew=anew)
        original = Figures("the original", file_size_bytes(self.path), first.times_s[0], 0.0)
        figures = [_figures(entry, one) for entry, one in zip(racers, first.times_s[1:], strict=True)]
        figures = [original, *(self._refused(one, original) for one in figures)]
        left = contenders(figures, 0, self.goal.objective, _limits(self.recipe.limits))
        if len(left) == 1:
            return figures, first.remembered
        places = [place for place in left if place]
        more = self._prices([racers[place - 1] for place in places], ROUNDS - FIRST_ROUNDS, anew=anew)
        for place, times_s in zip([0, *places], more.times_s, strict=True):
            figures[place] = replace(figures[place], times_s=np.concatenate([figures[place].times_s, times_s]))
        return figures, first.remembered or more.remembered

    def _holds(self, entry: _Entry, figures: Sequence[Figures], place: int) -> bool:
        """Whether the entry is still as fast, against the original, as its remembered times say."""
        remembered = figures[0].times_of(figures[place])
        now = self.judge.timed([entry.candidate.record.path], CHECKED_ROUNDS, BUDGET_S / 4).speedup(1)
        now, remembered = (one.widened(SESSION_SPREAD) for one in (now, remembered))
        return now.low <= remembered.high and remembered.low <= now.high

    def _with_digests(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what names each model in the scores of who computes the metric; the original comes last."""
        original: dict[str, Any] = {
            "id": ORIGINAL,
            "name": "the original, as ONNX",
            "size_bytes": file_size_bytes(self.path),
            "speedup": {"median": 1.0, "low": 1.0, "high": 1.0},
            "agreement": 1.0,
            "expected_drop": None,
            "cosine": 1.0,
            "drop": 0.0,
            "pareto": True,
            "chosen": all(not row["chosen"] for row in rows),
            "reason": "",
            "sha256": model_digest(self.path),
        }
        digests = [model_digest(entry.candidate.record.path) for entry in self.entries]
        leads = [one.unscored and one.technique == "prune" for one in (entry.candidate for entry in self.entries)]
        named = [
            {**row, "sha256": digest, "leads_further": further}
            for row, digest, further in zip(rows, digests, leads, strict=True)
        ]
        return [*named, original]

    def _confirmed_choice(self, racers: list[_Entry], figures: list[Figures]) -> Choice:
        """The best of those that keep the answers on all samples; the lists get what is found out on the way.

        Few samples cleared the candidates of doubt, or an earlier job did; what is taken must run on all of them, now.
        """
        while True:
            choice = choose(figures, 0, self.goal.objective, _limits(self.recipe.limits))
            if choice.taken == 0:
                return choice
            entry = racers[choice.taken - 1]
            if not (entry.candidate.screened or entry.candidate.remembered):
                return choice
            self.context.check_time()
            judged = self._proven(self.judge.confirmed(entry.candidate, anew=True))
            racers[choice.taken - 1] = self.entries[self._place(entry)] = replace(entry, candidate=judged)
            if judged.reason:
                figures[choice.taken] = replace(figures[choice.taken], refusal=judged.reason)

    def _tell_taken(self, entry: _Entry, original: Figures, taken: Figures) -> None:
        number = 1 + self._place(entry)
        size = _change(taken.size_bytes, original.size_bytes)
        speed = f"{original.time_s / taken.time_s:.2f}x"
        self.context.progress(0.99, f"candidate {number} of {len(self.entries)}: {size}, {speed}; taken")

    def _place(self, entry: _Entry) -> int:
        return next(place for place, other in enumerate(self.entries) if other is entry)

    def _prices(self, racers: Sequence[_Entry], rounds: int, *, anew: bool = False) -> Prices:
        """Times of the original, at place 0, and of all racers."""
        self.context.check_time()
        self.context.progress(_BUILT, f"timing {len(racers)} candidates")
        budget_s = BUDGET_S * rounds / ROUNDS
        return self.judge.prices([entry.candidate.record.path for entry in racers], rounds, budget_s, anew=anew)

    def _refused(self, figures: Figures, original: Figures) -> Figures:
        """A result larger than the original is for those who ask for speed alone."""
        if figures.refusal or self.goal.objective == FASTEST or figures.size_bytes <= original.size_bytes:
            return figures
        return replace(figures, refusal="its file is larger than the original")

    def _shown(self, racers: list[_Entry], figures: list[Figures], choice: Choice) -> list[dict[str, Any]]:
        """The report's rows: those that were timed with their speed, the others with what spoke against them."""
        timed = {
            id(entry): (
                replace(entry.candidate, speedup=figures[0].times_of(one), reason=reason),
                choice.taken == place,
            )
            for place, (entry, one, reason) in enumerate(
                zip(racers, figures[1:], choice.reasons[1:], strict=True), start=1
            )
        }
        shown = [(entry, *timed.get(id(entry), (entry.candidate, False))) for entry in self.entries]
        fronts = pareto_set([candidate for _, candidate, _ in shown])
        return [
            candidate.to_dict(taken, front) | {"name": entry.name}
            for (entry, candidate, taken), front in zip(shown, fronts, strict=True)
        ]

    def _advice(self, figures: list[Figures], choice: Choice, racers: list[_Entry]) -> Iterator[dict[str, str]]:
        """What other options would have brought, from what was measured."""
        taken, original = figures[choice.taken], figures[0]
        sound = [one for one in figures if not one.refusal]
        device = DEVICES[self.recipe.target.device]
        asked = device.measured and device.name != Target().device
        command = f"compress-client upload MODEL{f' --target {device.name}' if asked else ''}"
        if not self.context.data.vouches and (faster := self._unproven_speedup()) is not None:
            gain = faster * taken.time_s / original.time_s
            if gain >= _WORTH_ADVICE:
                yield {
                    "text": f"Representative inputs would let 8-bit arithmetic be used: about {gain:.1f} times faster.",
                    "command": f"{command} --data FILE.npz",
                }
        for objective, best in (
            (SMALLEST, min(sound, key=lambda one: one.size_bytes)),
            (FASTEST, min(sound, key=lambda one: one.time_s)),
        ):
            smaller, faster_by = taken.size_bytes / best.size_bytes, taken.time_s / best.time_s
            if max(smaller if objective == SMALLEST else 0, faster_by if objective == FASTEST else 0) >= _WORTH_ADVICE:
                size, speed = best.size_bytes / 1e6, original.time_s / best.time_s
                yield {
                    "text": f"Another goal would give {size:.3g} MB at {speed:.2f} times the original's speed.",
                    "command": f"{command} --goal {objective}",
                }

    def _unproven_speedup(self) -> float | None:
        """Of the fastest candidate that only lacks data that vouches for it."""
        unproven = [entry.candidate for entry in self.entries if entry.candidate.unproven]
        if not unproven:
            return None
        times_s = self.judge.prices([one.record.path for one in unproven], ROUNDS // 4, BUDGET_S / 4).times_s
        return float(max(np.median(times_s[0] / one) for one in times_s[1:]))

    def _enter(self, candidates: Sequence[Candidate], before: tuple[StepRecord, ...] = ()) -> None:
        self.entries += [_Entry(self._proven(candidate), before) for candidate in candidates]

    def _proven(self, candidate: Candidate) -> Candidate:
        """Ranges of static quantization come from the data."""
        if candidate.reason or candidate.scheme != "static" or self.judge.trusts_ranges:
            return candidate
        reason = "its ranges come from inputs that cannot vouch for real ones; give representative ones with --data"
        return replace(candidate, reason=reason, unproven=True)

    def _folder(self, name: str) -> Path:
        return self.context.work_directory / "goal" / name / "model.onnx"

    def _part(self, start: float, stop: float) -> Context:
        return replace(self.context, progress=scaled(self._tell, start, stop))

    def _tell(self, share: float, message: str) -> None:
        """Says which candidate is being built, and the smallest so far that keeps the answers."""
        sizes = [entry.candidate.size_bytes for entry in self.entries if not entry.candidate.reason]
        so_far = f"; so far {_change(min(sizes), file_size_bytes(self.path))}" if sizes else ""
        self.context.progress(share, f"candidate {len(self.entries) + 1}: {message}{so_far}")


def _change(size_bytes: int, original_bytes: int) -> str:
    share = 1 - size_bytes / original_bytes
    return f"{abs(share):.0%} {'smaller' if share >= 0 else 'larger'}".replace("%", " %")


def _figures(entry: _Entry, times_s: Times) -> Figures:
    candidate = entry.candidate
    fidelity = candidate.fidelity
    drop = candidate.drop if candidate.drop is not None else fidelity.expected_drop if fidelity is not None else None
    return Figures(entry.name, candidate.size_bytes, times_s, 1 - candidate.cosine, drop or 0.0, candidate.reason)


def _limits(constraints: Constraints) -> Limits:
    return Limits(**{name: value for name, value in asdict(constraints).items() if name in Limits.__annotations__})


def _steps(entry: _Entry, rows: tuple[dict[str, Any], ...]) -> tuple[StepRecord, ...]:
    """What made the candidate; the rows of all candidates stand with its last step."""
    skips = tuple(Skip(row["name"], row["reason"]) for row in rows if row["reason"])
    last = entry.candidate.record
    return (*entry.before, replace(last, skipped=(*last.skipped, *skips), candidates=rows))
