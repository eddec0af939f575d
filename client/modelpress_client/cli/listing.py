"""Commands on models and jobs: and what a project uses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelpress_client.cli import again
from modelpress_client.cli.options import SharedHelp, WholeNumber, label_option
from modelpress_client.cli.session import Session, run
from modelpress_client.errors import EXIT_CONSTRAINT_NOT_MET, NotFoundError, UnusableInputError, UsageError

if TYPE_CHECKING:
    from modelpress_client.cli.progress import Display
    from modelpress_client.resources import Model

JOB_STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled", "expired")
MODEL_STATES = ("processing", "active", "rejected")
limit_option = click.option(
    "--limit", type=WholeNumber(min=1), metavar="N", default=50, show_default=True, help="At most so many."
)


@click.command(cls=SharedHelp, short_help="Show what a model is made of, without compressing it.")
@click.argument("path_or_model", metavar="PATH|MODEL")
@click.option("--input", "inputs", multiple=True, metavar="'NAME:DTYPE[DIM,...]'", help="An input, as in 'upload'.")
def inspect(path_or_model: str, inputs: tuple[str, ...]) -> None:
    """Show format, inputs, outputs, parameters, MACs, operators, and what the server would refuse, without compressing.

    A file is uploaded for it, and stays on the server as a model.
    """

    async def body(session: Session) -> int | None:
        from modelpress_client.cli.progress import display
        from modelpress_client.cli.tables import print_model

        with display(quiet=session.shared.quiet) as shown:
            model = await _model_of(session, path_or_model, inputs, shown)
            current = await session.client.inspect(model, raise_if_rejected=False, on_wait=shown.inspection)
        session.out.document(current.to_dict())
        session.out.show(lambda console: print_model(console, current))
        return UnusableInputError.default_exit_code if current.state == "REJECTED" else None

    run(body)


async def _model_of(session: Session, path_or_model: str, inputs: tuple[str, ...], shown: Display) -> Model:
    path = Path(path_or_model)
    if not await asyncio.to_thread(path.exists):
        try:
            return await session.client.model(path_or_model)
        except UsageError:
            raise UsageError(
                f"There is no file '{path_or_model}', and a model's name ends in 26 letters and digits; 'models' "
                "lists them."
            ) from None
    return await session.client.upload(path, inputs=inputs, on_progress=shown.transfer)


@click.command(cls=SharedHelp)
@click.option("--state", type=click.Choice(MODEL_STATES, case_sensitive=False), help="Only models in this state.")
@label_option("Only models with this label. Repeatable.")
@limit_option
def models(state: str | None, labels: tuple[str, ...], limit: int) -> None:
    """List models, newest first."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_models
        from modelpress_client.names import parse_labels

        found = await session.client.models(state=state, labels=parse_labels(labels), limit=limit)
        session.out.document({"models": [model.to_dict() for model in found]})
        if found:
            session.out.show(lambda console: print_models(console, found))
        else:
            session.out.hint(f"No models in project {session.shared.project}.")

    run(body)


@click.command(cls=SharedHelp)
@click.option("--state", type=click.Choice(JOB_STATES, case_sensitive=False), help="Only jobs in this state.")
@label_option("Only jobs with this label. Repeatable.")
@limit_option
def jobs(state: str | None, labels: tuple[str, ...], limit: int) -> None:
    """List jobs, newest first."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_jobs
        from modelpress_client.names import parse_labels

        found = await session.client.jobs(state=state, labels=parse_labels(labels), limit=limit)
        session.out.document({"jobs": [job.to_dict() for job in found]})
        if found:
            session.out.show(lambda console: print_jobs(console, [job.message for job in found]))
        else:
            session.out.hint(f"No jobs in project {session.shared.project}.")

    run(body)


@click.command(cls=SharedHelp, short_help="Show where a job stands.")
@click.argument("job_name", metavar="JOB")
def job(job_name: str) -> None:
    """Show where JOB stands and what it was asked to do."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_job

        found = await session.client.job(job_name)
        session.out.document(found.to_dict())
        session.out.show(lambda console: print_job(console, found.message))

    run(body)


@click.command(cls=SharedHelp, short_help="Follow a job to its end.")
@click.argument("job_name", metavar="JOB")
def watch(job_name: str) -> None:
    """Follow JOB to its end; the exit code is that of 'upload'."""

    async def body(session: Session) -> int | None:
        from modelpress_client.cli.progress import display

        found = await session.client.job(job_name)
        session.job = found.name
        with display(quiet=session.shared.quiet) as shown:
            async for event in found.watch():
                shown.event(event)
        found.raise_unless_succeeded()
        session.out.document(found.to_dict())
        session.out.data(f"{found.name} {found.state}")
        session.out.hint(f"Fetch it: {again.command(session.given, 'download', found.name)}")
        return None if found.message.summary.constraints_met else EXIT_CONSTRAINT_NOT_MET

    run(body)


