"""`compress-server backup` and `compress-server restore`."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import click

from modelpress_server.backup import DATABASE_NAME, Copied, back_up, total_bytes
from modelpress_server.backup import restore as restore_from
from modelpress_server.config import SettingsError, default_data_dir
from modelpress_server.lock import DataDirLock

_data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="COMPRESS_SERVER_DATA_DIR",
    show_envvar=True,
    help="The data folder; by default that of the command line before the command, or the user's.",
)


@click.command()
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@_data_dir
@click.pass_context
def backup(ctx: click.Context, target: Path, data_dir: Path | None) -> None:
    """Copies what a data folder holds to the folder TARGET, while the server runs.

    Into an earlier backup only what is new is copied. Every file is compared with its digest. Exits with 1 where a file
    was damaged or missing; everything else is in the backup all the same.
    """
    folder = _folder(ctx, data_dir)
    _require_records(folder, f"data_dir: {folder} is no data folder of a server")
    _finish(ctx, folder / DATABASE_NAME, lambda tell: back_up(folder, target.absolute(), tell))


@click.command()
@click.argument("source", type=click.Path(path_type=Path, file_okay=False, exists=True))
@_data_dir
@click.pass_context
def restore(ctx: click.Context, source: Path, data_dir: Path | None) -> None:
    """Makes a data folder of the backup SOURCE. The folder must be empty or not there, and no server may use it.

    Jobs that ran when the backup was made are queued again when a server starts on the folder.
    """
    folder = _folder(ctx, data_dir)
    _require_records(source, f"{source} is no backup")
    if (folder / DATABASE_NAME).exists():
        raise click.UsageError(f"data_dir: {folder} is in use: it has a {DATABASE_NAME}. Name an empty folder.")
    lock = DataDirLock(folder)
    try:
        lock.acquire()
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    try:
        _finish(ctx, source / DATABASE_NAME, lambda tell: restore_from(source.absolute(), folder, tell))
    finally:
        lock.release()


def _folder(ctx: click.Context, data_dir: Path | None) -> Path:
    given = ctx.obj if isinstance(ctx.obj, dict) else {}
    if given.get("database") is not None or given.get("blobs") is not None:
        raise click.UsageError(
            "These are for data folders. Back up PostgreSQL by its own means (pg_dump, WAL), and the bucket by its own "
            "(versions, replication)."
        )
    return (data_dir or given.get("data_dir") or default_data_dir()).expanduser().absolute()


def _require_records(folder: Path, what: str) -> None:
    if not (folder / DATABASE_NAME).is_file():
        raise click.UsageError(f"{what}: it has no {DATABASE_NAME}.")


def _finish(ctx: click.Context, database: Path, work: Callable[[Callable[[int], None]], Copied]) -> None:
    try:
        with click.progressbar(length=total_bytes(database), label="Copying", file=sys.stderr) as bar:
            copied = work(bar.update)
    except (OSError, sqlite3.Error) as error:
        raise click.ClickException(f"It stopped: {error}. What was there before is as it was.") from error
    click.echo(f"{copied.blobs} files of {copied.size_bytes / 1e6:,.1f} MB copied, {copied.kept} were there already.")
    if copied.removed:
        click.echo(f"{copied.removed} files that no record names any more were removed.")
    for name in copied.damaged:
        click.echo(f"damaged: blob {name} (upload the file again, then back up again)")
    for name in copied.missing:
        click.echo(f"missing: blob {name} (upload the file again, then back up again)")
    click.echo("All is there." if copied.whole else "Something is damaged or missing.")
    ctx.exit(0 if copied.whole else 1)
