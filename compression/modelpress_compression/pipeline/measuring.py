"""Compares the original and the result, and checks the figures against the recipe's constraints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from modelpress_compression.backends import backend_of, backends_of
from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.accuracy import Accuracy
from modelpress_compression.measure.damage import damage_of
from modelpress_compression.measure.fidelity import Fidelity, compare_outputs
from modelpress_compression.measure.latency import BUSY, LatencyRow, Speedup, compare_latency
from modelpress_compression.measure.task import Task, compare_on_task
from modelpress_compression.model import file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.recipe import Constraints, Recipe
from modelpress_compression.target import DEVICES

# Times the original's time: beyond it the first words of a report say so.
FAR_SLOWER = 1.5
# Samples on which the runtimes' answers to the original are compared, and the cosine below which they differ (30 dB).
OWN_SAMPLES, SAME_COSINE = 128, 0.9995


@dataclass(frozen=True)
class Measured:
    """All figures of a result; `violations`: one sentence for each constraint that is not met.

    `latency`: the rows of the target's runtime first, whose first decides, then those of onnxruntime beside it. None
    where the target runs what is built from the model.
    """

    latency: tuple[LatencyRow, ...]
    fidelity: Fidelity
    accuracy: Accuracy | None
    violations: tuple[str, ...]

    def conditions(self) -> dict[str, float | bool] | None:
        """The report's `measurement`: wall time over CPU time at its worst, and whether the figures hold. None: nothing
        was timed."""
        if not self.latency:
            return None
        return {
            "contention": max(row.contention for row in self.latency),
            "trusted": all(row.trusted for row in self.latency),
        }

    def warnings(self) -> list[str]:
        """Sentences on a result that is far slower, and on figures that other work on the machine has disturbed."""
        return [*self._slowness(), *self._disturbance()] if self.latency else []

    def _slowness(self) -> list[str]:
        runtime = self.latency[0].execution_provider
        name = runtime.removesuffix("ExecutionProvider")
        on_target = [row for row in self.latency if row.execution_provider == runtime]
        slowest = min(on_target, key=lambda row: row.speedup.high)
        if slowest.speedup.high * FAR_SLOWER >= 1.0:
            return []
        return [
            f"The result takes {1 / slowest.speedup.median:.3g} times the original's time (threads "
            f"{slowest.threads}, batch size {slowest.batch_size}): its form does not suit {name} on this "
            f"machine. A goal in place of the steps (--goal balanced) takes nothing that is slower."
        ]

    def _disturbance(self) -> list[str]:
        worst = max(self.latency, key=lambda row: row.contention)
        if worst.contention <= BUSY:
            return []
        seen = (
            f"The machine was busy with other work while latency was measured (wall time {worst.contention:.1f} times "
            "CPU time)"
        )
        if all(row.trusted for row in self.latency):
            return [f"{seen}; the times are therefore those of the CPU clock."]
        return [f"{seen}; the figures on several threads are not to be relied on."]


def measure(
    original: Path,
    optimized: Path,
    task: Task | None,
    recipe: Recipe,
    context: Context,
    fidelity: Fidelity | None = None,
) -> Measured:
    """Fidelity on the context's data, the metric of the `task`, and one latency row for each of runtimes x threads x
    batch sizes. The result runs in the target's runtime, and is compared with the original in onnxruntime.
    `fidelity`: where it has just been measured."""
    backend = backend_of(context.target)
    if fidelity is None:
        context.progress(0.0, "comparing the outputs")
        fidelity = compare_outputs(original, optimized, context.data, backend=backend)
    accuracy = None
    if task is not None:
        context.progress(0.2, "evaluating the task metric")
        accuracy = compare_on_task(task, original, optimized, backend)
    rows: list[LatencyRow] = []
    runtimes = () if DEVICES[context.target.device].built else backends_of(context.target)
    settings = list(product(runtimes, recipe.benchmark.threads, recipe.benchmark.batch_sizes))
    for index, (runtime, threads, batch_size) in enumerate(settings):
        share = 0.4 + 0.6 * index / len(settings)
        context.progress(share, f"timing: {runtime.label}, {threads} threads, batch size {batch_size}")
        rounds = recipe.benchmark.rounds
        with context.alone():
            row = compare_latency(
                original,
                optimized,
                context.data,
                threads=threads,
                batch_size=batch_size,
                rounds=rounds,
                backend=runtime,
            )
        rows.append(row)
    sizes = file_size_bytes(original), file_size_bytes(optimized)
    violations = _violations(recipe.limits, tuple(rows), fidelity, accuracy, *sizes)
    return Measured(tuple(rows), fidelity, accuracy, violations)


def own_answers(original: Path, backend: Backend, data: InputData) -> list[str]:
    """Sentences on how the `backend` opens the original, and on answers of its own that differ from onnxruntime's,
    whatever is done to the model. Raises ModelNotRunnableError, UnsupportedOperatorError where it does not run there.
    """
    if backend.label == CPU.label:
        return []
    note = backend.open(original).note
    notes = [note] if note else []
    found = compare_outputs(original, original, data, limit=OWN_SAMPLES, backend=backend)
    changed = [found.top1_agreement is not None and found.top1_agreement < 1.0, found.cosine < SAME_COSINE]
    if not any(changed):
        return notes
    classes = "" if found.top1_agreement is None else f"the same class in {found.top1_agreement:.2%} of cases, "
    return [
        *notes,
        f"{backend.label} answers otherwise than onnxruntime on the model as it was given, before anything was done to "
        f"it: on {found.samples} samples {classes}cosine {found.cosine:.5f}, {found.sqnr_db:.1f} dB. "
        f"{backend.remark}.",
    ]


def not_better(measured: Measured, original_size_bytes: int, optimized_size_bytes: int) -> str | None:
    """Why the original is given back: the result is larger and not surely faster in the first row, or surely slower
    and not smaller, at 95 % confidence. Else None."""
    speedup = measured.latency[0].speedup
    if speedup.high < 1.0 and optimized_size_bytes >= original_size_bytes:
        return (
            f"The result was slower ({speedup.median:.2f} times the original's speed) and not smaller, "
            f"so the model is returned as it was."
        )
    if speedup.low <= 1.0 and optimized_size_bytes > original_size_bytes:
        return (
            f"The result was larger ({optimized_size_bytes} bytes after {original_size_bytes}) and not surely faster, "
            f"so the model is returned as it was."
        )
    return None


def _violations(
    constraints: Constraints,
    latency: tuple[LatencyRow, ...],
    fidelity: Fidelity,
    accuracy: Accuracy | None,
    original_size_bytes: int,
    size_bytes: int,
) -> tuple[str, ...]:
    found: list[str] = []
    if not constraints.allow_damage and (damage := damage_of(fidelity, accuracy)):
        found.append(f"the result no longer resembles the original: {damage}")
    if constraints.max_drop is not None:
        kept, share = fidelity.kept(constraints.metric)
        drop = accuracy.drop if accuracy is not None else 1.0 - share
        loss = accuracy.loss if accuracy is not None else f"{kept} with the original falls by {drop:.4f}"
        if drop > constraints.max_drop:
            found.append(f"{loss}, more than max_drop {constraints.max_drop:g}")
    if constraints.max_size_bytes is not None and size_bytes > constraints.max_size_bytes:
        found.append(f"the result has {size_bytes} bytes, more than max_size_bytes {constraints.max_size_bytes}")
    ratio = original_size_bytes / max(size_bytes, 1)
    if constraints.min_ratio is not None and ratio < constraints.min_ratio:
        found.append(f"the result is {ratio:.2f} times smaller, less than min_ratio {constraints.min_ratio:g}")
    if not latency:
        return tuple(found)
    speedup = latency[0].speedup.median
    if constraints.min_speedup is not None and speedup < constraints.min_speedup:
        found.append(f"the speed-up is {speedup:.2f}, less than min_speedup {constraints.min_speedup:g}")
    if constraints.max_latency_ms is not None and latency[0].optimized.p50_ms > constraints.max_latency_ms:
        found.append(
            f"median latency is {latency[0].optimized.p50_ms:.3f} ms, more than max_latency_ms "
            f"{constraints.max_latency_ms:g}"
        )
    return tuple(found)


def within_time(measured: Measured, limits: Constraints, latency_ms: float | None) -> Measured:
    """The figures of what was built, with what its time breaks: `latency_ms` of one sample; None: not known."""
    found: list[str] = []
    if limits.min_speedup is not None:
        found.append(f"min_speedup {limits.min_speedup:g} cannot be told: the target runs no ONNX files")
    if limits.max_latency_ms is not None and latency_ms is None:
        found.append(f"whether max_latency_ms {limits.max_latency_ms:g} is met is not known: the clock is not")
    elif limits.max_latency_ms is not None and latency_ms is not None and latency_ms > limits.max_latency_ms:
        found.append(f"latency is {latency_ms:.4g} ms, more than max_latency_ms {limits.max_latency_ms:g}")
    return replace(measured, violations=(*measured.violations, *found))


def verdict(recipe: Recipe, measured: Measured, original_size_bytes: int, size_bytes: int, headline: str = "") -> str:
    """What was asked and what was got, in one sentence. `headline`: of what was built; it stands for size and speed."""
    asked = f"Goal {recipe.goal.objective}: " if recipe.goal is not None and not recipe.steps else ""
    ratio = original_size_bytes / max(size_bytes, 1)
    got = f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"
    if got.startswith("1.00 "):
        got = "no smaller"
    kept, share = measured.fidelity.kept(recipe.limits.metric)
    if measured.accuracy is not None:
        answers = f"{measured.accuracy.metric} {measured.accuracy.optimized:.4g} after {measured.accuracy.original:.4g}"
    else:
        source = "" if measured.fidelity.data == "provided" else " on synthetic inputs"
        answers = f"{kept} with the original {share:.2%}{source}"
    missed = f"; not met: {'; '.join(measured.violations)}" if measured.violations else ""
    if not headline:
        speed = _speed(measured.latency[0].speedup)
        far_slower = measured.latency[0].speedup.high * FAR_SLOWER < 1.0
        headline = f"{speed}, {got}" if far_slower else f"{got}, {speed}"
    said = f"{asked}{headline}, {answers}{missed}."
    return said[0].upper() + said[1:]


def _speed(speedup: Speedup) -> str:
    if speedup.verdict == "not distinguishable":
        return "as fast"
    return f"{speedup.median:.2f} times faster" if speedup.low > 1 else f"{1 / speedup.median:.2f} times slower"
