"""Whether the server can do its work, check by check."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from modelpress_server.clock import Clock
from modelpress_server.errors import ServiceError
from modelpress_server.executors.base import WorkerHost
from modelpress_server.host import Host
from modelpress_server.interceptors import Gate
from modelpress_server.stores.blobs import BlobStore
from modelpress_server.stores.overview import StoreOverview

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0
# However often somebody asks, the checks run no more often than this.
INTERVAL_S = 1.0


@dataclass(frozen=True)
class Check:
    """What one check found. `detail` is for people, and says nothing that a stranger may not know."""

    ok: bool
    detail: str = ""


class Readiness:
    """The checks of one server."""

    def __init__(
        self,
        store: StoreOverview,
        blobs: BlobStore,
        executor: WorkerHost,
        host: Host,
        gate: Gate,
        clock: Clock,
    ) -> None:
        self._blobs = blobs
        self._store = store
        self._executor = executor
        self._host = host
        self._gate = gate
        self._clock = clock
        self._found: dict[str, Check] = {}
        self._checked_at_s = -INTERVAL_S
        self._lock = asyncio.Lock()

    async def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether all is well, and the answer as JSON has it."""
        async with self._lock:
            if self._clock.now_s() - self._checked_at_s >= INTERVAL_S:
                self._found = {
                    "store": await _within_time(self._check_store),
                    "blobs": await _within_time(self._check_blobs),
                    "workers": self._check_workers(),
                }
                self._checked_at_s = self._clock.now_s()
        found = {**self._found, "accepting": self._check_accepting()}
        ready = all(check.ok for check in found.values())
        checks = {name: asdict(check) for name, check in found.items()}
        return ready, {"status": "ready" if ready else "not ready", "checks": checks}

    async def _check_store(self) -> Check:
        await self._store.ping()
        return Check(True)

    async def _check_blobs(self) -> Check:
        try:
            await self._blobs.ping()
        except ServiceError as error:
            return Check(False, str(error))
        return Check(True)

    def _check_workers(self) -> Check:
        if not self._host.able:
            return Check(False, "no worker can be started; jobs wait, uploads and downloads are served")
        return Check(True, f"sandbox level {self._executor.sandbox_level}")

    def _check_accepting(self) -> Check:
        return Check(True) if self._gate.accepts else Check(False, "the server is shutting down")


async def _within_time(check: Callable[[], Awaitable[Check]]) -> Check:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check()
    except TimeoutError:
        return Check(False, f"no answer within {CHECK_TIMEOUT_S:g} s")
    except Exception:
        logger.exception("readiness: a check failed")
        return Check(False, "failed; the server's log says why")
