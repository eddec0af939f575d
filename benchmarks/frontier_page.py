"""The page of the docs: our front beside the points of other tools, from the gathered figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from frontier_ours import JOBS, OURS, SMALLEST_1
from frontier_times import FIRST_ROUNDS, FLOAT, MINE, OPENINGS
from frontier_tools import TOOLS
from frontier_verdict import DAMAGE, SAME_METRIC, WORST_TIME
from modelpress_compression.measure.latency import SESSION_SPREAD
from modelpress_compression.search.candidates import SAME_SIZE

Row = Mapping[str, Any]
MAX_DROP, HALF_A_DIGIT = 0.01, 5e-5  # metrics are printed with four digits
LABELS = {tool.name: tool.label for tool in TOOLS} | {OURS: "**ours**", FLOAT: "float32"}

INTRODUCTION = f"""\
# The front beside other tools

Written by `benchmarks/frontier.py`; do not edit.

Every model goes as the same ONNX file, with the same calibration inputs and without labels, to every tool, in an
environment of its own: [what stands in each](#the-tools). Ours are the models that jobs for the four goals let be
downloaded, with the drop that is permitted left alone and set to 1, 3 and 10 %; jobs named so had labels as well, of
samples that are in neither set. Size is that of the files on the disk;
the metric is that of the model's own evaluation set, which nobody saw; **time** is that over the float model, one
thread, one sample: all points of a model run in one process, one run each in random order in every round. All run in
{FIRST_ROUNDS} rounds; what these leave open runs on, in as many as stand above each table. All sessions are opened anew
{OPENINGS} times meanwhile, for the place in memory that one gets is worth more than the interval of its rounds. Points
with the same file are one.

One of ours **matches** one of theirs if it is at most {100 * SAME_SIZE:g} % larger, at most {100 * SAME_METRIC:g}
points worse, and not surely slower: the 95 % interval of our time over theirs, widened by {100 * SESSION_SPREAD:g} %,
reaches down to 1. What a metric has above the float model's is luck and is not asked for. It **beats** it if it is at
least as good in all three by the figures themselves. The float model is everybody's. What loses over
{100 * DAMAGE:g} points is another model. The **volume** is the share of the box from nothing to the float model's size,
{WORST_TIME:g} times its time and a loss of {100 * DAMAGE:g} points that the points of a side cover; * marks the points
of the common front. Where one of ours that loses nothing matches one of theirs whatever that one loses, its metric was
not asked for (-), and the volume counts it as if it lost nothing.
"""


def page(results: Mapping[str, Any]) -> str:
    """Markdown."""
    models: Mapping[str, Row] = results["models"]
    parts = [INTRODUCTION, "## Summary", "", *_summary(models), ""]
    parts += ["## Not matched", "", *_unmatched(models), ""]
    parts += ["## The smallest within a point", "", *_smallest(models), ""]
    parts += ["## The tools", "", *_tools(results), ""]
    for name, model in models.items():
        parts += _section(name, model)
    return "\n".join(parts).rstrip() + "\n"


def _summary(models: Mapping[str, Row]) -> list[str]:
    rows = [["model", "points of theirs", "not made", "beaten", "matched", "not matched", "another model",
             "volume: ours", "theirs", "ours / theirs"]]  # fmt: skip
    for name, model in models.items():
        theirs = [row for row in model["points"] if "standing" in row]
        counts = [sum(row["standing"] == standing for row in theirs)
                  for standing in ("beaten", "matched", "not matched", "another model")]  # fmt: skip
        volume = model["hypervolume"]
        rows.append([
            name, str(len(theirs)), _missing(model), *map(str, counts), f"{volume['ours']:.3f}",
            f"{volume['theirs']:.3f}", _ratio(volume),
        ])  # fmt: skip
    return _markdown(rows)


def _missing(model: Row) -> str:
    """How many points of theirs were left out, and which tools."""
    there = {row["tool"] for row in model["points"]}
    tools = [tool.label for tool in TOOLS if tool.name not in there]
    left_out = sum(map(len, model.get("not_made", {}).values()))
    return ", ".join([str(left_out), *(f"all of {tool}" for tool in tools)])


def _ratio(volume: Row) -> str:
    return f"{volume['ours'] / volume['theirs']:.3f}" if volume["theirs"] else ""


def _unmatched(models: Mapping[str, Row]) -> list[str]:
    rows = [["model", "tool", "point", "size", "time", "metric", "nearest of ours", "what it misses"]]
    for name, model in models.items():
        for row in model["points"]:
            if row.get("standing") == "not matched":
                rows.append([
                    name, LABELS[row["tool"]], row["name"], *_figures(row), row["by"]["name"],
                    ", ".join(row["by"]["misses"]),
                ])  # fmt: skip
    return _markdown(rows) if len(rows) > 1 else ["None."]


def _smallest(models: Mapping[str, Row]) -> list[str]:
    """What `--goal smallest --max-drop 1%` gives, beside the smallest of theirs that loses no more than that; of models
    on which that job has run."""
    rows = [["model", "ours", "size", "time", "metric", "best of theirs", "size", "time", "metric",
             "ours / theirs in size"]]  # fmt: skip
    for name, model in models.items():
        placed = [row for row in model["points"] if "place" in row]
        original = next(row for row in placed if row["tool"] == FLOAT)
        if SMALLEST_1 not in model.get("goals", {SMALLEST_1: {}}):
            continue
        ours = next((row for row in placed if row.get("job") == SMALLEST_1 and row["chosen"]), original)
        theirs = smallest_of_theirs(model)
        rows.append([
            name, ours["name"], *_figures(ours), f"{LABELS[theirs['tool']]}: {theirs['name']}", *_figures(theirs),
            f"{ours['size_bytes'] / theirs['size_bytes']:.3f}",
        ])  # fmt: skip
    return _markdown(rows)


def smallest_of_theirs(model: Row) -> Row:
    """The smallest point of other tools, or the float model, that loses no more than a point."""
    placed = [row for row in model["points"] if "place" in row and row["tool"] != OURS]
    return min(
        (row for row in placed if row["place"]["loss"] <= MAX_DROP + HALF_A_DIGIT), key=lambda row: row["size_bytes"]
    )


def _tools(results: Mapping[str, Any]) -> list[str]:
    rows = [["tool", "installed", "points that gave a model", "others"]]
    missing = results.get("missing", {})
    for tool in TOOLS:
        there = [row for model in results["models"].values() for row in model["points"] if row["tool"] == tool.name]
        good = sum(row["outcome"] == "ok" for row in there)
        installed = f"no: {missing[tool.name]}" if tool.name in missing else ", ".join(tool.requirements)
        note = f" ({tool.note})" if tool.note else ""
        rows.append([tool.label, installed + note, str(good), str(len(there) - good)])
    return _markdown(rows)


def _section(name: str, model: Row) -> list[str]:
    points = model["points"]
    original = next(row for row in points if row["tool"] == FLOAT)
    done = sorted((row for row in points if "place" in row), key=lambda row: (row["size_bytes"], row["time_ms"]))
    failed = [row for row in points if "place" not in row]
    first, second = model["rounds"]
    before, after = model["load"]
    rows: list[Sequence[str]] = [["", "tool", "point", "size", "time [95 %]", model["metric_name"], "answered by"]]
    seen: dict[tuple[Any, ...], None] = {}
    for row in done:
        mark = (row["tool"], row["size_bytes"], row["time_ms"])
        if mark not in seen:  # jobs for several goals give the same model
            seen[mark] = None
            rows.append(["\\*" if row["front"] else "", LABELS[row["tool"]], _name(row), *_figures(row), _answer(row)])
    return [
        f"## {name}",
        "",
        f"{original['size_bytes'] / 1e6:.2f} MB, {original['time_ms']:.2f} ms, {model['metric_name']} "
        f"{original['metric']:.4f}. {first} rounds of all, {second} of those still open"
        f"{_turns(model)}; load average {before:.1f} to "
        f"{after:.1f}. {_machine(model['environment'])}.",
        "",
        *_markdown(rows),
        "",
        *_failures(failed),
        *_left_out(model),
    ]


def _name(row: Row) -> str:
    if "samples" in row:
        return f"{row['name']} (memory for {row['samples']} samples alone)"
    return f"{row['name']} ({row['job']})" if row.get("job") else str(row["name"])


def _figures(row: Row) -> list[str]:
    time = row["time"]
    return [
        f"{row['place']['size']:.3f}",
        f"{time['median']:.3f} [{time['low']:.3f}, {time['high']:.3f}]",
        "-" if row["metric"] is None or math.isnan(row["metric"]) else f"{row['metric']:.4f}",
    ]


def _answer(row: Row) -> str:
    if row["tool"] in MINE:
        return ""
    if row["standing"] == "another model":
        return "another model"
    time = row["by"]["time"]
    text = f"{row['standing']}: {row['by']['name']}, {time['median']:.3f} [{time['low']:.3f}, {time['high']:.3f}]"
    return f"**{text}**" if row["standing"] == "not matched" else text


def _failures(failed: Sequence[Row]) -> list[str]:
    """What gave no model that runs, in one line for each cause of a tool."""
    causes: dict[tuple[str, str], list[str]] = {}
    for row in failed:
        causes.setdefault((row["tool"], f"{row['outcome']}: {row['error']}"), []).append(row["name"])
    lines = [f"- {LABELS[tool]}: {'; '.join(names)}: {cause}" for (tool, cause), names in causes.items()]
    return ["No model that runs:", "", *lines, ""] if lines else []


def _turns(model: Row) -> str:
    return "" if model.get("together", True) else ", in turn, for lack of memory for all at once"


def _left_out(model: Row) -> list[str]:
    """What was not asked for: times of ours that were bounded, points of theirs that were not made."""
    limits: dict[float, list[str]] = {}
    for job, goal in model.get("goals", {}).items():
        if "search_time_s" in goal:
            limits.setdefault(goal["search_time_s"], []).append(job)
    lines = [f"- ours: more than {seconds:g} s of search in {', '.join(jobs)}" for seconds, jobs in limits.items()]
    lines += [f"- {LABELS[tool]}: not made: {'; '.join(names)}" for tool, names in model.get("not_made", {}).items()]
    if "goals" in model:
        jobs = [job.name for job in JOBS if job.name not in model["goals"]]
        lines += [f"- ours: not run: {', '.join(jobs)}"] if jobs else []
    there = {row["tool"] for row in model["points"]}
    lines += [f"- {tool.label}: not run on this model" for tool in TOOLS if tool.name not in there]
    return ["Not tried:", "", *lines, ""] if lines else []


def _machine(environment: Row) -> str:
    instructions = ", ".join(environment["instructions"])
    versions = ", ".join(f"{name} {environment[name]}" for name in ("onnxruntime", "onnx", "torch", "numpy"))
    return f"Measured on {environment['measured_on']}: {environment['cpu']} ({instructions}), {versions}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["|" + "|".join(cell.replace("|", "\\|") for cell in row) + "|" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
