"""What a goal gains by all techniques together over quantization alone, at one point of the task's metric.

    python benchmarks/levers.py --models DIR [--only NAME ...] [--drop 0.01] [--inputs N] [--search-time SECONDS]
                                [--page FILE]

Every model goes through `compress` with its own representative inputs and with the model's own evaluation as the metric
that decides: once with `fuse` and `quantize` alone, once with all techniques, for each of the objectives fastest and
smallest. mnist and fashion are judged on labelled images that no evaluation sees; the others on the evaluation set
itself, as accuracy-aware tuning does elsewhere, so that their last column is what the search was held to. With
`--inputs`, mnist and fashion get so many training images, without labels, in place of their few representative inputs.
At the end all results of a model are timed in the same rounds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from model_evaluation import evaluate, representative
from modelpress_compression import Recipe, compress, load
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.measure.latency import time_interleaved
from modelpress_compression.model import Model
from pruning_quality import CASES, Case

OBJECTIVES = ("fastest", "smallest")
ALONE = ("fuse", "quantize")
ROUNDS, BUDGET_S = 200, 30.0
# Of the training images, those that judge; what a model is given are the first.
JUDGES = slice(4000, 8000)
HEADER = """# All techniques together, and quantization alone

Written by `benchmarks/levers.py`; do not edit.

"""


@dataclass(frozen=True)
class Result:
    """What one search gave. `path`: its file; `name`: of the candidate that was taken."""

    objective: str
    techniques: str
    name: str
    path: Path
    metric: float
    seconds: float


def images(case: Case, models: Path, chosen: slice) -> dict[str, Array] | None:
    """Training images with their labels, as the network takes them; none of them is an evaluation sample."""
    if case.name == "mnist":
        with np.load(models / "mnist/mnist_data.npz") as data:
            return {"input": data["x_train"][chosen].astype(np.float32), "labels": data["y_train"][chosen]}
    if case.name == "fashion":
        with np.load(models / "data/fashion.npz") as data:
            pixels = (data["x_train"][chosen].astype(np.float32) / 255 - 0.2860) / 0.3530
            return {
                "input": pixels.reshape(-1, 1, 28, 28).astype(np.float32),
                "labels": data["y_train"][chosen].astype(np.int64),
            }
    return None


def inputs_of(case: Case, models: Path, model: Model, folder: Path, count: int | None) -> InputData:
    """The representative inputs; where there are training images and `count` is given, so many of those that do not
    judge."""
    found = images(case, models, slice(min(count, JUDGES.start))) if count else None
    if found is None:
        return representative(case.name, models, model, folder)
    return InputData.from_arrays({"input": found["input"]}, model.inputs)


def metric_of(case: Case, models: Path) -> Callable[[str, object], float]:
    """The model's own evaluation as a metric."""

    def evaluation(path: str, _: object) -> float:
        return float(evaluate(case.name, models, "--model", path, "--threads", "1"))

    return evaluation


def results(
    case: Case, models: Path, folder: Path, data: InputData, drop: float, search_time_s: float | None
) -> Iterator[Result]:
    """Both sets of techniques for each objective."""
    model = load(models / case.file, case.inputs)
    judged = images(case, models, JUDGES)
    judge = {"metric": metric_of(case, models)} if judged is None else {"eval_data": judged}
    for objective in OBJECTIVES:
        for techniques in (ALONE, None):
            goal = {"objective": objective, "max_drop": drop}
            if techniques:
                goal["techniques"] = list(techniques)
            if search_time_s is not None:
                goal["search_time_s"] = search_time_s
            began = time.monotonic()
            done = compress(model, Recipe.from_dict({"version": 1, "goal": goal}), data=data, **judge)  # type: ignore[arg-type]
            seconds = time.monotonic() - began
            path = folder / f"{objective}-{'alone' if techniques else 'all'}.onnx"
            done.model.save(path)
            chosen = next((row["name"] for row in done.candidates if row["chosen"]), "the model itself")
            metric = float(evaluate(case.name, models, "--model", str(path), "--threads", "1"))
            yield Result(objective, "quantization alone" if techniques else "all", chosen, path, metric, seconds)


def rows(
    case: Case, models: Path, drop: float, count: int | None, search_time_s: float | None
) -> tuple[list[str], dict[str, float]]:
    """Lines of the table, and by objective the gain of all techniques in what it asks for."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(models / case.file, case.inputs)
        data = inputs_of(case, models, model, folder, count)
        found = list(results(case, models, folder, data, drop, search_time_s))
        model.save(folder / "float.onnx")
        base = float(evaluate(case.name, models, "--model", str(folder / "float.onnx"), "--threads", "1"))
        paths = [one.path for one in found]
        timings = time_interleaved(
            [folder / "float.onnx", *paths], data, threads=1, batch_size=1, rounds=ROUNDS, budget_s=BUDGET_S
        )
        whole = (folder / "float.onnx").stat().st_size
        lines, speeds, sizes = [], [], []
        for place, one in enumerate(found, start=1):
            speed, size = timings.speedup(0, place), one.path.stat().st_size
            speeds.append(speed.median)
            sizes.append(size)
            lines.append(
                f"|{case.name}, {len(data)} inputs|{one.objective}|{one.techniques}|{whole / size:.2f}|"
                f"{speed.median:.2f} [{speed.low:.2f}, {speed.high:.2f}]|{base:.4f} → {one.metric:.4f}|"
                f"{one.seconds:.0f} s|{one.name}|"
            )
        gains = {"fastest": speeds[1] / speeds[0], "smallest": sizes[2] / sizes[3]}
        return lines, gains


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--drop", type=float, default=0.01)
    parser.add_argument("--inputs", type=int, help="training images for mnist and fashion, without labels")
    parser.add_argument("--search-time", type=float)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    lines = [
        "|model|goal|techniques|times smaller|times as fast|metric|search|taken|",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    print("\n".join(lines), flush=True)
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        found, gain = rows(case, arguments.models, arguments.drop, arguments.inputs, arguments.search_time)
        print("\n".join(found), flush=True)
        lines += found
        for objective in OBJECTIVES:
            gains[objective].append(gain[objective])
    means = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in gains.items()}
    summary = (
        f"All techniques over quantization alone, geometric mean: {means['fastest']:.2f} times as fast by `fastest`, "
        f"{means['smallest']:.2f} times smaller by `smallest`."
    )
    print(summary)
    if arguments.page:
        arguments.page.write_text("\n".join([HEADER + summary, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
