"""The progress of a job as server-sent events (WHATWG HTML, section 9.2), for a page that is open.

Each event is the whole of what the page shows, so that one that was missed costs nothing. The connection is closed
after a while, as every one is, and the browser comes back by itself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from modelpress_protos.printable import printable
from modelpress_protos.v1 import job_service_pb2
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from modelpress_server.console.figures import duration, percent
from modelpress_server.console.visitor import Visitor
from modelpress_server.errors import ServiceError
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.records import job_state_name

MAX_STREAMS = 32  # of the connections that the server takes, the others are for pages
_RETRY = b"retry: 1000\n\n"


class Live:
    """All streams of a console."""

    def __init__(self) -> None:
        self._open = 0

    async def job(self, visitor: Visitor, name: str) -> Response:
        """The stream of one job. Raises ServiceError where it cannot be read."""
        job = await visitor.job(name)
        if self._open >= MAX_STREAMS:
            return PlainTextResponse("Too many pages are open.\n", 503, headers={"Retry-After": "10"})
        return StreamingResponse(self._events(visitor, job), media_type="text/event-stream")

    async def _events(self, visitor: Visitor, job: job_service_pb2.Job) -> AsyncIterator[bytes]:
        self._open += 1
        try:
            yield _RETRY
            async with aclosing(visitor.watch(job.name, job.last_sequence)) as responses:
                async for response in responses:
                    kind = response.WhichOneof("event")
                    if kind == "heartbeat":
                        yield b": the stream lives\n\n"
                        continue
                    if kind == "snapshot":
                        job = response.snapshot
                    elif kind == "progress":
                        job.progress.CopyFrom(response.progress)
                    elif kind == "state":
                        job.state = response.state
                    yield b"data: " + json.dumps(shown(job)).encode() + b"\n\n"
        except ServiceError:
            return  # the job is gone, the caller may no longer, the server shuts down: the page finds out when it asks
        finally:
            self._open -= 1


def shown(job: job_service_pb2.Job) -> dict[str, Any]:
    """What a page shows of a job's progress; the script puts each text where it belongs."""
    progress, waits = job.progress, job.state == job_service_pb2.JOB_STATE_QUEUED
    ahead = f"{progress.queue_position} ahead" if progress.queue_position else "the next one"
    left = duration(round(progress.eta.ToMilliseconds() / 1000)) if progress.HasField("eta") else ""
    return {
        "state": job_state_name(job.state),
        "fraction": round(progress.fraction, 3),
        "percent": percent(progress.fraction),
        "stage": ahead if waits else printable(progress.stage.replace("_", " ")),
        "message": printable(progress.message),
        "left": left and (f"begins in about {left}" if waits else f"about {left} left"),
        "ended": job.state in ENDED_STATES,
    }
