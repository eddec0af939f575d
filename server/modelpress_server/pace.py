"""About how long jobs take, from those that ended lately on this server; nothing where too few have."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque

from modelpress_protos.v1 import job_service_pb2

from modelpress_server.stores.overview import StateChange

REMEMBERED = 50
FEWEST = 3
# Less than this share, or this time, says nothing of how fast a job gets on.
LEAST_DONE = 0.02
LEAST_S = 1.0


class Pace:
    """Remembers how long the last jobs ran. `note` may be called from any thread."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._runs_s: deque[float] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()

    def note(self, change: StateChange) -> None:
        """A job or a model is in another state."""
        if change.kind == "job" and change.state == "SUCCEEDED" and change.run_s is not None:
            with self._lock:
                self._runs_s.append(change.run_s)

    def tell(self, job: job_service_pb2.Job) -> None:
        """Sets the `eta` of a job's progress, where something can be said."""
        eta_s = self._eta_s(job)
        if eta_s is None:
            job.progress.ClearField("eta")
        else:
            job.progress.eta.FromMilliseconds(int(max(eta_s, 0.0) * 1000))

    def _eta_s(self, job: job_service_pb2.Job) -> float | None:
        if job.state == job_service_pb2.JOB_STATE_QUEUED:
            return self._wait_s(job.progress.queue_position)
        if job.state != job_service_pb2.JOB_STATE_RUNNING:
            return None
        elapsed_s, done = time.time() - job.start_time.ToMicroseconds() / 1e6, job.progress.fraction
        if done < LEAST_DONE or elapsed_s < LEAST_S:
            return None
        return elapsed_s * (1 - done) / done

    def _wait_s(self, ahead: int) -> float | None:
        """Those ahead take a worker each, and those that run now are half done, on average."""
        with self._lock:
            if len(self._runs_s) < FEWEST or not self._workers:  # others run the jobs, nobody knows how many
                return None
            run_s = statistics.median(self._runs_s)
        return (ahead + 0.5) * run_s / self._workers
