"""Runs one contender in a process of its own, bounded in time and memory, and keeps what it made in the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from quantization_cases import Prepared
from quantization_contenders import Contender

POLL_S = 0.05
# Where memory does not suffice for all samples, peers may try with a half and with a quarter of them.
FEWER = (2, 4)
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """`memory_bytes`: of resident memory; what takes more is stopped."""

    timeout_s: float
    memory_bytes: int


def made_by(contender: Contender, prepared: Prepared, limits: Limits) -> dict[str, Any]:
    """The outcome, from the cache where nothing that it depends on has changed. See quantization_contenders.main.

    `outcome` is ok, failed, out of time or out of memory; where it is ok, FOLDER/CONTENDER/model.onnx is there.
    """
    folder = prepared.folder / contender.name
    key = contender.key(prepared.digest)
    kept = folder / "outcome.json"
    if kept.exists():
        outcome: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if outcome["key"] == key and not _may_go_further(outcome, limits):
            return outcome
    outcome = _run(contender, prepared.folder, folder, limits)
    if outcome["outcome"] == "out of memory" and not contender.ours:
        outcome = _with_fewer_samples(contender, prepared, folder, limits, outcome)
    outcome["key"] = key
    kept.write_text(json.dumps(outcome, indent=1), "utf-8")
    return outcome


def _with_fewer_samples(
    contender: Contender, prepared: Prepared, folder: Path, limits: Limits, first: dict[str, Any]
) -> dict[str, Any]:
    """What a careful user does next. The first outcome stays beside the result, as `with_all_samples`."""
    outcome, samples = first, len(prepared.calibration())
    for divisor in FEWER:
        outcome = _run(contender, prepared.folder, folder, limits, samples // divisor)
        if outcome["outcome"] != "out of memory":
            outcome["notes"] = [
                f"{first['error']} with all {samples} samples, so calibrated on {samples // divisor}",
                *outcome.get("notes", []),
            ]
            break
    return outcome | {"with_all_samples": first}


def _may_go_further(outcome: dict[str, Any], limits: Limits) -> bool:
    """Whether it, or its first try, was stopped at a limit that is wider now."""
    outcome = outcome.get("with_all_samples", outcome)
    stopped_at = outcome.get("limit")
    now = {"out of time": limits.timeout_s, "out of memory": limits.memory_bytes}.get(outcome["outcome"])
    return now is not None and stopped_at is not None and now > stopped_at


def _run(contender: Contender, case: Path, folder: Path, limits: Limits, samples: int | None = None) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = Path(__file__).with_name("quantization_contenders.py")
    command = [
        sys.executable,
        str(script),
        contender.name,
        str(case),
        str(folder),
        *([str(samples)] if samples else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    began = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        stopped = watch(process, began, limits)
    if stopped:
        return stopped
    made = folder / "made.json"
    if not made.exists():
        last = (folder / "log.txt").read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        error = f"the process ended with {process.returncode}: {' '.join(last)[:300]}"
        return {"outcome": "failed", "error": error, "wall_s": time.monotonic() - began, "peak_bytes": 0}
    outcome: dict[str, Any] = json.loads(made.read_text("utf-8"))
    return outcome


def watch(process: subprocess.Popen[bytes], began: float, limits: Limits) -> dict[str, Any] | None:
    """Waits for the end; the outcome where it had to be stopped."""
    watched, peak_bytes = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak_bytes = max(peak_bytes, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
        elapsed_s = time.monotonic() - began
        memory, late = peak_bytes > limits.memory_bytes, elapsed_s > limits.timeout_s
        if memory or late:
            process.kill()
            process.wait()
            error = f"over {limits.memory_bytes / GIB:.1f} GiB" if memory else f"over {limits.timeout_s:.0f} s"
            return {
                "outcome": "out of memory" if memory else "out of time",
                "limit": limits.memory_bytes if memory else limits.timeout_s,
                "error": f"stopped: {error}",
                "wall_s": elapsed_s,
                "peak_bytes": peak_bytes,
            }
        time.sleep(POLL_S)
    return None
