"""`quantize: {scheme: auto}`: chooses between float32, dynamic and static quantization, layer by layer.

1. Candidates are built with dynamic and with static quantization, and judged: answers first, then latency against the
   float model (judge.py).
2. Heads of more classes than there are samples stay in float32 under dynamic, unless there are labels (graph/heads.py).
3. Static is also tried with memory-bound layers in 8 bits, which do not gain on their own, and with sums in 8 bits at
   the end of a chain; small networks gain by them.
4. If static does not keep the answers, layers go back to float32 until it does, those first that make the most error
   for the time that they take: a bisection over that order (kept_in_float.py).
5. For each candidate that keeps the answers, another one stores the weights that are still in float32 in fewer bits
   too; it computes as before.
6. The fastest candidate is taken that is surely faster than float32 at every batch size that the recipe measures; among
   candidates whose latencies cannot be told apart, the smallest wins (candidates.py).
7. Without one, the model goes on in float32; if earlier steps have made it surely faster than the original, its weights
   are stored in fewer bits, which onnxruntime turns into float32 when it loads the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any

from modelpress_compression.counted import counted
from modelpress_compression.graph.heads import unvouched_heads
from modelpress_compression.measure.task import Task, model_digest
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.passes.base import Context, PassResult, Skip
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize, prepare_static
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.passes.quantize.weight_only.storage import Storing, store_all, store_rest
from modelpress_compression.recipe import Recipe, Step
from modelpress_compression.search.candidates import Candidate, fastest, pareto_set
from modelpress_compression.search.judge import FLOAT_FLOOR_DB, Judge
from modelpress_compression.search.kept_in_float import fewest_in_float, order_of
from modelpress_compression.search.recall import Recall
from modelpress_compression.search.steps import StepRecord, keep, scaled
from modelpress_compression.target import DEVICES, Device

# The weights that integers leave in float32 are those that 8 bits serve worst. Stored, they are to add a quarter of the
# error that the integers make (6 dB), or less than this.
_REST_MARGIN_DB, _REST_FLOOR_DB = 6.0, 26.0
# Where what is stored does not keep the answers, it is stored with so much less error, so many times. Of integers more
# does not help: whatever changes a little, some are rounded the other way. Of a text recognizer in static 8 bits,
# float16 for the weights that are left is 27 dB away from float32, and no worse an answer. Weights alone are stored
# like this the last time: more than what counts as no error (choice.NEGLIGIBLE_ERROR), 40 dB.
_CLOSER_DB, _CLOSER = 2.0, 3
_ROUNDING_DB = 0.01  # of a power and back
CLOSE_FLOOR_DB = 43.0
_WHOLE_DB = 150.0  # float32 is no nearer to itself
# Shares of the step's progress when dynamic, static and the mixed candidates are built and judged.
_DYNAMIC, _STATIC, _MIXED = 0.15, 0.6, 0.85


def choose_quantization(
    step: Step,
    model: Model,
    path: Path,
    context: Context,
    target: Path,
    *,
    recipe: Recipe,
    original: Path,
    task: Task | None,
) -> StepRecord:
    """Builds and measures the candidates; returns the record of the best, or of the float model when none is better.

    `original`: file of the model as it was uploaded, which agreement and drop are measured against.
    """
    began = time.monotonic()
    search = SchemeSearch(step, model, path, context, target, Judge(original, path, context, recipe, task))
    search.half()
    search.dynamic()
    search.static()
    search.smaller()
    search.measure_speed()
    search.in_float()
    return replace(search.outcome(), duration_s=time.monotonic() - began)


@dataclass
class SchemeSearch:
    """`path`: the file of the float `model`. `recall`: of earlier jobs; what they have built is not built again."""

    step: Step
    model: Model
    path: Path
    context: Context
    target: Path
    judge: Judge
    recall: Recall = field(default_factory=Recall)
    candidates: list[Candidate] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)  # of folders
    _storing: dict[str, Storing] = field(default_factory=dict)  # by the digest of the float model's file

    @cached_property
    def heads(self) -> dict[str, int]:
        """Class heads that stay in float32; none if there are labels, which show every loss."""
        if self.judge.task is not None:
            return {}
        return unvouched_heads(self.model, len(self.context.data))

    def _config(self, scheme: str) -> QuantizeConfig:
        config: QuantizeConfig = self.step.config
        kept = tuple(map(pattern_of, self.heads)) if scheme == "dynamic" else ()
        return replace(config, scheme=scheme, exclude=(*config.exclude, *kept))

    @property
    def device(self) -> Device:
        """What the target computes with."""
        return DEVICES[self.context.target.device]

    def half(self) -> None:
        """Arithmetic in float16, where the target is fast at it."""
        if self.device.half:
            config = self._config("float16")
            self.add("float16", lambda: Quantize(config)(self.model, self._part(0.0, _DYNAMIC)), asked=config.exclude)

    def dynamic(self) -> None:
        """Ranges that are found in each run, where the target has kernels for it."""
        if not self.device.finds_ranges:
            return
        self.context.progress(0.0, "trying dynamic quantization")
        self.context.check_time()
        config = self._config("dynamic")
        self.add("dynamic", lambda: Quantize(config)(self.model, self._part(0.0, _DYNAMIC)), asked=config.exclude)

    @cached_property
    def quantizer(self) -> StaticQuantizer | None:
        """Calibrated when it is first needed, for all choices of layers."""
        part = self._part(_DYNAMIC, _STATIC)
        return prepare_static(self.model, self._config("static"), part, for_time_alone=not self.judge.trusts_ranges)

    def _static(self, choose: Callable[[StaticQuantizer], StaticQuantizer]) -> Callable[[], PassResult]:
        """Makes the model of a choice of layers."""

        def make() -> PassResult:
            return PassResult(self.model) if self.quantizer is None else choose(self.quantizer).result()

        return make

    def static(self) -> None:
        """Static quantization of all layers, and of fewer where that does not keep the answers."""
        self.context.progress(_DYNAMIC, "trying static quantization")
        forms = self.known("static forms", self._static_forms)
        if not forms["possible"]:
            return
        tried = [self.add("static", self._static(lambda plain: plain))]
        if forms["fuller"]:
            full = self._static(lambda plain: replace(plain, full=True))
            tried.append(self.add("static", full, "memory-bound layers and sums too"))
        if not all(item.reason and item.record.changes for item in tried) or not self.context.data.vouches:
            return
        order = self.known("orders", self._order)["layers"]

        def keeps(count: int) -> bool:
            self.context.check_time()
            self.context.progress(_STATIC, f"trying static quantization with {counted(count, 'layer')} in float32")
            variant = f"{counted(count, 'layer')} in float32"
            kept = order[:count]
            return not self.add_static(variant, kept).reason

        fewest_in_float(len(order), keeps)

    def add_static(self, variant: str, kept: Sequence[str], *, full: bool = False) -> Candidate:
        """A candidate of static quantization with the layers of these outputs in float32. `full`: all others in 8 bits,
        whatever pays layer by layer."""
        make = self._static(lambda plain: replace(plain, full=full).keeping_in_float(kept))
        return self.add("static", make, variant, asked=[*kept, full])

    @property
    def threads(self) -> int:
        """Those that layers are timed with."""
        return self.judge.recipe.benchmark.threads[0]

    def _static_forms(self) -> dict[str, bool]:
        """Whether there is a static form at all, and one with more in 8 bits than pays layer by layer."""
        if self.quantizer is None:
            return {"possible": False, "fuller": False}
        full = replace(self.quantizer, full=True)
        return {"possible": True, "fuller": len(full.plan.nodes) > len(self.quantizer.plan.nodes)}

    def _order(self) -> dict[str, list[str]]:
        return {"layers": [] if self.quantizer is None else order_of(self.quantizer, self.context)}

    def known(self, kind: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Facts about the float model under this step's configuration."""
        return self.recall.facts(kind, [model_digest(self.path), self._config("static").to_dict()], make)

    def stored(self, variant: str, floor_db: float) -> Candidate | None:
        """The float model with all weights stored in fewer bits, computing as before; see `_until_kept`."""
        config, storing = replace(self.step.config, scheme="weight_only"), self._storing_of(self.path)

        def store(named: str, floor_db: float) -> Candidate:
            make = partial(store_all, self.model, config, self.context, floor_db, storing)
            return self.add("weight_only", make, named, asked=[floor_db])

        return self._until_kept(store, self.path, variant, floor_db, CLOSE_FLOOR_DB)

    def _storing_of(self, path: Path) -> Storing:
        """What was found out of the model in a file."""
        return self._storing.setdefault(model_digest(path), Storing())

    def _until_kept(
        self,
        store: Callable[[str, float], Candidate | None],
        path: Path,
        variant: str,
        floor_db: float,
        last_db: float = 0.0,
    ) -> Candidate | None:
        """What `store` adds under a name and for a floor: with less and less error until the answers are kept, and
        further should all samples refuse what a few of them have let through. The last one; None: nothing is stored.

        `path`: of the model whose weights are stored. `last_db`: the least of the last floor."""
        storing = self._storing_of(path)

        def following(floor_db: float, left: int, kept_before_db: float) -> Candidate | None:
            named = variant if left == _CLOSER else f"{variant}, for {floor_db:.0f} dB"
            candidate = store(named, floor_db)
            if candidate is None:
                return None
            candidate = self.candidates[-1] = replace(candidate, computes_as=path)
            if not left or candidate.unscored:
                return candidate
            # A later job, for which this one is not built again, goes on from here as well.
            asked = [model_digest(candidate.record.path), floor_db]
            facts = self.recall.facts("kept", asked, lambda: {"db": max(0.0, min(storing.kept_db, _WHOLE_DB))})
            if not candidate.record.changes:
                # Not to be had. What is, if it keeps more than what was refused, may do.
                most_db = facts["db"] - _ROUNDING_DB
                return following(most_db, 0, most_db) if most_db > kept_before_db else candidate
            kept_db = max(floor_db, facts["db"])
            closer = partial(following, max(kept_db + _CLOSER_DB, last_db if left == 1 else 0.0), left - 1, kept_db)
            if candidate.reason:
                return closer()
            self.candidates[-1] = replace(candidate, closer=closer)
            return self.candidates[-1]

        return following(floor_db, _CLOSER, floor_db)

    def smaller(self, candidates: Sequence[Candidate] | None = None) -> None:
        """Each of the candidates (None: of all) that keeps the answers with the rest of its weights stored in 8 bits;
        and, with a limit on the size, the float model with all weights stored so."""
        for candidate in list(self.candidates if candidates is None else candidates):
            if not candidate.reason:
                variant = f"{candidate.variant}, all weights stored in fewer bits".removeprefix(", ")
                own_db = candidate.fidelity.sqnr_db if candidate.fidelity is not None else _REST_FLOOR_DB
                floor_db = min(max(own_db + _REST_MARGIN_DB, FLOAT_FLOOR_DB), _REST_FLOOR_DB)
                confirmed = cache(partial(self.judge.confirmed, candidate))  # once, for however many floors
                store = partial(self._with_rest, candidate, confirmed, floor_db)
                self._until_kept(store, candidate.record.path, variant, floor_db)
        if self.judge.recipe.limits.max_size_bytes is not None:
            config = replace(self.step.config, scheme="weight_only")
            self.add("weight_only", lambda: Quantize(config)(self.model, self._part(_MIXED, _MIXED)))

    def _with_rest(
        self, whole: Candidate, confirmed: Callable[[], Candidate], first_db: float, variant: str, floor_db: float
    ) -> Candidate | None:
        """The candidate with the rest of its weights stored; for more than the first floor only where the candidate
        itself, `confirmed` on all samples, keeps the answers."""
        if floor_db > first_db and confirmed().reason:
            return None
        return self._store_rest(whole.scheme, whole.record, variant, floor_db)

    def _store_rest(self, scheme: str, record: StepRecord, variant: str, floor_db: float) -> Candidate | None:
        """A candidate with the weights that the record's model has in float32 stored in fewer bits, so that its outputs
        keep `floor_db`; None: no gain."""
        digest = model_digest(record.path)
        made: list[PassResult | None] = []

        def gains() -> dict[str, bool]:
            storing = self._storing_of(record.path)
            made.append(store_rest(record.result, self.step.config, self.context, floor_db, storing))
            return {"gains": made[0] is not None}

        def make() -> PassResult:
            if not made:
                gains()
            return made[0] or record.result

        if not self.recall.facts("rests", [digest, self.step.config.to_dict(), floor_db], gains)["gains"]:
            return None
        return self.add(scheme, make, variant, asked=[digest, floor_db])

    def measure_speed(self) -> None:
        self.context.check_time()
        self.context.progress(_MIXED, f"timing {counted(len(self.candidates), 'candidate')}")
        self.candidates = self.judge.speed(self.candidates)

    def in_float(self) -> None:
        """If nothing is faster in 8 bits: the float model with its weights stored in 8 bits."""
        if self.path == self.judge.original or fastest(self.candidates) is not None:
            return
        self.context.check_time()
        variant = "all weights stored in fewer bits, computing in float32"
        record = StepRecord(self.step, self.model, self.path)
        candidate = self._store_rest("weight_only", record, variant, FLOAT_FLOOR_DB)
        if candidate is not None:
            self.candidates[-1] = self.judge.speed_in_float(candidate)

    def outcome(self) -> StepRecord:
        chosen = fastest(self.candidates)
        rows = []
        for candidate, pareto in zip(self.candidates, pareto_set(self.candidates), strict=True):
            lost = replace(candidate, reason=candidate.reason or _lost(chosen))
            shown = candidate if candidate is chosen else lost
            self.context.log(f"{shown.name}: {shown.reason or 'taken'}")
            rows.append((shown, shown.to_dict(candidate is chosen, pareto)))
        table = tuple(row for _, row in rows)
        if chosen is not None:
            return replace(chosen.record, step=self.step, candidates=table)
        skips = tuple(Skip(candidate.name, candidate.reason) for candidate, _ in rows)
        return StepRecord(self.step, self.model, self.path, skipped=skips, candidates=table)

    def add(
        self, scheme: str, make: Callable[[], PassResult], variant: str = "", asked: Sequence[object] = ()
    ) -> Candidate:
        """Writes, checks and judges what a scheme made; the candidate is the last of `candidates` then.

        `asked`: all that `make` depends on, besides the float model, the configuration, the scheme and the variant.
        """
        self.candidates.append(self._judged(scheme, make, variant, asked))
        return self.candidates[-1]

    def add_draft(
        self, scheme: str, sketch: Callable[[], PassResult], make: Callable[[], PassResult], variant: str
    ) -> Candidate:
        """The same for what takes long to make: `sketch` makes what is as large and as fast, and `make` has its turn
        when the candidate is about to be taken."""
        record = self._record(scheme, sketch, variant, ["a sketch"])
        candidate = Candidate(scheme, record, file_size_bytes(record.path), variant)
        if record.changes:
            candidate = replace(candidate, draft=partial(self._judged, scheme, make, variant))
        else:
            candidate = self.judge.answers(candidate)  # which says why
        self.candidates.append(candidate)
        return candidate

    def _judged(
        self, scheme: str, make: Callable[[], PassResult], variant: str, asked: Sequence[object] = ()
    ) -> Candidate:
        with self.context.span("candidate", f"quantize {scheme}" + (f", {variant}" if variant else "")):
            record = self._record(scheme, make, variant, asked)
            return self.judge.answers(Candidate(scheme, record, file_size_bytes(record.path), variant))

    def _record(self, scheme: str, make: Callable[[], PassResult], variant: str, asked: Sequence[object]) -> StepRecord:
        before = StepRecord(Step(self.step.technique, replace(self.step.config, scheme=scheme)), self.model, self.path)
        target = self.target.parent / f"candidate-{next(self._numbers)}" / self.target.name

        def build() -> StepRecord:
            result = make()
            result = replace(result, skipped=tuple(self._explained(skip) for skip in result.skipped))
            return keep(before, result, self.context, target)

        return self.recall.step(before, [variant, list(asked)], target, build)

    def _explained(self, skip: Skip) -> Skip:
        if skip.node not in self.heads:
            return skip
        classes, samples = self.heads[skip.node], len(self.context.data)
        return Skip(skip.node, f"{counted(samples, 'sample')} cannot vouch for the weights of its {classes} classes")

    def _part(self, start: float, stop: float) -> Context:
        return replace(self.context, progress=scaled(self.context.progress, start, stop))


def _lost(chosen: Candidate | None) -> str:
    if chosen is None:
        return "neither faster nor smaller than float32"
    return f"{chosen.name.removeprefix('quantize ')} is faster, or smaller at the same speed"


def pattern_of(name: str) -> str:
    """What `exclude` takes for a node of this name; a recipe holds nothing that cannot be printed, a name may."""
    return "".join(char if char.isprintable() else "?" for char in escape(name))
