"""Writes docs/onnx_node_tests.md: how the engine fares on every test model that ships in the onnx package.

    python docs/generate_onnx_node_tests.py --cache FILE     runs what FILE does not hold yet, and writes the page

About an hour on one core. FILE has one line of JSON for each model and grows while this runs, so that it can be stopped
(`--time`) and continued; `--only` runs the models whose names hold a word, again. The page says how many were tried.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

import onnx
import onnxruntime
from oracles.node_tests import CUT, TREATMENTS, WRONG, Outcome, Subject, journey, subjects

PAGE = Path(__file__).resolve().parent / "onnx_node_tests.md"
_STATUSES = ("equal", "close", "alone", "undone", "refused", "not run", "no oracle", "wrong", "error")
_COLUMNS = ("load", *TREATMENTS, CUT)
_BEGUN = "begun"
_INTRODUCTION = """# ONNX's own test models through the engine

Written by `docs/generate_onnx_node_tests.py` from the tests that ship in the `onnx` package ({onnx}), with onnxruntime
{onnxruntime}: those of single nodes, the small models, those converted from PyTorch, and the large networks of `light`.
{subjects} models, since a test is taken in up to four forms: as it is; *frozen*, with all inputs but the first as
weights; and frozen *between products* and *between convolutions*, pairs of layers that together are the identity, wide
enough to be quantized and pruned, so that what stands between them is quantized and pruned too.

{tried} of them were tried. Each is loaded, and then treated in {treatments} ways, each on the loaded model. The result
is compared with it in onnxruntime on the test's inputs and on others.

| outcome | what it says |
|---|---|
| equal, close | It came back changed, and computes the same up to rounding (load, fuse, cut), or nearly so. |
| alone | It came back as it was: there was nothing to do, or a reason was given why not. |
| undone | The engine made a result that does not run or is not finite, dropped it, and said so. |
| refused | The engine gave an error for people. |
| not run | onnxruntime does not run the test as it is written. |
| no oracle | There is nothing to compare with: see below. |
| wrong, error | Another model came back, or the engine failed within. Neither may be. |

