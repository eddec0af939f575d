"""Factorization beside channel pruning: cost, fidelity and latency at the same multiply-accumulates.

    python benchmarks/factorize.py [--models DIR --only NAME ...] [--architectures NAME ... --cache DIR]
                                   [--budgets SHARE ...] [--tables SHARE ...] [--samples N] [--no-latency] [--render]

Every model is fused; then, at each budget, `factorize: {budget}` and channel pruning (global, least squares) whose
sparsity is searched so that it leaves as many multiply-accumulates. Half of the samples are given to both, fidelity is
that on the other half, towards the model as it was loaded. DIR is as for `real_models.py`, and gives the task metric as
well. ARCHITECTURES are those of `architectures.py`, with random weights and inputs: of them fidelity says little but
which of two is nearer. With --tables embedding tables alone are factorized, to these shares of their numbers, with the
samples and without, in place of all else. Latency is that of the fused model over the result's, in interleaved rounds
on one thread. Real models are quantized as well (static, 8 bits): fused, and factorized to each budget.

Rows are gathered in docs/factorization.json, a model at a time, but for those of tables; docs/factorization.md is
written from them (`--render`: that alone).
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from model_evaluation import evaluate
from modelpress_compression import load
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.measure.latency import compare_latency
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.factorize import Factorize
from modelpress_compression.passes.factorize.layers import find_layers
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.report.environment import environment
from pruning_quality import CASES

BUDGETS = (0.75, 0.5, 0.3)
ROUNDS, LATENCY_BUDGET_S = 30, 4.0
_ALIKE = 0.05  # of the multiply-accumulates
_POINT = 0.01  # of a metric
_SEARCHES = 6  # of the sparsity that leaves as many MACs
DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "factorization.json", DOCS / "factorization.md"
TABLE = (
    "| model | what | MACs | parameters | speed-up | SQNR, dB | metric | s | peak MiB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
HEADER = """# What factorization gives

Written by `benchmarks/factorize.py`; do not edit.

`factorize: {budget}` beside channel pruning with repair that leaves as many multiply-accumulates, and, for trained
models, static quantization to 8 bits behind it. MACs and parameters are shares of the fused model's, the speed-up is
over it, measured on one thread with one sample in interleaved rounds; SQNR is that of the first output on samples that
nobody fitted anything to; the metric is the task's own. Seconds and peak memory are those of the row's own work.
Architectures without a metric have random weights: their spectra are flat, so that low ranks keep less of them than of
trained ones, and their SQNR says only which of two is nearer.
"""


@dataclass(frozen=True)
class Subject:
    """A model as it was loaded and as it was fused, samples to give and to judge by; `evaluation`: of real models."""

    name: str
    model: Model
    fused: Model
    given: InputData
    held_out: InputData
    folder: Path
    evaluation: tuple[str, Path] | None = None

    @property
    def context(self) -> Context:
        return Context(self.given, self.folder)

    def macs(self, model: Model) -> int:
        return count_macs(model, sample_shapes(self.given)).total or 0

    def metric(self, model: Model) -> str:
        """The task's, where there is one."""
        if self.evaluation is None:
            return ""
        name, models = self.evaluation
        path = self.folder / "judged.onnx"
        model.save(path)
        return f"{float(evaluate(name, models, '--model', str(path), '--threads', '1')):.4f}"


def real(names: list[str], models: Path, samples: int, folder: Path) -> Iterator[Subject]:
    """Trained models, with the inputs that their own scripts write."""
    for case in CASES:
        if names and case.name not in names:
            continue
        evaluate(case.name, models, "--make-calib", str(folder / "data.npz"))
        model = load(models / case.file, case.inputs)
        with np.load(folder / "data.npz") as arrays:
            wanted = {spec.name for spec in model.inputs}
            kept = {name: arrays[name] for name in arrays.files if len(wanted) == 1 or name in wanted}
        yield subject(case.name, model, kept, samples, folder, (case.name, models))


def random_ones(names: list[str], cache: Path, samples: int, folder: Path) -> Iterator[Subject]:
    """Architectures with random weights; needs timm, torchvision and transformers."""
    from architectures import ARCHITECTURES, drawn_samples, exported

    for name in names:
        path, _ = exported(ARCHITECTURES[name], "dynamo", cache)
        yield subject(name, load(path), drawn_samples(ARCHITECTURES[name], samples), samples, folder)


