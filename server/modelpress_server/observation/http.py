"""HTTP beside gRPC, in the same event loop.

    /livez      200 while the event loop runs
    /readyz     200 or 503, with each check as JSON
    /metrics    Prometheus' text; where the server asks for tokens, for a token with a role in all projects (`*`)
    /console    pages for people, where they are asked for (`modelpress_server.console`)

Probes have no credentials, so `/livez` and `/readyz` answer everybody; they name no project and no file. On another
address than the loopback one it speaks TLS where the server has a certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from modelpress_server.config import LOOPBACK_HOSTS, Settings, SettingsError
from modelpress_server.errors import ServiceError, TooManyAttemptsError, UnauthenticatedError
from modelpress_server.identity.authenticator import Authenticator
from modelpress_server.identity.roles import ALL_PROJECTS
from modelpress_server.observation.look import Lookout
from modelpress_server.observation.metrics import PrometheusMeter
from modelpress_server.observation.readiness import Readiness
from modelpress_server.watched_file import signature

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
# A connection is closed when it is so old, at once where nothing is asked on it: nobody holds one for ever.
MAX_CONNECTION_S = 60.0
CLOSE_GRACE_S = 1
RENEWAL_INTERVAL_S = 60.0


class _Connection(H11Protocol):
    """A connection of uvicorn's, one of a bounded number and for a bounded time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._end = self.loop.call_later(MAX_CONNECTION_S, self._end_of_life)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _end_of_life(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False
            self._end = self.loop.call_later(MAX_CONNECTION_S, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    """uvicorn, which leaves the signals to the server that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """`bind`, `start`, and `close` once."""

    def __init__(
        self,
        settings: Settings,
        authenticator: Authenticator,
        meter: PrometheusMeter,
        lookout: Lookout,
        readiness: Readiness,
        pages: Sequence[BaseRoute] = (),
    ) -> None:
        """`pages`: what is served besides metrics and probes."""
        self._settings = settings
        self._authenticator = authenticator
        self._meter = meter
        self._lookout = lookout
        self._readiness = readiness
        self._pages = pages
        self._reading = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._socket: socket.socket | None = None
        self.address = ""

    def bind(self) -> None:
        """Takes the address. Raises SettingsError."""
        host, port = self._settings.http_host, self._settings.http_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise SettingsError(
                f"http_listen: cannot bind {self._settings.http_listen}: {error.strerror}. Choose another, or port 0."
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{listening.getsockname()[1]}"

    async def start(self) -> None:
        """Serves. Raises SettingsError where the certificate cannot be used."""
        settings = self._settings
        encrypted = settings.tls and settings.http_host not in LOOPBACK_HOSTS
        config = uvicorn.Config(
            self._application(),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSE_GRACE_S,
            ssl_certfile=settings.tls_cert if encrypted else None,
            ssl_keyfile=settings.tls_key if encrypted else None,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(f"http_listen: the certificate or its key cannot be used: {error}.") from error
        self._uvicorn = _Uvicorn(config)
        sockets = [self._socket] if self._socket is not None else []
        self._tasks.append(asyncio.create_task(self._uvicorn.serve(sockets)))
        if encrypted:
            self._tasks.append(asyncio.create_task(self._renew(config)))
        scheme = "https" if encrypted else "http"
        what = "metrics, probes and /console" if self._pages else "metrics and probes"
        logger.info("%s on %s://%s", what, scheme, self.address)

    async def close(self) -> None:
        """Answers what was asked, for a moment, then closes."""
        if self._tasks:
            self._uvicorn.should_exit = True
            for task in self._tasks[1:]:
                task.cancel()
            for error in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(error, Exception):  # the rest of the server is to end all the same
                    logger.error("http_listen: it ended by itself", exc_info=error)
        if self._socket is not None:
            self._socket.close()

    async def _renew(self, config: uvicorn.Config) -> None:
        """A certificate that was renewed on the disk is used from the next connection on."""
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if cert is None or key is None or config.ssl is None:
            return
        seen = signature(cert), signature(key)
        while True:
            await asyncio.sleep(RENEWAL_INTERVAL_S)
            found = signature(cert), signature(key)
            if found == seen:
                continue
            try:
                config.ssl.load_cert_chain(cert, key)
                seen = found
            except OSError as error:
                logger.error("http_listen: the renewed certificate cannot be used: %s", error)

    def _application(self) -> Starlette:
        routes = [Route("/livez", _live), Route("/readyz", self._ready), Route("/metrics", self._metrics)]
        return Starlette(routes=[*routes, *self._pages])

    async def _ready(self, _request: Request) -> Response:
        ready, report = await self._readiness.report()
        return JSONResponse(report, 200 if ready else 503, headers=_NEVER_STORED)

    async def _metrics(self, request: Request) -> Response:
        refused = await self._refused(request)
        if refused is not None:
            return refused
        async with self._reading:
            text = await asyncio.to_thread(self._meter.text, await self._lookout.look())
        return Response(text, media_type=CONTENT_TYPE_LATEST, headers=_NEVER_STORED)

    async def _refused(self, request: Request) -> Response | None:
        """The answer to who may not see the metrics: they name every project."""
        peer = f"ip:{request.client.host}:{request.client.port}" if request.client else ""
        try:
            caller = await self._authenticator.caller(request.headers.get("authorization", ""), peer)
        except UnauthenticatedError as error:
            return PlainTextResponse(f"{error}\n", 401, headers={"WWW-Authenticate": "Bearer"})
        except TooManyAttemptsError as error:
            return PlainTextResponse(f"{error}\n", 429, headers={"Retry-After": "5"})
        except ServiceError as error:
            return PlainTextResponse(f"{error}\n", 503)
        if caller.role(ALL_PROJECTS) is None:
            return PlainTextResponse("The metrics name every project: they need a token with a role in '*'.\n", 403)
        return None


_NEVER_STORED = {"Cache-Control": "no-store"}


async def _live(_request: Request) -> Response:
    return PlainTextResponse("ok\n", headers=_NEVER_STORED)
