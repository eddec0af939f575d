"""The preset `default` on all models of quantization.py, beside what that benchmark has recorded of an earlier version.

    python benchmarks/quantization_before.py --models DIR [--cache DIR] [--kinds real packaged architecture]
                                             [--only NAME ...]

Only ours runs, with the same calibration and held-out inputs, so that all models take half an hour in place of hours.
The record (docs/quantization_benchmark.json) stays as it is. A model counts as worse where

    product    of size and time, which the preset weighs, over 5 % larger; times are those over the float model's, which
               runs in the same rounds, then and now
    slower     one run takes over 5 % longer than the float model's, and did not before
    answers    the metric falls by over half a point; without one, the SQNR falls below 20 dB and by over 1 dB
"""

from __future__ import annotations

import json
from typing import Any, get_args

from modelpress_compression.model import file_size_bytes
from quantization import RESULTS, arguments_of, say
from quantization_cases import Case, Kind, NotInstalledError, cases, prepare
from quantization_contenders import CONTENDERS
from quantization_measuring import FLOAT, Figures, Timing, latency, quality
from quantization_process import GIB, Limits, made_by

OURS = "auto"
WORSE, SLOWER, LOST_POINTS, LOST_DB, FLOOR_DB = 1.05, 1.05, 0.005, 1.0, 20.0
HEADER = "| model | size over float32, then / now | time | SQNR dB | metric | s | worse |"


def figures_of(case: Case, arguments: Any) -> dict[str, Any]:
    """`size`, `time` over the float model, `db`, `metric`, `seconds` of what ours makes now."""
    prepared = prepare(case, arguments.models, arguments.cache)
    outcome = made_by(CONTENDERS[OURS], prepared, Limits(arguments.timeout, int(arguments.memory * GIB)))
    if outcome["outcome"] != "ok":
        raise RuntimeError(f"{outcome['outcome']}: {outcome['error']}")
    path = prepared.folder / OURS / "model.onnx"
    found = quality(case, prepared, path, arguments.models)
    files = {FLOAT: prepared.model, OURS: path}
    timed = latency(files, prepared.held_out(), 1, Timing(arguments.rounds, arguments.budget))
    return {
        "size": file_size_bytes(path) / file_size_bytes(prepared.model),
        "time": timed["contenders"][OURS]["ratio"]["median"] if timed else None,
        "db": found["fidelity"]["sqnr_db"],
        "metric": found["metric"],
        "seconds": outcome["wall_s"],
    }


def recorded(row: Figures) -> dict[str, Any]:
    """The same of the record's row of a model."""
    ours, timed = row["contenders"][OURS], row["latency"]["1"]
    return {
        "size": ours["size_ratio"],
        "time": timed["contenders"][OURS]["ratio"]["median"] if timed else None,
        "db": ours["fidelity"]["sqnr_db"],
        "metric": ours["metric"],
    }


def worse(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has got worse."""
    found = []
    if then["time"] and now["time"]:
        found += ["product"] if now["size"] * now["time"] > then["size"] * then["time"] * WORSE else []
        found += ["slower"] if now["time"] > max(1.0, then["time"]) * SLOWER else []
    if now["metric"] is not None:
        lost = now["metric"] < then["metric"] - LOST_POINTS
    else:
        lost = now["db"] is not None and now["db"] < min(FLOOR_DB, then["db"] - LOST_DB)
    return [*found, "answers"] if lost else found


def main() -> None:
    parser = arguments_of("What ours makes now, beside the record of an earlier version.", list(get_args(Kind)))
    parser.set_defaults(rounds=150, budget=20.0)
    arguments = parser.parse_args()
    if arguments.models is None:
        parser.error("--models is needed")
    arguments.models = arguments.models.resolve()
    record: Figures = json.loads(RESULTS.read_text("utf-8"))
    print(HEADER, "|---|---|---|---|---|---|---|", sep="\n", flush=True)
    count, behind = 0, []
    for case in cases(arguments.kinds, arguments.only, arguments.cache.resolve()):
        if case.name not in record:
            continue
        try:
            now = figures_of(case, arguments)
        except NotInstalledError as error:
            say(f"{case.name}: left out: {error}")
            continue
        except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
            now = None
            say(f"{case.name}: FAILED: {type(error).__name__}: {error}")
        count += 1
        then = recorded(record[case.name])
        lost = ["failed"] if now is None else worse(then, now)
        behind += [case.name] if lost else []
        print(_line(case.name, then, now, lost), flush=True)
    print(
        f"{count - len(behind)} of {count} are as before or better; worse in something: {', '.join(behind) or 'none'}"
    )


def _line(name: str, then: dict[str, Any], now: dict[str, Any] | None, lost: list[str]) -> str:
    formats = {"size": ".3f", "time": ".2f", "db": ".1f", "metric": ".4f"}
    cells = [f"{_text(then[key], form)} / {_text((now or {}).get(key), form)}" for key, form in formats.items()]
    return f"| {name} | {' | '.join(cells)} | {_text((now or {}).get('seconds'), '.0f')} | {', '.join(lost)} |"


def _text(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)


if __name__ == "__main__":
    main()
