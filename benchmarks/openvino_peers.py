"""Our choice for the target openvino against NNCF's and OpenVINO's own: size, metric and time of each, in one run.

    python benchmarks/openvino_peers.py --models DIR --cache DIR [--page FILE] [--only NAME ...] [--time-only]
                                        [--budget SECONDS]

Needs openvino and nncf (pip install --target FOLDER openvino nncf, and FOLDER on PYTHONPATH). Contenders:

    float32      the model with its operators fused, in float32
    own choice   the same as OpenVINO runs it by itself: in bfloat16 on CPUs that have it
    ours         what `--target openvino` gives, with representative inputs and nothing else asked
    nncf         nncf.quantize with its defaults
    nncf transformer   the same with model_type=TRANSFORMER

NNCF calibrates on the samples that ours calibrates on. Models and metrics are kept in the folder `--cache`; --time-only
takes what lies there and does nothing but time. Metrics are those of eval_NAME.py, computed in OpenVINO (the folder
openvino_as_onnxruntime). All contenders of a model are timed in the same rounds, on one thread, one sample at a time;
a ratio is the time of a contender over that of float32, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import openvino
from model_evaluation import representative
from modelpress_compression import InputData, Recipe, compress, load
from modelpress_compression.backends.base import Runner
from modelpress_compression.backends.openvino import OpenVino
from modelpress_compression.errors import CompressionError
from modelpress_compression.measure.latency import BUSY, ratio_interval, time_interleaved
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.report.environment import environment
from portability_results import CASES, Case

SHIM = Path(__file__).parent / "openvino_as_onnxruntime"
TARGET = {"device": "openvino"}
QUICK = {"rounds": 6}
CONTENDERS = ("float32", "own choice", "ours", "nncf", "nncf transformer")
IN_FLOAT32 = "float32"
NNCF: Mapping[str, dict[str, Any]] = {
    "nncf": {},
    "nncf transformer": {"model_type": nncf.ModelType.TRANSFORMER},
}


@dataclass(frozen=True)
class Entrant:
    """One contender's file; `metric` None: not computed."""

    name: str
    path: Path
    size_bytes: int
    metric: float | None = None


@dataclass(frozen=True)
class Both:
    """OpenVINO, in float32 for the one file that asks for it. See `backends.base.Backend`."""

    exact: Path
    label: str = "OpenVINO"
    remark: str = ""
    elsewhere: bool = False

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> Runner:
        precision = "float32" if path == self.exact else "default"
        return OpenVino(precision).open(path, threads=threads, comparable=comparable)


def build(case: Case, models: Path, cache: Path) -> Iterator[str]:
    """Makes the files that are missing; a sentence on each that could not be made."""
    folder = cache / case.name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"float32": _fused, "ours": _ours, **{name: _by_nncf(options) for name, options in NNCF.items()}}
    missing = {name: make for name, make in wanted.items() if not _file(folder, name).exists()}
    if not missing:
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = load(models / case.file, inputs=case.inputs)
        data = representative(case.name, models, model, work)
        (work / "data.npz").replace(folder / "data.npz")
        for name, make in missing.items():
            try:
                make(model, data, _file(folder, "float32"), work / "made.onnx")
            except (CompressionError, RuntimeError, ValueError, TypeError, KeyError, nncf.ValidationError) as error:
                yield f"{case.name}, {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            (work / "made.onnx").replace(_file(folder, name))


Maker = Callable[[Model, InputData, Path, Path], None]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.onnx"


def _fused(model: Model, data: InputData, float_path: Path, target: Path) -> None:
    recipe = Recipe.from_dict({"version": 1, "steps": [{"fuse": {}}], "benchmark": QUICK})
    compress(model, recipe, data=data).model.save(target)


def _ours(model: Model, data: InputData, float_path: Path, target: Path) -> None:
    goal = {"version": 1, "goal": {"objective": "balanced"}, "target": TARGET, "benchmark": QUICK}
    compress(model, Recipe.from_dict(goal), data=data).model.save(target)


def _by_nncf(options: Mapping[str, Any]) -> Maker:
    def make(model: Model, data: InputData, float_path: Path, target: Path) -> None:
        samples = nncf.Dataset(list(data.feeds(1)))
        onnx.save(nncf.quantize(onnx.load(float_path), samples, **options), target)

    return make


