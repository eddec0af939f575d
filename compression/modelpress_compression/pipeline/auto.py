"""`quantize: {scheme: auto}`: of none, dynamic and static take the fastest that keeps the agreement with the original.

Every candidate is built, checked and measured: agreement on the given (or synthetic) inputs, the task metric where
there are labels, and latency against the float model in interleaved rounds. Candidates whose latency cannot be told
apart from the fastest's are a draw, and the smallest of them wins.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelpress_compression.inputs import EvaluationData
from modelpress_compression.measure.accuracy import compare_accuracy
from modelpress_compression.measure.fidelity import Fidelity, compare_outputs
from modelpress_compression.measure.latency import LatencyRow, compare_latency
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.pipeline.steps import StepRecord, apply_step, file_size_bytes, scaled
from modelpress_compression.recipe import Recipe, Step

SCHEMES = ("dynamic", "static")
# Without labels and without max_drop: how far a candidate may move away from the original.
DEFAULT_MAX_DROP = 0.01
# Cosine of the outputs below which a candidate is no longer the same model, whatever its top class says. It is 10 dB:
# a sentence encoder whose token vectors keep 0.967 (11.5 dB) retrieves as well as before.
MIN_COSINE = 0.95
FIDELITY_SAMPLES = 128
LATENCY_ROUNDS = 30
LATENCY_BUDGET_S = 15.0


@dataclass(frozen=True)
class _Candidate:
    """A quantized model and what was measured of it; `reason`: why it was not taken, empty while it is in the race."""

    scheme: str
    record: StepRecord
    size_bytes: int
    fidelity: Fidelity | None = None
    latency: LatencyRow | None = None
    drop: float | None = None
    reason: str = ""

    def to_dict(self, chosen: bool) -> dict[str, Any]:
        return {
            "name": f"quantize {self.scheme}",
            "size_bytes": self.size_bytes,
            "speedup": self.latency.to_dict()["speedup"] if self.latency else None,
            "agreement": self.fidelity.agreement if self.fidelity else None,
            "drop": self.drop,
            "chosen": chosen,
            "reason": self.reason,
        }


def choose_quantization(
    step: Step,
    model: Model,
    path: Path,
    context: Context,
    target: Path,
    *,
    recipe: Recipe,
    original: Path,
    eval_data: EvaluationData | None,
) -> StepRecord:
    """Builds and measures the candidates; returns the record of the best, or of the float model when none is better.

    `original`: file of the model as it was uploaded, which agreement and drop are measured against.
    """
    began = time.monotonic()
    float_size_bytes = file_size_bytes(path)
    candidates: list[_Candidate] = []
    for index, scheme in enumerate(SCHEMES):
        context.check_time()
        start, stop = index / len(SCHEMES), (index + 1) / len(SCHEMES)
        progress = scaled(context.progress, start, stop)
        progress(0.0, f"trying {scheme} quantization")
        tried = Step(step.technique, replace(step.config, scheme=scheme))
        folder = target.parent / scheme / target.name
        record = apply_step(tried, model, path, replace(context, progress=scaled(progress, 0.0, 0.6)), folder)
        candidate = _Candidate(scheme, record, file_size_bytes(record.path))
        progress(0.6, f"measuring {scheme} quantization")
        candidate = _judge(candidate, path, original, context, recipe, eval_data)
        context.log(f"quantize auto: {scheme}: {candidate.reason or 'kept as a candidate'}")
        candidates.append(candidate)
    chosen = _fastest([candidate for candidate in candidates if not candidate.reason], float_size_bytes)
    candidates = [
        candidate if candidate.reason or candidate.scheme == chosen else replace(candidate, reason=_lost(chosen))
        for candidate in candidates
    ]
    rows = tuple(candidate.to_dict(candidate.scheme == chosen) for candidate in candidates)
    return replace(
        _outcome(step, model, path, candidates, chosen), candidates=rows, duration_s=time.monotonic() - began
    )


def _judge(
    candidate: _Candidate,
    float_path: Path,
    original: Path,
    context: Context,
    recipe: Recipe,
    eval_data: EvaluationData | None,
) -> _Candidate:
    """The candidate with its figures, and with the reason where one of them rules it out. Cheap figures come first."""
    if not candidate.record.changes:
        undone = candidate.record.warnings
        return replace(candidate, reason=undone[-1] if undone else "there was nothing that it could quantize")
    path = candidate.record.path
    fidelity = compare_outputs(original, path, context.data, limit=FIDELITY_SAMPLES)
    candidate = replace(candidate, fidelity=fidelity)
    if reason := _disagrees(fidelity, recipe, context.data.provided, labelled=eval_data is not None):
        return replace(candidate, reason=reason)
    if eval_data is not None:
        accuracy = compare_accuracy(original, path, eval_data, recipe.constraints.metric)
        candidate = replace(candidate, drop=accuracy.drop)
        allowed = DEFAULT_MAX_DROP if recipe.constraints.max_drop is None else recipe.constraints.max_drop
        if accuracy.drop > allowed:
            return replace(candidate, reason=f"{accuracy.metric} falls by {accuracy.drop:.4f}, more than {allowed}")
    benchmark = recipe.benchmark
    latency = compare_latency(
        float_path,
        path,
        context.data,
        threads=benchmark.threads[0],
        batch_size=benchmark.batch_sizes[0],
        rounds=min(LATENCY_ROUNDS, benchmark.rounds),
        budget_s=LATENCY_BUDGET_S,
    )
    candidate = replace(candidate, latency=latency)
    if latency.speedup.low < 1.0 and latency.speedup.median < 1.0:
        return replace(candidate, reason=f"slower than in float32: {latency.speedup.median:.2f} times its speed")
    if candidate.scheme == "static" and not context.data.provided:
        return replace(candidate, reason=_unproven(latency.speedup.median))
    return candidate


def _unproven(speedup: float) -> str:
    """Static ranges are fixed by the data. Synthetic inputs would agree with their own ranges even where real ones, ten
    times as loud or as dark, do not; so nothing measured on them can vouch for the model."""
    return (
        f"its ranges come from synthetic inputs, which cannot vouch for real ones; with representative inputs (--data) "
        f"it may be taken, and was {speedup:.2f} times as fast as float32 here"
    )


def _disagrees(fidelity: Fidelity, recipe: Recipe, provided: bool, *, labelled: bool) -> str:
    """Why the outputs have moved too far from the original's; empty where they have not."""
    cosines = [output.cosine for output in fidelity.outputs.values() if output.cosine is not None]
    cosine = min(cosines, default=1.0)
    if cosine < MIN_COSINE:
        return f"its outputs differ too much from the original's (cosine {cosine:.4f}, at least {MIN_COSINE} is kept)"
    # Labels are the better judge; the top class of noise says nothing; and without classes the cosine has said it all.
    undecided = not provided or fidelity.top1_agreement is None
    if labelled or (undecided and recipe.constraints.max_drop is None):
        return ""
    allowed = DEFAULT_MAX_DROP if recipe.constraints.max_drop is None else recipe.constraints.max_drop
    if fidelity.agreement < 1.0 - allowed:
        return f"agrees with the original on {fidelity.agreement:.2%} of the samples, less than {1 - allowed:.2%}"
    return ""


def _fastest(candidates: list[_Candidate], float_size_bytes: int) -> str | None:
    """The scheme to take; None: stay in float32. Draws in latency go to the smallest file."""
    measured = [(candidate, candidate.latency) for candidate in candidates if candidate.latency is not None]
    if not measured:
        return None
    best = max(latency.speedup.median for _, latency in measured)
    draws = [candidate for candidate, latency in measured if latency.speedup.high >= best]
    smallest = min(draws, key=lambda candidate: candidate.size_bytes)
    if smallest.size_bytes >= float_size_bytes and best <= 1.0:
        return None
    return smallest.scheme


def _lost(chosen: str | None) -> str:
    return f"{chosen} is faster, or smaller at the same speed" if chosen else "neither faster nor smaller than float32"


def _outcome(step: Step, model: Model, path: Path, candidates: list[_Candidate], chosen: str | None) -> StepRecord:
    for candidate in candidates:
        if candidate.scheme == chosen:
            return replace(candidate.record, step=step)
    skips = tuple(Skip(f"quantize {candidate.scheme}", candidate.reason) for candidate in candidates)
    return StepRecord(step, model, path, skipped=skips)
