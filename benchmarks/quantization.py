"""Quantization of real and random models, ours beside onnxruntime's own tools in the same run.

    python benchmarks/quantization.py --models DIR [--cache DIR] [--kinds real packaged architecture] [--only NAME ...]
                                      [--again] [--render]

DIR holds trained models and one `eval_NAME.py` for each, as for real_models.py. Every contender quantizes in a process
of its own, bounded by --timeout and --memory; what it made stays in the cache and is made again only when something
that it depends on has changed: for ours that is any file of the engine, for theirs the versions. Latency is measured
anew for all contenders of a model whenever one of them has changed.

Figures are gathered in docs/quantization_benchmark.json, a model at a time, so that a run can be broken off and gone on
with, and one model can be run again by itself; docs/quantization_benchmark.md is written from them (`--render`: that
alone). The packaged models come from `pip install --no-deps rapidocr-onnxruntime==1.4.4 magika==1.0.3`; those that are
not installed are left out.

For steady figures keep it to one core: `taskset -c 1 nice python benchmarks/quantization.py ...`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from modelpress_compression.errors import CompressionError
from modelpress_compression.model import file_size_bytes
from modelpress_compression.report.environment import environment
from quantization_cases import Case, Kind, NotInstalledError, Prepared, cases, prepare
from quantization_contenders import BATCH_SIZES, CONTENDERS
from quantization_measuring import FLOAT, VERSION, Figures, Timing, latency, quality
from quantization_page import KINDS, page
from quantization_process import GIB, Limits, made_by

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "quantization_benchmark.json"
PAGE = DOCS / "quantization_benchmark.md"


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make_all(case: Case, prepared: Prepared, limits: Limits) -> dict[str, Figures]:
    """The outcome of every contender that is for this case."""
    outcomes = {}
    for contender in CONTENDERS.values():
        if contender.cases and case.name not in contender.cases:
            continue
        outcome = made_by(contender, prepared, limits)
        outcomes[contender.name] = outcome
        peak = f"{outcome['peak_bytes'] / GIB:.2f} GiB"
        say(
            f"{case.name}: {contender.label}: {outcome['outcome']} {outcome['error']} {outcome['wall_s']:.1f} s, {peak}"
        )
    return outcomes


def fingerprint(outcomes: dict[str, Figures], timing: Timing) -> str:
    """Of all that the figures of a model depend on."""
    keys = {name: [outcome["key"], outcome["outcome"]] for name, outcome in outcomes.items()}
    return hashlib.sha256(json.dumps([VERSION, timing.rounds, keys], sort_keys=True).encode()).hexdigest()[:32]


def measure(case: Case, prepared: Prepared, outcomes: dict[str, Figures], arguments: argparse.Namespace) -> Figures:
    """All figures of one model; the float model is a row among the contenders."""
    files = {FLOAT: prepared.model}
    rows: dict[str, Figures] = {FLOAT: {"outcome": "ok"}}
    for name, outcome in outcomes.items():
        rows[name] = {key: value for key, value in outcome.items() if key not in ("key", "limit")}
        if outcome["outcome"] == "ok":
            files[name] = prepared.folder / name / "model.onnx"
    float_size_bytes = file_size_bytes(prepared.model)
    for name, path in list(files.items()):
        try:
            rows[name] |= quality(case, prepared, path, arguments.models)
        except (CompressionError, SystemExit) as error:  # it quantized, but the result does not run
            rows[name] |= {"outcome": "does not run", "error": " ".join(str(error).split())[-300:]}
            del files[name]
            continue
        size_bytes = file_size_bytes(path)
        rows[name] |= {"size_bytes": size_bytes, "size_ratio": size_bytes / float_size_bytes}
        say(f"{case.name}: {name}: size {rows[name]['size_ratio']:.3f}, metric {rows[name]['metric']}")
    held_out = prepared.held_out()
    return {
        "kind": case.kind,
        "metric_name": case.metric,
        "environment": environment() | {"measured_on": datetime.date.today().isoformat()},
        "samples": {"calibration": len(prepared.calibration()), "held_out": len(held_out)},
        "contenders": rows,
        "latency": {
            str(size): latency(files, held_out, size, Timing(arguments.rounds, arguments.budget))
            for size in BATCH_SIZES
        },
    }


def run_case(case: Case, results: Figures, arguments: argparse.Namespace) -> None:
    """Brings the figures of one model up to date."""
    prepared = prepare(case, arguments.models, arguments.cache)
    outcomes = make_all(case, prepared, Limits(arguments.timeout, int(arguments.memory * GIB)))
    state = fingerprint(outcomes, Timing(arguments.rounds, arguments.budget))
    if results.get(case.name, {}).get("state") == state and not arguments.again:
        say(f"{case.name}: nothing has changed; --again measures all the same")
        return
    figures = measure(case, prepared, outcomes, arguments)
    for size, row in figures["latency"].items():
        if row:
            timed = {name: one["ratio"]["median"] for name, one in row["contenders"].items() if "ratio" in one}
            text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in timed.items())
            say(f"{case.name}: batch {size}, {row['contenders'][FLOAT]['rounds']} rounds: {text}")
    results[case.name] = {"state": state, **figures}


def write(results: Figures) -> None:
    """Both files, models in the order of their kinds."""
    order = sorted(results.items(), key=lambda item: list(KINDS).index(item[1]["kind"]))
    RESULTS.write_text(json.dumps(_rounded(dict(order)), indent=1) + "\n", "utf-8")
    PAGE.write_text(page(dict(order)), "utf-8")


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of it is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def arguments_of(what: str, kinds: list[str]) -> argparse.ArgumentParser:
    """The options that say which models there are and what each may take. `kinds`: those that run unless others are
    asked for."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpress-quantization")
    parser.add_argument("--kinds", nargs="*", default=kinds, choices=get_args(Kind))
    parser.add_argument("--only", nargs="*", default=[], help="parts of models' names")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one contender on one model")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of resident memory for one contender")
    parser.add_argument("--rounds", type=int, default=300, help="most timed rounds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for a model at one batch size")
    return parser


def _parse() -> argparse.Namespace:
    parser = arguments_of("Quantization beside onnxruntime's own tools.", ["real", "packaged"])
    parser.add_argument("--again", action="store_true", help="measure again what has not changed")
    parser.add_argument("--render", action="store_true", help="write the page from the gathered figures, and stop")
    arguments = parser.parse_args()
    if not arguments.render and arguments.models is None:
        parser.error("--models is needed")
    return arguments


def main() -> None:
    arguments = _parse()
    results: Figures = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if not arguments.render:
        arguments.models = arguments.models.resolve()
        for case in cases(arguments.kinds, arguments.only, arguments.cache.resolve()):
            try:
                run_case(case, results, arguments)
            except NotInstalledError as error:
                say(f"{case.name}: left out: {error}")
                continue
            except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
                say(f"{case.name}: FAILED: {type(error).__name__}: {error}")
                continue
            write(results)
    write(results)


if __name__ == "__main__":
    main()
