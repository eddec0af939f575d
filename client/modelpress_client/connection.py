"""One connection: the stubs, and calls that survive a server that is away for a moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
from google.protobuf.message import Message
from modelpress_protos.v1 import (
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    server_service_pb2_grpc,
    upload_service_pb2_grpc,
)

from modelpress_client.channel import call_metadata, open_channel
from modelpress_client.errors import ModelpressError, Retry, ServerUnreachableError, from_rpc_error
from modelpress_client.settings import RetryPolicy, Settings

if TYPE_CHECKING:
    RequestT = TypeVar("RequestT", bound=Message)
    ResponseT = TypeVar("ResponseT", bound=Message)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


class Patience:
    """Decides whether to try again, and waits: exponential backoff with jitter until `give_up_s` without progress."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._attempt = 0
        self._last_progress = time.monotonic()
        self._explained: ModelpressError | None = None

    def progressed(self) -> None:
        """Something got through: start counting anew."""
        self._attempt = 0
        self._last_progress = time.monotonic()

    async def wait(self, error: ModelpressError) -> None:
        """Waits before the next attempt. Raises `error`, or an earlier one that says more, when there must be none."""
        if error.retry is None:
            raise error
        # grpc.aio replaces the status of a stream that ends during a write by a bare INTERNAL.
        if error.reason not in ("INTERNAL", "CANCELLED"):
            self._explained = error
        ceiling = min(self._policy.initial_backoff_s * 2**self._attempt, self._policy.max_backoff_s)
        # Jitter spreads the clients of a server that has come back; it is no secret.
        delay = max(error.retry.delay_s, random.uniform(ceiling / 2, ceiling))  # noqa: S311
        if time.monotonic() + delay - self._last_progress > self._policy.give_up_s:
            raise self._explained or error
        self._attempt = min(self._attempt + 1, 30)
        await asyncio.sleep(delay)


class Connection:
    """The stubs of one server. Use as an async context manager, or call `close`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metadata = call_metadata(settings)
        self._channel = open_channel(settings)
        self._reached = False
        self.uploads = upload_service_pb2_grpc.UploadServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self._channel)

    async def close(self) -> None:
        """Ends all calls."""
        await self._channel.close(grace=None)

    async def reach(self) -> None:
        """Waits for the first connection. Raises ServerUnreachableError after the connect timeout."""
        if self._reached:
            return
        timeout_s = self.settings.retry.connect_timeout_s
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            tls = (
                " Its certificate may not be one that is trusted here: name its authority with --ca FILE."
                if self.settings.uses_tls
                else " If it speaks TLS, pass --ca FILE or https://HOST:PORT."
            )
            raise ServerUnreachableError(
                f"No server answers at {self.settings.address} (waited {timeout_s:g} s). Start one with "
                f"'compress-server', name another with --server HOST:PORT, or use --local.{tls}"
            ) from None
        self._reached = True

    def patience(self) -> Patience:
        """A new count of attempts."""
        return Patience(self.settings.retry)

    def error(self, error: grpc.aio.AioRpcError) -> ModelpressError:
        """Our exception for a failed call of this connection."""
        return from_rpc_error(error, server=self.settings.address)

    @asynccontextmanager
    async def translated(self) -> AsyncIterator[None]:
        """Turns gRPC's exceptions into ours."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error

    async def call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT, *, retry: bool = True
    ) -> ResponseT:
        """One unary call that may be repeated: it is idempotent, or it carries a request id."""
        await self.reach()
        patience = self.patience()
        while True:
            try:
                async with self.translated():
                    timeout_s = self.settings.retry.call_timeout_s
                    return await method(request, timeout=timeout_s, metadata=self.metadata)
            except ModelpressError as error:
                if not retry:
                    raise
                await patience.wait(error)

    async def serving_status(self) -> str:
        """What grpc.health.v1 says: SERVING, NOT_SERVING, UNKNOWN."""
        await self.reach()
        # The message is one enum field; its package would be a dependency for these two bytes.
        check = self._channel.unary_unary(HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
        async with self.translated():
            timeout_s = self.settings.retry.connect_timeout_s
            answer = cast(bytes, await check(b"", timeout=timeout_s, metadata=self.metadata))
        status = answer[1] if len(answer) == 2 and answer[0] == 0x08 else 0
        return _SERVING_STATUS.get(status, "UNKNOWN")


def stalled(what: str, idle_s: float) -> ModelpressError:
    """A stream on which nothing moves is as good as cut."""
    return ServerUnreachableError(f"{what}: nothing moved for {idle_s:g} s.", reason="STALLED", retry=Retry())
