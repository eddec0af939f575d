"""`upload` and `compress`: the main job in one command."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpress_client.cli import again
from modelpress_client.cli.options import SharedHelp, compression_options
from modelpress_client.cli.result_files import ResultFiles, digests_of
from modelpress_client.cli.session import Session, run
from modelpress_client.errors import EXIT_CONSTRAINT_NOT_MET, ModelpressError, NotFoundError, UsageError

if TYPE_CHECKING:
    from modelpress_protos.v1.recipe_pb2 import Recipe

    from modelpress_client.async_job import AsyncJob
    from modelpress_client.cli.progress import Display
    from modelpress_client.own_metric import OwnMetric
    from modelpress_client.report import Report
    from modelpress_client.resources import Model


@dataclass(frozen=True)
class Wanted:
    """The options of `upload` and `compress`."""

    inputs: tuple[str, ...]
    recipe: str
    overrides: tuple[str, ...]
    data: Path | None
    eval_data: Path | None
    metric: str | None
    metric_timeout: float | None
    goal: str | None
    max_drop: float | None
    max_size: float | None
    min_ratio: float | None
    max_latency: float | None
    min_speedup: float | None
    search_time: float | None
    target: str | None
    allow_damage: bool
    output: Path | None
    report_dir: Path | None
    labels: tuple[str, ...]
    priority: int
    skip_cache: bool
    no_compress: bool
    detach: bool

    @property
    def stated(self) -> tuple[str, ...]:
        """What the options say of the recipe, in the form of `--set`; `--set` itself comes last."""
        values = {
            "goal.objective": self.goal,
            "goal.search_time_s": self.search_time,
            "target.device": self.target,
            "constraints.max_size_bytes": None if self.max_size is None else int(self.max_size),
            "constraints.min_ratio": self.min_ratio,
            "constraints.max_latency_ms": None if self.max_latency is None else self.max_latency * 1e3,
            "constraints.min_speedup": self.min_speedup,
            "constraints.allow_damage": "true" if self.allow_damage else None,
        }
        given = [f"{path}={value}" for path, value in values.items() if value is not None]
        return (*given, *self.overrides)

    def sent_data(self, own: OwnMetric | None) -> list[Path]:
        """The files of arrays that go to the server; what a metric of the user's own takes does not."""
        return [path for path in (self.data, None if own else self.eval_data) if path is not None]


@click.command(cls=SharedHelp, short_help="Upload a model, compress it, download the result.")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@compression_options
@click.option(
    "--architecture",
    metavar="MODULE:FACTORY",
    help="Code that builds the network, for weights alone (state dict, safetensors, a folder of them), or "
    "transformers:auto where the folder has a config.json; needs modelpress[engine].",
)
@click.option(
    "--state-dict-key",
    metavar="KEY",
    help="Where in the file the weights lie, as params_ema or models.generator. [default: where they fit, averaged "
    "ones (EMA) first]",
)
@click.option(
    "--ignore-weights",
    metavar="PATTERN",
    multiple=True,
    help="Weights of the file that the network does without, as 'decoder.*'. Repeatable.",
)
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Read a pickled module on this machine, running the code in it; needs modelpress[engine].",
)
def upload(
    path: Path,
    architecture: str | None,
    state_dict_key: str | None,
    ignore_weights: tuple[str, ...],
    trust_pickle: bool,
    **options: Any,
) -> None:
    """Upload the model at PATH, compress it, download the result, print the report.

    The upload resumes where an interrupted one stopped, and skips what the server has. PATH is ONNX (external data
    beside it is found), TorchScript or torch.export; a folder stands for the one .onnx file in it. Weights alone are
    converted with --architecture: a file, the index of their shards, or the folder that they lie in.
    """
    wanted = Wanted(**options)

    async def body(session: Session) -> int | None:
        from modelpress_client.convert import Conversion
        from modelpress_client.inputs import parse_inputs
        from modelpress_client.names import parse_labels
        from modelpress_client.sources import check_data, check_source, stem_of

        files = _result_files(wanted, stem_of(path), source=path)
        async with _display(session) as display:
            # All that can be wrong is checked before anything is sent, the local things before the server is asked.
            labels, specs = parse_labels(wanted.labels), parse_inputs(wanted.inputs)
            conversion = Conversion(architecture, trust_pickle, tuple(specs), state_dict_key, ignore_weights)
            await asyncio.to_thread(check_source, path, conversion)
            own = _own_metric(wanted)
            for data in wanted.sent_data(own):
                await asyncio.to_thread(check_data, data)
            recipe = None if wanted.no_compress else await _recipe(session, wanted)
            model = await session.client.upload(
                path,
                inputs=specs,
                architecture=architecture,
                trust_pickle=trust_pickle,
                state_dict_key=state_dict_key,
                ignore_weights=ignore_weights,
                labels=labels,
                on_progress=display.transfer,
                on_note=session.out.hint,
            )
            if recipe is None:
                _stored(session, model)
                return None
            ended = await _compressed(session, model, recipe, own, wanted, display)
            if ended is None:
                return None
            job, report = ended
            await _fetch(session, job, report, files, display)
        return _print_result(session, job, report, files, ["upload", str(path)])

    run(body)


