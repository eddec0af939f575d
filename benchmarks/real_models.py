"""Real trained models through the whole way: upload, compress, download, and the task metric before and after.

    python benchmarks/real_models.py --models DIR [--only NAME ...] [--recipe PRESET] [--no-data]
                                     [--asked OPTIONS ...]

DIR holds the models and one `eval_NAME.py` for each, which prints a figure (higher is better) for `--model FILE.onnx`
and writes representative inputs, not the evaluation samples, for `--make-calib FILE.npz`. Every model goes through
`compress-client upload --local` in a process of its own, as a person would run it. The metric before is that of the
same file converted to ONNX without any step. Each of OPTIONS is one more run with such options of the client, as in
`--asked="--goal smallest" --asked="--min-ratio 6 --goal fastest"`; exit 6 says that what was asked could not be had.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_evaluation import evaluate

CONVERT_ONLY = "version: 1\nbenchmark: {rounds: 5}\n"


@dataclass(frozen=True)
class Case:
    """One file of one model; `evaluation`: the NAME of its eval_NAME.py."""

    name: str
    file: str
    evaluation: str
    inputs: tuple[str, ...] = ()


CASES = (
    Case("mnist (TorchScript)", "mnist/mnist_traced.pt", "mnist", ("input:float32[batch,1,28,28]",)),
    Case("fashion (ONNX)", "fashion/fashion.onnx", "fashion"),
    Case("fashion (.pt2)", "fashion/fashion.pt2", "fashion"),
    Case(
        "effnet_lite0 (TorchScript)",
        "files/effnet_lite0.traced.pt",
        "effnet_lite0",
        ("input:float32[batch,3,224,224]",),
    ),
    Case("minilm (ONNX)", "files/minilm.onnx", "minilm"),
    Case("minilm (.pt2)", "files/minilm.pt2", "minilm"),
    Case("silero_vad (ONNX)", "files/silero_vad_16k_op15.onnx", "silero_vad"),
    Case("ppocr_rec (ONNX)", "files/ppocr_rec.onnx", "ppocr_rec"),
)


def upload(
    case: Case, models: Path, folder: Path, options: Sequence[str], data: Path | None
) -> tuple[int, Path, dict[str, Any]]:
    """Runs the client with these options; returns its exit code, the optimized file and the report."""
    folder.mkdir(parents=True)
    output = folder / "model.onnx"
    command = [sys.executable, "-m", "modelpress_client", "upload", str(models / case.file), "--local", "--json"]
    command += ["--data-dir", str(folder / "server"), *options, "-o", str(output)]
    command += [part for text in case.inputs for part in ("--input", text)]
    command += ["--data", str(data)] if data else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 6):
        raise SystemExit(f"{case.name}: exit {done.returncode}\n{done.stderr}")
    return done.returncode, output, json.loads(done.stdout)["report"]


def representative(case: Case, models: Path, work: Path) -> Path | None:
    """Representative inputs by the model's own script; None where it cannot make them."""
    data = work / "data.npz"
    try:
        evaluate(case.evaluation, models, "--make-calib", str(data))
    except SystemExit as error:
        print(f"{case.name}: no representative inputs: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return data


def measure(case: Case, models: Path, asked: Sequence[Sequence[str]], with_data: bool) -> Iterator[list[str]]:
    """One row of the table for each list of options."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = representative(case, models, work) if with_data else None
        (work / "convert.yaml").write_text(CONVERT_ONLY)
        _, converted, _ = upload(case, models, work / "converted", ["--recipe", str(work / "convert.yaml")], None)
        before = float(evaluate(case.evaluation, models, "--model", str(converted)))
        for number, options in enumerate(asked):
            began = time.monotonic()
            code, optimized, report = upload(case, models, work / f"optimized-{number}", options, data)
            wall_s = time.monotonic() - began
            after = float(evaluate(case.evaluation, models, "--model", str(optimized)))
            yield row_of(case, options, report, (before, after), (code, wall_s))


def row_of(
    case: Case, options: Sequence[str], report: dict[str, Any], metric: tuple[float, float], ended: tuple[int, float]
) -> list[str]:
    """`metric`: before and after; `ended`: exit code and seconds."""
    row = report["latency"][0]
    speedup = row["speedup"]
    chosen = [candidate["name"] for candidate in report["candidates"] if candidate.get("chosen")]
    return [
        case.name,
        " ".join(options),
        f"{report['original']['onnx_size_bytes'] / 1e6:.2f} MB",
        f"{report['optimized']['size_bytes'] / 1e6:.2f} MB",
        f"{report['size_ratio']:.2f}",
        f"{row['original']['p50_ms']:.2f} ms",
        f"{row['optimized']['p50_ms']:.2f} ms",
        f"{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]",
        *(f"{figure:.4f}" for figure in metric),
        ", ".join(chosen) or "float32",
        str(ended[0]),
        f"{ended[1]:.0f} s",
    ]


HEADINGS = ("model", "asked", "original", "optimized", "ratio", "p50 before", "p50 after", "speed-up [95 %]",
            "metric before",
            "metric after", "taken", "exit", "time")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Real trained models through the whole way.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of names, of the models to run")
    parser.add_argument("--recipe", default="default", help="preset or YAML file")
    parser.add_argument("--no-data", action="store_true", help="give the service the file alone")
    parser.add_argument("--asked", action="append", default=[], help="options of the client for one more run")
    arguments = parser.parse_args()
    asked = [shlex.split(options) for options in arguments.asked] or [["--recipe", arguments.recipe]]
    cases = [case for case in CASES if not arguments.only or any(part in case.name for part in arguments.only)]
    print("|".join(["", *HEADINGS, ""]), "|".join(["", *["---"] * len(HEADINGS), ""]), sep="\n", flush=True)
    for case in cases:
        for row in measure(case, arguments.models.resolve(), asked, not arguments.no_data):
            print("|".join(["", *row, ""]), flush=True)


if __name__ == "__main__":
    main()
