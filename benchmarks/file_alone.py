"""The file alone, without data: what `compress` makes of many architectures and files when nothing else is given.

    python benchmarks/file_alone.py --cache DIR [--only NAME ...] [--architectures] [FILE ...]

Each FILE is an ONNX model or one that records its inputs. `--architectures` adds those that pruning is measured on,
with random weights (see architectures.py, which says what they need). The last line counts, of the models with more
than 100 kB of float weights, those that come back at least three times smaller, those that are slower by more than 5 %
beyond doubt (the whole 95 % interval), and those that are larger.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from modelpress_compression import Recipe, compress, load
from modelpress_compression.errors import CompressionError
from modelpress_compression.model import Model

LEAST_BYTES = 100_000
WANTED_RATIO = 3.0
MAX_SLOWDOWN = 1.05


@dataclass(frozen=True)
class Row:
    """One model. `speedup`: low, median, high."""

    counts: bool
    ratio: float
    speedup: tuple[float, float, float]


def float_bytes(model: Model) -> int:
    """Of all constants in float32 or float64."""
    return sum(tensor.nbytes for tensor in model.tensors() if tensor.dtype.name in ("FLOAT", "DOUBLE"))


def measured(name: str, path: Path) -> Row:
    """Compresses one file with nothing but itself, and prints its row."""
    model = load(path)
    began = time.monotonic()
    report = compress(model, Recipe.preset("default")).report
    wall_s = time.monotonic() - began
    speedup = report["latency"][0]["speedup"]
    interval = (speedup["low"], speedup["median"], speedup["high"])
    worst = min(
        (one["sqnr_db"] for one in report["fidelity"]["outputs"].values() if one["sqnr_db"] is not None), default=200
    )
    taken = next((row["name"] for row in report["candidates"] if row.get("chosen")), "unchanged")
    size = float_bytes(model)
    print(
        f"| {name} | {size / 1e6:.2f} MB | {report['size_ratio']:.2f} | {interval[1]:.2f} [{interval[0]:.2f}, "
        f"{interval[2]:.2f}] | {worst:.1f} | {taken} | {wall_s:.0f} s |",
        flush=True,
    )
    return Row(size > LEAST_BYTES, report["size_ratio"], interval)


def main() -> None:
    parser = argparse.ArgumentParser(description="What compress makes of models without data.")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--cache", type=Path, required=True, help="folder for exported architectures")
    parser.add_argument("--architectures", action="store_true", help="those that pruning is measured on, too")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of the models to run")
    arguments = parser.parse_args()
    named = {f"{path.parent.name}/{path.name}": path for path in arguments.files}
    if arguments.architectures:
        from architectures import ARCHITECTURES, exported

        for name, architecture in ARCHITECTURES.items():
            if not arguments.only or any(part in name for part in arguments.only):
                named[name] = exported(architecture, "dynamo", arguments.cache)[0]
    print(
        "| model | float weights | ratio | speed-up [95 %] | worst dB | taken | time |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, path in named.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        try:
            rows.append(measured(name, path))
        except CompressionError as error:
            print(f"| {name} | refused: {error} | | | | | |", flush=True)
    counted = [row for row in rows if row.counts]
    print(
        f"\n{sum(row.ratio >= WANTED_RATIO for row in counted)} of {len(counted)} at least {WANTED_RATIO:g} times "
        f"smaller; {sum(row.speedup[2] < 1 / MAX_SLOWDOWN for row in rows)} of {len(rows)} surely slower by over 5 %; "
        f"{sum(row.ratio < 1 for row in rows)} larger."
    )


if __name__ == "__main__":
    main()
