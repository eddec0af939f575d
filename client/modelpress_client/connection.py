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
from modelpress_client.tracing import call_span, trace_metadata

if TYPE_CHECKING:
    RequestT = TypeVar("RequestT", bound=Message)
    ResponseT = TypeVar("ResponseT", bound=Message)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
# What gRPC says of a channel without a connection -> the cause in plain words.
_CAUSES = {
    "Connection refused": "the connection is refused",
    "errors resolving": "the name of the host is not known",
    "DNS resolution failed": "the name of the host is not known",
    "No route to host": "there is no way to the host",
    "Network is unreachable": "there is no way to its network",
}


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
        self._channel = open_channel(settings)
        self._reached = False
        self.uploads = upload_service_pb2_grpc.UploadServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self._channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call that begins now."""
        return call_metadata(self.settings) + trace_metadata()

    async def close(self) -> None:
        """Ends all calls."""
        await self._channel.close(grace=None)

    async def reach(self) -> None:
        """Waits for the first connection.

        Raises ServerUnreachableError: soon where the address refuses, since a server that is starting needs a moment
        at most, and after the connect timeout where nothing answers at all.
        """
        if self._reached:
            return
        timeout_s = self.settings.retry.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect()
        except TimeoutError:
            raise self._unreachable(f"nothing came within {timeout_s:g} s") from None
        self._reached = True

    async def _connect(self) -> None:
        """Returns once connected; attempts that fail at once go on for `starting_s`."""
        failing: asyncio.Timeout | None = None
        try:
            async with asyncio.timeout(None) as failing:
                while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and failing.when() is None:
                        failing.reschedule(asyncio.get_running_loop().time() + self.settings.retry.starting_s)
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            if failing is None or not failing.expired():
                raise
            raise self._unreachable(*await self._cause()) from None

    async def _cause(self) -> tuple[str, bool]:
        """Why no connection comes about, as gRPC says of a call on such a channel; whether TLS may be the reason."""
        try:
            await self._check_health(self.settings.retry.connect_timeout_s)
        except grpc.aio.AioRpcError as error:
            for said, cause in _CAUSES.items():
                if said in (error.details() or ""):
                    return cause, False
        return "it ends the connection", True

    def _unreachable(self, cause: str, tls: bool = True) -> ServerUnreachableError:
        hint = (
            " Its certificate may not be one that is trusted here: name its authority with --ca FILE."
            if self.settings.uses_tls
            else " If it speaks TLS, pass --ca FILE or https://HOST:PORT."
        )
        return ServerUnreachableError(
            f"No server answers at {self.settings.address}: {cause}. Start one with 'compress-server', name another "
            f"with --server HOST:PORT, or use --local.{hint if tls else ''}"
        )

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
                with call_span(type(request).DESCRIPTOR.name.removesuffix("Request")):
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
        async with self.translated():
            answer = await self._check_health(self.settings.retry.connect_timeout_s)
        status = answer[1] if len(answer) == 2 and answer[0] == 0x08 else 0
        return _SERVING_STATUS.get(status, "UNKNOWN")

    async def _check_health(self, timeout_s: float) -> bytes:
        # The message is one enum field; its package would be a dependency for these two bytes.
        check = self._channel.unary_unary(HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
        return cast(bytes, await check(b"", timeout=timeout_s, metadata=self.metadata))


def stalled(what: str, idle_s: float) -> ModelpressError:
    """A stream on which nothing moves is as good as cut."""
    return ServerUnreachableError(f"{what}: nothing moved for {idle_s:g} s.", reason="STALLED", retry=Retry())
