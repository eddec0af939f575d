"""Many architectures, as many producers write them, through the engine: what loads, and what comes back.

    python benchmarks/breadth.py --cache FILE [--continue] [--only WORD ...] [--recipes ...] [--again]
                                 [--time SECONDS] [--docs]

A cell (`breadth_cases`) runs in a process of its own, bounded in time and memory, which is forked from this one: the
libraries are imported once. FILE has one line of JSON for each cell, so that a run can be stopped and continued; with
`--continue` the cells of docs/breadth.json count as run where FILE has none of them. `--docs` writes docs/breadth.json
and, from it, docs/breadth.md.

Needs `pip install -e '.[benchmarks]'`. TensorFlow and Paddle are in environments of their own, whose Pythons
MODELPRESS_TENSORFLOW_PYTHON and MODELPRESS_PADDLE_PYTHON name: `pip install tensorflow-cpu tf2onnx keras` and
`pip install paddlepaddle paddle2onnx packaging` (which paddle2onnx imports and does not ask for).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import breadth_yardstick
import psutil
from breadth_page import WRONG, document
from breadth_page import cells as cells_of_row
from breadth_results import Rows, packed, read, unpacked

DOCS = Path(__file__).resolve().parent.parent / "docs" / "breadth.md"
RESULTS = DOCS.with_suffix(".json")
CELL_CPU_S = 150.0
CELL_WALL_S = 1800.0
CELL_MEMORY_BYTES = 4 * 1024**3  # 4 GiB, resident
POLL_S = 0.1
# The default recipe's search ends here: cells are many, and training would take most of the time.
SEARCH_TIME_S = 20.0
TECHNIQUES = ("fuse", "prune", "factorize", "quantize")
_QUICK = {"rounds": 5}
RECIPES: Mapping[str, dict[str, Any]] = {
    "default": {
        "version": 1,
        "goal": {"objective": "balanced", "search_time_s": SEARCH_TIME_S, "techniques": [*TECHNIQUES]},
        "benchmark": _QUICK,
    },
    "static": {"version": 1, "steps": [{"fuse": {}}, {"quantize": {"scheme": "static"}}], "benchmark": _QUICK},
    "prune": {
        "version": 1,
        "steps": [{"prune": {"structure": "channel", "sparsity": 0.3}}, {"fuse": {}}],
        "benchmark": _QUICK,
    },
    "int4": {
        "version": 1,
        "steps": [{"quantize": {"scheme": "weight_only", "weights": "int4"}}],
        "benchmark": _QUICK,
    },
}
# Least cosine of outputs with the original's at which a result counts as close; pruned channels take answers along.
CLOSE: Mapping[str, float | None] = {"default": 0.98, "static": 0.95, "prune": None, "int4": 0.9}


def measure(name: str, producer: str, recipes: Sequence[str] = tuple(RECIPES)) -> dict[str, Any]:
    """The cell's figures, in this process."""
    from breadth_cases import NotMade, made

    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        try:
            one = made(name, producer, Path(folder))
        except NotMade as error:
            return {"load": {"outcome": "not written", "why": str(error)}}
        return _through_the_engine(one, name, Path(folder), recipes)


def _through_the_engine(one: Any, name: str, folder: Path, recipes: Sequence[str]) -> dict[str, Any]:
    from modelpress_compression.errors import CompressionError

    row: dict[str, Any] = {}
    try:
        model = _load(one, name, folder)
        row["load"] = _loaded(one, model, folder)
    except CompressionError as error:
        row["load"] = _refused(one, error.message)
    except Exception as error:  # noqa: BLE001  what is looked for
        row["load"] = _failed(error)
    if row["load"]["outcome"] != "equal":
        return row
    for recipe in recipes:
        try:
            row[recipe] = _compressed(one, model, recipe, folder)
        except CompressionError as error:
            row[recipe] = {"outcome": "refused", "why": error.message[:400]}
        except Exception as error:  # noqa: BLE001  what is looked for
            row[recipe] = _failed(error)
    return row


def _refused(one: Any, why: str) -> dict[str, Any]:
    """An ONNX file that onnxruntime does not run either is none that anybody has a use for, nor at extents that the
    exporter was told to keep open."""
    from modelpress_compression.errors import CompressionError
    from modelpress_compression.runtime import open_session, run

    if one.path.suffix == ".onnx":
        try:
            session = open_session(one.path)
            names = [value.name for value in session.get_inputs()]
            for feed in one.feeds:
                run(session, feed if set(names) == set(feed) else dict(zip(names, feed.values(), strict=True)))
        except CompressionError as error:
            return {"outcome": "not written", "why": f"what is written does not run: {error.message}"[:400]}
    return {"outcome": "refused", "why": why[:400]}


def _failed(error: Exception) -> dict[str, Any]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return {"outcome": "error", "why": f"{type(error).__name__}: {error}"[:300] + f" ({place})"}