@click.command(cls=SharedHelp, short_help="Compress a model that the server already has.")
@click.argument("model_name", metavar="MODEL")
@compression_options
def compress(model_name: str, **options: Any) -> None:
    """Compress MODEL, which the server already has; the same as 'upload' otherwise."""
    wanted = Wanted(**options)

    async def body(session: Session) -> int | None:
        _check_is_no_file(model_name)
        async with _display(session) as display:
            model = await session.client.model(model_name)
            if wanted.no_compress:
                _stored(session, model)
                return None
            _check_inputs(model, wanted.inputs)
            files = _result_files(wanted, Path(model.display_name or model_name).stem, source=None)
            own, recipe = _own_metric(wanted), await _recipe(session, wanted)
            ended = await _compressed(session, model, recipe, own, wanted, display)
            if ended is None:
                return None
            job, report = ended
            await _fetch(session, job, report, files, display)
        return _print_result(session, job, report, files, ["compress", model_name])

    run(body)


COMMANDS = (upload, compress)


def _check_is_no_file(name: str) -> None:
    if Path(name).is_file():
        raise UsageError(f"'{name}' is a file; 'compress-client upload {name}' sends and compresses it.")


def _result_files(wanted: Wanted, stem: str, *, source: Path | None) -> ResultFiles:
    """Names the files, and refuses early what could not be written at the end."""
    files = ResultFiles.of(stem, wanted.output, wanted.report_dir)
    if source is not None and files.model.exists() and source.exists() and files.model.samefile(source):
        raise UsageError(f"--output {files.model} is the model itself; choose another file.")
    if not wanted.no_compress and not wanted.detach:
        files.check_writable()
    return files


@asynccontextmanager
async def _display(session: Session) -> AsyncIterator[Display]:
    from modelpress_client.cli.progress import display

    with display(quiet=session.shared.quiet) as shown:
        yield shown


async def _recipe(session: Session, wanted: Wanted) -> Recipe:
    if wanted.target not in (None, "cpu"):
        _check_target(wanted.target, (await session.client.server_info()).devices)
    from modelpress_client.own_metric import OwnMetric

    own = OwnMetric.names_one(wanted.metric)
    recipe: Recipe = await session.client.resolve_recipe(
        wanted.recipe, overrides=wanted.stated, metric=None if own else wanted.metric, max_drop=wanted.max_drop
    )
    if own and recipe.steps:
        raise UsageError(
            f"The recipe {wanted.recipe} has steps, which run as written; a metric of your own chooses among the "
            "candidates of a goal. Leave --recipe out."
        )
    if recipe.steps and (wanted.goal is not None or wanted.search_time is not None):
        raise UsageError(
            f"The recipe {wanted.recipe} has steps, which run as written; --goal and --search-time are for recipes "
            "without. Leave --recipe out, or state limits alone (--max-size, --min-speedup, ...)."
        )
    return recipe


def _check_target(target: str | None, devices: Collection[str]) -> None:
    if target not in devices:
        hint = f" A server has it where modelpress[{target}] is installed, and the hardware is there."
        raise UsageError(
            f"This server measures on {', '.join(devices) or 'nothing'} alone, so it cannot say what a model for "
            f"{target} would gain. Leave --target out, or ask a server that has {target}; 'info' lists what one has."
            f"{hint}"
        )


def _check_inputs(model: Model, inputs: tuple[str, ...]) -> None:
    """A model's inputs belong to the model: other ones need another upload."""
    from modelpress_client.inputs import format_input, parse_inputs

    hints = {format_input(spec) for spec in model.message.input_hints}
    known = hints | set(model.inputs)
    for spec in parse_inputs(inputs):
        if format_input(spec) not in known:
            raise UsageError(
                f"{model.name} was uploaded with other inputs than '{format_input(spec)}'; inputs belong to the model. "
                "Upload it again with --input."
            )


async def _submit(session: Session, model: Model, recipe: Any, wanted: Wanted, display: Display) -> AsyncJob:
    from modelpress_client.names import parse_labels

    job = await session.client.compress(
        model,
        recipe=recipe,
        data=wanted.data,
        eval=wanted.eval_data,
        labels=parse_labels(wanted.labels),
        priority=wanted.priority,
        skip_cache=wanted.skip_cache,
        on_progress=display.transfer,
    )
    session.job = job.name
    return job


def _own_metric(wanted: Wanted) -> OwnMetric | None:
    """The function of the user's that `--metric` names; checked, so that a slip costs no upload."""
    from modelpress_client.own_metric import DEFAULT_TIMEOUT_S, OwnMetric

    if not OwnMetric.names_one(wanted.metric):
        return None
    if wanted.detach:
        raise UsageError("--detach and a metric of your own do not go together: this machine has to score candidates.")
    own = OwnMetric(wanted.metric or "", wanted.eval_data, wanted.metric_timeout or DEFAULT_TIMEOUT_S)
    own.check()
    return own


