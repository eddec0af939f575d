"""What the parts of the server tell of what belongs together: calls, and the runs of jobs that came of them."""

from __future__ import annotations

import re

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2

TRACE_PARENT_KEY = "traceparent"
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def trace_parent(text: str) -> str:
    """What a client sent, where it is a `traceparent` (W3C Trace Context, version 00 or what is read as such)."""
    return text if _TRACE_PARENT.fullmatch(text) else ""


class CallTrace:
    """One call. `parent`: what a job that comes of it belongs to."""

    def __init__(self, parent: str = "") -> None:
        self.parent = parent

    def end(self, code: str, project: str) -> None:
        """It has its answer; `code`: the name of a gRPC status code."""


class RunTrace:
    """One run of a job. `asks`: whether the worker is to tell of its parts."""

    asks = False

    def on_event(self, event: worker_pb2.WorkerEvent) -> None:
        """What the worker said."""

    def end(self, outcome: str, reason: str = "") -> None:
        """How it ended: the state that the job went to."""


class Tracer:
    """Keeps no traces, and passes on what clients send: a server without `--otlp-endpoint` pays nothing.

    All methods are quick and raise nothing.
    """

    def call(self, method: str, parent: str) -> CallTrace:
        """A call has begun; `parent`: the `traceparent` that came with it."""
        return CallTrace(trace_parent(parent))

    def run(self, job: job_service_pb2.Job) -> RunTrace:
        """A run of a job has begun, which was claimed just now."""
        return RunTrace()

    async def close(self) -> None:
        """Sends what is left."""
