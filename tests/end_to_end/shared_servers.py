"""Server processes that share their stores, and what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelpress_protos.v1 import job_service_pb2

S = job_service_pb2
PATIENCE_S = 1500.0
ENDED = (S.JOB_STATE_SUCCEEDED, S.JOB_STATE_FAILED, S.JOB_STATE_CANCELLED, S.JOB_STATE_EXPIRED)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits until the condition gives something true, and returns it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")


@contextmanager
def compress_server(folder: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process, which is killed in the end, and its address."""
    command = [sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", "--data-dir", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), folder.with_suffix(".log").read_text()
        yield process, line.removeprefix("listening on ").strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def started(log: Path) -> set[str]:
    """Ids of the jobs that a server has begun to run, by its log."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return {line["job"] for line in lines if line.get("state") == "RUNNING"}


def ended(stub: Any, name: str) -> Any:
    """The job once it has ended."""
    job = stub.WaitJob(S.WaitJobRequest(name=name))
    return job if job.state in ENDED else None
