"""Factorization beside channel pruning: cost, fidelity and latency at the same multiply-accumulates.

    python benchmarks/factorize.py [--models DIR --only NAME ...] [--architectures NAME ... --cache DIR]
                                   [--budgets SHARE ...] [--tables SHARE ...] [--samples N] [--no-latency]

Every model is fused; then, at each budget, `factorize: {budget}` and channel pruning (global, least squares) whose
sparsity is searched so that it leaves as many multiply-accumulates. Half of the samples are given to both, fidelity is
that on the other half, towards the model as it was loaded. DIR is as for `real_models.py`, and gives the task metric as
well. ARCHITECTURES are those of `architectures.py`, with random weights and inputs: of them fidelity says little but
which of two is nearer. With --tables embedding tables alone are factorized, to these shares of their numbers, with the
samples and without, in place of all else. Latency is that of the fused model over the result's, in interleaved rounds
on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

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
from pruning_quality import CASES

BUDGETS = (0.75, 0.5, 0.3)
ROUNDS, LATENCY_BUDGET_S = 30, 4.0
_SEARCHES = 6  # of the sparsity that leaves as many MACs


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


def row_of(one: Subject, what: str, model: Model, seconds: float, timed: bool) -> str:
    """One row of the table."""
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
        f"{seconds:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def rows_of(one: Subject, budgets: list[float], timed: bool) -> Iterator[str]:
    """Rows of all budgets."""
    yield row_of(one, "fused", one.fused, 0.0, timed)
    for budget in budgets:
        began = time.monotonic()
        result = Factorize(FactorizeConfig(budget=budget))(one.fused, one.context)
        took_s = time.monotonic() - began
        methods = sorted({str(row["method"]) for row in result.details})
        yield row_of(one, f"factorize {budget} ({', '.join(methods)})", result.model, took_s, timed)
        began = time.monotonic()
        model = pruned_to(one, one.macs(result.model))
        yield row_of(one, f"prune {budget}", model, time.monotonic() - began, timed)


def table_rows_of(one: Subject, shares: list[float], timed: bool) -> Iterator[str]:
    """Rows of a model's embedding tables alone, by how often rows are read, and with all rows alike."""
    yield row_of(one, "fused", one.fused, 0.0, timed)
    layers, _ = find_layers(one.fused, (), {})
    others = tuple(layer.name for layer in layers if not layer.is_table)
    for share in shares:
        for what, given in (("by reads", one.given), ("rows alike", one.given.only(range(1)))):
            began = time.monotonic()
            config = FactorizeConfig(rank_ratio=share, embeddings="always", exclude=others)
            result = Factorize(config)(one.fused, Context(given, one.folder))
            took_s = time.monotonic() - began
            lost = ", ".join(f"{float(row['relative_error']):.3f}" for row in result.details)
            yield row_of(one, f"tables {share}, {what} (lost {lost})", result.model, took_s, timed)


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
    arguments = parser.parse_args()
    print("| model | what | MACs | parameters | speed-up | SQNR, dB | metric | s |\n" + "| --- " * 8 + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, samples = Path(temporary), arguments.samples
        subjects = random_ones(arguments.architectures, arguments.cache, samples, folder)
        if arguments.models is not None:
            subjects = chain(real(arguments.only, arguments.models.resolve(), samples, folder), subjects)
        for one in subjects:
            timed, tables = not arguments.no_latency, arguments.tables
            rows = table_rows_of(one, tables, timed) if tables else rows_of(one, arguments.budgets, timed)
            for row in rows:
                print(row, flush=True)


if __name__ == "__main__":
    main()