def entrants(case: Case, models: Path, cache: Path, *, judged: bool) -> list[Entrant]:
    """Those whose files lie there. `judged`: metrics that are missing are computed."""
    folder = cache / case.name
    kept = folder / "metrics.json"
    metrics: dict[str, float] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    found = []
    for name in CONTENDERS:
        # OpenVINO's own choice is the same file in another precision; a second name tells them apart.
        path = _file(folder, name)
        if name == "own choice" and not path.exists() and _file(folder, "float32").exists():
            path.symlink_to(_file(folder, "float32").name)
        if not path.exists():
            continue
        if judged and name not in metrics:
            try:
                metrics[name] = _metric(case, models, path, "f32" if name == IN_FLOAT32 else "")
            except RuntimeError as error:
                print(f"{case.name}, {name}: no metric: {error}", flush=True)
        found.append(Entrant(name, path, file_size_bytes(path.resolve()), metrics.get(name)))
    kept.write_text(json.dumps(metrics), "utf-8")
    return found


def _metric(case: Case, models: Path, path: Path, precision: str) -> float:
    done = subprocess.run(
        [sys.executable, f"eval_{case.name}.py", "--model", str(path.absolute()), "--threads", "1"],
        cwd=models,
        env={
            **os.environ,
            "OPENVINO_PRECISION": precision,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH", "")])),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return float(done.stdout.strip().splitlines()[-1])


def rows(case: Case, models: Path, cache: Path, *, time_only: bool, budget_s: float) -> Iterator[list[str]]:
    """One for each contender, all timed in the same rounds."""
    found = entrants(case, models, cache, judged=not time_only)
    if len(found) < 2:
        return
    model = load(found[0].path)
    with np.load(cache / case.name / "data.npz") as arrays:
        names = {spec.name for spec in model.inputs}
        one = len(names) == 1
        given = {name: arrays[name] for name in arrays.files if one or name in names}
    data = InputData.from_arrays(given, model.inputs)
    timings = time_interleaved(
        [entrant.path for entrant in found],
        data,
        threads=1,
        batch_size=1,
        rounds=200,
        budget_s=budget_s,
        backend=Both(_file(cache / case.name, "float32")),
    )
    for place, entrant in enumerate(found):
        ratio = ratio_interval(timings.times_s[place] / timings.times_s[0])
        yield [
            case.name,
            entrant.name,
            f"{entrant.size_bytes / found[0].size_bytes:.3f}",
            f"{timings.quantiles(place).p50_ms:.3f} ms",
            f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            "" if entrant.metric is None else f"{entrant.metric:.4f}",
            f"{timings.contention:.2f}, {timings.clock}",
        ]


HEADINGS = ("model", "contender", "size", "p50", "time over float32", "metric", "contention, clock")
PAGE = """# OpenVINO against its own tools

What `--target openvino` chooses for each model, beside NNCF's default and transformer presets and OpenVINO's own
choice of precision. All contenders of a model ran in the same rounds, in OpenVINO, on one thread, one sample at a
time; size and time are ratios to the fused model in float32, smaller is better. Metrics are those of the models' own
tasks, higher is better, computed in OpenVINO too. NNCF calibrates on the samples that ours calibrates on.

"""


def page(found: list[list[str]], problems: list[str]) -> str:
    """docs/openvino_peers.md."""
    here = environment()
    lines = [list(HEADINGS), ["---"] * len(HEADINGS), *found]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    intro = (
        f"OpenVINO {openvino.__version__.split('-')[0]}, NNCF {nncf.__version__}, {here['cpu']} "
        f"({', '.join(here['instructions'])}).\n\nContention is wall time over CPU time: beyond 1.05 the machine did\n"
        f"other work, and times are those of the CPU clock.\n"
    )
    if any(float(row[-1].split(",")[0]) > BUSY for row in found):
        intro += "\nIt was busy here: times are to be taken again before anything is made of them.\n"
    left = "\nWhat there is no row for:\n\n" + "\n".join(f"- {text}" for text in problems) + "\n" if problems else ""
    made = "\nMade by `python benchmarks/openvino_peers.py`; `--time-only` times the same files again.\n"
    return f"{PAGE}{intro}\n{table}\n{left}{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours for OpenVINO against NNCF and OpenVINO's own choice.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--cache", type=Path, required=True, help="folder for models and metrics")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--only", nargs="*", default=[], help="names of the models")
    parser.add_argument("--time-only", action="store_true", help="build and judge nothing")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing for one model")
    options = parser.parse_args()
    cache, models = options.cache.resolve(), options.models.resolve()
    found: list[list[str]] = []
    problems: list[str] = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        if not options.time_only:
            problems += build(case, models, cache)
        try:
            found += rows(case, models, cache, time_only=options.time_only, budget_s=options.budget)
        except CompressionError as error:
            problems.append(f"{case.name}: {error.message}")
    for line in (*found, *problems):
        print(" | ".join(line) if isinstance(line, list) else line, flush=True)
    if options.page:
        options.page.write_text(page(found, problems), "utf-8")


if __name__ == "__main__":
    main()
