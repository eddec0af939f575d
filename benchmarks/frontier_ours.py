"""Our points on the front: every model that jobs for the goals let be downloaded.

As a script it is one job in a process of its own:

    python benchmarks/frontier_ours.py FOLDER OUTPUT GOAL [LABELLED]

FOLDER is a prepared case (quantization_cases.py), GOAL that of a recipe as JSON, LABELLED an .npz as for `--eval`.
Writes what `Result.write` writes into OUTPUT, and OUTPUT/points.json with name and file of each model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from modelpress_compression import Memory, Recipe, compress, load
from quantization_cases import Prepared, file_digest
from quantization_contenders import engine_digest
from quantization_process import Limits, watch

OURS = "ours"
SMALLEST_1 = "smallest-1"  # as `compress-client upload --goal smallest --max-drop 1%`


@dataclass(frozen=True)
class Job:
    """`goal` as in a recipe. `labels`: with labelled data, by which channels, ranks and training are judged."""

    name: str
    goal: dict[str, Any] = field(default_factory=dict)
    labels: bool = False

    def within(self, search_time_s: float | None) -> Job:
        """The same job with so much time for its search; None: as much as it takes."""
        return self if search_time_s is None else replace(self, goal=self.goal | {"search_time_s": search_time_s})


JOBS = (
    Job("balanced", {"objective": "balanced"}),
    Job("smallest", {"objective": "smallest"}),
    Job("fastest", {"objective": "fastest"}),
    Job("accurate", {"objective": "accurate"}),
    Job("balanced-3", {"objective": "balanced", "max_drop": 0.03}),
    Job("balanced-10", {"objective": "balanced", "max_drop": 0.1}),
    Job("ratio-6", {"objective": "balanced", "min_ratio": 6.0, "max_drop": 0.1}),
    Job(SMALLEST_1, {"objective": "smallest", "max_drop": 0.01}),
    Job("smallest-3", {"objective": "smallest", "max_drop": 0.03}),
    Job("smallest-10", {"objective": "smallest", "max_drop": 0.1}),
    Job("fastest-3", {"objective": "fastest", "max_drop": 0.03}),
    Job("fastest-10", {"objective": "fastest", "max_drop": 0.1}),
    *(Job(f"{name}-labels", {"objective": name}, labels=True) for name in ("balanced", "smallest", "fastest")),
)


def our_points(job: Job, prepared: Prepared, limits: Limits, labelled: Path | None = None) -> dict[str, Any]:
    """Runs the job unless the cache has it, by this engine on this model. `outcome` as for the tools' points."""
    folder = _folder(prepared, job)
    kept, key = folder / "outcome.json", f"{prepared.digest} {engine_digest()} {json.dumps(job.goal)}"
    if labelled is not None:
        key += f" {file_digest(labelled)}"
    if kept.exists():
        outcome: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if outcome["key"] == key:
            return outcome
    outcome = _run(job, prepared, folder, limits, labelled) | {"key": key, "goal": job.goal}
    kept.write_text(json.dumps(outcome), "utf-8")
    return outcome


def kept_points(prepared: Prepared) -> list[dict[str, Any]]:
    """Of all jobs in the cache, in the shape of the tools' outcomes."""
    found = []
    for job in JOBS:
        folder = _folder(prepared, job)
        if not (folder / "points.json").exists():
            continue
        for point in json.loads((folder / "points.json").read_text("utf-8")):
            about = {"name": point["name"], "file": str(folder / point["file"]), "job": job.name}
            found.append({"tool": OURS, "outcome": "ok", "error": "", "chosen": point.get("chosen", False), **about})
    return found


def kept_goals(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Goals of the jobs whose points the cache has, by name."""
    outcomes = {job.name: _folder(prepared, job) / "outcome.json" for job in JOBS}
    kept = {name: json.loads(path.read_text("utf-8")) for name, path in outcomes.items() if path.exists()}
    return {name: outcome["goal"] for name, outcome in kept.items() if "goal" in outcome}


def _folder(prepared: Prepared, job: Job) -> Path:
    return prepared.folder / "front" / OURS / job.name


def _run(job: Job, prepared: Prepared, folder: Path, limits: Limits, labelled: Path | None) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, str(prepared.folder), str(folder), json.dumps(job.goal)]
    command += [] if labelled is None else [str(labelled.resolve())]
    began = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        stopped = watch(process, began, limits)
    if stopped:
        return stopped
    wall_s = time.monotonic() - began
    if process.returncode:
        last = (folder / "log.txt").read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        return {"outcome": "failed", "error": " ".join(last)[:300], "wall_s": wall_s}
    return {"outcome": "ok", "error": "", "wall_s": wall_s}


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    prepared = Prepared(folder)
    recipe = Recipe.from_dict({"version": 1, "goal": json.loads(sys.argv[3])})
    # Jobs on one model remember each other, as on a server.
    memory = Memory(folder / "memory")
    model, labelled = load(prepared.model), None
    if len(sys.argv) > 4:
        with np.load(sys.argv[4]) as arrays:
            labelled = dict(arrays)
    result = compress(model, recipe, data=prepared.calibration(), eval_data=labelled, memory=memory)
    result.write(output)
    points = [
        {"name": member["name"], "file": f"model.{member.id}.onnx", "chosen": member["chosen"]}
        for member in result.candidates
        if member.model is not None
    ]
    (output / "points.json").write_text(json.dumps(points, indent=1), "utf-8")


if __name__ == "__main__":
    main()
