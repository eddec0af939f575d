"""What the search's prices promise, beside what was measured.

    python benchmarks/prices.py --models DIR [--only NAME ...] [--choices 12] [--page FILE]

For every model, choices at random: each weight in 2, 4 or 8 bits or float32 (bytes and error), each layer in 8 bits or
float32 (time and error), and each group of channels at some width, each branch there or gone (time and error; both
repaired, nothing trained). The promised error is the sum of the errors of the parts alone; the promised time is the
float model's, less what the layers save by their own times. The models are timed in one race.
Correlations are Spearman's, since a search needs the order; errors are compared in decibels.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from model_evaluation import representative
from modelpress_compression import load
from modelpress_compression.channels import find_groups
from modelpress_compression.measure.latency import time_interleaved
from modelpress_compression.measure.layer_times import layer_times
from modelpress_compression.measure.stats import layer_name
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.prune.blocks import find_branches
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.weight_only.mixed_bits import MixedBits
from modelpress_compression.search.budgets import decibels
from modelpress_compression.search.joint import BLOCKS, PRUNE, cutting_steps
from modelpress_compression.search.joint_solver import Form, Weight, Width, total
from modelpress_compression.search.width_times import width_times
from modelpress_compression.search.widths import branch_errors, owned_axes, width_errors
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
    paths, promised_db, measured_db, promised_ms = [folder / "float.onnx"], [], [], []
    for number, share in enumerate(np.linspace(0.1, 1.0, choices)):
        chosen = generator.random(len(nodes)) < share
        kept = [node.outputs[0].name or "" for node, taken in zip(nodes, chosen, strict=True) if not taken]
        result = quantizer.keeping_in_float(kept).result()
        paths.append(folder / f"{number}.onnx")
        result.model.save(paths[-1])
        promised_db.append(decibels(float(errors[chosen].sum())))
        measured_db.append(decibels(output_distances(whole, result.model, context).error))
        promised_ms.append(float(saved[chosen].sum()))
    return compared(paths, promised_db, measured_db, promised_ms, context, threads)


def widths(model: Model, context: Context, choices: int, generator: np.random.Generator, threads: int = 1) -> str:
    """Promised and measured error and time of random widths and branches, in float32."""
    groups, (branches, _) = find_groups(model).groups, find_branches(model, context.data)
    errors = width_errors(model, PRUNE, context)
    own = [[Width(0.0, 0.0), *(Width(*pair) for pair in sorted(errors.get(group.id, {}).items()))] for group in groups]
    own += [[Width(0.0, 0.0), Width(1.0, error)] for error in branch_errors(model, branches, BLOCKS, context)]
    if not any(len(found) > 1 for found in own):
        return "|".join(["-"] * 6)
    curves = width_times(model, groups, PRUNE, QuantizeConfig(scheme="static"), context, threads)
    weights = [
        Weight([Form(curve.in_float[-1][1], 0.0, curve.in_float)], owned_axes(model, groups, curve.tensor, branches))
        for curve in curves
    ]
    whole_ms = total(own, weights, [0] * (len(own) + len(weights)))
    folder = context.work_directory
    model.save(folder / "uncut.onnx")
    paths, promised_db, measured_db, saved_ms = [folder / "uncut.onnx"], [], [], []
    for number, share in enumerate(np.linspace(0.1, 1.0, choices)):
        choice = [int(generator.integers(len(found))) if generator.random() < share else 0 for found in own]
        parts = [found[place] for found, place in zip(own, choice, strict=True)]
        steps = cutting_steps(groups, branches, parts)
        if not steps:
            continue
        cut = model
        for step in steps:
            cut = TECHNIQUES["prune"].make_pass(step.config)(cut, context).model
        paths.append(folder / f"cut-{number}.onnx")
        cut.save(paths[-1])
        promised_db.append(decibels(sum(part.error for part in parts)))
        measured_db.append(decibels(output_distances(model, cut, context).error))
        saved_ms.append(whole_ms - total(own, weights, [*choice, *[0] * len(weights)]))
    return compared(paths, promised_db, measured_db, saved_ms, context, threads)


def compared(
    paths: Sequence[Path],
    promised_db: Sequence[float],
    measured_db: Sequence[float],
    saved_ms: Sequence[float],
    context: Context,
    threads: int,
) -> str:
    """Six cells. `paths`: of the float model, then of those that were promised to save so much of its time."""
    timings = time_interleaved(paths, context.data, threads=threads, batch_size=1, rounds=ROUNDS, budget_s=BUDGET_S)
    times = np.array([float(np.median(own)) * 1e3 for own in timings.times_s])
    promised = times[0] - np.array(saved_ms)
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
        second = layers(fused, context, choices, generator)
        return f"|{case.name}|{first}|{second}|{widths(fused, context, choices, generator)}|"


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
        "measured, median|worst|widths: rank|dB, median|worst|time: rank|promised / measured, median|worst|",
        "|" + "---|" * 16,
    ]
    print("\n".join(lines), flush=True)
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            lines.append(row(case, arguments.models, arguments.choices))
            print(lines[-1], flush=True)
    if arguments.page:
        where = (
            f"{arguments.choices} choices a model, on {os.cpu_count()} cores with a load of {os.getloadavg()[2]:.0f}.\n"
        )
        arguments.page.write_text("\n".join([HEADER, where, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
