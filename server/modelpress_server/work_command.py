"""`compress-server work`: does tasks of servers that share their stores, and serves nothing."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import replace
from typing import Any

import click

from modelpress_server import logs
from modelpress_server.config import Settings, SettingsError
from modelpress_server.executors.base import WorkerUnavailableError

UNAVAILABLE = 75  # EX_TEMPFAIL: try again later


@click.command()
@click.option(
    "--once",
    is_flag=True,
    envvar="COMPRESS_SERVER_WORK_ONCE",
    show_envvar=True,
    help="Do one task, a job or else the inspection of a model, and end with 0, whatever became of it, or if there was "
    "none; with 75 where no worker can be started.",
)
@click.pass_context
def work(ctx: click.Context, once: bool) -> None:
    """Takes queued jobs and models from the database of servers that share it, and works on them here.

    The settings stand before `work`: --database and --blobs as the servers have them, a --data-dir of its own,
    --workers for how many at a time. It serves nothing. SIGTERM: takes no more, finishes or re-queues what runs, exits
    0.
    """
    values: dict[str, Any] = ctx.obj
    try:
        settings = Settings(**values)
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(_once(settings) if once else _always(settings))
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    except WorkerUnavailableError as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(UNAVAILABLE)


async def _once(settings: Settings) -> None:
    from modelpress_server.work import Work

    process = Work(replace(settings, worker_start="exec"))  # a process that forks pays with the second task
    loop, task = asyncio.get_running_loop(), asyncio.create_task(process.once())
    # The task ends by itself once its run is stopped.
    stopping: list[asyncio.Task[None]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stopping.append(asyncio.create_task(process.drain())))
    if not await task:
        print("nothing to do", flush=True)


async def _always(settings: Settings) -> None:
    from modelpress_server.work import Work

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    process = Work(settings)
    await process.start()
    print("working", flush=True)  # the line that scripts wait for
    await stopped.wait()
    logging.getLogger(__name__).info("shutting down; running jobs have %g s", settings.drain_grace_s)
    await process.stop()
