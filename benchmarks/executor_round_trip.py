"""Whether the executor gives what onnxruntime gives, on model files with their data.

    python benchmarks/executor_round_trip.py MODEL DATA.npz [MODEL DATA.npz ...] [--value sr=16000] [--input SPEC ...]

For each model: the largest deviation of its outputs, how many parameters it has and how many of them get no gradient,
and the same deviation after a training step that was written back into a clone. Exits with 1 where something deviates.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from modelpress_compression import load, runtime
from modelpress_compression.executor import Executor, unsupported_nodes, weights
from modelpress_compression.model import Model

RTOL, ATOL = 1e-3, 1e-4
SAMPLES = 4
LEARNING_RATE = 1e-6
Feeds = dict[str, np.ndarray]


def feeds_of(model: Model, path: Path, values: Mapping[str, str]) -> Feeds:
    """A few samples as one batch, or the first sample where each is a feed of its own; numbers from the command line
    for inputs that the file does not have."""
    feeds: Feeds = {}
    with np.load(path) as arrays:
        whole = any(arrays[s.name].ndim == len(s.shape) + 1 for s in model.inputs if s.name in arrays)
        for spec in model.inputs:
            if spec.name in arrays:
                feeds[spec.name] = arrays[spec.name][0] if whole else arrays[spec.name][:SAMPLES]
            else:
                feeds[spec.name] = np.full(spec.concrete_shape(), float(values[spec.name]))
            feeds[spec.name] = np.asarray(feeds[spec.name], spec.dtype)
    return feeds


def deviation(model: Model, executor: Executor, feeds: Feeds) -> tuple[float, bool]:
    """(largest absolute difference between executor and onnxruntime, whether all are within the tolerances)."""
    with runtime.session_of(model) as session:
        expected = runtime.run(session, feeds)
    found = executor.run(feeds)
    largest = max(float(np.abs(found[name] - array).max()) for name, array in expected.items())
    close = all(np.allclose(found[name], array, rtol=RTOL, atol=ATOL) for name, array in expected.items())
    return largest, close


def train_once(executor: Executor, feeds: Feeds) -> int:
    """One SGD step; how many parameters got no gradient."""
    optimizer = torch.optim.SGD(executor.parameters(), lr=LEARNING_RATE)
    outputs = executor(feeds)
    losses = [value.square().mean() for value in outputs.values() if value.is_floating_point()]
    torch.stack(losses).sum().backward()
    optimizer.step()
    return sum(parameter.grad is None for parameter in executor.parameters())


def check(path: Path, data: Path, inputs: Sequence[str], values: Mapping[str, str]) -> bool:
    """Prints one line."""
    model = load(path, inputs if path.suffix != ".onnx" else ())
    if missing := unsupported_nodes(model):
        print(f"{path.stem:24} unsupported: {', '.join(map(str, missing))}")
        return False
    feeds = feeds_of(model, data, values)
    began = time.perf_counter()
    executor = Executor(model, trainable=weights)
    compiled_s = time.perf_counter() - began
    before, same = deviation(model, executor, feeds)
    idle = train_once(executor, feeds)
    student = model.clone()
    executor.write_back(student)
    after, same_after = deviation(student, executor, feeds)
    count = sum(parameter.numel() for parameter in executor.parameters())
    print(
        f"{path.stem:24} {'equal' if same else 'DIFFERS'} ({before:.1e}), after a step "
        f"{'equal' if same_after else 'DIFFERS'} ({after:.1e}); {count} parameters in "
        f"{len(executor.parameters_by_name)} tensors, {idle} without gradient; compiled in {compiled_s:.2f} s",
        flush=True,
    )
    return same and same_after


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the executor with onnxruntime on model files.")
    parser.add_argument("pairs", type=Path, nargs="+", help="MODEL DATA.npz ...")
    parser.add_argument("--value", nargs="*", default=[], help="NAME=NUMBER of inputs that the data file lacks")
    parser.add_argument("--input", nargs="*", default=[], help="NAME:DTYPE[DIM,...] for formats that record no inputs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = dict(item.split("=", 1) for item in arguments.value)
    models, files = arguments.pairs[::2], arguments.pairs[1::2]
    results = [check(path, data, arguments.input, values) for path, data in zip(models, files, strict=True)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
