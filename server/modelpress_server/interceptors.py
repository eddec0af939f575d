"""What happens around every call: who calls and what they may, refusal while draining, audit, errors as rich status."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from modelpress_server import errors, logs
from modelpress_server.clock import Clock
from modelpress_server.identity.audit import AuditLog, resource_of
from modelpress_server.identity.authenticator import Authenticator
from modelpress_server.identity.roles import ALL_PROJECTS, ANYBODY, Caller, needed_role
from modelpress_server.identity.throttle import Throttle
from modelpress_server.listing import Scope
from modelpress_server.names import ANY_PROJECT, new_id
from modelpress_server.observation.meter import Meter
from modelpress_server.observation.tracer import TRACE_PARENT_KEY, Tracer
from modelpress_server.projects import Projects
from modelpress_server.shortage import shortage_of
from modelpress_server.waiting import ended

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
HEALTH_PREFIX = "/grpc.health."
API_PREFIX = "/modelpress."
REQUEST_ID_KEY = "x-request-id"
DRAIN_RETRY_S = 2.0
RATE_WINDOW_S = 10.0
# A stream whose caller may no longer do what it does ends within so long, and one look at the tokens.
RECHECK_S = 10.0
# Calls that bring new work; the others go on while running jobs get their grace.
NEW_WORK = ("CreateUpload", "WriteUpload", "CreateModel", "CreateJob")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
Handler = Any  # grpc.RpcMethodHandler, which only type checkers may subscript
Method = Any  # of a service: a coroutine function, or a generator of answers
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


@dataclass
class Call:
    """A call as far as it is known: for the checks inside the services, and for the audit log."""

    path: str  # /modelpress.v1.JobService/CreateJob
    request_id: str  # the client's own, or one of ours
    peer: str = ""  # ipv4:127.0.0.1:50000
    caller: Caller = ANYBODY
    project: str = ""
    trace_parent: str = ""
    resource: str = ""  # where neither request nor answer names it
    take_request: Callable[[str], None] = lambda project: None

    @property
    def method(self) -> str:
        """CreateJob."""
        return self.path.rpartition("/")[2]


_call: ContextVar[Call] = ContextVar("call")


def check_project(project: str) -> str:
    """The project, where the caller may do there what this call does.

    Raises ResourceNotFoundError, as for one that does not exist, PermissionDeniedError, QuotaExceededError.
    """
    call = _call.get()
    call.project = project
    logs.bind(project=project)
    _check_role(call, project)
    call.take_request(project)
    return project


def check_projects(parent: str) -> Scope:
    """What a list over `parent`, a project or ANY_PROJECT, goes over. Raises as `check_project` does."""
    if parent != ANY_PROJECT:
        return Scope(parent, (check_project(parent),))
    call = _call.get()
    call.project = parent
    call.take_request(parent)
    if call.caller.role(ALL_PROJECTS) is not None:
        return Scope(parent, None)
    needed = needed_role(call.method)
    return Scope(parent, tuple(project for project, role in call.caller.grants.items() if role >= needed))


def current_trace_parent() -> str:
    """The `traceparent` that what comes of this call belongs to; empty: nobody keeps a trace."""
    return _call.get().trace_parent


def note_resource(name: str) -> None:
    """What this call is about, for the audit log: a stream of requests cannot be read twice."""
    _call.get().resource = name


def _check_role(call: Call, project: str) -> None:
    """Raises ResourceNotFoundError, PermissionDeniedError."""
    if project == ANY_PROJECT:
        return  # whoever asks for all projects gets those that he may read
    role, needed = call.caller.role(project), needed_role(call.method)
    if role is None:
        raise errors.ResourceNotFoundError(f"There is no project {project}.")
    if role < needed:
        raise errors.PermissionDeniedError(
            f"{call.method} needs the role {needed.name.lower()} in project {project}; this token has "
            f"{role.name.lower()}. Ask the server's operator for another token.",
            metadata={"role": role.name.lower(), "needed": needed.name.lower()},
        )


class Malformed:
    """What came instead of a request: bytes that are none."""


def check_readable(message: Any) -> None:
    """Raises InvalidFieldsError where a message could not be read."""
    if isinstance(message, Malformed):
        violation = errors.FieldViolation("", "the bytes are no message of this method; client and server differ")
        raise errors.InvalidFieldsError([violation])


def _readable(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """The deserializer; what it cannot read is told by the call, with a status, where gRPC would say UNKNOWN."""
    if deserializer is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return Malformed()

    return read


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not subscriptable at run time
    """Around every call: who calls, whether the server still takes work, and what the client sees of an error."""

    def __init__(
        self,
        authenticator: Authenticator,
        projects: Projects,
        audit: AuditLog,
        meter: Meter,
        clock: Clock,
        tracer: Tracer,
    ) -> None:
        self._authenticator = authenticator
        self._projects = projects
        self._audit = audit
        self._meter = meter
        self._clock = clock
        self._tracer = tracer
        self._requests = Throttle()
        self._pumps: set[asyncio.Task[None]] = set()  # of streams by other doors than gRPC
        self._draining = False

    @property
    def accepts(self) -> bool:
        """Whether new work is taken."""
        return not self._draining

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
        sent = {"authorization": "", REQUEST_ID_KEY: "", TRACE_PARENT_KEY: ""}
        for key, value in handler_call_details.invocation_metadata or ():
            if key in sent:
                sent[key] = value if isinstance(value, str) else value.decode("latin-1")
        request_id = sent[REQUEST_ID_KEY] if _REQUEST_ID.fullmatch(sent[REQUEST_ID_KEY]) else new_id()
        return self._wrap(handler, method, request_id, sent["authorization"], sent[TRACE_PARENT_KEY])

    async def _enter(self, call: Call, authorization: str, context: Any) -> None:
        _call.set(call)
        logs.bind(request_id=call.request_id)
        if not call.path.startswith(HEALTH_PREFIX):
            call.caller = await self._authenticator.caller(authorization, call.peer, self._certificate_name(context))
        call.take_request = self._take_request
        if self._draining and call.method in NEW_WORK:
            raise draining()

    def _take_request(self, project: str) -> None:
        per_s = self._projects.limits(project).requests_per_s
        if per_s <= 0:
            return
        burst, now_s = max(1.0, per_s * RATE_WINDOW_S), self._clock.now_s()
        wait_s = self._requests.wait_s(project, now_s, burst, per_s)
        if wait_s > 0:
            raise errors.QuotaExceededError(
                f"Project {project} sends more than {per_s:g} requests a second, the most that it may. Slow down.",
                subject=f"projects/{project}",
                retry_after_s=wait_s,
            )
        self._requests.take(project, now_s, burst, per_s)

    def _note(self, call: Call, outcome: str, *messages: Any) -> None:
        if not call.path.startswith(API_PREFIX):
            return
        self._audit.write(
            caller=call.caller.name,
            peer=call.peer,
            method=call.method,
            project=call.project,
            resource=call.resource or resource_of(*messages),
            outcome=outcome,
        )

    def _certificate_name(self, context: Any) -> str:
        names = context.auth_context().get("x509_common_name", ()) if self._authenticator.reads_certificates else ()
        return names[0].decode("utf-8", "replace") if names else ""

    async def _check_again(self, call: Call, authorization: str, context: Any) -> None:
        """Raises UnauthenticatedError, ResourceNotFoundError, PermissionDeniedError where a token holds no longer."""
        name = self._certificate_name(context)
        call.caller = await self._authenticator.caller(authorization, call.peer, name, known=True)
        if call.project:
            _check_role(call, call.project)

    async def _guard(self, stream: Coroutine[Any, Any, Any], call: Call, authorization: str, context: Any) -> Any:
        """Runs a stream to its end, or until its caller may no longer do what it does."""
        running = asyncio.create_task(stream)
        try:
            while not await self._clock.wait({running}, RECHECK_S):
                await self._check_again(call, authorization, context)
            return await running
        finally:
            running.cancel()
            await ended(running)

    async def ask(self, method: Method, request: Any, *, caller: Caller, peer: str) -> Any:
        """What a method of the API answers to a caller who came by another door than gRPC: with its checks and audit.

        Raises ServiceError.
        """
        with self._inside(method, request, caller, peer):
            return await method(request, None)

    async def stream(
        self, method: Method, request: Any, *, caller: Caller, peer: str, renew: Callable[[], Awaitable[Caller]]
    ) -> AsyncGenerator[Any, None]:
        """As `ask`, of a method that answers with a stream. `renew` finds out now and then who the caller still is."""
        with self._inside(method, request, caller, peer) as call:
            # A task of its own has the generator: who reads here may be cancelled in the middle, and more than once.
            answers: asyncio.Queue[Any] = asyncio.Queue(1)
            pump = asyncio.create_task(_pump(method(request, None), answers))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)
            pump.add_done_callback(lambda task: task.cancelled() or task.exception())
            checked_s = self._clock.now_s()
            try:
                while not (pump.done() and answers.empty()):
                    coming = asyncio.ensure_future(answers.get())
                    try:
                        await self._clock.wait({coming, pump}, RECHECK_S)
                        if self._clock.now_s() - checked_s >= RECHECK_S:
                            call.caller, checked_s = await renew(), self._clock.now_s()
                            if call.project:
                                _check_role(call, call.project)
                        if coming.done():
                            yield coming.result()
                    finally:
                        coming.cancel()
                await pump  # raises what it ended with
            finally:
                pump.cancel()

    async def left(self) -> None:
        """Ends what still runs of streams: readers that are cancelled may be gone before they have ended theirs."""
        pumps = list(self._pumps)
        for pump in pumps:
            pump.cancel()
        for pump in pumps:
            await ended(pump)

    @contextmanager
    def _inside(self, method: Method, request: Any, caller: Caller, peer: str) -> Iterator[Call]:
        call = Call(f"{API_PREFIX}console/{method.__name__}", new_id(), peer, caller, take_request=self._take_request)
        _call.set(call)
        logs.bind(request_id=call.request_id)
        outcome = "CANCELLED"
        try:
            yield call
            outcome = "OK"
        except Exception as error:
            outcome = _outcome(error)
            raise
        finally:
            self._note(call, outcome, request)

    def _end(self, call: Call, code: str, began_s: float) -> None:
        duration_s = time.perf_counter() - began_s
        self._meter.call_ended(call.path, code, duration_s)
        if logger.isEnabledFor(logging.DEBUG):
            fields = {"method": call.path, "code": code, "duration_ms": round(duration_s * 1e3, 3)}
            caller = {"caller": call.caller.name, "peer": call.peer}
            logger.debug("%s: %s", call.path, code, extra={"fields": {**fields, **caller}})

    def _wrap(self, handler: Any, method: str, request_id: str, authorization: str, parent: str) -> Handler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if inspect.isasyncgenfunction(behaviour):
            behaviour = _writing(behaviour)
        streams = (handler.request_streaming or handler.response_streaming) and method.startswith(API_PREFIX)

        async def call(request: Any, context: Any) -> Any:
            trace = self._tracer.call(method, parent)
            state = Call(method, request_id, context.peer(), trace_parent=trace.parent)
            outcome, result = "CANCELLED", None
            code, began_s = "CANCELLED", time.perf_counter()
            try:
                await self._enter(state, authorization, context)
                check_readable(request)
                result = behaviour(request, context)
                if streams:
                    result = self._guard(result, state, authorization, context)
                if inspect.isawaitable(result):
                    result = await result
                outcome = code = "OK"
                return result
            except grpc.aio.InternalError:  # the client went while an answer was written: no error of the server's
                raise asyncio.CancelledError from None
            except grpc.aio.BaseError:  # the call has its answer, or the server has stopped
                raise
            except Exception as error:  # noqa: BLE001  # every error of a call becomes a status here
                outcome = _outcome(error)
                shown = _shown(method, error)
                code = errors.code_of(shown).name
                await _abort(context, shown)
            finally:
                self._note(state, outcome, result, request)
                self._end(state, code, began_s)
                trace.end(code, state.project)

        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        make: Any = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
        made: Handler = make(call, _readable(handler.request_deserializer), handler.response_serializer)
        return made


def _writing(behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]]) -> Callable[[Any, Any], Awaitable[None]]:
    """A generator of responses as a coroutine that writes them.

    gRPC leaves a generator whose call was cancelled to the garbage collector, which closes it after the call is freed:
    what its clean-up asks of the context then ends the process. A coroutine cleans up while the call is there.
    """

    async def write(request: Any, context: Any) -> None:
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write


async def _pump(answers: AsyncGenerator[Any, None], queue: asyncio.Queue[Any]) -> None:
    async with aclosing(answers):
        async for answer in answers:
            await queue.put(answer)


def _outcome(error: Exception) -> str:
    known = errors.STATUS.get(type(error))  # type: ignore[arg-type]  # others are not in it
    return errors.reason_name(known[1]) if known is not None else "INTERNAL"


def draining() -> errors.DrainingError:
    """The answer to who comes while the server shuts down."""
    return errors.DrainingError(
        "The server is shutting down and takes no new work. Try again shortly.", retry_after_s=DRAIN_RETRY_S
    )


def _shown(method: str, error: Exception) -> errors.ServiceError:
    """What the client is told of an error. Raises the error where the call has ended already."""
    if isinstance(error, asyncio.InvalidStateError):
        raise error
    shortage = shortage_of(error)
    if shortage is not None:
        logger.warning("%s: %s", method, error)
        error = shortage
    if not isinstance(error, errors.ServiceError):
        internal = errors.InternalError()
        logger.error("incident %s in %s", internal.incident, method, exc_info=error)
        error = internal
    return error


async def _abort(context: Any, error: errors.ServiceError) -> None:
    status: status_pb2.Status = errors.status_of(error)
    await context.abort(
        errors.code_of(error), status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )
