"""Networks as FPGA designs, through a real server: accuracy, resources, clock, latency, and what answers exactly.

    python benchmarks/fpga.py [--only NAME ...] [--again]

runs what docs/fpga_benchmark.json has no result of (--again: all that is named), one `compress-client upload ...
--target fpga` each, and writes docs/fpga_benchmark.md from it. Networks:

    jet      16-64-32-32-5, the size of the jet tagger of hls4ml's first paper; synthetic data of 16 features and five
             classes, for the physicists' data must be downloaded: accuracies of the two say nothing about each other
    mnist    49-32-16-10 on digits (examples/mnist/digits.npz) that are averaged over 4 by 4 pixels
    convnet  that of examples/mnist, with all its 28 by 28 pixels, on 1,000 digits of its training set

Every second labelled sample judges the job (--eval); what the others say of the original and the result is computed
here. The C++ that hls4ml writes is compiled with g++, where there is one, and answers the samples of its test bench.
Yosys and nextpnr take minutes of CPU for each design: first `python -m modelpress_compression.backends.fpga`.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from server_process import running_server
from torch import nn

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "mnist"
RESULTS, PAGE = ROOT / "docs" / "fpga_benchmark.json", ROOT / "docs" / "fpga_benchmark.md"
SAMPLES = 1000
TIME_LIMIT_S = 4 * 3600
FILES = {"original": "model", "optimized": "model.optimized"}


@dataclass(frozen=True)
class Case:
    """`samples` [n, ...] of the input "x"; `labelled` of it and of the "labels". `max_drop`: of the agreement."""

    model: bytes
    samples: NDArray[Any]
    labelled: dict[str, NDArray[Any]]


# What is built: a network, a part, and what else the recipe says of the target.
RUNS: dict[str, tuple[str, str, dict[str, str]]] = {
    "jet": ("jet", "lfe5u-85f", {}),
    "jet, UltraScale+": ("jet", "xcvu13p", {}),
    "mnist": ("mnist", "lfe5u-85f", {}),
    "convnet": ("convnet", "lfe5u-85f", {}),
}
TITLES = {"jet": "jet 16-64-32-32-5", "mnist": "digits 49-32-16-10", "convnet": "digits ConvNet 28 by 28"}


def jet() -> Case:
    """The jet tagger's size, on a mixture of Gaussians that no linear map tells apart."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((5, 3, 16)) * 1.1
    labels = rng.integers(0, 5, 12_000)
    x = centers[labels, rng.integers(0, 3, len(labels))] + rng.standard_normal((len(labels), 16))
    return _trained([16, 64, 32, 32, 5], x / x.std(axis=0), labels, 10_000)


def mnist() -> Case:
    """Digits of 7 by 7 pixels."""
    with np.load(EXAMPLE / "digits.npz") as arrays:
        images = np.concatenate([arrays["images_train"], arrays["images_test"]]).reshape(-1, 7, 4, 7, 4)
        labels = np.concatenate([arrays["labels_train"], arrays["labels_test"]])
    x = (images.mean(axis=(2, 4)).reshape(len(images), 49) / 255 - 0.1307) / 0.3081
    return _trained([49, 32, 16, 10], x, labels, 8_000)


def convnet() -> Case:
    """The example's, as it is."""
    with np.load(EXAMPLE / "digits.npz") as arrays, np.load(EXAMPLE / "eval.npz") as labelled:
        images = arrays["images_train"][:SAMPLES].astype(np.float32)
        samples = (images / 255 - 0.1307) / 0.3081
        return Case((EXAMPLE / "model.onnx").read_bytes(), samples.astype(np.float32), dict(labelled))


def _trained(sizes: list[int], x: NDArray[Any], labels: NDArray[Any], count: int) -> Case:
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
    held_out = {"x": x[count:], "labels": labels[count:].astype(np.int64)}
    return Case(file.getvalue(), x[:SAMPLES], held_out)


CASES = {"jet": jet, "mnist": mnist, "convnet": convnet}


