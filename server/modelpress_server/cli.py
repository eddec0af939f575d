"""`compress-server`: settings from the command line, the environment and a TOML file, in this order of precedence."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import re
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from modelpress_server import logs
from modelpress_server.backup_commands import backup, restore
from modelpress_server.check_command import check
from modelpress_server.config import GIB, KIB, MIB, Settings, SettingsError
from modelpress_server.token_commands import token
from modelpress_server.work_command import work

ENV_PREFIX = "COMPRESS_SERVER_"
_UNITS = {"": 1, "B": 1, "KIB": KIB, "K": KIB, "MIB": MIB, "M": MIB, "GIB": GIB, "G": GIB}


class ByteSize(click.ParamType[int]):
    """A number of bytes, such as 512MiB or 2G (1 KiB = 1,024 bytes)."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a number of bytes, such as 512MiB", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


def _load_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Reads the TOML file into the defaults of the other options."""
    if path is None:
        return None
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    unknown = sorted(document.keys() - {setting.name for setting in dataclasses.fields(Settings)})
    if unknown:
        raise click.BadParameter(f"{path} has unknown keys: {', '.join(unknown)}")
    ctx.default_map = document
    return path


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each setting."""
    for setting in reversed(dataclasses.fields(Settings)):
        metadata = setting.metadata
        kinds: dict[str, Any] = {"bytes": ByteSize(), "seconds": float, "path": click.Path(path_type=Path)}
        default = setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory()
        plain: Any = type(default) if default is not None else str
        kind = click.Choice(metadata["choices"]) if metadata["choices"] else kinds.get(metadata["kind"], plain)
        command = click.option(
            f"--{setting.name.replace('_', '-')}",
            setting.name,
            type=bool if metadata["kind"] == "flag" else kind,
            is_flag=metadata["kind"] == "flag",
            default=default,
            envvar=ENV_PREFIX + setting.name.upper(),
            show_default=setting.default_factory is dataclasses.MISSING and default is not None,
            show_envvar=True,
            help=metadata["help"],
        )(command)
    return command


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="modelpress")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=f"{ENV_PREFIX}CONFIG",
    show_envvar=True,
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="TOML file with settings; its keys are the options' names with _ for -.",
)
@_options
@click.pass_context
def command(ctx: click.Context, /, **values: Any) -> None:
    """Serves model compression over gRPC.

    Prints one line `listening on HOST:PORT` to stdout when it serves. SIGTERM and SIGINT: takes no new work, finishes
    or re-queues what runs, exits 0. Started again on the same data folder, it goes on where it was.
    """
    ctx.obj = values
    if ctx.invoked_subcommand is not None:
        return
    try:
        settings = Settings(**values)
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(_serve(settings))
    except SettingsError as error:
        raise click.UsageError(str(error)) from error


command.add_command(token)
command.add_command(check)
command.add_command(backup)
command.add_command(restore)
command.add_command(work)


async def _serve(settings: Settings) -> None:
    from modelpress_server.app import Server
    from modelpress_server.connections import raise_descriptor_limit

    raise_descriptor_limit()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = Server(settings)
    await server.start()
    # What is there now stays: a collection of garbage that looked at all of it would hold up calls.
    gc.collect()
    gc.freeze()
    print(f"listening on {server.address}", flush=True)  # the line that scripts wait for
    await stopped.wait()
    logging.getLogger(__name__).info("shutting down; running jobs have %g s", settings.drain_grace_s)
    await server.stop()


def main() -> None:
    """Entry point of `compress-server`."""
    command()


if __name__ == "__main__":
    main()
