"""The parts of the page below the figures: what each step did, candidates, outputs, operators, environment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from modelpress_compression.counted import counted
from modelpress_compression.decibels import MAX_SQNR_DB
from modelpress_compression.measure.damage import DAMAGE_COSINE, DAMAGE_DROP
from modelpress_compression.report.figures import family_picture
from modelpress_compression.report.formats import (
    NOT_MEASURED,
    change,
    definitions,
    escape,
    interval,
    milliseconds,
    number,
    percent,
    seconds,
    size,
    speed_kind,
    speed_words,
    table,
    tag,
    words,
    yaml_text,
)

MAX_NAMED_NODES = 30
MAX_OPEN_REASONS = 4
MAX_OPEN_LAYERS = 12
_ENVIRONMENT_NAMES = {"cpu": "CPU", "cores": "cores", "instructions": "instructions", "system": "system"}


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of the page; empty where it has no content."""
    if not content:
        return ""
    return tag("section", tag("h2", escape(title)) + (tag("p", escape(note), class_="note") if note else "") + content)


def folded(summary: str, content: str) -> str:
    """Details behind one line; both are HTML already."""
    return tag("details", tag("summary", summary) + content)


def hardware(target: Mapping[str, Any] | None) -> str:
    """Figures of a design; empty where the target runs the ONNX file."""
    if not target:
        return ""
    names = {"luts": "lookup tables", "flip_flops": "flip-flops", "dsps": "DSPs", "brams": "block RAMs"}
    rows = [
        [name, escape(number(target["resources"][key])), percent(target["shares"][key])]
        for key, name in names.items()
        if key in target["resources"]
    ]
    listed = definitions({"part": escape(target.get("part_title") or target["part"]), **_cycles(target)})
    return table(("Resource", "Taken", "Of the part"), rows, numeric=(1, 2)) + listed


