"""How weights are rounded: to the nearest level, by GPTQ, or learned, in few bits.

    python benchmarks/rounding.py --models DIR [--only NAME ...] [--schemes static weight_only] [--weights int4]
                                  [--roundings nearest gptq adaround brecq] [--steps N] [--block-size N]

Every model is fused and quantized from three quarters of its representative inputs; those that show the same thing,
such as crops of one photo, lie on the same side. Of each result: how many weights have 8 bits in place of 4, the file's
size as a share of the original's, the signal to noise of the worst output on the quarter held out in dB, the task
metric by the model's own script (DIR is as for `real_models.py`), CPU seconds, and the process's peak of memory in MiB.
Each row is made by a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from model_evaluation import evaluate
from modelpress_compression import load
from modelpress_compression.holding_out import parted
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from pruning_quality import CASES

_HEAD = (
    "| model | scheme | weights | rounding | learned | in 8 bits | size | SQNR | metric | CPU s | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def row_of(name: str, models: Path, config: QuantizeConfig) -> str:
    """One row of the table."""
    case = next(case for case in CASES if case.name == name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        evaluate(name, models, "--make-calib", str(folder / "data.npz"))
        model = load(models / case.file, case.inputs)
        with np.load(folder / "data.npz") as arrays:
            kept = {key: arrays[key] for key in arrays.files if len(model.inputs) == 1 or key in _names(model.inputs)}
        data = InputData.from_arrays(kept, model.inputs)
        given, held_out = parted(data, 4)
        fused = Fuse(FuseConfig())(model, Context(given, folder)).model
        began = time.process_time()
        result = Quantize(config)(fused, Context(given, folder))
        seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        paths = folder / "loaded.onnx", folder / "result.onnx"
        model.save(paths[0])
        result.model.save(paths[1])
        found = compare_outputs(*paths, held_out).outputs.values()
        noise = [item.sqnr_db for item in found if item.sqnr_db is not None]
        metric = float(evaluate(name, models, "--model", str(paths[1]), "--threads", "1"))
        size = file_size_bytes(paths[1]) / file_size_bytes(paths[0])
    learned = str(result.changes.get("learned_rounding", ""))
    wide = sum("8 bits instead of 4" in skip.reason for skip in result.skipped)
    cells = (
        name,
        config.scheme,
        config.weights,
        config.rounding,
        learned,
        str(wide or ""),
        f"{size:.3f}",
        f"{min(noise):.1f}" if noise else "",
        f"{metric:.4f}",
    )
    return "| " + " | ".join((*cells, f"{seconds:.0f}", f"{peak:.0f}")) + " |"


def _names(inputs: object) -> set[str]:
    return {item.name for item in inputs}  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES if case.name != "silero_vad"])
    parser.add_argument("--schemes", nargs="*", default=["static", "weight_only"])
    parser.add_argument("--weights", nargs="*", default=["int4"])
    parser.add_argument("--roundings", nargs="*", default=["nearest", "gptq", "adaround", "brecq"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--block-size", type=int, default=32, help="of weight_only")
    parser.add_argument("--row", nargs=4, metavar=("NAME", "SCHEME", "WEIGHTS", "ROUNDING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, scheme, weights, rounding = options.row
        config = QuantizeConfig(
            scheme=scheme,
            weights=weights,
            rounding=rounding,
            rounding_steps=options.steps,
            block_size=options.block_size,
        )
        print(row_of(name, options.models, config))
        return
    print(_HEAD, flush=True)
    for name in options.only:
        rows = [(name, s, w, r) for s in options.schemes for w in options.weights for r in options.roundings]
        for row in rows:
            settings = ["--steps", str(options.steps), "--block-size", str(options.block_size)]
            command = [sys.executable, __file__, "--models", str(options.models), *settings]
            done = subprocess.run([*command, "--row", *row], capture_output=True, text=True, check=False)
            print(done.stdout.strip() or f"| {' | '.join(row)} | failed: {done.stderr.strip()[-200:]} |", flush=True)


if __name__ == "__main__":
    main()
