"""Pruning at 30 and 50 % of the MACs: cut alone, repaired, and in rounds with training in between.

    python benchmarks/pruning_rounds.py --models DIR [--only NAME ...] [--shares 0.3 0.5] [--ways none repair rounds]
                                        [--rounds 3] [--epochs 20] [--base METRIC]

Each row is a run of `compress` on the model's representative inputs, in a process of its own: the task metric by the
model's own script (DIR is as for `pruning_quality.py`), the MACs and the parameters that are left, the speed-up on one
thread, CPU seconds of the job, and the process's peak of memory in MiB.

    none        every layer loses the same share of its least important channels (`activation`), nothing is repaired
    repair      the least important of the whole model go, by their MACs; the layers behind them are fitted
    sensitive   the same, importance by gradients of the answers (`taylor`)
    rounds      as `repair`, in rounds, each trained towards the original; sensitive-rounds: as `sensitive`
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model_evaluation import representative
from modelpress_compression import Recipe, compress, load
from pruning_quality import CASES, metric_of

_GLOBAL = {"scope": "global", "normalize": "macs"}
WAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"criterion": "activation", "repair": "none"},
        "repair": {"criterion": "activation", **_GLOBAL},
        "sensitive": {"criterion": "taylor", **_GLOBAL},
        "rounds": {"criterion": "activation", **_GLOBAL},
        "sensitive-rounds": {"criterion": "taylor", **_GLOBAL},
    }
)
_HEAD = (
    "| model | way | MACs asked | MACs left | parameters left | speed-up | float32 | pruned | CPU s | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def row_of(name: str, way: str, share: float, models: Path, rounds: int, epochs: int, base: float | None) -> str:
    """One row of the table. `base`: the metric in float32, where it is known."""
    case = next(case for case in CASES if case.name == name)
    options = {"structure": "channel", "sparsity": share, "sparsity_of": "macs", **WAYS[way]}
    if way.endswith("rounds"):
        options |= {"rounds": rounds, "epochs": epochs}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "steps": [{"fuse": {}}, {"prune": options}],
            "benchmark": {"rounds": 30},
            "constraints": {"allow_damage": True},
        }
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(models / case.file, case.inputs)
        data = representative(name, models, model, folder)
        base = metric_of(model, case, models, folder) if base is None else base
        began = time.process_time()
        result = compress(model, recipe, data=data, work_directory=folder)
        seconds = time.process_time() - began
        metric = metric_of(result.model, case, models, folder)
    report = result.report
    left = [
        after / before if after and before else float("nan")
        for after, before in ((report["optimized"][key], report["original"][key]) for key in ("macs", "parameters"))
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = report["latency"][0]["speedup"]["median"] if report["latency"] else float("nan")
    return (
        f"| {name} | {way} | {1 - share:.2f} | {left[0]:.3f} | {left[1]:.3f} | {speed:.2f} | {base:.4f} | {metric:.4f} "
        f"| {seconds:.0f} | {peak:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.3, 0.5])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=tuple(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--base", type=float, help="the metric in float32, where it is known; of one model")
    parser.add_argument("--row", nargs=3, metavar=("NAME", "WAY", "SHARE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, way, share = options.row
        models = options.models.resolve()
        print(row_of(name, way, float(share), models, options.rounds, options.epochs, options.base))
        return
    print(_HEAD, flush=True)
    for row in [(name, way, str(share)) for name in options.only for share in options.shares for way in options.ways]:
        command = [sys.executable, *sys.argv, "--row", *row]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout.strip() or f"| {' | '.join(row)} | failed: {done.stderr.strip()[-200:]} |", flush=True)


if __name__ == "__main__":
    main()
