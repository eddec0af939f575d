"""Networks as FPGA designs: accuracy, resources, clock and latency.

    python benchmarks/fpga.py [--only NAME ...] [--part PART ...]

Two networks are trained here, in seconds, since what they cost depends on their weights:

    jet     16-64-32-32-5, the size of the jet tagger of hls4ml's first paper; synthetic data of 16 features and five
            classes, for the physicists' data must be downloaded: accuracies of the two say nothing about each other
    mnist   49-32-16-10 on digits (examples/mnist/digits.npz) that are averaged over 4 by 4 pixels

and the ConvNet of examples/mnist is taken as it is, which only fits folded. One row for each part; all figures are
those of the report. Yosys and nextpnr take minutes for each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from modelpress_compression import EvaluationData, InputData, Recipe, compress, load
from modelpress_compression.errors import CompressionError
from modelpress_compression.model import Model
from torch import nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist"
SAMPLES = 1000
HEADER = (
    "| network | part | accuracy float, fixed | LUT | FF | DSP | BRAM | Fmax MHz | cycles | latency ns | exact, as "
    "written and synthesized |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


@dataclass(frozen=True)
class Case:
    """A model with representative samples and labelled ones."""

    name: str
    model: Model
    samples: InputData
    labelled: EvaluationData


def jet() -> Case:
    """The jet tagger's size, on a mixture of Gaussians that no linear map tells apart."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((5, 3, 16)) * 1.1
    labels = rng.integers(0, 5, 12_000)
    x = centers[labels, rng.integers(0, 3, len(labels))] + rng.standard_normal((len(labels), 16))
    return _trained("jet 16-64-32-32-5", [16, 64, 32, 32, 5], x / x.std(axis=0), labels, 10_000)


def mnist() -> Case:
    """Digits of 7 by 7 pixels."""
    with np.load(EXAMPLE / "digits.npz") as arrays:
        images = np.concatenate([arrays[name] for name in arrays if arrays[name].ndim >= 3]).reshape(-1, 7, 4, 7, 4)
        labels = np.concatenate([arrays[name] for name in arrays if arrays[name].ndim == 1])
    x = (images.mean(axis=(2, 4)).reshape(len(images), 49) / 255 - 0.1307) / 0.3081
    return _trained("mnist 49-32-16-10", [49, 32, 16, 10], x, labels, 8_000)


def convnet() -> Case:
    """The example's, with all its 28 by 28 pixels."""
    model = load(EXAMPLE / "model.onnx")
    with np.load(EXAMPLE / "samples.npz") as samples, np.load(EXAMPLE / "eval.npz") as labelled:
        return Case(
            "mnist ConvNet",
            model,
            InputData.from_arrays(dict(samples), model.inputs),
            EvaluationData.from_arrays(dict(labelled), model.inputs),
        )


def _trained(name: str, sizes: list[int], x: np.ndarray, labels: np.ndarray, count: int) -> Case:
    """The first `count` samples train it, the others judge it."""
    torch.manual_seed(0)
    x = x.astype(np.float32)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    given, wanted = torch.tensor(x[:count]), torch.tensor(labels[:count].astype(np.int64))
    for _ in range(25):
        for batch in torch.randperm(count).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(given[batch]), wanted[batch]).backward()
            optimizer.step()
    file = io.BytesIO()
    torch.onnx.export(
        network.eval(), (given[:1],), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(file.getvalue())
        model = load(path)
    samples = InputData.from_arrays({"x": x[:SAMPLES]}, model.inputs)
    return Case(
        name, model, samples, EvaluationData.from_arrays({"x": x[count:], "labels": labels[count:]}, model.inputs)
    )


CASES = {"jet": jet, "mnist": mnist, "convnet": convnet}


def row(case: Case, part: str) -> str:
    """A line of the table."""
    recipe = Recipe.from_dict(
        {"version": 1, "goal": {"objective": "balanced"}, "target": {"device": "fpga", "part": part}}
    )
    try:
        report = compress(case.model, recipe, data=case.samples, eval_data=case.labelled).report
    except CompressionError as error:
        return f"| {case.name} | {part} | {error.message} |"
    made, accuracy = report["target"], report["accuracy"]
    routed = made["routed"] or {"fmax_mhz": None, "latency_us": None}
    taken = [f"{made['resources'][key]:,} ({made['shares'][key]:.1%})" for key in made["resources"]]
    clock = [f"{routed['fmax_mhz']:.1f}", f"{routed['latency_us'] * 1e3:.0f}"] if made["routed"] else ["", ""]
    exact = made["bit_exact"]
    cells = [
        case.name,
        part,
        f"{accuracy['original']:.4f}, {accuracy['optimized']:.4f}",
        *taken,
        clock[0],
        f"{made['latency_cycles']}",
        clock[1],
        f"{exact['as_written']}, {exact['synthesized']} of {exact['samples']}",
    ]
    return "| " + " | ".join(cells) + " |"


def rows(names: list[str], parts: list[str]) -> Iterator[str]:
    """The table, line by line."""
    yield HEADER
    for name in names:
        case = CASES[name]()
        for part in parts:
            yield row(case, part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--part", nargs="+", default=["lfe5u-85f", "xc7a100t"])
    options = parser.parse_args()
    for line in rows(options.only, options.part):
        print(line, flush=True)
