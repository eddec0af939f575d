"""Whether a candidate keeps the answers, and whether it is faster: measured in turn with the float model.

A candidate keeps the answers if all of these hold that apply:

1. No output's cosine with the original's falls below 0.95 (10 dB). Without labels, and unless damage is allowed, the
   expected drop is at most 10 points, on made-up inputs too: more is damage (damage.py).
2. With labels, or with a metric of the user's own: it falls by at most `max_drop` (0.01 if it is not set).
3. Without labels, `max_drop` set: agreement with the original is at least `1 - max_drop`. With the metric cosine, the
   cosine takes the place of agreement, and `max_drop` is 0.01 if it is not set.
4. Without either, where outputs hold classes and the data is real: the expected drop is at most 0.6 points of accuracy,
   so that the metric falls by less than one; 0.4, and 20 dB are kept, where ranges or levels were fitted to that data.
   The expected drop is what the original loses by its own probabilities (`measure.fidelity`). Of a text recognizer,
   five models in 8 bits with 0.9 to 1.2 points on their own data had 1.0 to 1.2 points on other lines, and read 1.1 to
   1.8 points fewer words there, where stored weights alone with 0.1 to 0.7 points read no fewer.
5. As in 4, where the model was cut and nothing was fitted to the data, which is held out for that (grounds.py):
   agreement as in 3, with 0.01 for `max_drop` if that is not set, and every output keeps 23 dB, or 26 dB where none
   holds classes. Few samples show a small drop no better than chance does, and a search that tries dozens of models
   finds the luckiest: of a digit classifier, one changed none of 86 answers at 19 dB, and lost 2 points; at 23 dB it
   lost 0.2 on 2,000 digits.
6. As in 4, if the original expects to be right in fewer than a tenth of all cases: its scores are no probabilities, or
   it is untrained, and the expected drop says nothing. Then no output's cosine may fall below 0.99 (17 dB). So it is
   with fewer than 30 answers: of two none changes by chance, and a model at 0.967 was taken for one that keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from modelpress_compression.backends import backend_of
from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import MetricError
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.accuracy import Evaluation, accuracy_after
from modelpress_compression.measure.damage import damage_of
from modelpress_compression.measure.fidelity import Fidelity, KnownOutputs, compare_outputs
from modelpress_compression.measure.latency import Speedup, Times, Timings, ratio_interval, time_interleaved
from modelpress_compression.measure.task import GivenScores, NotScoredError, OwnMetric, Task, model_digest
from modelpress_compression.model import file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.recipe import Recipe
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.recall import Prices, Recall

# The largest drop of the task metric, with labels, if `max_drop` is not set.
DEFAULT_MAX_DROP = 0.01
MAX_EXPECTED_DROP = 0.006
# What was fitted to the data loses so many times as much elsewhere: four static models of a text recognizer that were
# expected to lose 1.8 points together read 2.9 points fewer words, and EfficientNet in 4 bits lost more still.
FLATTERED = 1.5
# And keeps so much: EfficientNet with 20 of 49 weights in 4 bits kept 17 dB and, by its own probabilities, its answers
# on 96 views of 12 photos; on 20 other photos it lost 2 points.
FITTED_FLOOR_DB = 20.0
# Below this the original's probabilities say nothing, and its outputs must stay closer.
MIN_EXPECTED_TOP1, MIN_COSINE_OF_SCORES = 0.1, 0.99
# Fewer answers say as little: where 2 % change, it is none of 30 in every second case.
MIN_ANSWERS = 30
# A sentence encoder whose token vectors keep 0.967 (11.5 dB) retrieves as well as before.
MIN_COSINE = 0.95
# On synthetic inputs, of models that compute in 8 bits. docs/goals.md says how it was found.
SYNTHETIC_FLOOR_DB = 30.0
# Of outputs that hold no classes, on real data without labels.
VALUES_FLOOR_DB = 20.0
# Of models that were cut, on real data without labels that nothing was fitted to.
HELD_OUT_FLOOR_DB = 23.0
# The same where outputs hold no classes, of which agreement could tell more: a voice detector with 65 % of its channels
# gone kept 23 dB, and lost 1.6 points of AUC.
HELD_OUT_VALUES_FLOOR_DB = 26.0
# What stored weights keep, whose error is the same on real inputs and on synthetic ones, or less.
FLOAT_FLOOR_DB = 20.0
FIDELITY_SAMPLES = 128
# Few samples leave no doubt where half of what is permitted, or twice as much, would decide the same.
SCREENING_SAMPLES = 32
_STRICT, _LOOSE = 0.5, 2.0
LATENCY_ROUNDS, MORE_ROUNDS = 30, 240
LATENCY_BUDGET_S = 15.0
# Candidates that do not keep the answers are timed too, so that the report shows what a looser bound would give.
OUT_BUDGET_S = 4.0


@dataclass(frozen=True)
class RaceTimings:
    """Timings of the float model, at place 0, and the candidates: one for each batch size that the model takes."""

    by_batch_size: tuple[Timings, ...]

    @cached_property
    def times_s(self) -> Times:
        """[models, rounds]: the geometric mean over batch sizes, for as many rounds as all of them have."""
        rounds = min(one.rounds for one in self.by_batch_size)
        logarithms = [np.log(one.times_s[:, :rounds]) for one in self.by_batch_size]
        return np.asarray(np.exp(np.mean(logarithms, axis=0)), np.float64)

    def speedup(self, place: int) -> Speedup:
        """Over the float model, all batch sizes together."""
        return ratio_interval(self.times_s[0] / self.times_s[place])

    def speedups(self, place: int) -> list[Speedup]:
        """Over the float model, at each batch size."""
        return [one.speedup(0, place) for one in self.by_batch_size]


@dataclass(frozen=True)
class Judge:
    """`original`: file of the model as it was uploaded; `float_path`: of the model before this step. `task`: what
    decides where there is one. `screens`: see `answers`. `known`, `known_few`: the original's outputs on all of the
    data, and on a few samples. `held_out`: whether others than the context's samples were fitted to."""

    original: Path
    float_path: Path
    context: Context
    recipe: Recipe
    task: Task | None
    screens: bool = False
    known: KnownOutputs = field(default_factory=KnownOutputs)
    known_few: KnownOutputs = field(default_factory=KnownOutputs)
    recall: Recall = field(default_factory=Recall)
    held_out: bool = False

    @cached_property
    def backend(self) -> Backend:
        """What candidates run in: the target's. The original's answers are those of onnxruntime."""
        return backend_of(self.context.target)

    @property
    def trusts_ranges(self) -> bool:
        """Whether a model with ranges from this data may be taken: made-up data can vouch for none."""
        # A metric of the user's own runs the model on inputs of theirs.
        return self.context.data.vouches or isinstance(self.task, OwnMetric | GivenScores)

    def proven(self, candidate: Candidate) -> Candidate:
        """The candidate, refused where its ranges come from inputs that cannot vouch for them."""
        if candidate.reason or candidate.scheme != "static" or self.trusts_ranges:
            return candidate
        reason = "its ranges come from inputs that cannot vouch for real ones; give representative ones with --data"
        return replace(candidate, reason=reason, unproven=True)

    def answers(self, candidate: Candidate) -> Candidate:
        """The candidate with its fidelity, and with the reason if it does not keep the answers.

        Where `screens` and a few samples leave no doubt, they suffice: what is taken must then be `confirmed`.
        """
        if not candidate.record.changes:
            undone = candidate.record.warnings
            return replace(candidate, reason=undone[-1] if undone else "there was nothing that it could quantize")
        if self.screens and self.task is None and len(self.context.data) > 2 * SCREENING_SAMPLES:
            few = self.context.data.spread(SCREENING_SAMPLES)
            rough = self._compared(candidate, few, self.known_few)
            if self._differs(rough, _LOOSE) or not self._differs(rough, _STRICT):
                return replace(rough, reason=self._differs(rough), screened=True)
        return self.confirmed(candidate)

    def confirmed(self, candidate: Candidate, *, anew: bool = False) -> Candidate:
        """The same on all samples, and by the labels where there are any. `anew`: whatever is remembered."""
        candidate = self._compared(replace(candidate, screened=False), self.context.data, self.known, anew=anew)
        reason = self._differs(candidate)
        if reason or self.task is None:
            return replace(candidate, reason=reason)
        constraints = self.recipe.limits
        try:
            before = self._original_metric
            accuracy = accuracy_after(before, self.recall.evaluation(self.task, candidate.record.path, self.backend))
        except NotScoredError as error:
            return replace(candidate, reason=error.message, unscored=True)
        except MetricError as error:
            # It could score the original: what it makes of a candidate says something of the candidate.
            return replace(candidate, reason=error.message)
        allowed = DEFAULT_MAX_DROP if constraints.max_drop is None else constraints.max_drop
        if accuracy.drop > allowed:
            reason = f"{accuracy.loss}, more than {allowed}"
        return replace(candidate, drop=accuracy.drop, reason=reason)

    def _compared(self, candidate: Candidate, data: InputData, known: KnownOutputs, *, anew: bool = False) -> Candidate:
        path = candidate.record.path

        def compare() -> Fidelity:
            return compare_outputs(self.original, path, data, limit=FIDELITY_SAMPLES, known=known, backend=self.backend)

        if anew:
            return replace(candidate, fidelity=compare(), remembered=False)
        fidelity, remembered = self.recall.fidelity(path, [len(data), FIDELITY_SAMPLES], compare)
        return replace(candidate, fidelity=fidelity, remembered=remembered)

    def _differs(self, candidate: Candidate, slack: float = 1.0) -> str:
        """Why the candidate, whose outputs were compared, does not keep the answers, as far as outputs tell; empty: it
        does. `slack`: how many times what is permitted of any error is."""
        fidelity = candidate.fidelity
        if fidelity is None:
            raise ValueError("the outputs were not compared")
        if 1 - candidate.cosine > slack * (1 - MIN_COSINE):
            return (
                f"its outputs differ too much from the original's (cosine {candidate.cosine:.4f}, at least "
                f"{MIN_COSINE} is kept)"
            )
        floor_db = SYNTHETIC_FLOOR_DB - 10 * math.log10(slack)
        if not self.context.data.vouches and candidate.computes_in_8_bits and fidelity.sqnr_db < floor_db:
            return (
                f"on synthetic inputs its outputs keep {fidelity.sqnr_db:.1f} dB; at least {SYNTHETIC_FLOOR_DB:g} dB "
                "have never cost an answer"
            )
        if candidate.size_bytes >= file_size_bytes(self.float_path) and candidate.technique != "fuse":
            return "its file would not be smaller than in float32"
        if self.task is not None:
            return ""
        # Classes of made-up inputs say nothing of a point, but the whole job would be called damaged for ten.
        if not self.recipe.limits.allow_damage and (damage := damage_of(fidelity, None, slack)):
            return f"it would no longer resemble the original: {damage}"
        return self._disagrees(fidelity, slack, fitted=candidate.is_fitted)

    def keeps_without_bound(self, candidate: Candidate) -> bool:
        """Whether the candidate keeps the answers, as far as they were compared, where nobody bounds the drop."""
        constraints, goal = self.recipe.constraints, self.recipe.goal
        free = replace(
            self.recipe,
            constraints=replace(constraints, max_drop=None),
            goal=None if goal is None else replace(goal, max_drop=None),
        )
        return candidate.fidelity is not None and not replace(self, recipe=free)._differs(candidate)

    @cached_property
    def _original_metric(self) -> Evaluation:
        assert self.task is not None  # noqa: S101  # who has none does not ask
        return self.recall.evaluation(self.task, self.original, CPU)

    def speed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their speed, and with the reason where one is not surely faster.

        Those that may still be taken run in the same rounds, so that they can be told apart from each other; each of
        the others runs against the float model alone.
        """
        race = [item for item in candidates if not item.reason and item.record.changes]
        timed = dict(zip(map(id, race), self._race(race), strict=True))
        return [timed[id(item)] if id(item) in timed else self._out_of_race(item) for item in candidates]

    def speed_in_float(self, candidate: Candidate) -> Candidate:
        """The same for a candidate that computes in float32, as the model before this step does: any gain over the
        original comes from earlier steps."""
        if candidate.reason:
            return candidate
        timings = self.timed([candidate.record.path, self.original], MORE_ROUNDS, LATENCY_BUDGET_S)
        candidate = replace(candidate, speedup=timings.speedup(1), times_s=timings.times_s[1])
        worst = min((one.speedup(2, 1) for one in timings.by_batch_size), key=lambda one: one.low)
        if worst.low >= 1.0:
            return candidate
        return replace(candidate, reason=f"computes in float32: {_not_faster('the original', worst)}")

    def _race(self, race: Sequence[Candidate]) -> list[Candidate]:
        if not race:
            return []
        paths = [item.record.path for item in race]
        timings = self.timed(paths, LATENCY_ROUNDS, LATENCY_BUDGET_S * len(race))
        if any(one.low < 1.0 <= one.high for place in range(1, len(race) + 1) for one in timings.speedups(place)):
            # More rounds make the intervals narrower.
            timings = self.timed(paths, MORE_ROUNDS, LATENCY_BUDGET_S * len(race))
        return [self._judged(item, timings, place) for place, item in enumerate(race, start=1)]

    def _out_of_race(self, candidate: Candidate) -> Candidate:
        if not candidate.record.changes:
            return candidate
        timings = self.timed([candidate.record.path], LATENCY_ROUNDS, OUT_BUDGET_S)
        return replace(candidate, speedup=timings.speedup(1))

    def _judged(self, candidate: Candidate, timings: RaceTimings, place: int) -> Candidate:
        candidate = replace(candidate, speedup=timings.speedup(place), times_s=timings.times_s[place])
        if candidate.scheme == "static" and not self.context.data.vouches:
            return replace(candidate, reason=_unproven(self.context.data, timings.speedup(place).median))
        # With a limit on the size it is enough not to be surely slower.
        asked = self.recipe.limits.max_size_bytes is not None
        worst = min(timings.speedups(place), key=lambda one: one.high if asked else one.low)
        if (worst.high if asked else worst.low) < 1.0:
            return replace(candidate, reason=_not_faster("in float32", worst))
        return candidate

    def prices(
        self, paths: Sequence[Path], rounds: int, budget_s: float, turn: int = 0, *, anew: bool = False
    ) -> Prices:
        """Of the float model, at place 0, and these: [models, rounds]. `turn`: of several with as many rounds. `anew`:
        not what was remembered."""
        parts = [model_digest(self.float_path), self.recipe.benchmark.to_dict(), rounds, turn]
        return self.recall.prices(paths, parts, lambda some: self.timed(some, rounds, budget_s).times_s, anew=anew)

    def timed(self, paths: Sequence[Path], rounds: int, budget_s: float) -> RaceTimings:
        """Of the float model, at place 0, and these."""
        models = [self.float_path, *paths]
        timings: dict[int, Timings] = {}
        for batch_size in self.recipe.benchmark.batch_sizes:
            with self.context.alone():
                one = time_interleaved(
                    models,
                    self.context.data,
                    threads=self.recipe.benchmark.threads[0],
                    batch_size=batch_size,
                    rounds=rounds,
                    budget_s=budget_s,
                    backend=self.backend,
                )
            timings.setdefault(one.batch_size, one)
        return RaceTimings(tuple(timings.values()))

    def _disagrees(self, fidelity: Fidelity, slack: float = 1.0, *, fitted: bool = False) -> str:
        """Why the answers have changed too much, without labels; empty where they have not. `fitted`: whether to the
        data that they were compared on."""
        metric, allowed = self.recipe.limits.metric, self.recipe.limits.max_drop
        floor_db = HELD_OUT_VALUES_FLOOR_DB if fidelity.expected_drop is None else HELD_OUT_FLOOR_DB
        if self.held_out and (distance := _too_far(fidelity, floor_db, slack)):
            return distance
        name, share = fidelity.kept(metric)
        if allowed is None and (name == metric or (self.held_out and fidelity.expected_drop is not None)):
            allowed = DEFAULT_MAX_DROP
        if allowed is not None:
            kept = 1.0 - share <= slack * allowed
            return "" if kept else f"its {name} with the original is {share:.4f}, less than {1.0 - allowed:g}"
        # The classes of synthetic inputs say nothing.
        if not self.context.data.vouches:
            return ""
        if fitted and (distance := _too_far(fidelity, FITTED_FLOOR_DB, slack)):
            return distance
        return self._doubts(fidelity, MAX_EXPECTED_DROP / (FLATTERED if fitted else 1), slack)

    @staticmethod
    def _doubts(fidelity: Fidelity, most: float, slack: float) -> str:
        """The same by what the original thinks of its own answers; `most`: of the drop that it expects."""
        expected, drop = fidelity.expected_top1, fidelity.expected_drop
        if expected is None or drop is None:
            return _too_far(fidelity, VALUES_FLOOR_DB, slack)
        if drop > slack * most:
            return (
                f"by its own probabilities the original would lose {100 * drop:.2f} points of accuracy, more than "
                f"{100 * most:.2g}"
            )
        unsure = (
            "from those of an original that hardly tells its classes apart" if expected < MIN_EXPECTED_TOP1
            else f"where {fidelity.positions} answers, fewer than {MIN_ANSWERS}, cannot show that they are kept"
            if fidelity.positions < MIN_ANSWERS
            else ""
        )  # fmt: skip
        if unsure and 1 - fidelity.cosine > slack * (1 - MIN_COSINE_OF_SCORES):
            return (
                f"its scores differ too much (cosine {fidelity.cosine:.4f}, at least {MIN_COSINE_OF_SCORES} is kept) "
                f"{unsure}"
            )
        return ""


def _too_far(fidelity: Fidelity, floor_db: float, slack: float) -> str:
    """That the worst output keeps less than the floor; empty: it does not."""
    far = fidelity.sqnr_db < floor_db - 10 * math.log10(slack)
    return f"its outputs keep {fidelity.sqnr_db:.1f} dB, less than {floor_db:g} dB" if far else ""


def _not_faster(than: str, worst: Speedup) -> str:
    return f"not surely faster than {than}: {worst.median:.2f} times its speed [{worst.low:.2f}, {worst.high:.2f}]"


def _unproven(data: InputData, speedup: float) -> str:
    """Static ranges are fixed by the data. Synthetic inputs agree with their own ranges even where real inputs, ten
    times as loud or as dark, would not; so nothing measured on them can vouch for the model."""
    source = "samples that are all the same" if data.provided else "synthetic inputs"
    return (
        f"its ranges come from {source}, which cannot vouch for real ones; with representative inputs (--data) "
        f"it may be taken, and was {speedup:.2f} times as fast as float32 here"
    )
