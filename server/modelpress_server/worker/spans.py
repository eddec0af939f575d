"""Which parts of a task began and ended when, for the server's traces: a worker has no network to send its own to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.worker.events import Events

MAX_SPANS = 1000
MAX_NAME_CHARS = 200


class Spans:
    """Numbers the parts of one task; may be used from any thread."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._count = 0
        self._within: ContextVar[int] = ContextVar("span", default=0)  # another thread's parts have no parent

    @contextmanager
    def span(self, kind: str, name: str) -> Iterator[None]:
        """Around a part; beyond the first MAX_SPANS nothing is told."""
        with self._lock:
            self._count += 1
            number = self._count
        if number > MAX_SPANS:
            yield
            return
        self._send(worker_pb2.Span(id=number, parent=self._within.get(), kind=kind, name=name[:MAX_NAME_CHARS]))
        token, failed = self._within.set(number), True
        try:
            yield
            failed = False
        finally:
            self._within.reset(token)
            self._send(worker_pb2.Span(id=number, ended=True, failed=failed))

    def _send(self, span: worker_pb2.Span) -> None:
        span.time_us = time.time_ns() // 1000
        self._events.send(worker_pb2.WorkerEvent(span=span))
