"""Many architectures, as many producers write them, through the engine: what loads, and what comes back.

    python benchmarks/breadth.py --cache FILE [--only WORD ...] [--again] [--time SECONDS] [--docs]

A cell is a model in small (`breadth_cases`: few layers, narrow, random weights) in a form that a producer writes. It
runs in a process of its own, bounded in time and memory: the model is written, loaded, and held against what torch
gives, at the extents that it was written with and, where dimensions are dynamic, at others. Then it goes through four
recipes. FILE has one line of JSON for each cell, so that a run can be stopped and continued; `--docs` writes
docs/breadth.md from what FILE holds.

Needs `pip install -e '.[benchmarks]'`; skl2onnx, onnxmltools, lightgbm and xgboost for the classifiers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

DOCS = Path(__file__).resolve().parent.parent / "docs" / "breadth.md"
CELL_TIME_S = 420.0
CELL_MEMORY_BYTES = 6 * 1024**3  # 6 GiB, resident
POLL_S = 0.2
# The default recipe's search ends here: cells are many.
SEARCH_TIME_S = 20.0
_QUICK = {"rounds": 5}
RECIPES: Mapping[str, dict[str, Any]] = {
    "default": {"version": 1, "goal": {"objective": "balanced", "search_time_s": SEARCH_TIME_S}, "benchmark": _QUICK},
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
_WRONG = ("error", "wrong")


def measure(name: str, producer: str) -> dict[str, Any]:
    """The cell's figures, in this process."""
    from breadth_cases import NotMade, made

    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        try:
            one = made(name, producer, Path(folder))
        except NotMade as error:
            return {"load": {"outcome": "not written", "why": str(error)}}
        return _through_the_engine(one, name, Path(folder))


def _through_the_engine(one: Any, name: str, folder: Path) -> dict[str, Any]:
    from modelpress_compression.errors import CompressionError

    row: dict[str, Any] = {}
    try:
        model = _load(one, name, folder)
        row["load"] = _loaded(one, model, folder)
    except CompressionError as error:
        row["load"] = {"outcome": "refused", "why": error.message[:400]}
    except Exception as error:  # noqa: BLE001  what is looked for
        row["load"] = {"outcome": "error", "why": f"{type(error).__name__}: {error}"[:400]}
    if row["load"]["outcome"] != "equal":
        return row
    for recipe in RECIPES:
        try:
            row[recipe] = _compressed(one, model, recipe, folder)
        except CompressionError as error:
            row[recipe] = {"outcome": "refused", "why": error.message[:400]}
        except Exception as error:  # noqa: BLE001  what is looked for
            row[recipe] = {"outcome": "error", "why": f"{type(error).__name__}: {error}"[:400]}
    return row


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
    from modelpress_compression.runtime import open_session, run

    feeds = [_by_position(model, feed) for feed in one.feeds]
    data = InputData(model.inputs, {name: array[None] for name, array in feeds[0].items()})
    began = time.monotonic()
    result = compress(model, Recipe.from_dict(RECIPES[recipe]), data=data)
    took_s = time.monotonic() - began
    path = folder / recipe / "model.onnx"
    result.write(path.parent)
    before, after = (run(open_session(file), feeds[-1]) for file in (folder / "loaded.onnx", path))
    cosine = _cosine(before, after)
    row: dict[str, Any] = {
        "outcome": "equal" if cosine > 1 - 1e-6 else "close",
        "ratio": path.stat().st_size / (folder / "loaded.onnx").stat().st_size,
        "cosine": cosine,
        "seconds": round(took_s, 1),
    }
    least = CLOSE[recipe]
    problems = _changed(model, result.model)
    given, back = (onnx.load(file, load_external_data=False) for file in (folder / "loaded.onnx", path))
    if [*given.metadata_props] != [*back.metadata_props]:
        problems.append("metadata")
    if least is not None and cosine < least:
        problems.append(f"cosine {cosine:.3f}")
    if [array.shape for array in before.values()] != [array.shape for array in after.values()]:
        problems.append("shapes of outputs")
    return {**row, "outcome": "wrong", "why": ", ".join(problems)} if problems else row


def _changed(model: Any, result: Any) -> list[str]:
    """What of the interface is another: names, types and dimensions."""
    return [side for side in ("inputs", "outputs") if getattr(model, side) != getattr(result, side)]


