"""The targets cuda and tensorrt on a GPU: docs/gpu.md, in under ten minutes.

    python benchmarks/gpu.py [--models DIR] [--page FILE] [--budget SECONDS]

Needs an NVIDIA GPU, modelpress[cuda] or modelpress[tensorrt], and a torch that sees the GPU. --models: the folder with
models and their eval_NAME.py; without it the example's ConvNet is all there is. Where there is no GPU the page says so
in its first line, and nothing is measured. What does not fit into the budget is left out, and named.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from model_evaluation import representative
from modelpress_compression import InputData, Recipe, compress, load
from modelpress_compression.backends import backend_of
from modelpress_compression.errors import CompressionError
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.measure.latency import compare_latency
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.report.environment import environment
from modelpress_compression.target import DEVICES, Target
from portability_results import CASES

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist"
TARGETS = ("cuda", "tensorrt")
FORMS: dict[str, list[dict[str, Any]]] = {
    "float32": [{"fuse": {}}],
    "float16": [{"fuse": {}}, {"quantize": {"scheme": "float16"}}],
    "static": [{"fuse": {}}, {"quantize": {"scheme": "static"}}],
}
# Steps that torch trains: on the GPU and on the CPU they must come to the same, but for rounding.
TRAINED: dict[str, list[dict[str, Any]]] = {
    "distill": [{"prune": {"structure": "channel", "sparsity": 0.25}}, {"distill": {"epochs": 2}}],
    "taylor": [{"prune": {"structure": "channel", "sparsity": 0.25, "criterion": "taylor"}}],
    "adaround": [{"quantize": {"scheme": "static", "rounding": "adaround", "rounding_steps": 100}}],
    "data-free distill": [{"quantize": {"scheme": "weight_only", "weights": "int4"}}, {"distill": {"epochs": 1}}],
}
NOT_RUN = "This was not run on a GPU: "
ABSENT = """# NVIDIA GPUs