def _load(one: Any, name: str, folder: Path) -> Any:
    """As the client does: a file alone, or converted on the user's machine where it needs its code."""
    from modelpress_compression import convert
    from modelpress_compression.errors import UnsupportedFormatError
    from modelpress_compression.loaders import load

    if one.path.suffix != ".pth":
        return load(one.path, one.specs)
    inputs = [part for spec in one.specs for part in ("--input", spec)]
    target = folder / "converted.onnx"
    arguments = [str(one.path), "--output", str(target), *inputs, "--architecture", f"breadth_cases:build({name!r})"]
    if convert.main(arguments) != 0:
        raise UnsupportedFormatError("convert refuses the checkpoint; its message is in the cell's log.")
    return load(target)


def _loaded(one: Any, model: Any, folder: Path) -> dict[str, Any]:
    """Whether the loaded model gives what the network gives, by position: exporters rename inputs and outputs.

    Of an ONNX file, what onnxruntime gives for it: where the exporter went wrong, the file is still what was uploaded.
    """
    from modelpress_compression.agreement import why_different
    from modelpress_compression.runtime import open_session, run

    model.save(folder / "loaded.onnx")
    session = open_session(folder / "loaded.onnx")
    file = open_session(one.path) if one.path.suffix == ".onnx" else None
    for feeds, wanted_of_network in zip(one.feeds, one.expected, strict=True):
        given = _by_position(model, feeds)
        expected = wanted_of_network if file is None else tuple(run(file, given).values())
        got = list(run(session, given).values())[: len(expected)]
        for index, (wanted, found) in enumerate(zip(expected, got, strict=True)):
            if (reason := why_different(wanted, found)) is not None:
                return {"outcome": "wrong", "why": f"output {index} {reason}, on {_extents(given)}"}
    lost = one.dynamic and all(isinstance(dim, int) for spec in model.inputs for dim in spec.shape)
    return {"outcome": "wrong", "why": "the dynamic dimensions are gone"} if lost else {"outcome": "equal"}


