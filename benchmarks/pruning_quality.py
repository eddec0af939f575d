"""What channel pruning costs on real trained models: the task metric at 10, 20, 30 and 50 % of the channels removed.

    python benchmarks/pruning_quality.py --models DIR [--only NAME ...] [--scope layer global] [--samples N] [--render]

For each criterion, with and without the closed-form repair, never with any training. DIR holds the models and one
`eval_NAME.py` for each, which prints a figure (higher is better) for `--model FILE.onnx` and writes representative
inputs, not the evaluation samples, for `--make-calib FILE.npz`. Figures are gathered in docs/pruning_quality.json, a
model at a time, so that one can be run again by itself; docs/pruning_quality.md and its plots are written from them
(`--render`: that alone).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import Panel, render_svg
from model_evaluation import evaluate, representative
from modelpress_compression import load
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "pruning_quality.json"
PAGE = DOCS / "pruning_quality.md"
SPARSITIES = (0.1, 0.2, 0.3, 0.5)
CRITERIA = ("l1", "l2", "activation", "random")
REPAIRS = ("none", "least_squares")


@dataclass(frozen=True)
class Case:
    """One model; `name` is that of its eval_NAME.py, `metric` what it prints."""

    name: str
    file: str
    metric: str
    inputs: tuple[str, ...] = ()


CASES = (
    Case("mnist", "mnist/mnist.onnx", "top-1 on 2,000 digits"),
    Case("fashion", "fashion/fashion.onnx", "top-1 on 10,000 images"),
    Case("effnet_lite0", "files/effnet_lite0.traced.pt", "top-1 on 200 photos", ("input:float32[batch,3,224,224]",)),
    Case("minilm", "files/minilm.onnx", "retrieval top-1 of 500"),
    Case("ppocr_rec", "files/ppocr_rec.onnx", "share of words read right"),
    Case("silero_vad", "files/silero_vad_16k_op15.onnx", "ROC AUC per frame"),
)

Results = dict[str, Any]


def metric_of(model: Model, case: Case, models: Path, folder: Path) -> float:
    """The task metric of a model in memory."""
    path = folder / "model.onnx"
    model.save(path)
    return float(evaluate(case.name, models, "--model", str(path), "--threads", "1"))


def measure(case: Case, models: Path, scope: str, samples: int | None) -> Results:
    """All figures of one model in one scope."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(models / case.file, case.inputs)
        data = representative(case.name, models, model, folder)
        data = data if samples is None else data.spread(samples)
        context = Context(data, folder)
        found: Results = {"samples": len(data), "metric": case.metric, "base": metric_of(model, case, models, folder)}
        print(f"{case.name}, scope {scope}: {found['base']:.4f} uncut", flush=True)
        runs = []
        for criterion in CRITERIA:
            for sparsity in SPARSITIES:
                for repair in REPAIRS:
                    config = PruneConfig(
                        structure="channel", criterion=criterion, sparsity=sparsity, repair=repair, scope=scope
                    )
                    run = _measure_one(config, model, context, case, models, found["base"])
                    print(json.dumps(run), flush=True)
                    runs.append(run)
        return {**found, "runs": runs}


def _measure_one(config: PruneConfig, model: Model, context: Context, case: Case, models: Path, base: float) -> Results:
    began = time.monotonic()
    result = Prune(config)(model, context)
    seconds = time.monotonic() - began
    return {
        "criterion": config.criterion,
        "sparsity": config.sparsity,
        "repair": config.repair,
        "metric": metric_of(result.model, case, models, context.work_directory) if result.changed else base,
        "parameters_removed_share": round(float(result.changes.get("parameters_removed_share", 0.0)), 4),
        "groups_cut": result.changes.get("groups_cut", 0),
        "seconds": round(seconds, 1),
    }


def figure(entry: Results, criterion: str, sparsity: float, repair: str) -> Results:
    """One run of the results."""
    return next(
        run
        for run in entry["runs"]
        if (run["criterion"], run["sparsity"], run["repair"]) == (criterion, sparsity, repair)
    )


