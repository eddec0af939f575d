"""What the search's prices promise, beside what was measured.

    python benchmarks/prices.py --models DIR [--only NAME ...] [--choices 12] [--page FILE]

For every model, choices of forms at random: each weight in 2, 4 or 8 bits or float32 (bytes and error), and each layer
in 8 bits or float32 (time and error). The promised error is the sum of the errors of the parts alone; the promised time
is the float model's, less what the layers in 8 bits save by their own times. The models are timed in one race.
Correlations are Spearman's, since a search needs the order; errors are compared in decibels.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from model_evaluation import representative
from modelpress_compression import load
from modelpress_compression.measure.latency import time_interleaved
from modelpress_compression.measure.layer_times import layer_times
from modelpress_compression.measure.stats import layer_name
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.weight_only.mixed_bits import MixedBits
from modelpress_compression.search.budgets import decibels
from modelpress_compression.techniques import TECHNIQUES
from numpy.typing import NDArray
from pruning_quality import CASES, Case
from scipy.stats import spearmanr

ROUNDS, BUDGET_S = 60, 30.0
HEADER = """# What prices promise

Written by `benchmarks/prices.py`, which says what the columns are; do not edit.
"""
Floats = NDArray[np.float64]


def spearman(first: Floats, second: Floats) -> float:
    """Of the ranks; 1 where all are the same."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 1.0
    return float(spearmanr(first, second).statistic)


def bits(model: Model, context: Context, choices: int, generator: np.random.Generator) -> str:
    """Promised and measured error of weights in random forms."""
    mixed = MixedBits(model, QuantizeConfig(scheme="weight_only"), context)
    promised, measured = [], []
    for share in np.linspace(0.05, 0.95, choices):
        taken = {
            name: forms[0 if generator.random() < share else int(generator.integers(len(forms)))]
            for name, forms in mixed.options.items()
        }
        result = mixed.store({name: form.name for name, form in taken.items()})
        promised.append(decibels(sum(form.error for form in taken.values())))
        measured.append(decibels(output_distances(model, result.model, context).error))
    gaps = np.array(promised) - np.array(measured)
    rank = spearman(np.array(promised), np.array(measured))
    return f"{rank:.3f}|{np.median(gaps):+.1f}|{gaps[np.abs(gaps).argmax()]:+.1f}"


def layers(model: Model, context: Context, choices: int, generator: np.random.Generator, threads: int = 1) -> str:
    """Promised and measured error and time of layers in 8 bits or float32."""
    quantizer = prepare_static(model, QuantizeConfig(scheme="static"), context)
    if quantizer is None or not quantizer.ranges.weight_errors:
        return "|".join(["-"] * 6)
    plan, folder = quantizer.plan, context.work_directory
    whole = quantizer.setup.model
    before, after = layer_times([whole, quantizer.result().model], context.data, folder, threads)
    nodes = [node for node in plan.layers if layer_name(node) in before and layer_name(node) in after]
    saved = np.array([before[layer_name(node)].ms - after[layer_name(node)].ms for node in nodes])
    errors = np.array([quantizer.ranges.error_saved(node, plan) for node in nodes])
    whole.save(folder / "float.onnx")
    paths, promised_db, measured_db, promised_ms = [folder / "float.onnx"], [], [], [0.0]
    for number, share in enumerate(np.linspace(0.1, 1.0, choices)):
        chosen = generator.random(len(nodes)) < share
        kept = [node.outputs[0].name or "" for node, taken in zip(nodes, chosen, strict=True) if not taken]
        result = quantizer.keeping_in_float(kept).result()
        paths.append(folder / f"{number}.onnx")
        result.model.save(paths[-1])
        promised_db.append(decibels(float(errors[chosen].sum())))
        measured_db.append(decibels(output_distances(whole, result.model, context).error))
        promised_ms.append(float(saved[chosen].sum()))
    timings = time_interleaved(paths, context.data, threads=threads, batch_size=1, rounds=ROUNDS, budget_s=BUDGET_S)
    times = np.array([float(np.median(own)) * 1e3 for own in timings.times_s])
    promised = times[0] - np.array(promised_ms[1:])
    ratios = promised / times[1:]
    gaps = np.array(promised_db) - np.array(measured_db)
    worst = ratios[np.abs(np.log(np.maximum(ratios, 1e-3))).argmax()]
    return (
        f"{spearman(np.array(promised_db), np.array(measured_db)):.3f}|{np.median(gaps):+.1f}|"
        f"{gaps[np.abs(gaps).argmax()]:+.1f}|{spearman(promised, times[1:]):.3f}|{np.median(ratios):.2f}|{worst:.2f}"
    )


def row(case: Case, models: Path, choices: int) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(models / case.file, case.inputs)
        context = Context(representative(case.name, models, model, folder), folder)
        fused = TECHNIQUES["fuse"].make_pass(FuseConfig())(model, context).model
        generator = np.random.default_rng(0)
        first = bits(fused, context, choices, generator)
        return f"|{case.name}|{first}|{layers(fused, context, choices, generator)}|"


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--choices", type=int, default=12)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    lines = [
        "|model|bits: rank|dB promised - measured, median|worst|layers: rank|dB, median|worst|time: rank|promised / "
        "measured, median|worst|",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            lines.append(row(case, arguments.models, arguments.choices))
            print(lines[-1], flush=True)
    if arguments.page:
        arguments.page.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
