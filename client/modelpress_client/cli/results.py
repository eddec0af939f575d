"""`download` and `report`: what a job has made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelpress_client.cli.keeping import Room
from modelpress_client.cli.options import OutputPath, SharedHelp
from modelpress_client.cli.output import json_text
from modelpress_client.cli.result_files import ARTIFACTS, digests_of, suffix_of
from modelpress_client.cli.session import Session, run
from modelpress_client.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from modelpress_client.async_job import AsyncJob


@click.command(cls=SharedHelp)
@click.argument("job_name", metavar="JOB")
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    metavar="PATH",
    help="A file, or a folder.  [default: STEM.optimized.onnx, STEM.report.json, STEM.report.html, STEM.project.zip]",
)
@click.option(
    "--artifact", type=click.Choice([*ARTIFACTS, "all"]), default="model", show_default=True, help="What to download."
)
@click.option(
    "--candidate",
    metavar="ID|all",
    help="A candidate's model instead, by its id in 'candidates JOB'; all: each in a file of its own.",
)
def download(job_name: str, output: Path | None, artifact: str, candidate: str | None) -> None:
    """Download the results of JOB."""
    if candidate is not None and artifact != "model":
        raise UsageError("--candidate fetches models; leave --artifact out.")

    async def body(session: Session) -> None:
        from modelpress_client.cli.progress import display

        job = await session.client.job(job_name)
        job.raise_unless_succeeded()
        wanted = tuple(job.artifacts) if artifact == "all" else (artifact,)
        if candidate is not None:
            wanted = tuple(job.candidates) if candidate == "all" else (candidate,)
        if not wanted:
            raise NotFoundError(f"{job.name} has no candidates to download; recipes with a goal have them.")
        stem = await _stem(session, job)
        targets = _targets(stem, wanted, output)
        if output not in targets.values():
            await _make_room(session, job, stem, targets)
        written: list[Path] = []
        with display(quiet=session.shared.quiet) as shown:
            for item, target in targets.items():
                which = {"artifact": item} if candidate is None else {"candidate": item}
                written += await job.download(target, **which, on_progress=shown.transfer)
        session.out.document({"job": job.name, "files": [str(path) for path in written]})
        for path in written:
            session.out.data(str(path))

    run(body)


@click.command(cls=SharedHelp)
@click.argument("job_name", metavar="JOB")
@click.option(
    "--format",
    "report_format",
    type=click.Choice(["text", "json", "html", "markdown"]),
    default="text",
    show_default=True,
    help="How to print it.",
)
@click.option("--layers", is_flag=True, help="Layer by layer: time, kernel, and why it is not faster.")
def report(job_name: str, report_format: str, layers: bool) -> None:
    """Print the report of JOB."""
    if layers and report_format != "text":
        raise UsageError(f"--layers is for the terminal; --format {report_format} has the layers anyway.")

    async def body(session: Session) -> None:
        job = await session.client.job(job_name)
        if report_format == "html" and not session.shared.json:
            session.out.data((await job.read_artifact("report.html")).decode())
            return
        result = await job.report()
        if layers:
            from modelpress_client.cli.report_text import print_layers

            session.out.document({"job": job.name, "layers": list(result.layers)})
            session.out.show(lambda console: print_layers(console, result))
            return
        if session.shared.json:
            session.out.document(result.to_dict())
        elif report_format == "json":
            session.out.data(json_text(result.to_dict()))
        elif report_format == "markdown":
            from modelpress_client.cli.report_markdown import to_markdown

            session.out.data(to_markdown(result))
        else:
            from modelpress_client.cli.report_text import print_report

            session.out.show(lambda console: print_report(console, result))

    run(body)


@click.command(cls=SharedHelp, short_help="What a goal tried: the family of a model.")
@click.argument("job_name", metavar="JOB")
@click.option("--compare", nargs=2, metavar="ID ID", help="Set these two side by side.")
def candidates(job_name: str, compare: tuple[str, str] | None) -> None:
    """List what JOB tried, with size, speed and answers; 'download JOB --candidate ID' fetches those with a star."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.family import print_comparison, print_family

        job = await session.client.job(job_name)
        found = (await job.report()).candidates
        if compare is None:
            session.out.document({"job": job.name, "candidates": list(found)})
            session.out.show(lambda console: print_family(console, found))
            return
        by_id = {str(row.get("id")): row for row in found}
        if unknown := [item for item in compare if item not in by_id]:
            raise NotFoundError(f"{job.name} has no candidate '{unknown[0]}'; there are {', '.join(by_id)}.")
        first, second = (by_id[item] for item in compare)
        session.out.document({"job": job.name, "candidates": [first, second]})
        session.out.show(lambda console: print_comparison(console, first, second))

    run(body)


COMMANDS = (download, report, candidates)


async def _make_room(session: Session, job: AsyncJob, stem: str, targets: dict[str, Path]) -> None:
    """Keeps what lies under the usual names and is none that the files replace."""
    if not any(target.exists() for target in targets.values()):
        return
    original, digests = (await job.report()).original.sha256, digests_of(job)
    coming = {target: digests[item] for item, target in targets.items() if item in digests}
    report_json = next(iter(targets.values())).with_name(f"{stem}.report.json")
    for told in await asyncio.to_thread(Room(report_json, original).make, coming):
        session.out.hint(told)


async def _stem(session: Session, job: AsyncJob) -> str:
    """The name of the uploaded file without its suffix."""
    try:
        stem = Path((await session.client.model(job.message.spec.model)).display_name).stem
    except NotFoundError:
        stem = ""  # the model was deleted; the job keeps its results
    return stem or job.name.rsplit("/", 1)[-1]


def _targets(stem: str, wanted: tuple[str, ...], output: Path | None) -> dict[str, Path]:
    """Where each artifact goes."""
    if output is not None and len(wanted) == 1 and not output.is_dir():
        return {wanted[0]: output}
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; for several artifacts it must be a folder.")
    folder = output or Path()
    return {item: folder / f"{stem}.{suffix_of(item)}" for item in wanted}
