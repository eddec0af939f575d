"""Runs a recipe on a model and measures what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.graph.stats import model_stats
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import Array, EvaluationData, InputData
from modelpress_compression.model import Model
from modelpress_compression.options import config_to_dict
from modelpress_compression.passes.base import Context
from modelpress_compression.pipeline.measuring import measure, not_better
from modelpress_compression.pipeline.progress import Progress, ProgressListener, stages_of
from modelpress_compression.pipeline.steps import StepRecord, apply_step, broken, file_size_bytes, save
from modelpress_compression.recipe import Recipe
from modelpress_compression.report.build import ReportInputs, StepRow, build_report
from modelpress_compression.techniques import TECHNIQUES

SYNTHETIC_SAMPLES = 32
LogListener = Callable[[str, str], None]  # severity (INFO, WARNING, ERROR), text


@dataclass(frozen=True)
class Result:
    """The optimized model, the report (the content of report.json), and what else was tried."""

    model: Model
    report: dict[str, Any]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """What `auto` tried, with the figures that decided."""
        rows: list[dict[str, Any]] = self.report["candidates"]
        return rows

    def write(self, directory: Path) -> list[tuple[str, list[Path]]]:
        """Writes model.onnx (and model.onnx.data), report.json and report.html; returns kind and files of each."""
        from modelpress_compression.report.html import render_html

        directory.mkdir(parents=True, exist_ok=True)
        model = self.model.save(directory / "model.onnx")
        json_path, html_path = directory / "report.json", directory / "report.html"
        json_path.write_text(json.dumps(self.report, indent=1, allow_nan=False), "utf-8")
        html_path.write_text(render_html(self.report), "utf-8")
        return [("model", model), ("report.json", [json_path]), ("report.html", [html_path])]


def compress(
    model: Model,
    recipe: Recipe,
    *,
    data: InputData | Mapping[str, Array] | None = None,
    eval_data: EvaluationData | Mapping[str, Array] | None = None,
    on_progress: ProgressListener | None = None,
    on_log: LogListener | None = None,
    job: str = "",
    time_limit_s: float | None = None,
    work_directory: Path | None = None,
) -> Result:
    """Runs the recipe's steps in order and measures the result against the model as it was given.

    `data`: representative inputs, one array a model input, first axis = samples, and `labels` if there are any; None:
    synthetic ones, and a warning.
    `eval_data`: inputs with `labels`. `work_directory`: for temporary files; None: one of its own.

    Raises InvalidDataError, ModelNotRunnableError, UnsupportedOperatorError, TimeLimitError. A step that breaks the
    model is undone and reported; a result that is slower and not smaller is replaced by the model as it was given.
    """
    began = time.monotonic()
    deadline = None if time_limit_s is None else began + time_limit_s
    stages = stages_of(recipe)
    progress = Progress(stages, on_progress)
    log = on_log or (lambda severity, text: None)
    with _work_directory(work_directory) as work:
        inputs = _input_data(model, data)
        evaluation = _evaluation_data(model, eval_data)
        original = work / "original" / "model.onnx"
        save(model, original)
        if (problem := broken(original, inputs, original)) is not None:
            raise ModelNotRunnableError(problem)
        context = Context(
            inputs,
            work,
            deadline,
            recipe.target,
            log=lambda text: log("INFO", text),
            progress=progress.update,
            original=model,
        )
        records = _run_steps(recipe, model, original, context, progress, evaluation)
        final, path = (records[-1].model, records[-1].path) if records else (model, original)
        progress.begin(len(stages) - 2, "measuring the original and the result")
        measured = measure(original, path, inputs, evaluation, recipe, progress.update)
        warnings = [
            *model.warnings,
            *_warnings_on(inputs),
            *(warning for record in records for warning in record.warnings),
        ]
        if (reason := not_better(measured, file_size_bytes(original), file_size_bytes(path))) is not None:
            warnings.append(reason)
            final, path = model, original
            measured = measure(original, original, inputs, evaluation, recipe, progress.update)
        for warning in warnings:
            log("WARNING", warning)
        progress.begin(len(stages) - 1, "writing the report")
        shapes = sample_shapes(inputs)
        report = build_report(
            ReportInputs(
                job=job,
                recipe=recipe.to_dict(),
                provenance=model.provenance,
                original_onnx_size_bytes=file_size_bytes(original),
                original=model_stats(model, shapes),
                optimized_sha256=_sha256(path),
                optimized_size_bytes=file_size_bytes(path),
                optimized=model_stats(final, shapes),
                latency=measured.latency,
                fidelity=measured.fidelity,
                accuracy=measured.accuracy,
                steps=[_step_row(record) for record in records],
                candidates=[candidate for record in records for candidate in record.candidates],
                warnings=warnings,
                violations=measured.violations,
            )
        )
        progress.update(1.0, "done")
        return Result(final, report)


def _run_steps(
    recipe: Recipe,
    model: Model,
    original: Path,
    context: Context,
    progress: Progress,
    eval_data: EvaluationData | None,
) -> list[StepRecord]:
    records: list[StepRecord] = []
    record: StepRecord
    path = original
    for index, step in enumerate(recipe.steps):
        progress.begin(index + 1, f"{step.technique} ({index + 1} of {len(recipe.steps)})")
        target = context.work_directory / f"step-{index}" / "model.onnx"
        choose = TECHNIQUES[step.technique].chooser_for(step.config)
        if choose is None:
            record = apply_step(step, model, path, context, target)
        else:
            record = choose(step, model, path, context, target, recipe=recipe, original=original, eval_data=eval_data)
        context.log(f"{step.technique}: {record.changes or 'nothing changed'} in {record.duration_s:.1f} s")
        records.append(record)
        model, path = record.model, record.path
    return records


def _step_row(record: StepRecord) -> StepRow:
    return StepRow(
        name=record.step.technique,
        config=config_to_dict(record.step.config),
        changes=record.changes,
        skipped=record.skipped,
        size_bytes=file_size_bytes(record.path),
        duration_s=record.duration_s,
        details=record.details,
        notes=record.notes,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _warnings_on(data: InputData) -> list[str]:
    if data.varied or not data.provided:
        return []
    return ["All samples of the data are the same: neither ranges nor agreement seen on them say anything of others."]


def _input_data(model: Model, data: InputData | Mapping[str, Array] | None) -> InputData:
    if data is None:
        return synthetic_inputs(model, samples=SYNTHETIC_SAMPLES)
    return data if isinstance(data, InputData) else InputData.from_arrays(data, model.inputs)


def _evaluation_data(model: Model, data: EvaluationData | Mapping[str, Array] | None) -> EvaluationData | None:
    if data is None or isinstance(data, EvaluationData):
        return data
    return EvaluationData.from_arrays(data, model.inputs)


@contextmanager
def _work_directory(given: Path | None) -> Iterator[Path]:
    with TemporaryDirectory(prefix="modelpress-", dir=given) as folder:
        yield Path(folder)
