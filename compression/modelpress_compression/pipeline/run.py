"""Runs a recipe on a model and measures what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any

from modelpress_compression import mapped
from modelpress_compression.backends import backend_of, backends_of
from modelpress_compression.errors import CompressionError, ModelNotRunnableError
from modelpress_compression.graph.compact import compacted
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import Array, EvaluationData, InputData
from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.layer_times import layer_forms, layer_times
from modelpress_compression.measure.node_times import PROFILED_RUNS
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.measure.task import GivenScores, Labelled, MetricFunction, OwnMetric, Task
from modelpress_compression.memory import Memory
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.noise import random_nodes
from modelpress_compression.passes.base import Context, SpanFactory
from modelpress_compression.pipeline.building import Building, build, steps_before
from modelpress_compression.pipeline.data_check import data_warnings
from modelpress_compression.pipeline.made_sequences import apply_to_made_sequences, is_open
from modelpress_compression.pipeline.measuring import (
    Measured,
    measure,
    not_better,
    own_answers,
    verdict,
    within_time,
)
from modelpress_compression.pipeline.preflight import check_room, needs
from modelpress_compression.pipeline.progress import Progress, ProgressListener, stages_of, weights_of
from modelpress_compression.recipe import Recipe
from modelpress_compression.report.build import ReportInputs, StepRow, build_report
from modelpress_compression.report.environment import environment
from modelpress_compression.report.ledger import Ledger, errors, left_alone
from modelpress_compression.runtime import fit_together
from modelpress_compression.search.decision import Pursuit
from modelpress_compression.search.family import FamilyMember, family
from modelpress_compression.search.goal import pursue
from modelpress_compression.search.steps import StepRecord, apply_step, broken, save
from modelpress_compression.target import DEVICES
from modelpress_compression.techniques import TECHNIQUES

SYNTHETIC_SAMPLES = 32
LogListener = Callable[[str, str], None]  # severity (INFO, WARNING, ERROR), text


@dataclass(frozen=True)
class Artifact:
    """What was written: its `kind`, and its files, the main one first. `candidate`: the id of a candidate's model."""

    kind: str
    files: list[Path]
    candidate: str = ""


@dataclass(frozen=True)
class Result:
    """The optimized model, and the report (the content of report.json).

    `candidates`: all that was tried, with the figures that decided; those of a goal that are worth having have a model.
    `project`: a zip archive of what was built for a target that runs no ONNX files; empty: the target runs them.
    """

    model: Model
    report: dict[str, Any]
    candidates: tuple[FamilyMember, ...] = ()
    project: bytes = b""

    def write(self, directory: Path) -> list[Artifact]:
        """Writes model.onnx (and model.onnx.data), report.json, report.html, model.ID.onnx of each candidate, and the
        target's project.zip where it has one."""
        from modelpress_compression.report.html import render_html

        directory.mkdir(parents=True, exist_ok=True)
        model = self.model.save(directory / "model.onnx")
        json_path, html_path = directory / "report.json", directory / "report.html"
        json_path.write_text(json.dumps(self.report, indent=1, allow_nan=False), "utf-8")
        html_path.write_text(render_html(self.report), "utf-8")
        project = []
        if self.project:
            (directory / "project.zip").write_bytes(self.project)
            project = [Artifact("project", [directory / "project.zip"])]
        return [
            Artifact("model", model),
            Artifact("report.json", [json_path]),
            Artifact("report.html", [html_path]),
            *project,
            *(
                Artifact("candidate", compacted(member.model).save(directory / f"model.{member.id}.onnx"), member.id)
                for member in self.candidates
                if member.model is not None
            ),
        ]