async def _compressed(
    session: Session, model: Model, recipe: Recipe, own: OwnMetric | None, wanted: Wanted, display: Display
) -> tuple[AsyncJob, Report] | None:
    """The job that has ended well, and its report; None: it goes on by itself."""
    if own is not None:
        return await _search(session, model, recipe, own, wanted, display)
    job = await _submit(session, model, recipe, wanted, display)
    if wanted.detach:
        _detached(session, job)
        return None
    return job, await _watched(job, display)


async def _search(
    session: Session, model: Model, recipe: Recipe, own: OwnMetric, wanted: Wanted, display: Display
) -> tuple[AsyncJob, Report]:
    """Rounds of jobs and scores."""
    from modelpress_client.metric_search import MetricSearch

    async def run_job(asked: Recipe) -> AsyncJob:
        job = await _submit(session, model, asked, replace(wanted, eval_data=None), display)
        await _watched(job, display)
        return job

    return await MetricSearch(own, recipe, run_job, session.out.hint, wanted.search_time).run()


async def _watched(job: AsyncJob, display: Display) -> Report:
    """The report of a job that has ended well."""
    warnings = asyncio.create_task(_tell_warnings(job, display))
    try:
        async for event in job.watch():
            display.event(event)
    finally:
        warnings.cancel()
        await asyncio.wait([warnings])
    return await job.report()


async def _fetch(session: Session, job: AsyncJob, report: Report, files: ResultFiles, display: Display) -> None:
    """Brings the result. What the server has made, maybe in hours, is not lost where this machine cannot take it."""
    try:
        await _written(session, job, report, files, display)
    except ModelpressError as error:
        fetch = again.command(session.given, "download", job.name, "-o", "FOLDER/")
        session.out.hint(f"The job has succeeded, and its result is on the server. Fetch it: {fetch}")
        error.details.setdefault("job", job.name)
        raise


async def _written(session: Session, job: AsyncJob, report: Report, files: ResultFiles, display: Display) -> None:
    for told in await asyncio.to_thread(files.make_room, report.original.sha256, digests_of(job)):
        session.out.hint(told)
    await job.download(files.model, on_progress=display.transfer)
    await job.download(files.report_json, artifact="report.json")
    # A server may keep no HTML; the figures are all in report.json.
    with contextlib.suppress(NotFoundError):
        await job.download(files.report_html, artifact="report.html")
    if "project.zip" in job.artifacts:
        await job.download(files.project, artifact="project.zip")


async def _tell_warnings(job: AsyncJob, display: Display) -> None:
    """Warnings of the job's log, as they come: what is odd about the data is known long before the end."""
    # The report has them all; a log that cannot be read is no reason to give the result up.
    with contextlib.suppress(ModelpressError):
        async for line in job.logs(follow=True):
            if line.severity == "WARNING":
                display.warning(line.text)


def _print_result(
    session: Session, job: AsyncJob, report: Report, files: ResultFiles, words: Sequence[str]
) -> int | None:
    """`words`: of this call, as `upload` and the path."""
    from modelpress_client.cli.report_text import print_report

    advice = [(item.text, again.advised(session.given, words, item.command)) for item in report.advice]
    if session.shared.json:
        session.out.document(
            {
                "model": job.message.spec.model,
                "job": job.name,
                "state": job.state,
                "output": str(files.model),
                "from_cache": job.message.from_cache,
                "report": report.to_dict(),
                "candidates": list(report.candidates),
                "advice": [{"text": text, "command": command} for text, command in advice],
            }
        )
    else:
        session.out.show(lambda console: print_report(console, report))
    for text, command in advice:
        session.out.hint(f"{text}\n  {command}")
    cached = " (an identical job had succeeded before; --skip-cache runs it again)" if job.message.from_cache else ""
    project = f"\nProject {files.project}" if "project.zip" in job.artifacts else ""
    session.out.hint(f"Job     {job.name}{cached}\nModel   {files.model}\nReport  {files.report_html}{project}")
    if report.constraints.met:
        return None
    broken = report.constraints.violations
    several = "Constraints are" if len(broken) > 1 else "A constraint is"
    session.out.hint(f"{several} not met: {'; '.join(broken) or 'see the report'}")
    return EXIT_CONSTRAINT_NOT_MET


def _stored(session: Session, model: Model) -> None:
    session.out.document({"model": model.name, "job": None, "state": None, "output": None, "report": None})
    session.out.data(model.name)


def _detached(session: Session, job: AsyncJob) -> None:
    session.out.document(
        {"model": job.message.spec.model, "job": job.name, "state": job.state, "output": None, "report": None}
    )
    session.out.data(job.name)
    session.out.hint(session.what_goes_on())