def table_of(entry: Results) -> str:
    """Rows by sparsity; in a cell the metric without and with repair."""
    lines = [
        "| channels removed | parameters removed | " + " | ".join(CRITERIA) + " |",
        "| --- | --- | " + " | ".join("---" for _ in CRITERIA) + " |",
    ]
    for sparsity in SPARSITIES:
        runs = {name: [figure(entry, name, sparsity, repair) for repair in REPAIRS] for name in CRITERIA}
        shares = [run["parameters_removed_share"] for pair in runs.values() for run in pair]
        removed = (
            f"{min(shares):.0%}" if max(shares) - min(shares) < 0.01 else f"{min(shares):.0%} to {max(shares):.0%}"
        )
        cells = " | ".join(f"{plain['metric']:.3f} → {fitted['metric']:.3f}" for plain, fitted in runs.values())
        lines.append(f"| {sparsity:.0%} | {removed} | {cells} |")
    return "\n".join(lines)


def panel_of(title: str, entry: Results) -> Panel:
    """The curves of one model in one scope."""
    curves = {
        (criterion, repair != "none"): [
            (0.0, entry["base"]),
            *((sparsity, figure(entry, criterion, sparsity, repair)["metric"]) for sparsity in SPARSITIES),
        ]
        for criterion in CRITERIA
        for repair in REPAIRS
    }
    return Panel(title, entry["metric"], curves)


def render(results: Results) -> None:
    """Writes the page and one plot a model."""
    parts = [INTRODUCTION]
    for case in CASES:
        scopes = results.get(case.name)
        if not scopes:
            continue
        panels = [
            panel_of(f"{case.name}, scope {scope}", entry) for scope, entry in sorted(scopes.items(), reverse=True)
        ]
        image = DOCS / "images" / f"pruning_{case.name}.svg"
        image.parent.mkdir(exist_ok=True)
        image.write_text(render_svg(panels), "utf-8")
        base = next(iter(scopes.values()))
        parts.append(f"## {case.name}\n")
        if not any(run["groups_cut"] for entry in scopes.values() for run in entry["runs"]):
            parts.append(f"Uncut: {base['base']:.3f} ({case.metric}). Nothing can be cut without changing an answer.\n")
            image.unlink()
            continue
        parts.append(
            f"Uncut: {base['base']:.3f} ({case.metric}); {base['samples']} representative inputs.\n\n"
            f"![Metric by share of channels removed, {case.name}](images/{image.name})\n"
        )
        for scope, entry in sorted(scopes.items(), reverse=True):
            parts.append(f"Scope `{scope}`, metric without → with repair:\n\n{table_of(entry)}\n")
    PAGE.write_text("\n".join(parts), "utf-8")


INTRODUCTION = """# What channel pruning costs

Task metrics of trained models after `prune: {structure: channel}`, without any training: each criterion with
`repair: none` and with `repair: least_squares`. Each file is evaluated on data that pruning never sees. Every other
option has its default: channels stay in multiples of 8, so a small layer loses more or less than asked, or nothing.
Written by `benchmarks/pruning_quality.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Task metrics of pruned models.")
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*", default=[], help="names of the models to run")
    parser.add_argument("--scope", nargs="*", default=["layer", "global"], choices=("layer", "global"))
    parser.add_argument("--samples", type=int, help="of the representative inputs; without it, all")
    parser.add_argument("--render", action="store_true", help="write the page from the figures that are there")
    arguments = parser.parse_args()
    if not arguments.render:
        if arguments.models is None:
            parser.error("--models is needed to measure")
        for case in CASES:
            for scope in arguments.scope if not arguments.only or case.name in arguments.only else ():
                entry = measure(case, arguments.models.resolve(), scope, arguments.samples)
                # Read again: another run may have added its model in the meantime.
                results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
                results.setdefault(case.name, {})[scope] = entry
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    render(json.loads(RESULTS.read_text("utf-8")))


if __name__ == "__main__":
    main()
