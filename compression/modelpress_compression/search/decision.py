"""Which candidate of a goal is taken: all that keep the answers are timed in the rounds of the original.

A few rounds show which candidates can win; those run on. `choice.choose` decides, what it takes is compared once more
on all samples, and what it did not take, but another option would have, becomes advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from modelpress_compression.counted import counted
from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import MIN_TIMING_S, SESSION_SPREAD, Times
from modelpress_compression.measure.task import GivenScores, model_digest
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.passes.base import Skip
from modelpress_compression.recipe import FASTEST, SMALLEST, Constraints, Goal
from modelpress_compression.report.formats import duration, plain_size
from modelpress_compression.search.candidates import pareto_set
from modelpress_compression.search.choice import Choice, Figures, Limits, choose, contenders, settled
from modelpress_compression.search.entries import Entry, size_change
from modelpress_compression.search.family import ORIGINAL, FamilyMember, family
from modelpress_compression.search.judge import Judge
from modelpress_compression.search.recall import Prices
from modelpress_compression.search.search_time import SearchTime
from modelpress_compression.search.steps import StepRecord
from modelpress_compression.target import DEVICES, Target

ROUNDS, FIRST_ROUNDS = 60, 20
# So many more of all, where the original takes less than `MIN_TIMING_S`: times of small models hang on where a session
# lies in memory, and 20 rounds see six sessions. Of a network of 50 microseconds they gave ratios up to 9 % off.
SMALL_ROUNDS = 100
# Those that can win have more rounds where all of these take no longer: small models, whose times scatter the most.
MOST_ROUNDS, MORE_ROUNDS_S = 240, 1.5
# As many again, so often, where figures lie so close to a bound that the choice would be another the next time; in all
# no longer than this.
MOST_TURNS, TURNS_S = 4, 6.0
CHECKED_ROUNDS = 15  # of a winner by remembered times
BUDGET_S = 20.0  # of timing, for each batch size
# Of size or time: less is not worth another command.
_WORTH_ADVICE = 1.1
_MORE_TIME = 5  # times the time of a search that was not through are worth another command
# Limits by their names in recipes: the client's option, and the unit of its value.
_BOUNDS = {
    "max_size_bytes": ("--max-size", "B"),
    "min_ratio": ("--min-ratio", ""),
    "max_latency_ms": ("--max-latency", "ms"),
    "min_speedup": ("--min-speedup", ""),
}
BUILT = 0.8  # share of a goal's progress when all candidates are built and judged


@dataclass(frozen=True)
class Pursuit:
    """What came of a goal. `records`: the steps that made the result, none where the original is the best.

    `candidates`: all that were tried, with those models that can be had. `advice`: what would have been better, each
    with `text` and `command`.
    `reused`: how much of each kind earlier jobs had found out. `fidelity`: of the result, as this job has compared it;
    None: the result is the original. `unmet`: by the limit's name, the factor by which the result misses it.
    `search`: its time, as the report has it; None: there were steps.
    """

    records: tuple[StepRecord, ...]
    candidates: tuple[FamilyMember, ...]
    advice: tuple[dict[str, str], ...] = ()
    reused: Mapping[str, int] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    unmet: Mapping[str, float] = field(default_factory=dict)
    search: Mapping[str, float | int | None] | None = None


@dataclass
class Decision:
    """Between the `entries`, whose candidates were judged; what is found out of them on the way is put in their places.

    `model`: the original, whose file is the judge's. `time`: of the search that has built them.
    """

    goal: Goal
    model: Model
    judge: Judge
    entries: list[Entry]
    time: SearchTime

    def pursuit(self) -> Pursuit:
        """Times the candidates that keep the answers in the rounds of the original, and decides."""
        search = self.time.facts()
        racers = [
            entry
            for entry in self.entries
            if entry.candidate.record.changes and (entry.candidate.unscored or not entry.candidate.reason)
        ]
        figures, remembered = self._priced(racers)
        choice = self._confirmed_choice(racers, figures)
        if remembered and choice.taken and not self._holds(racers[choice.taken - 1], figures, choice.taken):
            self.judge.context.log("what was remembered of the times does not hold any more: all are timed again")
            figures, _ = self._priced(racers, anew=True)
            choice = self._confirmed_choice(racers, figures)
        if choice.taken:
            self._tell_taken(racers[choice.taken - 1], figures[0], figures[choice.taken])
        shown = self._shown(racers, figures, choice)
        for row in shown:
            self.judge.context.log(f"{row['name']}: {row['reason'] or 'taken'}")
        records = () if choice.taken == 0 else _steps(racers[choice.taken - 1], tuple(shown))
        candidates = [entry.candidate for entry in self.entries]
        models: list[Model | None] = [None if one.draft else one.record.model for one in candidates]
        if isinstance(self.judge.task, GivenScores):
            shown, models = self._with_digests(shown), [*models, self.model]
        members = family(shown, models, file_size_bytes(self.judge.original))
        advice = tuple(self._advice(figures, choice, racers))
        fidelity = racers[choice.taken - 1].candidate.fidelity if choice.taken else None
        return Pursuit(records, members, advice, dict(+self.judge.recall.reused), fidelity, choice.unmet, search)

    def _priced(self, racers: list[Entry], *, anew: bool = False) -> tuple[list[Figures], bool]:
        """The figures of the original and of all racers, and whether some of the times are remembered.

        A few rounds show which candidates can win. Where those are several, they and the original run on.
        """
        first = self._prices(racers, FIRST_ROUNDS, anew=anew)
        if np.median(first.times_s[0]) < MIN_TIMING_S:
            first = first.then(self._prices(racers, SMALL_ROUNDS, anew=anew))
        own = self.judge.original
        original = Figures("the original", file_size_bytes(own), first.times_s[0], 0.0, kernels=str(own))
        figures = [_figures(entry, one) for entry, one in zip(racers, first.times_s[1:], strict=True)]
        figures = [original, *(self._refused(one, original) for one in figures)]
        asked = self.goal.objective, _limits(self.judge.recipe.limits)
        left = contenders(figures, 0, *asked)
        if len(left) == 1:
            return figures, first.remembered
        places = [place for place in left if place]
        remembered = first.remembered
        rounds, turns = _rounds_more(figures, [0, *places])
        for turn in range(turns):
            more = self._prices([racers[place - 1] for place in places], rounds, turn, anew=anew)
            remembered = remembered or more.remembered
            for place, times_s in zip([0, *places], more.times_s, strict=True):
                figures[place] = replace(figures[place], times_s=np.concatenate([figures[place].times_s, times_s]))
            if settled(figures, 0, *asked):
                break
        return figures, remembered

    def _holds(self, entry: Entry, figures: Sequence[Figures], place: int) -> bool:
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
            "size_bytes": file_size_bytes(self.judge.original),
            "speedup": {"median": 1.0, "low": 1.0, "high": 1.0},
            "agreement": 1.0,
            "expected_drop": None,
            "cosine": 1.0,
            "drop": 0.0,
            "pareto": True,
            "chosen": all(not row["chosen"] for row in rows),
            "reason": "",
            "sha256": model_digest(self.judge.original),
        }
        digests = [model_digest(entry.candidate.record.path) for entry in self.entries]
        leads = [one.unscored and one.technique == "prune" for one in (entry.candidate for entry in self.entries)]
        named = [
            {**row, "sha256": digest, "leads_further": further}
            for row, digest, further in zip(rows, digests, leads, strict=True)
        ]
        return [*named, original]

    def _confirmed_choice(self, racers: list[Entry], figures: list[Figures]) -> Choice:
        """The best of those that keep the answers on all samples; the lists get what is found out on the way.

        Few samples cleared the candidates of doubt, or an earlier job did; what is taken must run on all of them, now.
        """
        while True:
            choice = choose(figures, 0, self.goal.objective, _limits(self.judge.recipe.limits))
            if choice.taken == 0:
                return choice
            entry = racers[choice.taken - 1]
            candidate = entry.candidate
            if not (candidate.screened or candidate.remembered or candidate.draft):
                return choice
            self.judge.context.check_time()
            found = candidate.draft() if candidate.draft else entry.judge.confirmed(candidate, anew=True)
            judged = replace(entry, candidate=entry.judge.proven(found))
            racers[choice.taken - 1] = self.entries[self._place(entry)] = judged
            figures[choice.taken] = _figures(judged, figures[choice.taken].times_s)
            if judged.candidate.reason and candidate.closer is not None:
                self.judge.context.progress(BUILT, "storing weights with less error")
                if (closer := candidate.closer()) is not None and closer.record.changes:
                    racers.append(replace(entry, candidate=entry.judge.proven(closer)))
                    self.entries.append(racers[-1])
                    # It computes as the refused one: what is stored otherwise is float32 again once it is loaded.
                    figures.append(_figures(racers[-1], figures[choice.taken].times_s))

    def _tell_taken(self, entry: Entry, original: Figures, taken: Figures) -> None:
        number = 1 + self._place(entry)
        size = size_change(taken.size_bytes, original.size_bytes)
        speed = f"{original.time_s / taken.time_s:.2f}x"
        self.judge.context.progress(0.99, f"candidate {number} of {len(self.entries)}: {size}, {speed}; taken")

    def _place(self, entry: Entry) -> int:
        return next(place for place, other in enumerate(self.entries) if other is entry)

    def _prices(self, racers: Sequence[Entry], rounds: int, turn: int = 0, *, anew: bool = False) -> Prices:
        """Times of the original, at place 0, and of all racers. `turn`: of several with as many rounds."""
        self.judge.context.check_time()
        self.judge.context.progress(BUILT, f"timing {counted(len(racers), 'candidate')}")
        budget_s = BUDGET_S * min(rounds, ROUNDS) / ROUNDS
        paths = [entry.candidate.record.path for entry in racers]
        return self.judge.prices(paths, rounds, budget_s, turn, anew=anew)

    def _refused(self, figures: Figures, original: Figures) -> Figures:
        """A result larger than the original is for those who ask for speed alone."""
        if figures.refusal or self.goal.objective == FASTEST or figures.size_bytes <= original.size_bytes:
            return figures
        return replace(figures, refusal="its file is larger than the original")

    def _shown(self, racers: list[Entry], figures: list[Figures], choice: Choice) -> list[dict[str, Any]]:
        """The report's rows: those that were timed with their speed, the others with what spoke against them."""
        timed = {
            id(entry): (
                replace(
                    entry.candidate,
                    speedup=figures[0].times_of(one),
                    reason=self._reason(entry, place, figures, choice),
                ),
                choice.taken == place,
            )
            for place, (entry, one) in enumerate(zip(racers, figures[1:], strict=True), start=1)
        }
        shown = [(entry, *timed.get(id(entry), (entry.candidate, False))) for entry in self.entries]
        fronts = pareto_set([candidate for _, candidate, _ in shown])
        return [
            candidate.to_dict(taken, front) | {"name": entry.name}
            for (entry, candidate, taken), front in zip(shown, fronts, strict=True)
        ]

    def _reason(self, entry: Entry, place: int, figures: list[Figures], choice: Choice) -> str:
        """Why a racer was not taken. A missing score is no reason where no score would have changed the choice."""
        if entry.candidate.unscored:
            scored = [*figures[:place], replace(figures[place], refusal=""), *figures[place + 1 :]]
            again = choose(scored, 0, self.goal.objective, _limits(self.judge.recipe.limits))
            if again.taken == choice.taken:
                return again.reasons[place]
        return choice.reasons[place]

    def _advice(self, figures: list[Figures], choice: Choice, racers: list[Entry]) -> Iterator[dict[str, str]]:
        """What other options would have brought, from what was measured."""
        taken, original = figures[choice.taken], figures[0]
        sound = [one for one in figures if not one.refusal]
        drafts = {id(one) for entry, one in zip(racers, figures[1:], strict=True) if entry.candidate.draft}
        if not self.judge.context.data.vouches and (faster := self._unproven_speedup()) is not None:
            gain = faster * taken.time_s / original.time_s
            if gain >= _WORTH_ADVICE:
                yield {
                    "text": f"Representative inputs would let 8-bit arithmetic be used: about {gain:.1f} times faster.",
                    "command": self._command(self._asked, with_data=True),
                }
        for objective, best in (
            (SMALLEST, min(sound, key=lambda one: one.size_bytes)),
            (FASTEST, min(sound, key=lambda one: one.time_s)),
        ):
            smaller, faster_by = taken.size_bytes / best.size_bytes, taken.time_s / best.time_s
            if max(smaller if objective == SMALLEST else 0, faster_by if objective == FASTEST else 0) >= _WORTH_ADVICE:
                size, speed = plain_size(best.size_bytes), f"{original.time_s / best.time_s:.2f} times"
                gives = "may give" if id(best) in drafts else "would give"
                bounded = any(getattr(self.judge.recipe.limits, name) is not None for name in _BOUNDS)
                goal = f"Without the limits, the goal {objective}" if bounded else f"The goal {objective}"
                yield {
                    "text": f"{goal} {gives} {size} at {speed} the original's speed.",
                    "command": self._command([f"--goal {objective}"]),
                }
        yield from self._without_bound(taken)
        yield from self._more_time()

    def _without_bound(self, taken: Figures) -> Iterator[dict[str, str]]:
        """What the original's own probabilities would permit, where a bound on the drop counts changed answers: those
        that nearly tie change at any rounding."""
        if self.judge.task is not None or self.judge.recipe.limits.max_drop is None:
            return
        refused = ((entry.judge, entry.candidate) for entry in self.entries if entry.candidate.reason)
        spared = [
            one.size_bytes
            for judge, one in refused
            if one.fidelity is not None and one.fidelity.expected_drop is not None and judge.keeps_without_bound(one)
        ]
        if spared and taken.size_bytes / min(spared) >= _WORTH_ADVICE:
            yield {
                "text": (
                    "Without labels, the bound on the drop counts every changed answer, also where two classes nearly "
                    f"tie. Without it, this goal may give {plain_size(min(spared))}; with --eval, the metric decides."
                ),
                "command": self._command(self._asked, bounded=False),
            }

    def _command(self, options: Sequence[str], *, with_data: bool = False, bounded: bool = True) -> str:
        """The client's, for this target and data, with these options besides. `bounded`: with this bound on the drop,
        too."""
        recipe, task = self.judge.recipe, self.judge.task
        words = ["compress-client upload MODEL"]
        device = DEVICES[recipe.target.device]
        if not device.missing and device.name != Target().device:
            words.append(f"--target {device.name}")
        if with_data or self.judge.context.data.provided:
            words.append("--data FILE.npz")
        if task is not None:
            words.append("--metric FILE.py:FUNCTION" if isinstance(task, GivenScores) else "--eval FILE.npz")
        if (drop := recipe.limits.max_drop) is not None and bounded:
            words.append(f"--max-drop {_plain(drop, trim='0')}")  # 1 could be one percent or everything
        return " ".join([*words, *options])

    @property
    def _asked(self) -> list[str]:
        """The options of the client for this goal: its objective, and the limits on size and time."""
        limits = self.judge.recipe.limits
        stated = [(option, getattr(limits, name), unit) for name, (option, unit) in _BOUNDS.items()]
        bounds = [f"{option} {_plain(value)}{unit}" for option, value, unit in stated if value is not None]
        return [f"--goal {self.goal.objective}", *bounds]

    def _more_time(self) -> Iterator[dict[str, str]]:
        """What the end of its time has left out of the search."""
        if not self.time.untried:
            return
        minutes = max(1, round(_MORE_TIME * self.time.limit_s / 60))
        tries = f"--search-time {minutes}m tries up to {counted(self.time.untried, 'more model')}"
        yield {
            "text": f"The search was over after {duration(self.time.limit_s)}, before all was tried: {tries}.",
            "command": self._command([*self._asked, f"--search-time {minutes}m"]),
        }

    def _unproven_speedup(self) -> float | None:
        """Of the fastest candidate that only lacks data that vouches for it."""
        unproven = [entry.candidate for entry in self.entries if entry.candidate.unproven]
        if not unproven:
            return None
        times_s = self.judge.prices([one.record.path for one in unproven], ROUNDS // 4, BUDGET_S / 4).times_s
        return float(max(np.median(times_s[0] / one) for one in times_s[1:]))


def _plain(value: float, trim: Literal["-", "0"] = "-") -> str:
    """Without an exponent, which the client's options do not take."""
    return np.format_float_positional(value, trim=trim)


def _rounds_more(figures: Sequence[Figures], places: Sequence[int]) -> tuple[int, int]:
    """How many rounds more these models run, and at most how often."""
    round_s = sum(max(figures[place].time_s, MIN_TIMING_S) for place in places)
    rounds = int(np.clip(MORE_ROUNDS_S / round_s, ROUNDS - FIRST_ROUNDS, MOST_ROUNDS - FIRST_ROUNDS))
    return rounds, int(np.clip(TURNS_S / (rounds * round_s), 1, MOST_TURNS))


def _figures(entry: Entry, times_s: Times) -> Figures:
    candidate = entry.candidate
    fidelity = candidate.fidelity
    drop = candidate.drop if candidate.drop is not None else fidelity.expected_drop if fidelity is not None else None
    return Figures(
        entry.name,
        candidate.size_bytes,
        times_s,
        1 - candidate.cosine,
        drop or 0.0,
        candidate.reason,
        str(candidate.computes_as or candidate.record.path),
    )


def _limits(constraints: Constraints) -> Limits:
    return Limits(**{name: value for name, value in asdict(constraints).items() if name in Limits.__annotations__})


def _steps(entry: Entry, rows: tuple[dict[str, Any], ...]) -> tuple[StepRecord, ...]:
    """What made the candidate; the rows of all candidates stand with its last step."""
    skips = tuple(Skip(row["name"], row["reason"]) for row in rows if row["reason"])
    last = entry.candidate.record
    return (*entry.before, replace(last, skipped=(*last.skipped, *skips), candidates=rows))