`python benchmarks/gpu.py --models DIR --page docs/gpu.md` writes this page where there is a GPU, in under ten minutes:
size, time and answers of float32, float16 and static 8 bits by CUDA and by TensorRT, for each model; and distillation,
the criterion taylor, learned rounding and distillation without data on the GPU against the same on the CPU. What the
targets do: [targets.md](targets.md#nvidia-gpus).
"""
BATCHES = (1, 32)


@dataclass(frozen=True)
class Case:
    """A model with samples; its file is made by the steps that a form states."""

    name: str
    model: Model
    data: InputData


def cases(models: Path | None) -> Iterator[Case]:
    """The example first, then the smaller of the others."""
    model = load(EXAMPLE / "model.onnx")
    with np.load(EXAMPLE / "samples.npz") as arrays:
        yield Case("mnist (example)", model, InputData.from_arrays(dict(arrays), model.inputs))
    for case in CASES if models is not None else ():
        with tempfile.TemporaryDirectory() as work:
            model = load(models / case.file, inputs=case.inputs)  # type: ignore[operator]
            yield Case(case.name, model, representative(case.name, models, model, Path(work)))  # type: ignore[arg-type]


def made(case: Case, steps: list[dict[str, Any]], device: str, data: InputData | None) -> tuple[Model, dict[str, Any]]:
    """The result of the steps, and its report."""
    recipe = {"version": 1, "steps": steps, "target": {"device": device}, "benchmark": {"rounds": 6}}
    result = compress(case.model, Recipe.from_dict(recipe), data=data)
    return result.model, result.report


def rows(case: Case, device: str, folder: Path) -> Iterator[list[str]]:
    """Each form against float32 by the same provider: size, time at each batch size, answers."""
    backend = backend_of(Target(device=device))
    plain = folder / "float32.onnx"
    for form, steps in FORMS.items():
        path = folder / f"{form}.onnx"
        made(case, steps, device, case.data)[0].save(path)
        found = compare_outputs(plain, path, case.data, limit=64, backend=backend)
        timed = [
            compare_latency(
                plain, path, case.data, threads=1, batch_size=size, rounds=60, budget_s=15.0, backend=backend
            )
            for size in BATCHES
        ]
        yield [
            f"{case.name}, {form}",
            device,
            f"{file_size_bytes(path) / file_size_bytes(plain):.3f}",
            *(f"{row.optimized.p50_ms:.3f} ms, {row.speedup.median:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
              for row in timed),
            f"{found.sqnr_db:.1f} dB",
            "" if found.top1_agreement is None else f"{found.top1_agreement:.2%}",
        ]  # fmt: skip


def trained(case: Case) -> Iterator[list[str]]:
    """Each step that trains, on the GPU and on the CPU: seconds, and how far the results are apart."""
    for name, steps in TRAINED.items():
        data = None if name.startswith("data-free") else case.data
        seconds, reports = [], []
        for device in ("cuda", "cpu"):
            began = time.monotonic()
            reports.append(made(case, steps, device, data)[1])
            seconds.append(time.monotonic() - began)
        kept = [report["fidelity"]["agreement"] for report in reports]
        yield [name, f"{seconds[0]:.1f} s", f"{seconds[1]:.1f} s", *(f"{share:.4f}" for share in kept)]


def table(headings: list[str], found: list[list[str]]) -> str:
    """As Markdown."""
    lines = [headings, ["---"] * len(headings), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def why_not() -> str:
    """Why there is nothing to run; empty: a GPU is there."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees none here."
    return DEVICES["cuda"].missing


def page(models: Path | None, budget_s: float) -> str:
    """The whole page."""
    if reason := why_not():
        return f"{NOT_RUN}{reason}\n\n{ABSENT}"
    deadline = time.monotonic() + budget_s
    measured: list[list[str]] = []
    training: list[list[str]] = []
    left: list[str] = []

    def collected(what: str, into: list[list[str]], make: Callable[[], Iterator[list[str]]]) -> None:
        """Rows while there is time; what fails is named, and the next one goes on."""
        if time.monotonic() > deadline:
            left.append(f"{what}: no time was left")
            return
        try:
            into.extend(make())
        except CompressionError as error:
            left.append(f"{what}: {error.message}")

    for number, case in enumerate(cases(models)):
        for device in TARGETS:
            if missing := DEVICES[device].missing:
                left.append(f"{case.name}, {device}: {missing}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                collected(
                    f"{case.name}, {device}",
                    measured,
                    lambda: list_of(rows(case, device, Path(folder))),  # noqa: B023
                )
        if number == 0:
            collected(f"{case.name}, training", training, lambda: list_of(trained(case)))  # noqa: B023
    found = environment()
    sizes = [f"batch {size}: time, speed-up over float32" for size in BATCHES]
    return "\n\n".join(
        [
            f"Run on {torch.cuda.get_device_name()} with onnxruntime {ort.__version__}, torch {torch.__version__} and "
            f"{found['cpu']}.",
            "# NVIDIA GPUs",
            table(["result", "target", "size", *sizes, "SQNR", "same class"], measured),
            "Steps that torch trains, on the example; agreement with the original:",
            table(["step", "GPU", "CPU", "agreement, GPU", "agreement, CPU"], training),
            *(["Left out:\n\n" + "\n".join(f"- {text}" for text in left)] if left else []),
            "Made by `python benchmarks/gpu.py`.\n",
        ]
    )


def list_of(found: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows, all or none: one of a case that fails half way says little."""
    return iter(list(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="The targets cuda and tensorrt on a GPU.")
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--page", type=Path, help="where the page goes; without it, it is printed")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds, after which nothing more is begun")
    options = parser.parse_args()
    text = page(options.models.resolve() if options.models else None, options.budget)
    if options.page:
        options.page.write_text(text, "utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
