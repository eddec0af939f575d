"""What the adapters share. An adapter turns one tool into points of the front, in the tool's own environment:

    python ADAPTER.py list                                                        the labels of its points as JSON
    python ADAPTER.py MODEL CALIBRATION FOLDER TIMEOUT_S MEMORY_BYTES LABEL ...   makes these points

Each point becomes FOLDER/SLUG/model.onnx, with outcome.json and log.txt beside it. CALIBRATION is an .npz with one
array for each input of the model, whose first axis goes over the feeds: item `i` of each is one whole feed, batch axis
included. The tool is imported once; every point is made in a fork of that process, which may take TIMEOUT_S seconds
and MEMORY_BYTES of resident memory. Where memory does not suffice it does what a careful user does next: it tries with
fewer feeds, and the outcome has their number as `samples`. Nothing here, nor in an adapter, imports more than the tool
and NumPy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]
POLL_S = 0.1
RESULT = "model.onnx"
FEWER = (1, 2, 4, 8)
# What a tool may leave besides, for the weights of a large model.
KEPT = (RESULT, f"{RESULT}.data", f"{RESULT}_data", "outcome.json", "log.txt")


@dataclass(frozen=True)
class Job:
    """`model` is a float32 ONNX file of opset 13 or later; other files than model.onnx in `output` are scratch.

    `fewer`: one feed in so many is taken.
    """

    model: Path
    calibration: Path
    output: Path
    fewer: int = 1

    @property
    def result(self) -> Path:
        return self.output / RESULT

    def feeds(self) -> list[Feed]:
        with np.load(self.calibration) as arrays:
            stacked = dict(arrays)
        count = len(next(iter(stacked.values())))
        taken = range(0, count, self.fewer)
        return [{name: np.asarray(array[index]) for name, array in stacked.items()} for index in taken]


Point = Callable[[Job], None]


class Reader:
    """Feeds as onnxruntime's `CalibrationDataReader`, and the readers that other tools modelled on it, give them."""

    def __init__(self, feeds: list[Feed]) -> None:
        self.feeds = feeds
        self._left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self.feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)

    def __len__(self) -> int:
        return len(self.feeds)


def main(points: Mapping[str, Point]) -> None:
    """The command line of an adapter."""
    if sys.argv[1:] == ["list"]:
        print(json.dumps(list(points)))
        return
    model, calibration, folder, timeout_s, memory_bytes, *labels = sys.argv[1:]
    for label in labels:
        output = Path(folder) / slug(label)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        began = time.monotonic()
        for fewer in FEWER:
            job = Job(Path(model).resolve(), Path(calibration).resolve(), output.resolve(), fewer)
            outcome = _bounded(points[label], job, began + float(timeout_s), int(memory_bytes))
            if outcome["outcome"] != "out of memory":
                break
        if job.fewer > 1:
            outcome["samples"] = len(job.feeds())
        outcome |= {"name": label, "wall_s": time.monotonic() - began}
        (output / "outcome.json").write_text(json.dumps(outcome), "utf-8")
        _tidy(output)


def slug(label: str) -> str:
    """A name for a folder."""
    return "".join(char if char.isalnum() else "-" for char in label)


def _bounded(point: Point, job: Job, deadline_s: float, memory_bytes: int) -> dict[str, Any]:
    """`outcome` is ok, failed, out of time or out of memory; `error` says why it is not ok."""
    child = os.fork()
    if child == 0:
        _become(point, job)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        late, large = time.monotonic() > deadline_s, _resident_bytes(child) > memory_bytes
        if late or large:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"outcome": "out of time" if late else "out of memory", "error": ""}
        time.sleep(POLL_S)
    if status == 0 and job.result.exists():
        return {"outcome": "ok", "error": ""}
    words = _last_words((job.output / "log.txt").read_text("utf-8", errors="replace"))
    return {"outcome": "failed", "error": words if status else f"it ended without a model: {words}"}


def _become(point: Point, job: Job) -> None:
    """The child: makes the point and ends. Tools leave caches and logs where they stand."""
    log = os.open(job.output / "log.txt", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job.output)
    code = 0
    try:
        point(job)
    except BaseException:  # noqa: BLE001 - whatever a tool raises is its result
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _resident_bytes(process: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text("ascii"))
    except OSError:  # it has just ended
        return 0
    return int(found[1]) * 1024 if found else 0


def _last_words(text: str) -> str:
    """The line that says what was wrong, of a traceback if there is one."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Fail|NotImplemented|InvalidGraph)\b", line)]
    words = (told or lines or ["it said nothing"])[-1]
    return re.sub(r"(?:/[\w.+-]+){2,}/", "", words)[:300]  # paths of this machine say nothing


def _tidy(folder: Path) -> None:
    """Removes what was scratch: of a large model that is gigabytes."""
    for path in folder.iterdir():
        if path.name in KEPT:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
