"""`compress-server token`: adds, lists and revokes tokens, also while the server runs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from modelpress_server.config import SettingsError, default_data_dir
from modelpress_server.identity.roles import Role, parse_grant
from modelpress_server.identity.tokens import TokenKeeper

_UNITS_S = {"m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """A time such as 90d, 12h or 30m, in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+)([mhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a time such as 90d, 12h or 30m", param, ctx)
        return float(match[1]) * _UNITS_S[match[2]]


class Grant(click.ParamType[tuple[str, Role]]):
    """PROJECT:ROLE, or *:ROLE for all projects."""

    name = "grant"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Role]:
        try:
            return parse_grant(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="COMPRESS_SERVER_DATA_DIR",
    show_envvar=True,
    help="The server's data folder; by default that of the command line before `token`, or the user's.",
)
@click.pass_context
def token(ctx: click.Context, data_dir: Path | None) -> None:
    """Tokens of a data folder. The server takes changes at once; it need not run."""
    given = (ctx.obj or {}).get("data_dir") if isinstance(ctx.obj, dict) else None
    ctx.obj = TokenKeeper((data_dir or given or default_data_dir()).expanduser().absolute())


@token.command()
@click.argument("name")
@click.option(
    "--grant", "grants", type=Grant(), multiple=True, required=True,
    help="PROJECT:ROLE (reader, submitter or admin), or *:ROLE for all projects; repeatable.",
)  # fmt: skip
@click.option(
    "--expires", type=Duration(), default=0.0, help="The token ends after so long (90d, 12h); default: never."
)
@click.pass_obj
def add(keeper: TokenKeeper, name: str, grants: tuple[tuple[str, Role], ...], expires: float) -> None:
    """Makes a token for NAME and prints it. Only its hash is kept: it cannot be shown again."""
    now_s = time.time()
    with _told():
        click.echo(keeper.add(name, dict(grants), now_s, now_s + expires if expires else 0.0))


@token.command()
@click.argument("name")
@click.pass_obj
def revoke(keeper: TokenKeeper, name: str) -> None:
    """Takes the token of NAME back: from now on, no call with it begins."""
    with _told():
        keeper.revoke(name)


@token.command(name="list")
@click.pass_obj
def list_tokens(keeper: TokenKeeper) -> None:
    """Lists the tokens: name, grants, when made, when they end."""
    with _told():
        records = keeper.records()
    for record in records:
        grants = ",".join(f"{project}:{role}" for project, role in record.grants.items())
        click.echo(f"{record.name}\t{grants}\t{_day(record.created_s)}\t{_day(record.expires_s)}")


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d") if time_s else "never"


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"data_dir: {error.filename}: {error.strerror}.") from error
