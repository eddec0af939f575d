"""`compress-server check`: whether everything that a data folder holds is still what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from modelpress_server.config import default_data_dir
from modelpress_server.scrub import Found, Scrub


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="COMPRESS_SERVER_DATA_DIR",
    show_envvar=True,
    help="The data folder; by default that of the command line before `check`, or the user's.",
)
@click.option(
    "--set-aside/--leave", default=True, show_default=True,
    help="Move damaged blobs to quarantine/, so that they count as missing and an upload heals them.",
)  # fmt: skip
@click.pass_context
def check(ctx: click.Context, data_dir: Path | None, set_aside: bool) -> None:
    """Reads every blob and compares it with its digest; checks the database and the unfinished uploads.

    May run beside a server. Exits with 0 where all is well, with 1 where something is damaged or missing.
    """
    given = (ctx.obj or {}).get("data_dir") if isinstance(ctx.obj, dict) else None
    folder = (data_dir or given or default_data_dir()).expanduser().absolute()
    if not (folder / "modelpress.db").is_file():
        raise click.UsageError(f"data_dir: {folder} is no data folder of a server: it has no modelpress.db.")
    scrub = Scrub(folder)
    with click.progressbar(length=scrub.total_bytes, label="Checking", file=sys.stderr) as bar:
        found = scrub.run(set_aside=set_aside, on_progress=bar.update)
    _tell(found, set_aside)
    ctx.exit(0 if found.sound else 1)


def _tell(found: Found, set_aside: bool) -> None:
    click.echo(f"{found.blobs} blobs of {found.size_bytes / 1e6:,.1f} MB read.")
    what = "set aside; upload the files again to heal them" if set_aside else "left where it is"
    for name in found.damaged:
        click.echo(f"damaged: blob {name} ({what})")
    for name in found.missing:
        click.echo(f"missing: blob {name} (upload the file again)")
    for text in (*found.database, *found.uploads):
        click.echo(f"damaged: {text}")
    click.echo("All is well." if found.sound else "Something is damaged or missing.")
