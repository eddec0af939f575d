"""What a goal gains by all techniques together over quantization alone, at one point of the task's metric.

    python benchmarks/levers.py --models DIR [--only NAME ...] [--drop 0.01] [--inputs N] [--search-time SECONDS]
                                [--render]

Every model goes through `compress` with its own representative inputs and with the model's own evaluation as the metric
that decides: once with `fuse` and `quantize` alone, once with all techniques, for each of the objectives fastest and
smallest. mnist and fashion are judged on labelled images that no evaluation sees; the others on the evaluation set
itself, as accuracy-aware tuning does elsewhere, so that their last column is what the search was held to. With
`--inputs`, mnist and fashion get so many training images, without labels, in place of their few representative inputs.
At the end all results of a model are timed in the same rounds.

Figures are gathered in docs/levers.json, a model at a time; docs/levers.md is written from them and from what
frontier.py knows of other tools (`--render`: that alone). Below the tables it says of every model what was tried, what
came nearest beyond the permitted drop, and which layers take the time of the fastest result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from frontier_page import LABELS, MAX_DROP, smallest_of_theirs
from model_evaluation import evaluate, representative
from modelpress_compression import Recipe, compress, load
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.measure.latency import time_interleaved
from modelpress_compression.model import Model
from modelpress_compression.report.environment import environment
from pruning_quality import CASES, Case

OBJECTIVES = ("fastest", "smallest")
ALONE = ("fuse", "quantize")
ROUNDS, BUDGET_S = 200, 30.0
# Of the training images, those that judge; what a model is given are the first.
JUDGES = slice(4000, 8000)
DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE, FRONTIER = DOCS / "levers.json", DOCS / "levers.md", DOCS / "frontier.json"
HEADER = """# All techniques together, and quantization alone

Written by `benchmarks/levers.py`; do not edit. Each model may lose one point of its metric. Times are those of one
thread and one sample, all results of a model in the same interleaved rounds.
"""
TABLE = (
    "|model|goal|techniques|times smaller|times as fast|metric|search|taken|",
    "|---|---|---|---|---|---|---|---|",
)
OTHERS = (
    "## Beside other tools",
    "",
    "The smallest files of `smallest` with all techniques, and the smallest that onnxruntime's tools, onnxsim, Olive,",
    "NNCF, neural-compressor and Quark make of the same models within the same drop ([frontier.md](frontier.md)).",
)
_SLOWEST = 4  # layers that are named


@dataclass(frozen=True)
class Result:
    """What one search gave. `path`: its file; `name`: of the candidate that was taken; `tried`: sentences on others."""

    objective: str
    techniques: str
    name: str
    path: Path
    metric: float
    seconds: float
    tried: tuple[str, ...]


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
            told = () if techniques else tuple(tried(done.report, objective))
            yield Result(objective, "quantization alone" if techniques else "all", chosen, path, metric, seconds, told)


def tried(report: dict[str, Any], objective: str) -> Iterator[str]:
    """What a search with all techniques measured, the best that lost too much, and where its result's time goes."""
    measured = [row for row in report["candidates"] if row.get("drop") is not None]
    cut = [row for row in measured if "prune" in row["name"] or "factorize" in row["name"]]
    yield (
        f"`{objective}`: {len(measured)} models were measured, {len(cut)} of them cut; "
        f"{sum('falls by' in row['reason'] for row in cut)} of these lost too much."
    )
    lost = [row for row in cut if "falls by" in row["reason"]]
    if lost:
        nearest = min(lost, key=lambda row: row["drop"])
        yield (
            f"The cut that lost too much by the least: {nearest['name']}, "
            f"{report['original']['onnx_size_bytes'] / nearest['size_bytes']:.2f} times smaller; {nearest['reason']}."
        )
    timed = [row for row in report["layers"] if row.get("optimized_ms")]
    total = sum(row["optimized_ms"] for row in timed)
    if objective == "fastest" and total:
        slowest = sorted(timed, key=lambda row: -row["optimized_ms"])[:_SLOWEST]
        told = "; ".join(f"{row['name']}{_kind(row)} {row['optimized_ms'] / total:.0%}{_why(row)}" for row in slowest)
        yield f"The result's time goes to: {told}.".replace("%", " %").replace("  %", " %")


