"""Estimates of the preflight beside what jobs took: CPU time, memory and work folder at their largest.

python benchmarks/preflight.py MODEL [--data FILE.npz] [--recipe PRESET] [--input 'NAME:DTYPE[DIM,...]']
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from modelpress_compression import InputData, Model, Recipe, compress, load
from modelpress_compression.pipeline import preflight, run
from sampling import Largest


def folder_bytes(folder: Path) -> int:
    """Of all files below it; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def main() -> None:
    """One model a run: memory that another one has left would count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--input", action="append", default=[])
    asked = parser.parse_args()
    model = load(asked.model, inputs=asked.input)
    arrays = dict(np.load(asked.data)) if asked.data else None
    told: list[preflight.Needs] = []
    estimate = preflight.needs

    def needs(recipe: Recipe, original: Model, path: Path, samples: InputData, *, judged: bool) -> preflight.Needs:
        told.append(estimate(recipe, original, path, samples, judged=judged))
        return told[-1]

    run.needs = needs
    with (
        TemporaryDirectory() as folder,
        Largest(preflight.held_bytes) as memory,
        Largest(lambda: folder_bytes(Path(folder))) as disk,
    ):
        began = time.process_time()
        compress(model, Recipe.preset(asked.recipe), data=arrays, work_directory=Path(folder))
        took_s = time.process_time() - began
    (told_needs,) = told
    print(f"{asked.model.stem} {'with' if asked.data else 'without'} data, {asked.recipe}: {told_needs}")
    for what, expected, seen, unit in (
        ("CPU time", told_needs.time_s, took_s, "s"),
        ("memory", told_needs.memory_bytes / 1e6, memory.largest / 1e6, "MB"),
        ("disk", told_needs.disk_bytes / 1e6, disk.largest / 1e6, "MB"),
    ):
        print(f"  {what:9} took {seen:8.1f} {unit}, expected {expected:8.1f}, {expected / max(seen, 1e-9):.2f} times")


if __name__ == "__main__":
    main()