def compress(
    model: Model,
    recipe: Recipe,
    *,
    data: InputData | Mapping[str, Array] | None = None,
    eval_data: EvaluationData | Mapping[str, Array] | None = None,
    metric: OwnMetric | MetricFunction | None = None,
    on_progress: ProgressListener | None = None,
    on_log: LogListener | None = None,
    job: str = "",
    time_limit_s: float | None = None,
    work_directory: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    memory_limit_bytes: int | None = None,
    memory: Memory | None = None,
    span: SpanFactory | None = None,
) -> Result:
    """Runs the recipe's steps in order and measures the result against the model as it was given.

    `data`: representative inputs, one array for each input of the model with the samples along its first axis, and
    `labels` if there are any; None: synthetic inputs are made.
    `eval_data`: inputs with `labels`; with a `metric` whatever arrays that needs.
    `metric`: a function of the path of an ONNX file and `eval_data`, which returns a number; higher is better unless
    its attribute `lower_is_better` says otherwise. It decides then, in place of labels.
    `work_directory`: for temporary files; None: the system's own.
    `clock`: what `time_limit_s` is held against, in seconds. `alone`: within it nothing else of the caller's runs on
    this machine; latency is measured there.
    `span`: around each pass and each candidate, with "pass" or "candidate" and a name; None: nobody keeps traces.

    `memory_limit_bytes`: what this process may hold; None: what the machine has.
    `memory`: what earlier searches for a goal have found out about the same model and data, and where this one leaves
    what it finds; None: everything is found anew, and nothing is left.

    Raises TypeError for arguments of other types, InvalidDataError, MetricError, ModelNotRunnableError,
    UnsupportedOperatorError, TimeLimitError, and before the long work MemoryLimitError and DiskSpaceError where the job
    cannot fit. A step that breaks the model is undone and reported; a result that is slower and not smaller is replaced
    by the model as it was given.
    """
    _expect("model", model, Model, "a Model, as load(PATH) gives it")
    _expect("recipe", recipe, Recipe, "a Recipe, as Recipe.preset(NAME) and Recipe.from_dict(...) give it")
    arrays = "a mapping of names to arrays"
    _expect("data", data, (InputData, Mapping, NoneType), arrays)
    _expect("eval_data", eval_data, (EvaluationData, Mapping, NoneType), arrays)
    recipe = steps_before(recipe)
    deadline = None if time_limit_s is None else clock() + time_limit_s
    log = on_log or (lambda severity, text: None)
    with TemporaryDirectory(prefix="modelpress-", dir=work_directory) as folder:
        context = Context(
            _input_data(model, data),
            Path(folder),
            deadline,
            clock,
            alone,
            recipe.target,
            log=lambda text: log("INFO", text),
            original=model,
        )
        if span is not None:
            context = replace(context, span=span)
        run = _prepare(model, recipe, _task(model, recipe, eval_data, metric), context, on_progress)
        told: set[str] = set()

        def tell(warnings: Sequence[str]) -> None:
            for warning in warnings:
                if warning not in told:
                    told.add(warning)
                    log("WARNING", warning)

        tell(run.warnings)
        run = _with_room(run, memory_limit_bytes)
        tell(run.warnings)
        made = _make(run, memory)
        building = _build(run, made.records)
        if building is not None:
            made = replace(made, records=(*made.records, building.record), fidelity=None)
        outcome = _decide(run, made, building)
        tell(outcome.warnings)
        report = _report(job, run, made, outcome, building)
        run.progress.update(1.0, "done")
        for kept in (outcome.model, *(member.model for member in made.candidates if member.model is not None)):
            mapped.keep_mapped(kept.ir)  # the work folder goes
        project = building.built.project.read_bytes() if building is not None else b""
        return Result(outcome.model, report, made.candidates, project)


@dataclass(frozen=True)
class _Run:
    """All that stays the same throughout. `model`, `path`: the model as it was given, and its file. `warnings`: on the
    data."""

    model: Model
    path: Path
    recipe: Recipe
    task: Task | None
    context: Context
    progress: Progress
    warnings: tuple[str, ...]

    @property
    def given_size_bytes(self) -> int:
        """Of the upload, where it was ONNX; else of the same model as ONNX."""
        given = self.model.provenance
        return given.size_bytes if given.format == "onnx" and given.size_bytes else file_size_bytes(self.path)

    def measured(self, path: Path, fidelity: Fidelity | None = None) -> Measured:
        """The figures of the model in `path` against the original."""
        return measure(self.path, path, self.task, self.recipe, self.context, fidelity)


@dataclass(frozen=True)
class _Outcome:
    """The model that is given back, its file, and its figures."""

    model: Model
    path: Path
    measured: Measured
    warnings: tuple[str, ...]


def _prepare(
    model: Model,
    recipe: Recipe,
    task: Task | None,
    context: Context,
    on_progress: ProgressListener | None,
) -> _Run:
    """Writes the original to a file, and proves that it runs: every later comparison needs its outputs."""
    progress = Progress(stages_of(recipe), weights_of(recipe), on_progress)
    path = context.work_directory / "original" / "model.onnx"
    model = save(model, path, weights=False)
    if (problem := broken(path, context.data, path)) is not None:
        raise ModelNotRunnableError(problem)
    backend = backend_of(context.target)
    if backend.remark:
        context.log(backend.remark)
    labelled = task if isinstance(task, Labelled) else None
    warnings = [*_randomness(model), *data_warnings(model, path, context.data, labelled)]
    # Without labels cosine compares the outputs with the original's.
    if task is None and (metric := recipe.limits.metric) not in (None, "cosine"):
        warnings.append(f"The metric {metric} was not measured: it needs labels, which --eval gives.")
    if task is None and context.data.labels is not None:
        warnings.append(
            "The data holds labels, which training alone uses. Give them with --eval as well to judge the result."
        )
    warnings += own_answers(path, backend, context.data)
    if isinstance(task, OwnMetric):
        progress.update(0.0, "scoring the original with your metric")
        task.evaluate(path)  # a metric that cannot score the original is refused before the long work
    prepared = replace(context, progress=progress.update)
    return _Run(model, path, recipe, task, prepared, progress, tuple(warnings))