def subject(
    name: str,
    model: Model,
    arrays: dict[str, np.ndarray],
    samples: int,
    folder: Path,
    evaluation: tuple[str, Path] | None = None,
) -> Subject:
    """Fused, with every second sample held out."""
    data = InputData.from_arrays(arrays, model.inputs).spread(samples)
    count = len(data) // (data.fixed_batch or 1)
    given, held_out = (data.only(range(start, count, 2)) for start in (0, 1))
    fused = Fuse(FuseConfig())(model, Context(given, folder)).model
    return Subject(name, model, fused, given, held_out, folder, evaluation)


def pruned_to(one: Subject, macs: int) -> Model:
    """Channels removed until no more than so many MACs are left, or as many as can be."""
    low, high = 0.0, 0.98
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        config = PruneConfig(structure="channel", scope="global", normalize="macs", sparsity=middle, repair="none")
        low, high = (low, middle) if one.macs(Prune(config)(one.fused, one.context).model) <= macs else (middle, high)
    config = PruneConfig(structure="channel", scope="global", normalize="macs", sparsity=high, repair="least_squares")
    return Prune(config)(one.fused, one.context).model


@contextmanager
def own_costs() -> Iterator[list[float]]:
    """Seconds, and the peak of this process's memory in MiB, of what is done within; Linux alone tells the latter."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
    found, began = list[float](), time.monotonic()
    yield found
    status = Path("/proc/self/status").read_text("ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    found += [time.monotonic() - began, int(peak.split()[1]) / 1024]


def row_of(one: Subject, what: str, model: Model, costs: list[float], timed: bool) -> str:
    """One row of the table. `costs`: as of `own_costs`; empty: it was there."""
    paths = [one.folder / f"{name}.onnx" for name in ("loaded", "fused", "result")]
    for item, path in zip((one.model, one.fused, model), paths, strict=True):
        item.save(path)
    fidelity = next(iter(compare_outputs(paths[0], paths[2], one.held_out).outputs.values()))
    parameters = [sum(tensor.size for tensor in item.tensors()) for item in (model, one.fused)]
    latency = ""
    if timed:
        row = compare_latency(*paths[1:], one.given, batch_size=1, threads=1, rounds=ROUNDS, budget_s=LATENCY_BUDGET_S)
        latency = f"{row.speedup.median:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
    sqnr = "" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
    cells = (
        one.name,
        what,
        f"{one.macs(model) / one.macs(one.fused):.2f}",
        f"{parameters[0] / parameters[1]:.2f}",
        latency,
        sqnr,
        one.metric(model),
        f"{costs[0]:.1f}" if costs else "",
        f"{costs[1]:.0f}" if costs else "",
    )
    return "| " + " | ".join(cells) + " |"


def rows_of(one: Subject, budgets: list[float], timed: bool) -> Iterator[str]:
    """Rows of all budgets, and for a trained model those in 8 bits."""
    yield row_of(one, "fused", one.fused, [], timed)
    if one.evaluation is not None:
        yield in_8_bits(one, "8 bits", one.fused, timed)
    for budget in budgets:
        with own_costs() as costs:
            result = Factorize(FactorizeConfig(budget=budget))(one.fused, one.context)
        methods = sorted({str(row["method"]) for row in result.details})
        yield row_of(one, f"factorize {budget} ({', '.join(methods)})", result.model, costs, timed)
        if one.evaluation is not None:
            yield in_8_bits(one, f"factorize {budget}, 8 bits", result.model, timed)
        with own_costs() as costs:
            model = pruned_to(one, one.macs(result.model))
        yield row_of(one, f"prune {budget}", model, costs, timed)


def in_8_bits(one: Subject, what: str, model: Model, timed: bool) -> str:
    """The row of a model in static 8 bits."""
    with own_costs() as costs:
        quantized = Quantize(QuantizeConfig(scheme="static"))(model, one.context).model
    return row_of(one, what, quantized, costs, timed)


def table_rows_of(one: Subject, shares: list[float], timed: bool) -> Iterator[str]:
    """Rows of a model's embedding tables alone, by how often rows are read, and with all rows alike."""
    yield row_of(one, "fused", one.fused, [], timed)
    layers, _ = find_layers(one.fused, (), {})
    others = tuple(layer.name for layer in layers if not layer.is_table)
    for share in shares:
        for what, given in (("by reads", one.given), ("rows alike", one.given.only(range(1)))):
            config = FactorizeConfig(rank_ratio=share, embeddings="always", exclude=others)
            with own_costs() as costs:
                result = Factorize(config)(one.fused, Context(given, one.folder))
            lost = ", ".join(f"{float(row['relative_error']):.3f}" for row in result.details)
            yield row_of(one, f"tables {share}, {what} (lost {lost})", result.model, costs, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Factorization beside channel pruning.")
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*", default=[], help="names of those models")
    parser.add_argument("--architectures", nargs="*", default=[], help="names of architectures with random weights")
    parser.add_argument("--cache", type=Path, default=Path("architectures"), help="folder for their ONNX files")
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="shares of the MACs to leave")
    parser.add_argument("--tables", nargs="*", type=float, help="embedding tables alone, at these shares of their size")
    parser.add_argument("--samples", type=int, default=256, help="half are given, half judge")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--render", action="store_true", help="write the page from the rows that there are")
    arguments = parser.parse_args()
    if not arguments.render:
        print("\n".join(TABLE), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, samples = Path(temporary), arguments.samples
        subjects = random_ones(arguments.architectures, arguments.cache, samples, folder)
        if arguments.models is not None:
            subjects = chain(real(arguments.only, arguments.models.resolve(), samples, folder), subjects)
        for one in subjects:
            timed, tables = not arguments.no_latency, arguments.tables
            found = []
            for row in table_rows_of(one, tables, timed) if tables else rows_of(one, arguments.budgets, timed):
                print(row, flush=True)
                found.append(row)
            if not tables:
                about = f"{datetime.date.today().isoformat()}, {environment()['cpu']}, {samples} samples at most"
                results = gathered() | {one.name: {"rows": found, "about": about}}
                RESULTS.write_text(json.dumps(results, indent=1), "utf-8")
    PAGE.write_text(page(gathered()), "utf-8")


@dataclass(frozen=True)
class Figures:
    """What the page's summary reads of a row."""

    macs: float
    speed: float
    sqnr_db: float
    metric: float | None

    @classmethod
    def of(cls, row: str) -> tuple[str, Figures] | None:
        """With what was done, but for the methods in brackets; None: it was not timed."""
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        _, what, macs, _, speed, sqnr, metric, *_ = [*cells, "", ""]
        if not speed or not sqnr:
            return None
        found = cls(float(macs), float(speed.split()[0]), float(sqnr), float(metric) if metric else None)
        return what.split(" (", maxsplit=1)[0], found


def summary(results: dict[str, Any]) -> Iterator[str]:
    """How often factors are faster or nearer than pruning to the same cost, and in 8 bits than 8 bits alone."""
    by_model = {name: dict(filter(None, map(Figures.of, one["rows"]))) for name, one in results.items()}
    for budget in BUDGETS:
        pairs = [
            (rows[f"factorize {budget}"], rows[f"prune {budget}"])
            for rows in by_model.values()
            if f"factorize {budget}" in rows and f"prune {budget}" in rows
        ]
        alike = [(one, other) for one, other in pairs if abs(one.macs - other.macs) <= _ALIKE]
        if alike:
            speeds = [np.exp(np.mean([np.log(pair[place].speed) for pair in alike])) for place in (0, 1)]
            nearer = sum(one.sqnr_db > other.sqnr_db for one, other in alike)
            faster = sum(one.speed > other.speed for one, other in alike)
            yield (
                f"- At {budget} of the multiply-accumulates, {len(alike)} models whose two ways cost the same within "
                f"{_ALIKE}: factors are nearer to the original in {nearer}, faster in {faster}; in the geometric mean "
                f"factors are {speeds[0]:.2f} times as fast as the fused model, pruned ones {speeds[1]:.2f}."
            )
    for name, rows in by_model.items():
        alone = rows.get("8 bits")
        factored = {what: one for what, one in rows.items() if what.startswith("factorize") and what.endswith("8 bits")}
        if alone is None or not factored:
            continue
        what, best = max(factored.items(), key=lambda item: item[1].speed)
        kept = [one for one in factored.values() if alone.metric and one.metric and one.metric >= alone.metric - _POINT]
        fastest = max((one.speed for one in kept), default=None)
        yield (
            f"- {name} in 8 bits: {alone.speed:.2f} times as fast as fused ({alone.metric}). Factorized before, the "
            f"fastest is {what.removesuffix(', 8 bits')}, {best.speed:.2f} times ({best.metric}); "
            + (
                "none keeps the metric to within a point."
                if fastest is None
                else f"of those that keep the metric to within a point, {fastest:.2f} times."
            )
        )


def gathered() -> dict[str, Any]:
    """The rows so far, by model."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return results


def page(results: dict[str, Any]) -> str:
    """docs/factorization.md: trained models first."""
    order = [case.name for case in CASES]
    names = [*(name for name in order if name in results), *sorted(results.keys() - set(order))]
    blocks = [HEADER, *summary({name: results[name] for name in names}), ""]
    for name in names:
        blocks += [f"## {name}", "", f"{results[name]['about']}.", "", *TABLE, *results[name]["rows"], ""]
    return "\n".join(blocks)


if __name__ == "__main__":
    main()
