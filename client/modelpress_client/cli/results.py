"""`download` and `report`: what a job has made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelpress_client.cli.options import SharedHelp
from modelpress_client.cli.output import json_text
from modelpress_client.cli.session import Session, run
from modelpress_client.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from modelpress_client.async_job import AsyncJob

ALL = ("model", "report.json", "report.html")


@click.command(cls=SharedHelp)
@click.argument("job_name", metavar="JOB")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A file, or a folder.  [default: STEM.optimized.onnx, STEM.report.json, STEM.report.html]",
)
@click.option(
    "--artifact", type=click.Choice([*ALL, "all"]), default="model", show_default=True, help="What to download."
)
def download(job_name: str, output: Path | None, artifact: str) -> None:
    """Download the results of JOB."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.progress import display

        job = await session.client.job(job_name)
        job.raise_unless_succeeded()
        wanted = ALL if artifact == "all" else (artifact,)
        stem = await _stem(session, job)
        targets = _targets(stem, wanted, output)
        written: list[Path] = []
        with display(quiet=session.shared.quiet) as shown:
            for item, target in targets.items():
                written += await job.download(target, artifact=item, on_progress=shown.transfer)
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
def report(job_name: str, report_format: str) -> None:
    """Print the report of JOB."""

    async def body(session: Session) -> None:
        job = await session.client.job(job_name)
        if report_format == "html" and not session.shared.json:
            session.out.data((await job.read_artifact("report.html")).decode())
            return
        result = await job.report()
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


COMMANDS = (download, report)


async def _stem(session: Session, job: AsyncJob) -> str:
    """The name of the uploaded file without its suffix."""
    try:
        stem = Path((await session.client.model(job.message.spec.model)).display_name).stem
    except NotFoundError:
        stem = ""  # the model was deleted; the job keeps its results
    return stem or job.name.rsplit("/", 1)[-1]


def _targets(stem: str, wanted: tuple[str, ...], output: Path | None) -> dict[str, Path]:
    """Where each artifact goes."""
    if output is not None and len(wanted) == 1 and not output.is_dir() and not str(output).endswith("/"):
        return {wanted[0]: output}
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; for several artifacts it must be a folder.")
    folder = output or Path()
    return {item: folder / f"{stem}.{'optimized.onnx' if item == 'model' else item}" for item in wanted}