def _randomness(model: Model) -> list[str]:
    """A sentence on a model that draws random numbers."""
    operators = sorted({node.op_type for node in random_nodes(model.ir)})
    if not operators:
        return []
    return [
        f"The model is random ({', '.join(operators)}): its outputs differ from run to run. They were compared with "
        f"the same noise in both models; the result draws its numbers as the original does."
    ]


def _with_room(run: _Run, memory_limit_bytes: int | None) -> _Run:
    """Says what the job will take. Raises MemoryLimitError, DiskSpaceError where it cannot fit."""
    expected = needs(run.recipe, run.model, run.path, run.context.data, judged=run.task is not None)
    run.context.log(f"expected: {expected}")
    run.progress.update(1.0, f"expected: {expected}")
    found = check_room(expected, run.context.work_directory, memory_limit_bytes)
    return replace(run, warnings=(*run.warnings, *found))


def _make(run: _Run, memory: Memory | None) -> Pursuit:
    """The result of the recipe's steps, or of its goal where it has no steps."""
    goal = run.recipe.goal
    if goal is None or run.recipe.steps:
        records = _run_steps(run)
        rows = [row for record in records for row in record.candidates]
        return Pursuit(tuple(records), family(rows, [None] * len(rows), 0))
    run.progress.enter_next(f"looking for the {goal.objective} model")
    return pursue(run.recipe, goal, run.model, run.path, run.context, run.task, memory)


def _run_steps(run: _Run) -> list[StepRecord]:
    """The records of all steps in order; each step works on the result of the one before."""
    records: list[StepRecord] = []
    record: StepRecord
    model, path, context = run.model, run.path, run.context
    for index, step in enumerate(run.recipe.steps):
        run.progress.enter_next(f"{step.technique} ({index + 1} of {len(run.recipe.steps)})")
        target = context.work_directory / f"step-{index}" / "model.onnx"
        choose = TECHNIQUES[step.technique].chooser_for(step.config)
        if choose is None:
            apply = apply_to_made_sequences if is_open(step, model, context) else apply_step
            record = apply(step, model, path, context, target)
        else:
            record = choose(step, model, path, context, target, recipe=run.recipe, original=run.path, task=run.task)
        context.log(f"{step.technique}: {record.changes or 'nothing changed'} in {record.duration_s:.1f} s")
        records.append(record)
        model, path = record.model, record.path
    return records


def _build(run: _Run, records: Sequence[StepRecord]) -> Building | None:
    """What the target runs, from the result of the last step; None: it runs the ONNX file itself."""
    if not DEVICES[run.recipe.target.device].built:
        return None
    run.progress.enter_next(f"building for {run.recipe.target.device}")
    model, path = (records[-1].model, records[-1].path) if records else (run.model, run.path)
    return build(model, path, run.context, run.recipe.limits, run.task, run.path)


def _decide(run: _Run, made: Pursuit, building: Building | None) -> _Outcome:
    """The result of the last step, or the original if that result is slower and not smaller."""
    records = made.records
    model, path = (records[-1].model, records[-1].path) if records else (run.model, run.path)
    run.progress.enter_next("measuring the original and the result")
    measured = run.measured(path, made.fidelity)
    warnings = [*run.model.warnings, *run.warnings]
    warnings += [warning for record in records for warning in record.warnings]
    warnings += measured.warnings()
    if building is not None:
        measured = within_time(measured, run.recipe.limits, building.built.latency_ms)
    compared = path != run.path and building is None
    # The original is written out larger than it was given where it had sparse constants.
    returned = max(run.given_size_bytes, file_size_bytes(run.path))
    reason = not_better(measured, returned, file_size_bytes(path)) if compared else None
    if reason is None:
        return _Outcome(compacted(model, weights=path != run.path), path, measured, tuple(warnings))
    # Measured again, since the report's figures must be those of the model that it comes with.
    return _Outcome(compacted(run.model, weights=False), run.path, run.measured(run.path), (*warnings, reason))