@click.command(cls=SharedHelp)
@click.argument("job_name", metavar="JOB")
@click.option("--follow", "-f", is_flag=True, help="Stay until the job has ended.")
def logs(job_name: str, follow: bool) -> None:
    """Print the log of JOB."""

    async def body(session: Session) -> None:
        from modelpress_client.jsonable import to_json

        found = await session.client.job(job_name)
        lines = []
        async for line in found.logs(follow=follow):
            if session.shared.json:
                lines.append(to_json(line))
            clock = line.time.ToDatetime().strftime("%H:%M:%S")
            session.out.data(f"{clock} {line.severity:<7} {line.text}")
        session.out.document({"job": found.name, "lines": lines})

    run(body)


@click.command(cls=SharedHelp, short_help="Cancel a job.")
@click.argument("job_name", metavar="JOB")
def cancel(job_name: str) -> None:
    """Cancel JOB; a job that has ended stays as it is."""

    async def body(session: Session) -> None:
        found = await session.client.job(job_name)
        await found.cancel()
        session.out.document(found.to_dict())
        session.out.data(f"{found.name} {found.state}")

    run(body)


@click.command(cls=SharedHelp, short_help="What the project has and uses, and its limits.")
def usage() -> None:
    """Show what the project has stored, what its jobs have used so far, and what it may have."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_usage
        from modelpress_client.jsonable import to_json

        found = await session.client.usage()
        session.out.document(to_json(found))
        session.out.show(lambda console: print_usage(console, found))

    run(body)


@click.command(cls=SharedHelp, short_help="List unfinished uploads, or cancel them.")
@click.option("--cancel", "cancelled", multiple=True, metavar="UPLOAD|all", help="Drop this one, or all. Repeatable.")
def uploads(cancelled: tuple[str, ...]) -> None:
    """List unfinished uploads, newest first. Each counts against the project's limit until it ends or is cancelled."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_uploads
        from modelpress_client.jsonable import to_json

        found = await session.client.uploads()
        names = [upload.name for upload in found] if "all" in cancelled else list(cancelled)
        for name in names:
            await session.client.cancel_upload(name)
            session.out.data(f"Cancelled {name}")
        if cancelled:
            session.out.document({"cancelled": names})
            return
        session.out.document({"uploads": [to_json(upload) for upload in found]})
        if found:
            session.out.show(lambda console: print_uploads(console, found))
        else:
            session.out.hint(f"No unfinished uploads in project {session.shared.project}.")

    run(body)


@click.command(cls=SharedHelp, short_help="Delete a model, or a job that has ended.")
@click.argument("name", metavar="NAME")
def delete(name: str) -> None:
    """Delete a model, or a job that has ended with its results.

    NAME is a full name, models/M, jobs/J, or the last part alone.
    """

    async def body(session: Session) -> None:
        full = await _resolved(session, name)
        await session.client.delete(full)
        session.out.document({"deleted": full})
        session.out.data(f"Deleted {full}")

    run(body)


@click.command(cls=SharedHelp, short_help="Show or change the labels of a model or a job.")
@click.argument("name", metavar="NAME")
@click.argument("labels", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--remove", multiple=True, metavar="KEY", help="Take this label away. Repeatable.")
def label(name: str, labels: tuple[str, ...], remove: tuple[str, ...]) -> None:
    """Give a model or a job labels, or take them away, and show all that it has.

    NAME is as in 'delete'. The label pin keeps it from being deleted after its time (see 'usage').
    """
    _label(name, labels, remove)


@click.command(cls=SharedHelp, short_help="Keep a model or a job from being deleted after its time.")
@click.argument("name", metavar="NAME")
@click.option("--undo", is_flag=True, help="From now on it is deleted after its time.")
def pin(name: str, undo: bool) -> None:
    """Give a model or a job the label pin, with which it stays; the same as 'label NAME pin=yes'."""
    _label(name, () if undo else ("pin=yes",), ("pin",) if undo else ())


def _label(name: str, labels: tuple[str, ...], remove: tuple[str, ...]) -> None:
    async def body(session: Session) -> None:
        from modelpress_client.names import parse_labels

        wanted = parse_labels(labels)
        full = await _resolved(session, name)
        found = await session.client.label(full, wanted, remove=remove)
        session.out.document({"name": full, "labels": found})
        for key, value in sorted(found.items()):
            session.out.data(f"{key}={value}")
        if not found:
            session.out.hint(f"{full} has no labels.")

    run(body)


async def _resolved(session: Session, name: str) -> str:
    """The full name; the last part alone may be a job's or a model's."""
    from modelpress_client.names import full_name

    if "/" in name:
        return full_name(name, None, session.shared.project)
    try:
        return (await session.client.job(name)).name
    except NotFoundError:
        pass
    try:
        return (await session.client.model(name)).name
    except NotFoundError as error:
        raise NotFoundError(
            f"There is neither a job nor a model '{name}' in project {session.shared.project}."
        ) from error


COMMANDS = (inspect, jobs, models, job, watch, logs, cancel, delete, label, pin, usage, uploads)