def _by_position(model: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    names = [spec.name for spec in model.inputs]
    return dict(feeds) if set(names) == set(feeds) else dict(zip(names, feeds.values(), strict=True))


def _extents(feeds: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())


def _compressed(one: Any, model: Any, recipe: str, folder: Path) -> dict[str, Any]:
    """Size, and cosine with the loaded model at the last feed's extents, others than calibrated where it has some."""
    import onnx
    from modelpress_compression.inputs import InputData
    from modelpress_compression.pipeline import compress
    from modelpress_compression.recipe import Recipe

    feeds = [_by_position(model, feed) for feed in one.feeds]
    data = InputData(model.inputs, {name: array[None] for name, array in feeds[0].items()})
    began = time.monotonic()
    result = compress(model, Recipe.from_dict(RECIPES[recipe]), data=data)
    took_s = time.monotonic() - began
    path = folder / recipe / "model.onnx"
    result.write(path.parent)
    before, after = breadth_yardstick.answers(folder / "loaded.onnx", path, feeds[-1])
    cosine = breadth_yardstick.cosine(before, after)
    row: dict[str, Any] = {
        "outcome": "equal" if cosine > 1 - 1e-6 else "close",
        "ratio": path.stat().st_size / (folder / "loaded.onnx").stat().st_size,
        "cosine": cosine,
        "seconds": round(took_s, 1),
    }
    least = CLOSE[recipe]
    if least is not None and cosine < least and (error := breadth_yardstick.ROUNDING.get(recipe)) is not None:
        least = min(least, breadth_yardstick.disturbed(folder / "loaded.onnx", feeds[-1], error))
    problems = _changed(model, result.model)
    given, back = (onnx.load(file, load_external_data=False) for file in (folder / "loaded.onnx", path))
    if [*given.metadata_props] != [*back.metadata_props]:
        problems.append("metadata")
    if least is not None and cosine < least:
        problems.append(f"cosine {cosine:.3f}")
    if breadth_yardstick.other_extents(model, before, after, of_data=least is not None):
        problems.append("shapes of outputs")
    return {**row, "outcome": "wrong", "why": ", ".join(problems)} if problems else row


def _changed(model: Any, result: Any) -> list[str]:
    """What of the interface is another: names, types and dimensions."""
    return [side for side in ("inputs", "outputs") if getattr(model, side) != getattr(result, side)]


def cell(name: str, producer: str, recipes: Sequence[str]) -> dict[str, Any]:
    """The cell's figures, from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        answer, log = Path(folder) / "answer", Path(folder) / "log"
        arguments = (name, producer, recipes, answer, log)
        process = multiprocessing.get_context("fork").Process(target=_in_child, args=arguments)
        process.start()
        stopped = _watch(process)
        if stopped:
            return {"load": {"outcome": "stopped", "why": stopped}}
        if not answer.exists():
            last = " ".join(log.read_text("utf-8", "replace").strip().splitlines()[-1:])[:300]
            return {"load": {"outcome": "error", "why": f"the process ended with {process.exitcode}: {last}"}}
        row: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        return row


def _in_child(name: str, producer: str, recipes: Sequence[str], answer: Path, log: Path) -> None:
    with log.open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        row = measure(name, producer, recipes)
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(row), "utf-8")
        partial.replace(answer)


def _watch(process: multiprocessing.process.BaseProcess) -> str:
    """Waits for the end; why it was stopped, if it was. Time is the process's own: the machine may do other work."""
    watched, end = psutil.Process(process.pid), time.monotonic() + CELL_WALL_S
    while process.is_alive():
        process.join(POLL_S)
        try:
            resident, times = watched.memory_info().rss, watched.cpu_times()
        except psutil.NoSuchProcess:
            continue
        reason = (
            f"over {CELL_MEMORY_BYTES >> 30} GiB" if resident > CELL_MEMORY_BYTES
            else f"over {CELL_CPU_S:g} s of CPU" if times.user + times.system > CELL_CPU_S
            else f"over {CELL_WALL_S:g} s" if time.monotonic() > end
            else ""
        )  # fmt: skip
        if reason:
            process.kill()
            process.join()
            return reason
    return ""


def _import_all() -> None:
    """What every cell imports; no session is opened and nothing trained, since threads do not come along in a fork."""
    from breadth_cases import warm_up

    importlib.import_module("modelpress_compression.pipeline")
    warm_up()
    gc.collect()
    gc.freeze()  # else each collection in a cell walks over all of this again


def _lacks(row: Mapping[str, Any] | None, recipes: Sequence[str]) -> bool:
    """Whether the file has less of the cell than is asked for."""
    return row is None or (row["load"]["outcome"] == "equal" and any(recipe not in row for recipe in recipes))


def in_turns(everything: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One cell of each model, each with another producer, then a second of each: a run that is stopped has seen all."""
    by_model: dict[str, list[tuple[str, str]]] = {}
    for one in everything:
        by_model.setdefault(one[0], []).append(one)
    order = [
        (turn, one)
        for index, row in enumerate(by_model.values())
        for turn, one in enumerate(row[index % len(row) :] + row[: index % len(row)])
    ]
    return [one for _, one in sorted(order, key=lambda pair: pair[0])]


def main() -> int:
    parser = argparse.ArgumentParser(description="Many architectures by many producers through the engine.")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "PRODUCER"), help="one cell, in this process, as JSON")
    parser.add_argument("--cache", type=Path, help="a file for the cells, to go on from")
    parser.add_argument("--continue", action="store_true", dest="go_on", help=f"cells of {RESULTS.name} count as run")
    parser.add_argument("--only", nargs="*", default=[], help="words in MODEL/PRODUCER; all of them")
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES], choices=[*RECIPES], help="none: loading alone")
    parser.add_argument("--again", action="store_true", help="also cells that the file has")
    parser.add_argument("--time", type=float, default=float("inf"), help="seconds after which no cell is begun")
    parser.add_argument("--docs", action="store_true", help=f"write {RESULTS.name} and {DOCS.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell), indent=1))
        return 0
    if arguments.cache is None:
        parser.error("--cache is needed")
    from breadth_cases import cells, lacks_library

    everything = cells()
    known: Rows = unpacked(RESULTS.read_text("utf-8")) if arguments.go_on and RESULTS.exists() else {}
    rows, end = known | read(arguments.cache), time.monotonic() + arguments.time
    wanted = [
        one
        for one in in_turns(everything)
        if all(word in "/".join(one) for word in arguments.only)
        and not lacks_library(one[1])
        and (arguments.again or _lacks(rows.get(one), arguments.recipes))
    ]
    if wanted:
        _import_all()
    for name, producer in wanted:
        if time.monotonic() > end:
            break
        row = {"model": name, "producer": producer, **cell(name, producer, arguments.recipes)}
        rows[name, producer] = row
        with arguments.cache.open("a", encoding="utf-8") as sink:
            print(json.dumps(row), file=sink)
        why = "; ".join(row[part]["why"] for part in ("load", *RECIPES) if "why" in row.get(part, {}))
        print("|".join(cells_of_row(row, [*RECIPES])), why, flush=True)
    ordered = [rows[key] for key in everything if key in rows]
    if arguments.docs:
        RESULTS.write_text(packed(ordered), "utf-8")
        DOCS.write_text(document(ordered, everything, [*RECIPES]), "utf-8")
    outcomes = {row.get(part, {}).get("outcome") for row in ordered for part in ("load", *RECIPES)}
    return 1 if outcomes & set(WRONG) else 0


if __name__ == "__main__":
    sys.exit(main())