`prune` cuts 30 % of the channels by magnitude, and may change outputs; `cut` removes as many at random, and is held
against the masked model, to which it must be equal where that is finite. There is no oracle where that gives none, as
0 times infinity does, and where the original's own outputs move as far when its inputs move a little: where values are
rounded or compared, and where numbers near 0 are divided by.
"""


def run(everything: Sequence[Subject], cache: Path, only: Sequence[str], time_s: float) -> list[Outcome]:
    """The outcomes of the subjects: from the cache, and run where it has none, until the time is up."""
    known, end = _read(cache), time.monotonic() + time_s
    with cache.open("a", encoding="utf-8") as sink:
        for subject in _in_turns(everything):
            if time.monotonic() > end:
                break
            if subject.name not in known or any(word in subject.name for word in only):
                known[subject.name] = _run(subject, lambda line: print(line, file=sink, flush=True))
    return [outcome for subject in everything for outcome in known.get(subject.name, ())]


def _in_turns(everything: Sequence[Subject]) -> list[Subject]:
    """One of each operator, then a second of each: a run that is stopped has seen something of everything."""
    turns: Counter[tuple[str, str]] = Counter()
    order: list[tuple[int, Subject]] = []
    for subject in sorted(everything, key=lambda subject: zlib.crc32(subject.name.encode())):
        order.append((turns[subject.operator], subject))
        turns[subject.operator] += 1
    return [subject for _, subject in sorted(order, key=lambda pair: pair[0])]


def _run(subject: Subject, write: Callable[[str], None]) -> list[Outcome]:
    write(json.dumps([subject.name, [[subject.name, subject.operator, "load", _BEGUN, ""]]]))
    outcomes = journey(subject)
    write(json.dumps([subject.name, [astuple(outcome) for outcome in outcomes]]))
    return outcomes


def _read(cache: Path) -> dict[str, list[Outcome]]:
    """The outcomes by subject. One that was begun and never ended took the process along."""
    lines = cache.read_text("utf-8").splitlines() if cache.exists() else []
    found: dict[str, list[Outcome]] = {}
    for line in lines:
        name, rows = json.loads(line)
        found[name] = [
            Outcome(subject, (operator[0], operator[1]), treatment, "error", "The process ended.")
            if status == _BEGUN
            else Outcome(subject, (operator[0], operator[1]), treatment, status, detail)
            for subject, operator, treatment, status, detail in rows
        ]
    return found


def render(outcomes: Sequence[Outcome], number: int) -> str:
    """The page; `number` is how many models there are."""
    text = _INTRODUCTION.format(
        onnx=onnx.__version__,
        onnxruntime=onnxruntime.__version__,
        subjects=number,
        tried=len({outcome.subject for outcome in outcomes}),
        treatments=len(_COLUMNS) - 1,
    )
    return "\n".join(
        [
            text,
            "## Outcomes",
            "",
            *_by_treatment(outcomes),
            "",
            "## What is wrong",
            "",
            *_listed(outcomes, WRONG),
            "",
            "## What was undone, or refused after loading",
            "",
            *_listed([one for one in outcomes if one.treatment != "load"], ("undone", "refused")),
            "",
            "## What is refused in loading, though onnxruntime runs it",
            "",
            *_reasons(one for one in outcomes if (one.treatment, one.status) == ("load", "refused")),
            "",
            "## By operator",
            "",
            "Of each column: how many came back changed and equal or close, of how many that were loaded; `!` and a "
            "number where some are wrong.",
            "",
            *_by_operator(outcomes),
            "",
        ]
    )


def _by_treatment(outcomes: Sequence[Outcome]) -> list[str]:
    counts = Counter((outcome.treatment, outcome.status) for outcome in outcomes)
    rows = [[column, *(str(counts[column, status] or "") for status in _STATUSES)] for column in _COLUMNS]
    return _table(["", *_STATUSES], rows)


def _listed(outcomes: Iterable[Outcome], statuses: Sequence[str]) -> list[str]:
    rows = [[one.subject, one.treatment, one.status, one.detail] for one in outcomes if one.status in statuses]
    return _table(["model", "in", "outcome", "why"], rows) if rows else ["Nothing."]


def _reasons(outcomes: Iterable[Outcome]) -> list[str]:
    """Reasons with how many models they keep out; names and numbers in them differ from model to model."""
    kinds = Counter(re.sub(r"'[^']*'", "'…'", outcome.detail) for outcome in outcomes)
    rows = [[str(count), reason] for reason, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return _table(["models", "reason"], rows) if rows else ["Nothing."]


def _by_operator(outcomes: Sequence[Outcome]) -> list[str]:
    by_key: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    for outcome in outcomes:
        by_key.setdefault(outcome.operator, {}).setdefault(outcome.treatment, Counter())[outcome.status] += 1
    rows = [[_name(key), *(_cell(by_key[key].get(column, Counter())) for column in _COLUMNS)] for key in sorted(by_key)]
    return _table(["operator", *_COLUMNS], rows)


def _name(key: tuple[str, str]) -> str:
    domain, op_type = key
    return f"{domain}.{op_type}" if domain else op_type


def _cell(counts: Counter[str]) -> str:
    wrong = sum(counts[status] for status in WRONG)
    good = counts["equal"] + counts["close"]
    return (f"{good} of {counts.total()}" if good else "") + (f" !{wrong}" if wrong else "")


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the page on ONNX's own test models.")
    parser.add_argument("--cache", type=Path, required=True, help="a file for the outcomes, to go on from")
    parser.add_argument(
        "--time", type=float, default=float("inf"), help="seconds after which no further model is begun"
    )
    parser.add_argument("--only", nargs="*", default=[], help="words in names of models to run again")
    arguments = parser.parse_args()
    everything = list(subjects())
    outcomes = run(everything, arguments.cache, arguments.only, arguments.time)
    PAGE.write_text(render(outcomes, len(everything)), "utf-8")
    return 1 if any(outcome.status in WRONG for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
