"""How fast the differentiable executor is: forward against onnxruntime, a training step against plain torch.

    python benchmarks/executor.py --cache FOLDER [--models FILE.onnx ...] [--only NAME ...] [--rounds N]

One thread. Everything is measured in turn, round by round, and compared within its round, so that a busy machine slows
both sides; printed are the medians and the median of the ratios. The plain torch model has its BatchNorms folded into
the convolutions, as the exported graph has.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from architectures import Architecture, _image, _timm, _torchvision, make, quiet
from modelpress_compression import load, runtime
from modelpress_compression.executor import Executor, weights
from modelpress_compression.model import Model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

IMAGE = {"image": {0: "batch"}}
SIZE = 224
BATCH = 4
GIVEN_BATCH = 32
LEARNING_RATE = 1e-4
MEASURED_S = 0.2
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _torchvision("resnet18"),
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2"),
    "efficientnet_b0": lambda: _timm("efficientnet_b0"),
    "regnety_004": lambda: _timm("regnety_004"),
}


@dataclass(frozen=True)
class Subject:
    """A model and its input; `module` is the same model in plain torch, where there is one."""

    name: str
    model: Model
    feeds: dict[str, np.ndarray]
    module: nn.Module | None


def exported(name: str, folder: Path) -> Subject:
    """A network with random weights, exported once, then taken from `folder`."""
    architecture = Architecture(name, "benchmark", NETWORKS[name], _image(SIZE), IMAGE)
    module, _ = make(architecture)
    path = folder / f"{name}-{SIZE}.onnx"
    image = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            torch.onnx.export(
                module, (image,), path, dynamo=False, opset_version=17, input_names=["image"], dynamic_axes=IMAGE
            )
    return Subject(name, load(path), {"image": image.numpy()}, fuse(module.eval()))


def given(path: Path) -> Subject:
    """A model file, with random numbers of the shape that it asks for (open axes: the batch size)."""
    model = load(path)
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal([dim if isinstance(dim, int) else GIVEN_BATCH for dim in spec.shape]).astype(
            spec.dtype
        )
        for spec in model.inputs
    }
    return Subject(path.stem, model, feeds, None)


def seconds(work: Callable[[], object]) -> float:
    """The shortest of at least two runs, and of as many as fit into the time: small models run often."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < MEASURED_S:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def training_step(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Forward, backward and an SGD update towards zero outputs."""
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run().square().mean().backward()
        optimizer.step()

    return step


def measure(subject: Subject, rounds: int) -> str:
    """One row of the table."""
    executor = Executor(subject.model, trainable=weights)
    output = executor.output_names[0]
    feeds = {name: torch.from_numpy(array) for name, array in subject.feeds.items()}

    def forward() -> None:
        with torch.no_grad():
            executor(feeds)

    works: dict[str, Callable[[], object]] = {"forward": forward}
    works["step"] = training_step(lambda: executor(feeds)[output], list(executor.parameters()))
    if subject.module is not None:
        module = copy.deepcopy(subject.module)
        works["torch step"] = training_step(lambda: module(*feeds.values()), list(module.parameters()))
    times: dict[str, list[float]] = {name: [] for name in (*works, "onnxruntime")}
    with runtime.session_of(subject.model) as session:
        works["onnxruntime"] = lambda: runtime.run(session, subject.feeds)
        for work in works.values():
            work()
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(seconds(work))
    return row(subject.name, times)


def row(name: str, times: Mapping[str, list[float]]) -> str:
    def milliseconds(key: str) -> str:
        return f"{1000 * statistics.median(times[key]):9.1f}" if times.get(key) else "        -"

    def ratio(a: str, b: str) -> str:
        if not times.get(b):
            return "    -"
        return f"{statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)):5.2f}"

    return (
        f"{name:20} {milliseconds('forward')} {milliseconds('onnxruntime')} {ratio('forward', 'onnxruntime')}   "
        f"{milliseconds('step')} {milliseconds('torch step')} {ratio('step', 'torch step')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the differentiable executor.")
    parser.add_argument("--cache", type=Path, required=True, help="folder for exported networks")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="further ONNX files")
    parser.add_argument("--only", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'':20} {'forward':>9} {'ort':>9} {'ratio':>5}   {'step':>9} {'torch':>9} {'ratio':>5}   (ms)")
    for name in arguments.only:
        print(measure(exported(name, arguments.cache), arguments.rounds), flush=True)
    for path in arguments.models:
        print(measure(given(path), arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