def run(case: Case, part: str, settings: dict[str, str], folder: Path) -> dict[str, Any]:
    """One upload to a server of its own: what the report says, and what the C++ of hls4ml answers."""
    (folder / "model.onnx").write_bytes(case.model)
    np.savez(folder / "samples.npz", x=case.samples)
    np.savez(folder / "eval.npz", **{name: array[::2] for name, array in case.labelled.items()})
    command = ["upload", "model.onnx", "--data", "samples.npz", "--eval", "eval.npz", "--target", "fpga"]
    for name, value in {"part": part, **settings}.items():
        command += ["--set", f"target.{name}={value}"]
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with running_server(folder / "data", "--run-time-limit-s", str(TIME_LIMIT_S)) as server:
        client = [sys.executable, "-m", "modelpress_client", *command, "--server", server.address]
        ran = subprocess.run(client, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((folder / "model.report.json").read_text("utf-8"))
    with zipfile.ZipFile(folder / "model.project.zip") as archive:
        archive.extractall(folder / "project")
    (step,) = (step for step in report["steps"] if step["name"] == "fpga")
    unseen = {name: array[1::2] for name, array in case.labelled.items()}
    return {
        "command": "compress-client " + " ".join(command),
        "accuracy": report["accuracy"],
        "unseen": {name: accuracy(folder / f"{file}.onnx", unseen) for name, file in FILES.items()},
        "agreement": report["fidelity"]["top1_agreement"],
        "target": report["target"],
        "layers": step["details"],
        "warnings": report["warnings"],
        "hls": emulated(folder / "project" / "fpga" / "hls"),
        "wall_s": time.monotonic() - began,
        "cpu_s": sum(getattr(now, name) - getattr(used, name) for name in ("ru_utime", "ru_stime")),
    }


def accuracy(path: Path, labelled: dict[str, NDArray[Any]]) -> float:
    """The share of right classes, by onnxruntime."""
    session = onnxruntime.InferenceSession(str(path))
    given = next(array for name, array in labelled.items() if name != "labels")
    (scores,) = session.run(None, {session.get_inputs()[0].name: given})
    return float((scores.argmax(axis=1) == labelled["labels"]).mean())


def emulated(project: Path) -> dict[str, int] | None:
    """Of the samples of the test bench, how many the compiled C++ answers as the fixed-point model; None: no g++, or no
    project."""
    if shutil.which("g++") is None or not (project / "build_lib.sh").is_file():
        return None
    subprocess.run(["/bin/bash", "build_lib.sh"], cwd=project, check=True, capture_output=True)
    (library,) = (project / "firmware").glob("*.so")
    given, expected = (np.loadtxt(project / "tb_data" / f"tb_{name}.dat", np.float32, ndmin=2)
                       for name in ("input_features", "output_predictions"))  # fmt: skip
    answer = ctypes.CDLL(str(library)).network_float
    floats = ctypes.POINTER(ctypes.c_float)
    exact = 0
    for sample, wanted in zip(given, expected, strict=True):
        made = np.zeros_like(wanted)
        answer(np.ascontiguousarray(sample).ctypes.data_as(floats), made.ctypes.data_as(floats))
        exact += bool((made == wanted).all())
    return {"samples": len(given), "exact": exact}


def page(results: dict[str, Any]) -> str:
    """The page, from what was run."""
    taken, speeds, layers, commands = [], [], [], []
    for name, (network, _, _) in RUNS.items():
        if name not in results:
            continue
        made = results[name]
        title = f"{TITLES[network]} on {made['target']['part_title']}"
        taken.append(_line(title, *_taken(made)))
        speeds.append(_line(title, *_speed(made)))
        commands.append(f"    {made['command']}")
        layers += [f"\n{title}:\n\n{_LAYERS}", *(_layer(row) for row in made["layers"])]
    parts = {"taken": taken, "speeds": speeds, "layers": layers, "commands": commands}
    return _PAGE.format(**{name: "\n".join(lines) for name, lines in parts.items()})


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _taken(made: dict[str, Any]) -> list[str]:
    target, accuracies = made["target"], [made["accuracy"], made["unseen"]]
    kinds = ("luts", "flip_flops", "dsps", "brams")
    shares = [f"{target['resources'][kind]:,} ({target['shares'][kind]:.1%})" for kind in kinds]
    answers = [f"{share['original']:.4f}, {share['optimized']:.4f}" for share in accuracies]
    return [target["form"], *answers, *shares]


def _speed(made: dict[str, Any]) -> list[str]:
    target, hls = made["target"], made["hls"]
    routed, exact = target["routed"], target["bit_exact"]
    clock = ["not routed", "", ""]
    if routed:
        clock = [f"{routed['fmax_mhz']:.1f}", f"{routed['latency_us']:.3f}", f"{routed['samples_per_s']:,.0f}"]
    return [
        f"{target['latency_cycles']:,}",
        f"{target['interval_cycles']:,}",
        *clock,
        f"{exact['as_written']:,} of {exact['samples']:,}",
        "" if exact["synthesized"] is None else f"{exact['synthesized']:,} of {exact['samples']:,}",
        f"{hls['exact']} of {hls['samples']}" if hls else "not compiled",
        f"{made['cpu_s'] / 60:.0f}",
    ]


_LAYERS = "| layer | weights | sum, bits | output | zero weights | products |\n|---|---|---:|---|---:|---:|"


def _layer(row: dict[str, Any]) -> str:
    return (
        f"| {row['layer']} | {row['weights']} ({row['weight_bits']} bits) | {row['sum_bits']} | {row['output']} "
        f"({row['output_bits']} bits) | {row['zero_weights']:.0%} | {row['products']:,} |"
    )


_PAGE = """# FPGA designs

Written by `benchmarks/fpga.py`, which says what the networks and the data are. Each row is one job of a real server:

{commands}

Accuracy is in float, and in fixed point: of the labelled samples that judged the choice of bits and the training for
them, of which it may fall by 1 point; and *on others*, as many, that no part of the job has seen. Lookup tables have
four inputs on ECP5, and six on AMD's parts; block RAMs are of 18 kbit. The clock is nextpnr's, after placement and
routing, of the slowest path between two registers at speed grade 6. *Exact*: samples that the simulated gates answer in
every bit as the fixed-point model does, of the design as it was written and as it was synthesized. *hls4ml*: samples of
the test bench that the C++ which hls4ml writes from the same network, compiled with g++, answers so; of jobs that have
none the JSON beside this page says why. CPU minutes are of the whole job, from upload to the last figure, on one core.

| network | form | accuracy | on others | LUT | FF | DSP | BRAM |
|---|---|---:|---:|---:|---:|---:|---:|
{taken}

| network | cycles | interval | Fmax, MHz | latency, µs | samples/s | exact, written | synthesized | hls4ml | CPU min |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{speeds}

## Beside published jet taggers

The published designs name the particle jets of CERN's simulated data (OpenML 42468, or its older form at CERNBox).
Ours has the same 16 inputs, five classes and layer sizes, and synthetic data, which stands for the size of the network
alone: **accuracies cannot be compared**. Its bits were chosen after training, and its weights trained on for them
without labels; most of theirs were trained in fixed point from the beginning. Their parts are AMD's UltraScale+, in
16 nm with lookup tables of six inputs; our clock is that of an ECP5 in 40 nm with four.

| design | accuracy | LUT | FF | DSP | Fmax, MHz | latency, ns | as quoted in table |
|---|---:|---:|---:|---:|---:|---:|---|
| hls4ml, AutoQKeras (arXiv 2006.10159) | 74.8 % | 39,782 | 8,128 | 124 | about 200 | 55.0 | FINNAS, II |
| hls4ml, AutoQKeras (arXiv 2006.10159), smaller | 72.3 % | 9,149 | 1,781 | 66 | about 200 | 55.0 | FINNAS, II |
| hls4ml (Fahim et al., arXiv 2103.05579) | 76.2 % | 63,251 | 4,394 | 38 | 200 | 45 | KANELÉ, 3 |
| da4ml (arXiv 2507.04535) | 76.9 % | 12,250 | 1,502 | 0 | 212 | 18.9 | KANELÉ, 3 |
| HGQ (arXiv 2405.00645) | 75.3 % | 10,921 | 11,183 | 0 | 578.4 | 31.1 | FINNAS, II |
| HGQ (arXiv 2405.00645), smaller | 75.1 % | 5,974 | 5,775 | 0 | 609.8 | 24.6 | FINNAS, II |
| FINN, dense (arXiv 1809.04570) | 73.78 % | 57,893 | 82,750 | 0 | 417.5 | 110.2 | FINNAS, II |

FINNAS: *FINN-Guided Hardware-Aware NAS and Pruning for FPGA Jet Substructure Classification*, arXiv 2609.16367, whose
table is of the CERNBox form, on a VU9P (HGQ: VU13P). KANELÉ: *Kolmogorov-Arnold Networks for Efficient LUT-based
Evaluation*, FPGA 2026, table 3, of the OpenML form. They quote the papers in brackets, which were not read for this
page.

## Bits of each layer
{layers}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    found = {name: made for name, made in kept.items() if "unseen" in made}  # older ones were judged otherwise
    for name in options.only:
        if name in found and not options.again:
            continue
        network, part, settings = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(CASES[network](), part, settings, Path(folder))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(_line(name, *_taken(found[name]), *_speed(found[name])), flush=True)
    PAGE.write_text(page(found), "utf-8")
