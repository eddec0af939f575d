"""Turns what a worker tells into stored events and log lines, at a rate that a database likes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.printable import printable
from modelpress_protos.v1 import job_service_pb2

from modelpress_server.errors import clip
from modelpress_server.stores.jobs import JobStore, Lease, LogLine
from modelpress_server.stores.records import now_us
from modelpress_server.waiting import Notifier, uninterrupted

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.1
MAX_PENDING_EVENTS = 100
MAX_EVENTS = 100_000
MAX_LOG_LINES = 10_000
MAX_LINE_CHARS = 4096
MAX_STAGE_CHARS = 64
MAX_MESSAGE_CHARS = 256
NO_BREAK = "\u00a0"  # stands between a figure and its unit
SEVERITIES = ("INFO", "WARNING", "ERROR")


class JobRecorder:
    """Events and log of one attempt of one job; `on_event` never blocks."""

    def __init__(self, lease: Lease, jobs: JobStore, notifier: Notifier, on_lost: Callable[[], None]) -> None:
        self._lease = lease
        self._on_lost = on_lost  # another server has the job
        self._jobs = jobs
        self._notifier = notifier
        self._events: list[job_service_pb2.WatchJobResponse] = []
        self._log: list[LogLine] = []
        self._fraction = 0.0
        self._event_count = 0
        self._line_count = 0
        self._news = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to store what comes."""
        self._flusher = asyncio.create_task(self._flush_regularly())

    async def close(self) -> None:
        """Stores what is left."""
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait([self._flusher])
        await self._flush()

    def on_event(self, event: worker_pb2.WorkerEvent) -> None:
        """Takes progress and log lines; other events are not for the record."""
        kind = event.WhichOneof("event")
        if kind == "progress":
            self._take_progress(event.progress)
        elif kind == "log":
            for text in event.log.text.splitlines() or [""]:
                self.log(event.log.severity, text)
        self._news.set()

    def log(self, severity: str, text: str) -> None:
        """Takes one line; beyond the limit of a job's log, one line says so and the others are dropped."""
        self._line_count += 1
        if self._line_count > MAX_LOG_LINES:
            return
        if self._line_count == MAX_LOG_LINES:
            severity, text = "WARNING", f"The log ends here: it has {MAX_LOG_LINES} lines."
        severity = severity if severity in SEVERITIES else "INFO"
        self._log.append(LogLine(now_us(), severity, clip(printable(text, keep=NO_BREAK), MAX_LINE_CHARS)))
        self._news.set()

    def _take_progress(self, given: job_service_pb2.Progress) -> None:
        fraction = given.fraction if math.isfinite(given.fraction) else 0.0
        self._fraction = max(self._fraction, min(fraction, 1.0))
        event = job_service_pb2.WatchJobResponse()
        event.time.FromMicroseconds(now_us())
        progress = event.progress
        progress.stage = clip(printable(given.stage), MAX_STAGE_CHARS)
        progress.stage_index = max(given.stage_index, 0)
        progress.stage_count = max(given.stage_count, 0)
        progress.fraction = self._fraction
        progress.message = clip(printable(given.message), MAX_MESSAGE_CHARS)
        same_stage = bool(self._events) and self._events[-1].progress.stage == progress.stage
        # Within one interval the latest word on a stage is enough.
        if same_stage or len(self._events) >= MAX_PENDING_EVENTS:
            self._events[-1] = event
        elif self._event_count < MAX_EVENTS:
            self._event_count += 1
            self._events.append(event)

    async def _flush_regularly(self) -> None:
        while True:
            await self._news.wait()
            await uninterrupted(self._flush())  # what `close` interrupts would be lost
            await asyncio.sleep(FLUSH_INTERVAL_S)

    async def _flush(self) -> None:
        self._news.clear()
        events, self._events = self._events, []
        lines, self._log = self._log, []
        if not events and not lines:
            return
        try:
            if not await self._jobs.progress(self._lease, events, lines):
                self._on_lost()
        except Exception as error:  # noqa: BLE001  # neither a full disk nor a bug here may lose the job's result
            logger.warning(
                "job %s: %d events and %d lines lost: %s", self._lease.job_id, len(events), len(lines), error
            )
        self._notifier.notify(self._lease.job_id)