def _cosine(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The least of all float outputs; outputs of other types or shapes do not count."""
    import numpy as np

    least = 1.0
    for name, array in before.items():
        if array.dtype.kind == "f" and array.size and array.shape == after[name].shape:
            a, b = array.astype(np.float64).ravel(), after[name].astype(np.float64).ravel()
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            least = min(least, float(a @ b) / norm if norm else float(np.array_equal(a, b)))
    return least


def cell(name: str, producer: str) -> dict[str, Any]:
    """The cell's figures, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", name, producer]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=answer, stderr=log, env=environment, cwd=Path(__file__).parent)
        stopped = _watch(process)
        answer.seek(0)
        log.seek(0)
        lines, noise = answer.read().splitlines(), log.read()
    if stopped:
        return {"load": {"outcome": "stopped", "why": stopped}}
    if process.returncode != 0 or not lines:
        last = " ".join(noise.strip().splitlines()[-1:])[:300]
        return {"load": {"outcome": "error", "why": f"the process ended with {process.returncode}: {last}"}}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def _watch(process: subprocess.Popen[bytes]) -> str:
    """Waits for the end; why it was stopped, if it was."""
    watched, end = psutil.Process(process.pid), time.monotonic() + CELL_TIME_S
    while process.poll() is None:
        try:
            resident = watched.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        if resident > CELL_MEMORY_BYTES or time.monotonic() > end:
            process.kill()
            process.wait()
            return f"over {CELL_MEMORY_BYTES >> 30} GiB" if resident > CELL_MEMORY_BYTES else f"over {CELL_TIME_S:g} s"
        time.sleep(POLL_S)
    return ""


def read(cache: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the file by model and producer; of two for one cell the later counts."""
    lines = cache.read_text("utf-8").splitlines() if cache.exists() else []
    return {(row["model"], row["producer"]): row for row in map(json.loads, lines)}


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


def document(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """The page."""
    written = [row for row in rows if row["load"]["outcome"] != "not written"]
    loaded = [row for row in written if row["load"]["outcome"] == "equal"]
    treated = [row[recipe] for row in loaded for recipe in RECIPES if recipe in row]
    good = sum(one["outcome"] in ("equal", "close") for one in treated)
    failures = Counter(_kind(row, part) for row in written for part in ("load", *RECIPES) if _kind(row, part))
    text = (__doc__ or "").strip().split("\n\n")[2]
    lines = [
        "# Breadth",
        "",
        "Written by `python benchmarks/breadth.py --docs`; do not edit.",
        "",
        text.partition(" FILE has")[0],
        "",
        f"- Cells run: {len(rows)} of {number}; {len(rows) - len(written)} of them the producer refuses to write.",
        f"- Loaded and equal: {len(loaded)} of {len(written)} ({len(loaded) / max(1, len(written)):.1%}).",
        f"- Results equal or close, with names, types, dynamic dimensions and metadata kept: {good} of {len(treated)}.",
        "",
        "A recipe's column: size over the loaded model's, and least cosine of an output with the loaded model's, at "
        "other extents than the calibrated ones where the model has dynamic dimensions.",
        "",
        *_table(["model", "producer", "load", *RECIPES], [_cells(row) for row in rows]),
        "",
        "## What fails",
        "",
        *_table(["cells", "what"], [[str(count), kind] for kind, count in failures.most_common()]),
        "",
    ]
    return "\n".join(lines)


def _kind(row: Mapping[str, Any], part: str) -> str:
    one = row.get(part, {"outcome": "equal"})
    if one["outcome"] in ("equal", "close", "not written"):
        return ""
    return f"{part}: {one['outcome']}: {one['why'][:200]}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    texts = [_figures(row[recipe]) if recipe in row else "" for recipe in RECIPES]
    return [row["model"], row["producer"], row["load"]["outcome"], *texts]


def _figures(one: Mapping[str, Any]) -> str:
    figures = f"{one['ratio']:.2f}, {one['cosine']:.3f}" if "ratio" in one else ""
    return figures if one["outcome"] in ("equal", "close") else f"**{one['outcome']}** {figures}".strip()


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description="Many architectures by many producers through the engine.")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "PRODUCER"), help="one cell, in this process, as JSON")
    parser.add_argument("--cache", type=Path, help="a file for the cells, to go on from")
    parser.add_argument("--only", nargs="*", default=[], help="words in MODEL/PRODUCER; all of them")
    parser.add_argument("--again", action="store_true", help="also cells that the file has")
    parser.add_argument("--time", type=float, default=float("inf"), help="seconds after which no cell is begun")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.name} in docs")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell)))
        return 0
    if arguments.cache is None:
        parser.error("--cache is needed")
    from breadth_cases import cells

    rows, end = read(arguments.cache), time.monotonic() + arguments.time
    for name, producer in in_turns(cells()):
        wanted = all(word in f"{name}/{producer}" for word in arguments.only)
        if not wanted or ((name, producer) in rows and not arguments.again) or time.monotonic() > end:
            continue
        row = {"model": name, "producer": producer, **cell(name, producer)}
        rows[name, producer] = row
        with arguments.cache.open("a", encoding="utf-8") as sink:
            print(json.dumps(row), file=sink)
        print("|".join(_cells(row)), row["load"].get("why", ""), flush=True)
    ordered = [rows[key] for key in cells() if key in rows]
    if arguments.docs:
        DOCS.write_text(document(ordered, len(cells())), "utf-8")
    return 1 if any(row.get(part, {}).get("outcome") in _WRONG for row in ordered for part in ("load", *RECIPES)) else 0


if __name__ == "__main__":
    sys.exit(main())
