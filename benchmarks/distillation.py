"""What training from the file alone brings back: task metrics of trained models against the CPU time that it took.

    python benchmarks/distillation.py run --models FOLDER --name mnist      measures, into docs/distillation.json
    python benchmarks/distillation.py render                                writes docs/distillation.md and its plots

FOLDER holds the models, their training inputs (no labels are used) and `eval_NAME.py`; see `model_evaluation`. Models
are pruned to about half of their multiplications. Times are CPU seconds of the step on one thread, since wall clock
tells of what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from model_evaluation import evaluate
from modelpress_compression import Model, load
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.config import Augmentation, DistillConfig
from modelpress_compression.passes.distill.distill import Distill
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from time_curves import render_svg

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "distillation.json"
CALIBRATION_SAMPLES = 500
# Made-up inputs cost more than all else on large models.
LIMIT_WITHOUT_DATA_S = 180.0
SPARSITIES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
NONE, REPAIR, LAYERWISE, DISTILL, AUGMENTED, DATA_FREE = (
    "nothing",
    "closed-form repair",
    "layer-wise",
    "distillation",
    "distillation + augmentation",
    "distillation without data",
)


def _representative(name: str) -> Callable[[Path], dict[str, Array]]:
    """The representative inputs that a user would have at hand: some 100 to 200, as `eval_NAME.py` makes them."""

    def read(models: Path) -> dict[str, Array]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.npz"
            evaluate(name, models, "--make-calib", str(path))
            with np.load(path) as arrays:
                return dict(arrays)

    return read


def _digits(models: Path) -> dict[str, Array]:
    with np.load(models / "mnist" / "mnist_data.npz") as arrays:
        return {"input": arrays["x_train"].astype(np.float32)}


def _clothes(models: Path) -> dict[str, Array]:
    with np.load(models / "data" / "fashion.npz") as arrays:
        return {"input": ((arrays["x_train"].astype(np.float32) / 255 - 0.2860) / 0.3530).astype(np.float32)}


@dataclass(frozen=True)
class Subject:
    """A model: its file, its training inputs, what is measured; `epochs`: budgets of whole-model training.

    `shapes`: inputs of a file that does not record them; `options`: of `distill`, where they are not the usual ones.
    """

    file: str
    metric: str
    inputs: Callable[[Path], dict[str, Array]]
    augment: tuple[Augmentation, ...]
    epochs: tuple[int, ...]
    shapes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "mnist": Subject(
        "mnist/mnist.onnx",
        "top-1 on 2,000 digits",
        _digits,
        (Augmentation("rotation", 10), Augmentation("random_resized_crop", 0.8)),
        (1, 5, 20),
    ),
    "fashion": Subject(
        "fashion/fashion.onnx",
        "top-1 on 10,000 images",
        _clothes,
        (Augmentation("horizontal_flip", 0.5), Augmentation("random_resized_crop", 0.8)),
        (1, 4, 12),
    ),
    "silero_vad": Subject(
        "files/silero_vad_16k_op15.onnx",
        "ROC AUC on labelled speech",
        _representative("silero_vad"),
        (Augmentation("noise", 0.05), Augmentation("time_masking", 0.1)),
        (5, 20, 60),
        options={"batch_size": 16, "learning_rate": 1e-3},
    ),
    "ppocr_rec": Subject(
        "files/ppocr_rec.onnx",
        "words read right on 400 lines",
        _representative("ppocr_rec"),
        (Augmentation("color_jitter", 0.2), Augmentation("rotation", 2)),
        (2, 6, 15),
        options={"batch_size": 8, "learning_rate": 5e-4},
    ),
    "minilm": Subject(
        "files/minilm.onnx",
        "retrieval top-1 on 500 queries",
        _representative("minilm"),
        (Augmentation("token_masking", 0.15),),
        (2, 6, 15),
        options={"batch_size": 8, "learning_rate": 1e-4},
    ),
    "effnet_lite0": Subject(
        "files/effnet_lite0.traced.pt",
        "top-1 on 200 photos",
        _representative("effnet_lite0"),
        (Augmentation("horizontal_flip", 0.5), Augmentation("random_resized_crop", 0.7)),
        (10, 40),
        shapes=("input:float32[batch,3,224,224]",),
        options={"batch_size": 8, "learning_rate": 5e-4, "patience": 15},
    ),
}


@dataclass
class Bench:
    """One model and what was measured of it."""

    name: str
    models: Path
    subject: Subject
    original: Model
    context: Context
    rows: list[dict[str, Any]] = field(default_factory=list)

    def metric(self, model: Model) -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            model.save(path)
            return float(evaluate(self.name, self.models, "--model", str(path)).split()[-1])

    def row(self, table: str, method: str, model: Model, seconds: float, **more: Any) -> None:
        entry = {"table": table, "method": method, "metric": self.metric(model), "cpu_s": round(seconds, 1), **more}
        self.rows.append(entry)
        print(self.name, entry, flush=True)

    def small(self) -> Context:
        return replace(self.context, data=self.context.data.head(CALIBRATION_SAMPLES))

    def without_data(self) -> Context:
        return replace(self.context, data=synthetic_inputs(self.original, samples=32))

    def distilled(self, model: Model, context: Context | None = None, **options: Any) -> tuple[Model, float]:
        began = time.process_time()
        config = DistillConfig(**{"learning_rate": 3e-3, "feature_weight": 1.0, **self.subject.options, **options})
        result = Distill(config)(model, context or self.context)
        return result.model, time.process_time() - began

    def macs(self, model: Model) -> int:
        return model_stats(model, sample_shapes(self.context.data.head(1))).macs or 0


def pruned(bench: Bench, context: Context, **options: Any) -> tuple[Model, float]:
    began = time.process_time()
    model = Prune(PruneConfig(structure="channel", **options))(bench.original, context).model
    return model, time.process_time() - began


def half_of_macs(bench: Bench) -> float:
    """The sparsity that comes nearest to half of the multiplications."""
    whole = bench.macs(bench.original)
    shares = {
        sparsity: bench.macs(pruned(bench, bench.small(), sparsity=sparsity, criterion="l2", repair="none")[0]) / whole
        for sparsity in SPARSITIES
    }
    return min(shares, key=lambda sparsity: abs(shares[sparsity] - 0.5))


def recovery(bench: Bench, sparsity: float) -> None:
    """Every way back from a cut, each with its time."""
    cut, seconds = pruned(bench, bench.small(), sparsity=sparsity, criterion="activation", repair="none")
    share = bench.macs(cut) / bench.macs(bench.original)
    bench.row("recovery", NONE, cut, seconds, macs_share=share, sparsity=sparsity)
    repaired, seconds = pruned(bench, bench.small(), sparsity=sparsity, criterion="activation")
    bench.row("recovery", REPAIR, repaired, seconds)
    model, more = bench.distilled(repaired, method="layerwise", epochs=4)
    bench.row("recovery", LAYERWISE, model, seconds + more)
    for epochs in bench.subject.epochs:
        model, more = bench.distilled(repaired, epochs=epochs)
        bench.row("recovery", DISTILL, model, seconds + more, epochs=epochs)
    model, more = bench.distilled(repaired, epochs=bench.subject.epochs[-1], augment=bench.subject.augment)
    bench.row("recovery", AUGMENTED, model, seconds + more, epochs=bench.subject.epochs[-1])


def blind(bench: Bench, sparsity: float) -> None:
    """The same without any data."""
    cut, seconds = pruned(bench, bench.without_data(), sparsity=sparsity, criterion="l2")
    bench.row("blind", f"{NONE}, without data", cut, seconds)
    context = replace(bench.without_data(), deadline=time.monotonic() + LIMIT_WITHOUT_DATA_S)
    model, more = bench.distilled(cut, context, epochs=30, learning_rate=1e-3)
    bench.row("blind", DATA_FREE, model, seconds + more, epochs=30)


def criteria(bench: Bench, sparsity: float) -> None:
    """What a criterion is worth at once, repaired, and after the same short training."""
    for criterion in ("l2", "activation", "taylor"):
        for scope in ("layer", "global"):
            options = {"sparsity": sparsity, "criterion": criterion, "scope": scope, "normalize": "macs"}
            cut, seconds = pruned(bench, bench.small(), repair="none", **options)
            repaired, _ = pruned(bench, bench.small(), **options)
            trained, _ = bench.distilled(repaired, epochs=bench.subject.epochs[0])
            share = bench.macs(cut) / bench.macs(bench.original)
            more = {"cut": bench.metric(cut), "repaired": bench.metric(repaired), "macs_share": share}
            bench.row("criteria", f"{criterion}, {scope}", trained, seconds, **more)


def quantized(bench: Bench, _: float) -> None:
    """Post-training quantization, and the same model trained."""
    forms: Mapping[str, dict[str, Any]] = {
        "static int8": {"scheme": "static"},
        "int4 weights": {"scheme": "weight_only", "weights": "int4", "block_size": 128},
        "int4 weights, rounded to the nearest": {
            "scheme": "weight_only",
            "weights": "int4",
            "block_size": 128,
            "rounding": "nearest",
        },
    }
    for name, options in forms.items():
        began = time.process_time()
        context = replace(bench.context, data=bench.context.data.head(200))
        model = Quantize(QuantizeConfig(**options))(bench.original, context).model
        bench.row("quantized", name, model, time.process_time() - began, trained=False)
        trained, seconds = bench.distilled(model, epochs=bench.subject.epochs[0] * 3, learning_rate=3e-4)
        bench.row("quantized", name, trained, seconds, trained=True)


PARTS: Mapping[str, Callable[[Bench, float], None]] = {
    "recovery": recovery,
    "blind": blind,
    "quantized": quantized,
    "criteria": criteria,
}


def measure(name: str, models: Path, parts: Sequence[str]) -> None:
    """Tables of one model, into the results; other tables stay."""
    subject = SUBJECTS[name]
    original = load(models / subject.file, subject.shapes)
    arrays = subject.inputs(models)
    names = [spec.name for spec in original.inputs]
    given = {name: arrays[name] for name in names} if len(names) > 1 else dict(zip(names, arrays.values(), strict=True))
    data = InputData.from_arrays(given, original.inputs)
    with TemporaryDirectory() as folder:
        bench = Bench(name, models, subject, original, Context(data, Path(folder), original=original))
        bench.row("original", "original", original, 0.0, samples=len(data))
        sparsity = 0.5 if name == "mnist" else half_of_macs(bench)
        for part in parts:
            PARTS[part](bench, sparsity)
            found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
            new = {row["table"] for row in bench.rows}
            rows = [*(row for row in found.get(name, ()) if row["table"] not in new), *bench.rows]
            RESULTS.write_text(json.dumps({**found, name: rows}, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure one model")
    run.add_argument("--models", type=Path, required=True)
    run.add_argument("--name", choices=sorted(SUBJECTS), required=True)
    run.add_argument("--part", choices=sorted(PARTS), action="append", help="some tables only")
    commands.add_parser("render", help="write the page from the results")
    arguments = parser.parse_args()
    if arguments.command == "run":
        torch.set_num_threads(1)
        measure(arguments.name, arguments.models, arguments.part or list(PARTS))
    else:
        from distillation_page import render_page

        render_page(json.loads(RESULTS.read_text("utf-8")), DOCS, render_svg)


if __name__ == "__main__":
    main()