def _kind(row: dict[str, Any]) -> str:
    return f" ({row['op_type']})" if row["op_type"] else ""


def _why(row: dict[str, Any]) -> str:
    why = str(row.get("why") or "").rstrip(".")
    if why.startswith("It "):
        why = f"it {why.removeprefix('It ')}"
    return f": {why}" if why else ""


def figures(case: Case, models: Path, drop: float, count: int | None, search_time_s: float | None) -> dict[str, Any]:
    """All that the page says of a model: lines of the table, by objective the gain of all techniques in what it asks
    for, and what was tried."""
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
        return {
            "lines": lines,
            "gains": {"fastest": speeds[1] / speeds[0], "smallest": sizes[2] / sizes[3]},
            "times_smaller": whole / sizes[3],
            "tried": [text for one in found for text in one.tried],
            "measured_on": f"{datetime.date.today().isoformat()}, {environment()['cpu']}",
        }


def gathered() -> dict[str, Any]:
    """The figures so far, by model."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return results


def beside_others(results: dict[str, Any]) -> Iterator[str]:
    """A table of the smallest files beside those of other tools, as frontier.py has measured these. Sizes are those of
    any machine; what loses more than a point is left out."""
    measured = json.loads(FRONTIER.read_text("utf-8"))["models"]
    yield from ("|model|smallest, times smaller|other tools, times smaller|tool|", "|---|---|---|---|")
    ratios = []
    for name, one in results.items():
        best = smallest_of_theirs(measured[name])
        theirs = 1 / best["place"]["size"]
        ratios.append(one["times_smaller"] / theirs)
        yield f"|{name}|{one['times_smaller']:.2f}|{theirs:.2f}|{LABELS[best['tool']]}: {best['name']}|"
    yield ""
    yield f"In the geometric mean {geometric_mean(ratios):.2f} times smaller than the best of theirs."


def page(results: dict[str, Any]) -> str:
    """docs/levers.md."""
    means = {name: geometric_mean([one["gains"][name] for one in results.values()]) for name in OBJECTIVES}
    summary = (
        f"All techniques over quantization alone, geometric mean of {len(results)} models: {means['fastest']:.2f} "
        f"times as fast by `fastest`, {means['smallest']:.2f} times smaller by `smallest`."
    )
    blocks = [HEADER, summary, "", *TABLE, *(line for one in results.values() for line in one["lines"])]
    blocks += ["", *OTHERS, "", *beside_others(results)]
    for name, one in results.items():
        gains = ", ".join(f"`{objective}` {one['gains'][objective]:.2f}" for objective in OBJECTIVES)
        blocks += ["", f"## {name}", "", f"Gained over quantization alone: {gains}. {one['measured_on']}.", ""]
        blocks += [f"- {text}" for text in one["tried"]]
    return "\n".join([*blocks, ""])


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--drop", type=float, default=MAX_DROP)
    parser.add_argument("--inputs", type=int, help="training images for mnist and fashion, without labels")
    parser.add_argument("--search-time", type=float)
    parser.add_argument("--render", action="store_true", help="write the page from the figures that there are")
    arguments = parser.parse_args()
    if not arguments.render:
        print("\n".join(TABLE), flush=True)
    for case in CASES:
        if arguments.render or (arguments.only and case.name not in arguments.only):
            continue
        found = figures(case, arguments.models, arguments.drop, arguments.inputs, arguments.search_time)
        print("\n".join([*found["lines"], *found["tried"]]), flush=True)
        # Read only now: another run may have gone through another model meanwhile.
        RESULTS.write_text(json.dumps(gathered() | {case.name: found}, indent=1), "utf-8")
    PAGE.write_text(page(gathered()), "utf-8")


if __name__ == "__main__":
    main()