def _report(job: str, run: _Run, made: Pursuit, outcome: _Outcome, building: Building | None) -> dict[str, Any]:
    run.progress.enter_next("writing the report")
    shapes = sample_shapes(run.context.data)
    return build_report(
        ReportInputs(
            job=job,
            recipe=run.recipe.to_dict(),
            provenance=run.model.provenance,
            original_onnx_size_bytes=run.given_size_bytes,
            original=model_stats(run.model, shapes),
            optimized_sha256=_sha256(outcome.path),
            optimized_size_bytes=file_size_bytes(outcome.path),
            optimized=model_stats(outcome.model, shapes),
            latency=outcome.measured.latency,
            fidelity=outcome.measured.fidelity,
            accuracy=outcome.measured.accuracy,
            steps=[_step_row(record) for record in made.records],
            candidates=[dict(member) for member in made.candidates],
            warnings=outcome.warnings,
            violations=outcome.measured.violations,
            measurement=outcome.measured.conditions(),
            target=building.built.section if building is not None else None,
            goal=run.recipe.goal.to_dict() if run.recipe.goal is not None else None,
            search=made.search,
            advice=made.advice,
            reused=made.reused,
            ledger=_ledger(run, made, outcome),
            verdict=verdict(
                run.recipe,
                outcome.measured,
                run.given_size_bytes,
                file_size_bytes(outcome.path),
                building.built.headline if building is not None else "",
            ),
        )
    )


def _ledger(run: _Run, made: Pursuit, outcome: _Outcome) -> Ledger | None:
    """Layer by layer, from a few profiled runs; None where there is no time or memory for them, and where the target is
    another runtime, whose kernels are others."""
    context = run.context
    if len(backends_of(context.target)) > 1 or not outcome.measured.latency:
        return None
    models = (run.model, outcome.model)
    seconds = 2e-3 * PROFILED_RUNS * max(row.original.p50_ms for row in outcome.measured.latency)
    hurried = context.time_left_s is not None and context.time_left_s < 2 * seconds
    if hurried or not fit_together(map(file_size_bytes, (run.path, outcome.path))):
        return None
    with context.alone():
        try:
            times = layer_times(models, context.data, context.work_directory, run.recipe.benchmark.threads[0])
        except CompressionError as error:
            context.log(f"layers were not timed: {error.message}")
            return None
    if not all(times):
        return None
    chosen = made.records if outcome.path != run.path else ()
    return Ledger(
        times[0],
        times[1],
        layer_forms(outcome.model),
        set(layer_forms(run.model)),
        left_alone(
            [
                (skip.node, skip.reason)
                for record in chosen
                if record.step.technique == "quantize"
                for skip in record.skipped
            ]
        ),
        errors([row for record in chosen for row in record.details]),
        context.data.provided,
        environment()["instructions"],
    )


def _step_row(record: StepRecord) -> StepRow:
    return StepRow(
        name=record.step.technique,
        config=record.step.config.to_dict(),
        changes=record.changes,
        skipped=[(skip.node, skip.reason) for skip in record.skipped],
        size_bytes=file_size_bytes(record.path),
        duration_s=record.duration_s,
        details=record.details,
        notes=record.notes,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect(name: str, given: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raises TypeError with what is expected, where it would be an AttributeError far from here."""
    if not isinstance(given, kinds):
        raise TypeError(f"{name} must be {what}; it is of type {type(given).__name__}")


def _input_data(model: Model, data: InputData | Mapping[str, Array] | None) -> InputData:
    if data is None:
        return synthetic_inputs(model, samples=SYNTHETIC_SAMPLES)
    return data if isinstance(data, InputData) else InputData.from_arrays(data, model.inputs)


def _task(
    model: Model,
    recipe: Recipe,
    data: EvaluationData | Mapping[str, Array] | None,
    metric: OwnMetric | MetricFunction | None,
) -> Task | None:
    if recipe.goal is not None and (given := recipe.goal.client_metric) is not None:
        return GivenScores(given.name, dict(given.scores), given.lower_is_better)
    if isinstance(metric, OwnMetric):
        return metric
    if metric is not None:
        arrays = {**data.inputs.arrays, "labels": data.labels} if isinstance(data, EvaluationData) else data
        return OwnMetric.of(metric, arrays)
    if data is None:
        return None
    read = data if isinstance(data, EvaluationData) else EvaluationData.from_arrays(data, model.inputs)
    return Labelled(read, recipe.limits.metric)