def _cycles(target: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a design's speed, and of how exact it is."""
    between = {"cycles between samples": escape(number(target["interval_cycles"]))}
    routed, checked = target["routed"], target["bit_exact"]
    if checked is None:
        return {"built": "nothing; all figures are estimates", **between}
    clock = f"{routed['fmax_mhz']:.1f} MHz" if routed else NOT_MEASURED
    synthesized = NOT_MEASURED if checked["synthesized"] is None else number(checked["synthesized"])
    return {
        "clock after routing": escape(clock),
        "cycles from a sample to its answer": escape(number(target["latency_cycles"])),
        **between,
        "a sample takes": escape(f"{routed['latency_us']:.3f} \N{MICRO SIGN}s" if routed else NOT_MEASURED),
        "samples a second": escape(f"{routed['samples_per_s']:,.0f}" if routed else NOT_MEASURED),
        "answered exactly, as written": escape(f"{checked['as_written']} of {checked['samples']}"),
        "answered exactly, as synthesized": escape(f"{synthesized} of {checked['samples']}"),
    }


def steps(report: Mapping[str, Any]) -> str:
    """For each step its changes, and what it left alone and why."""
    before: float = report["original"]["onnx_size_bytes"]
    written = []
    for index, step in enumerate(report["steps"], start=1):
        written.append(_step(index, step, before))
        before = step["size_bytes"]
    return tag("ol", "".join(written), class_="steps") if written else ""


def _step(index: int, step: Mapping[str, Any], before: float) -> str:
    changes = {name: value for name, value in step["changes"].items() if value}
    chips = "".join(
        tag("li", f"{escape(words(name))} <b>{escape(number(value))}</b>") for name, value in changes.items()
    )
    done = tag("ul", chips, class_="chips") if chips else tag("p", "Nothing changed.", class_="quiet")
    after = step["size_bytes"]
    shift = change(before, after)
    head = (
        tag("span", str(index), class_="index")
        + tag("h3", escape(step["name"]))
        + tag("span", f"{size(after)} <small>{escape(shift)}</small>", class_="figures")
        + tag("span", seconds(step["duration_s"]), class_="quiet")
    )
    notes = "".join(tag("p", escape(note)) for note in step.get("notes", ()))
    left = _left_alone(step.get("left_alone", ()))
    return tag("li", tag("header", head) + done + notes + left + _details(step) + _config(step["config"]))


def _details(step: Mapping[str, Any]) -> str:
    """A table for each kind of row, which its keys are."""
    rows: Sequence[Mapping[str, Any]] = step.get("details", ())
    kinds: defaultdict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[tuple(row)].append(row)
    tables = "".join(
        table(
            [words(key) for key in keys],
            [[escape(number(value)) for value in row.values()] for row in same],
            numeric=[index for index, key in enumerate(keys) if not isinstance(same[0][key], str)],
        )
        for keys, same in kinds.items()
    )
    return folded(f"Layer by layer: {len(rows)}", tables) if rows else ""


def _left_alone(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each reason, with the names behind it; the rarer reasons behind one line together."""
    if not rows:
        return ""
    lines = [
        tag("li", folded(f"{counted(row['count'], row['what'])}: {escape(row['reason'])}", _nodes(row["names"])))
        for row in rows
    ]
    first, rest = lines[:MAX_OPEN_REASONS], lines[MAX_OPEN_REASONS:]
    more = folded(counted(len(rest), "other reason"), tag("ul", "".join(rest), class_="reasons")) if rest else ""
    total = ", ".join(
        counted(number, what)
        for what in ("node", "candidate")
        if (number := sum(row["count"] for row in rows if row["what"] == what))
    )
    listed = tag("ul", "".join(first), class_="reasons")
    return tag("div", tag("p", f"Left alone: {total}", class_="quiet") + listed + more, class_="left")


def _nodes(nodes: Sequence[str]) -> str:
    named = ", ".join(tag("code", escape(name)) for name in nodes[:MAX_NAMED_NODES])
    more = len(nodes) - MAX_NAMED_NODES
    return named + (f" and {more} more" if more > 0 else "")


def _config(config: Mapping[str, Any]) -> str:
    return folded("Configuration", tag("pre", escape(yaml_text(dict(config))))) if config else ""


def candidates(rows: Sequence[Mapping[str, Any]]) -> str:
    """All candidates, with the figures that decided."""
    if not rows:
        return ""
    headers = ("", "Candidate", "Size", "Speed", "Cosine", "Agreement", "Expected drop", "Drop")
    switch = tag("label", '<input type="checkbox" class="only"> Compare: show the ticked rows alone', class_="quiet")
    listed = table(headers, [_candidate(row) for row in rows], numeric=(2, 4, 5, 6, 7))
    fetched = any(row.get("downloadable") for row in rows)
    hint = tag("p", f"↓ {tag('code', 'compress-client download JOB --candidate ID')}", class_="note") if fetched else ""
    return family_picture(rows) + (switch if len(rows) > 1 else "") + listed + hint


def _candidate(row: Mapping[str, Any]) -> list[str]:
    cosine, drop, expected = row.get("cosine"), row.get("drop"), row.get("expected_drop")
    return [
        _candidate_tick(row),
        _candidate_name(row),
        size(row.get("size_bytes")),
        _candidate_speed(row.get("speedup")),
        _alarming(NOT_MEASURED if cosine is None else f"{cosine:.4f}", cosine is not None and cosine < DAMAGE_COSINE),
        percent(row.get("agreement"), 2),
        _alarming(percent(expected, 2), (expected or 0) > DAMAGE_DROP),
        NOT_MEASURED if drop is None else f"{drop:.4f}",
    ]


def _candidate_tick(row: Mapping[str, Any]) -> str:
    label = escape(row.get("id", ""))
    return f'<label class="pick" id="{label}"><input type="checkbox"> {label}</label>'


def _candidate_name(row: Mapping[str, Any]) -> str:
    name = escape(row.get("name", ""))
    if row.get("chosen"):
        name += " " + tag("b", "chosen", class_="chosen")
    elif row.get("pareto"):
        name += " " + tag("small", "on the Pareto front")
    if row.get("downloadable"):
        name += " " + tag("small", "↓", title="can be downloaded")
    return name + (tag("p", escape(row["reason"]), class_="quiet") if row.get("reason") else "")


def _candidate_speed(speedup: Mapping[str, float] | None) -> str:
    if not speedup:
        return NOT_MEASURED
    words = tag("b", escape(speed_words(speedup)), class_=f"verdict {speed_kind(speedup)}")
    return f"{words} {tag('small', escape(interval(speedup)))}"


def _alarming(text: str, damaged: bool) -> str:
    return tag("b", escape(text), class_="damaged") if damaged else escape(text)


def outputs(fidelity: Mapping[str, Any] | None) -> str:
    """How far each output is from the original's."""
    if not fidelity:
        return ""
    with_equal = any("equal" in figures for figures in fidelity["outputs"].values())
    rows = []
    for name, figures in fidelity["outputs"].items():
        equal = figures.get("equal")
        error, decibels = figures["max_abs_error"], figures["sqnr_db"]
        rows.append(
            [
                tag("code", escape(name)),
                NOT_MEASURED if figures["cosine"] is None else f"{figures['cosine']:.6f}",
                NOT_MEASURED if decibels is None else "identical" if decibels >= MAX_SQNR_DB else f"{decibels:.1f} dB",
                NOT_MEASURED if error is None else f"{error:.3g}",
                *([NOT_MEASURED if equal is None else percent(equal, 2)] if with_equal else []),
            ]
        )
    notes = "".join(tag("li", escape(note)) for note in fidelity.get("notes", ()))
    headers = ("Output", "Cosine", "SQNR", "Largest error", *(("Equal elements",) if with_equal else ()))
    body = table(headers, rows, numeric=(1, 2, 3, 4))
    return body + (tag("ul", notes) if notes else "")


def layer_times(rows: Sequence[Mapping[str, Any]]) -> str:
    """What took the time, the longest first: before, after, the kernel, and why it is not faster."""
    timed = [row for row in rows if row.get("original_ms") is not None or row.get("optimized_ms") is not None]
    timed.sort(key=lambda row: -max(row.get("original_ms") or 0.0, row.get("optimized_ms") or 0.0))
    if not timed:
        return ""
    lines = [_layer_time(row) for row in timed]
    headers = ("Layer", "Original", "Result", "Kernel", "Share of error", "Why not faster")
    first, rest = lines[:MAX_OPEN_LAYERS], lines[MAX_OPEN_LAYERS:]
    more = folded(counted(len(rest), "more layer"), table(headers, rest, numeric=(1, 2, 4))) if rest else ""
    return table(headers, first, numeric=(1, 2, 4)) + more


def _layer_time(row: Mapping[str, Any]) -> list[str]:
    kernel = row.get("kernel")
    types = tag("small", escape(row.get("types") or ""))
    name = tag("code", escape(row["name"])) + " " + tag("small", escape(row["op_type"]))
    return [
        name,
        milliseconds(row.get("original_ms")),
        milliseconds(row.get("optimized_ms")),
        f"{escape(kernel)} {types}" if kernel else NOT_MEASURED,
        percent(row.get("error_share"), 1),
        escape(row.get("why") or ""),
    ]


def operators(report: Mapping[str, Any]) -> str:
    """How often each operator occurs, before and after."""
    before, after = report["original"]["ops"], report["optimized"]["ops"]
    names = sorted(before.keys() | after.keys(), key=lambda name: (-max(before.get(name, 0), after.get(name, 0)), name))
    rows = [
        [tag("code", escape(name)), str(before.get(name, 0) or NOT_MEASURED), str(after.get(name, 0) or NOT_MEASURED)]
        for name in names
    ]
    title = f"Operators: {sum(before.values())} → {sum(after.values())} nodes"
    return folded(escape(title), table(("Operator", "Original", "Optimized"), rows, numeric=(1, 2)))


def environment(values: Mapping[str, Any]) -> str:
    """Machine and versions."""
    items = {}
    for name, value in values.items():
        text = ", ".join(str(item) for item in value) if isinstance(value, list) else number(value)
        items[_ENVIRONMENT_NAMES.get(name, name)] = escape(text or NOT_MEASURED)
    return definitions(items)


def recipe(value: Any) -> str:
    """The recipe as it would stand in a file."""
    return tag("pre", escape(yaml_text(value)))


def files(report: Mapping[str, Any]) -> str:
    """Digests and formats of what came in and what came out."""
    original, optimized = report["original"], report["optimized"]
    listed = definitions(
        {
            "uploaded": f"{escape(original['format'])}, {size(original['size_bytes'])}, opset {original['opset']}",
            "sha256 of the upload": tag("code", escape(original["sha256"])),
            "result": f"{escape(optimized['format'])}, {size(optimized['size_bytes'])}, opset {optimized['opset']}",
            "sha256 of the result": tag("code", escape(optimized["sha256"])),
        }
    )
    return tag("div", listed, class_="files")
