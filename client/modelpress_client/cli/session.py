"""Runs the body of a command: client, local server, time limit, interruption."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from modelpress_client.cli import again
from modelpress_client.cli.options import Shared, shared_of
from modelpress_client.cli.output import Output, write
from modelpress_client.errors import EXIT_INTERRUPTED, TimedOutError, UsageError

if TYPE_CHECKING:
    from modelpress_client.async_client import AsyncClient
    from modelpress_client.settings import RetryPolicy

CONNECT_SHARE = 0.8  # of a command's time limit, at most, goes into the first connection
Body = Callable[["Session"], Awaitable[int | None]]


class Session:
    """What a command works with. `given`: its options as they were spelled.

    `job` is set once a job exists, so that an interruption can name it.
    """

    client: AsyncClient

    def __init__(self, shared: Shared, given: again.Given) -> None:
        self.shared, self.given = shared, given
        self.out = Output(as_json=shared.json, quiet=shared.quiet)
        self.job = ""

    def what_goes_on(self) -> str:
        """What an interruption leaves behind, and what to do about it."""
        if not self.job:
            return "Nothing was started on the server. What was sent is kept: the same command goes on from there."
        if self.shared.local:
            return f"{self.job} goes on when --local is used again on the same data directory."
        follow, stop = (again.command(self.given, name, self.job) for name in ("watch", "cancel"))
        return f"{self.job} goes on. Follow it: {follow}. Stop it: {stop}"


class InterruptedCommandError(Exception):
    """Ctrl-C or SIGTERM. `job`: the name of the one that goes on; empty: none does."""

    def __init__(self, message: str, job: str) -> None:
        super().__init__(message)
        self.job = job


def run(body: Body) -> None:
    """Runs the body and leaves with its exit code."""
    context = click.get_current_context()
    session = Session(shared_of(context), again.given(context))
    try:
        code = asyncio.run(_main(session, body))
    except KeyboardInterrupt:
        raise InterruptedCommandError(session.what_goes_on(), session.job) from None
    raise SystemExit(code or 0)


async def _main(session: Session, body: Body) -> int | None:
    task = asyncio.current_task()
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        if task is not None:
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    timeout_s = session.shared.timeout_s
    try:
        async with _client(session), asyncio.timeout(timeout_s) as limit:
            return await body(session)
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimedOutError(
            f"Not done within {timeout_s:g} s. {session.what_goes_on()}",
            details={"job": session.job} if session.job else {},
        ) from None
    except asyncio.CancelledError:
        if terminated:
            raise KeyboardInterrupt from None
        raise


@asynccontextmanager
async def _client(session: Session) -> AsyncIterator[None]:
    from modelpress_client.async_client import AsyncClient

    shared = session.shared
    if shared.local:
        if "--server" in session.given:
            raise UsageError("--local uses a server of its own on this machine: leave out --server, or --local.")
        from modelpress_client.local import default_data_dir, local_server

        async with (
            local_server(shared.data_dir or default_data_dir()) as address,
            AsyncClient(address, project=shared.project) as session.client,
        ):
            yield
        return
    async with AsyncClient(
        shared.server,
        project=shared.project,
        token=shared.token,
        ca=shared.ca,
        cert=shared.cert,
        key=shared.key,
        retry=_retry(shared.timeout_s),
    ) as session.client:
        settings = session.client.settings
        if settings.token and not settings.uses_tls and not settings.is_loopback:
            session.out.hint(
                "Warning: the token goes over the network unencrypted; use --ca FILE or https://HOST:PORT."
            )
        yield


def _retry(timeout_s: float | None) -> RetryPolicy:
    """That no server is there is said before the command's own time is up: the one explains the other."""
    from modelpress_client.settings import RetryPolicy

    usual = RetryPolicy()
    if timeout_s is None:
        return usual
    return replace(
        usual,
        connect_timeout_s=min(usual.connect_timeout_s, timeout_s * CONNECT_SHARE),
        starting_s=min(usual.starting_s, timeout_s * CONNECT_SHARE / 2),
    )


def interrupted(out: Output, message: str, job: str) -> int:
    """Says that the command was interrupted."""
    details = {"job": job} if job else {}
    out.document({"error": {"reason": "INTERRUPTED", "message": message, "details": details}})
    write(sys.stderr, f"Interrupted. {message}")
    return EXIT_INTERRUPTED
