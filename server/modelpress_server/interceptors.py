"""What happens around every call: authentication, refusal while draining, and errors as rich status."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from modelpress_server import errors
from modelpress_server.config import Settings, SettingsError

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
HEALTH_PREFIX = "/grpc.health."
DRAIN_RETRY_S = 2.0
# Calls that bring new work; the others go on while running jobs get their grace.
NEW_WORK = ("CreateUpload", "WriteUpload", "CreateModel", "CreateJob")

Handler = Any  # grpc.RpcMethodHandler, which only type checkers may subscript
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]

# Projects that the caller of this call may name; None: all.
_allowed_projects: ContextVar[frozenset[str] | None] = ContextVar("allowed_projects", default=None)


def check_project(project: str) -> str:
    """The project, where the caller may name it. Raises ResourceNotFoundError, as for one that does not exist."""
    allowed = _allowed_projects.get()
    if allowed is not None and project not in allowed:
        raise errors.ResourceNotFoundError(f"There is no project {project}.")
    return project


class Tokens:
    """The tokens that the server knows; only their hashes are compared, in constant time."""

    def __init__(self, tokens: Mapping[str, frozenset[str] | None]) -> None:
        self._projects = {hashlib.sha256(token.encode()).digest(): allowed for token, allowed in tokens.items()}

    @classmethod
    def load(cls, settings: Settings) -> Tokens | None:
        """From the settings; None: the server asks for no token. Raises SettingsError."""
        tokens: dict[str, frozenset[str] | None] = {}
        if settings.token is not None:
            tokens[settings.token.strip()] = None
        if settings.token_file is not None:
            tokens |= _read_token_file(settings.token_file)
        if "" in tokens:
            raise SettingsError("token: is empty; set a long random one.")
        return cls(tokens) if tokens else None

    def projects(self, authorization: str) -> frozenset[str] | None:
        """Projects of the bearer of a token; None: all. Raises UnauthenticatedError."""
        scheme, _, token = authorization.partition(" ")
        given = hashlib.sha256(token.strip().encode(errors="replace")).digest()
        found = [key for key in self._projects if hmac.compare_digest(key, given)]
        if scheme.lower() != "bearer" or not found:
            raise errors.UnauthenticatedError(
                "This server asks for a token, and none that it knows was sent. Set --token or COMPRESS_TOKEN."
            )
        return self._projects[found[0]]


def _read_token_file(path: Path) -> dict[str, frozenset[str] | None]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"token_file: cannot read {path}: {error.strerror}.") from error
    words = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not words:
        raise SettingsError(f"token_file: {path} holds no token. Write one a line.")
    return {token: frozenset(projects) or None for token, *projects in words}


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not subscriptable at run time
    """Around every call: who calls, whether the server still takes work, and what the client sees of an error."""

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens
        self._draining = False

    def drain(self) -> None:
        """From now on, new work is refused."""
        self._draining = True

    async def intercept_service(  # type: ignore[override]  # grpc-stubs has the synchronous signature
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        authorization = ""
        for key, value in handler_call_details.invocation_metadata or ():
            if key == "authorization":
                authorization = value if isinstance(value, str) else value.decode("latin-1")
        return self._wrap(handler, method, authorization)

    def _enter(self, method: str, authorization: str) -> None:
        if not method.startswith(HEALTH_PREFIX) and self._tokens is not None:
            _allowed_projects.set(self._tokens.projects(authorization))
        if self._draining and method.rpartition("/")[2] in NEW_WORK:
            raise draining()

    def _wrap(self, handler: Any, method: str, authorization: str) -> Handler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def call(request: Any, context: Any) -> Any:
            try:
                self._enter(method, authorization)
                result = behaviour(request, context)
                return await result if inspect.isawaitable(result) else result
            except Exception as error:  # noqa: BLE001  # every error of a call becomes a status here
                await _abort(context, method, error)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._enter(method, authorization)
                async for response in behaviour(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001  # as above
                await _abort(context, method, error)

        wrapped = stream if inspect.isasyncgenfunction(behaviour) else call
        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        make: Any = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
        made: Handler = make(wrapped, handler.request_deserializer, handler.response_serializer)
        return made


def draining() -> errors.DrainingError:
    """The answer to who comes while the server shuts down."""
    return errors.DrainingError(
        "The server is shutting down and takes no new work. Try again shortly.", retry_after_s=DRAIN_RETRY_S
    )


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError | asyncio.InvalidStateError):
        raise error
    if not isinstance(error, errors.ServiceError):
        internal = errors.InternalError()
        logger.error("incident %s in %s", internal.incident, method, exc_info=error)
        error = internal
    status: status_pb2.Status = errors.status_of(error)
    await context.abort(
        errors.code_of(error), status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )
