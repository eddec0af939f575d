"""report.html: one self-contained page, without scripts, fonts or anything else from outside.

Every string of the report is escaped on its way in. Should one ever slip through, a Content-Security-Policy forbids
everything but the page's own style.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from modelpress_compression.counted import counted
from modelpress_compression.measure.metric_names import SHARES
from modelpress_compression.report import sections
from modelpress_compression.report.figures import latency_picture, layer_picture, legend, size_bar
from modelpress_compression.report.formats import (
    NOT_MEASURED,
    against_medians,
    change,
    count,
    escape,
    interval,
    milliseconds,
    percent,
    ratio,
    size,
    speed_kind,
    speed_words,
    tag,
)

# What a recipe can demand of its result.
_LIMITS = ("max_drop", "max_size_bytes", "min_ratio", "max_latency_ms", "min_speedup")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(report: Mapping[str, Any]) -> str:
    """The page for the content of a report.json (`build.build_report`)."""
    style = (files("modelpress_compression.report") / "report.css").read_text("utf-8")
    title = headline(report)
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    body = tag("main", _header(report, title) + _banners(report) + _cards(report) + _body(report))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: size, speed, and what it cost."""
    if report.get("target"):
        return str(report["verdict"])
    said = f"{_size_words(report['size_ratio'])}, {_speed_words(report['latency'])}{_quality_words(report)}."
    return f"Damaged: {said}" if report.get("damage") else said


def _size_words(size_ratio: float) -> str:
    if size_ratio >= 1.2:
        return f"{ratio(size_ratio)} smaller"
    if size_ratio > 1.005:
        return f"{percent(1 - 1 / size_ratio)} smaller"
    return "The same size" if size_ratio >= 0.995 else f"{percent(1 / size_ratio - 1)} larger"


def _speed_words(latency: Any) -> str:
    if not latency:
        return "speed not measured"
    speedup = latency[0]["speedup"]
    kind, gain = speed_kind(speedup), speedup["median"]
    if kind == "faster":
        return f"{ratio(gain)} as fast" if gain >= 1.2 else f"{percent(gain - 1, 0)} faster"
    return f"but {ratio(1 / gain)} slower" if kind == "slower" else "speed not measurably changed"


def _quality_words(report: Mapping[str, Any]) -> str:
    accuracy, fidelity = report["accuracy"], report["fidelity"]
    if accuracy is not None:
        before, after = _metric(accuracy, "original"), _metric(accuracy, "optimized")
        return f"; {accuracy['metric']} " + (f"stays at {after}" if before == after else f"{before} → {after}")
    if fidelity is None:
        return ""
    if fidelity["top1_agreement"] is not None:
        words = f"; {percent(fidelity['top1_agreement'])} of the answers unchanged"
    else:
        cosine = _lowest_cosine(fidelity)
        words = "" if cosine is None else f"; output cosine {cosine:.4f}"
    # Noise proves little: whoever reads one sentence only must not miss that.
    return words + (" on synthetic inputs" if words and fidelity["data"] == "synthetic" else "")


def _metric(accuracy: Mapping[str, Any], role: str) -> str:
    value = accuracy[role]
    if value is None:
        return NOT_MEASURED
    return percent(value, 2) if accuracy["metric"] in SHARES else f"{value:.4g}"


def _lowest_cosine(fidelity: Mapping[str, Any]) -> float | None:
    cosines = [output["cosine"] for output in fidelity["outputs"].values() if output["cosine"] is not None]
    return min(cosines, default=None)


def _header(report: Mapping[str, Any], title: str) -> str:
    job = f" · {tag('code', escape(report['job']))}" if report["job"] else ""
    kind = "damaged" if report.get("damage") else "sound"
    heading = tag("h1", escape(title), class_=kind)
    return tag("header", tag("p", f"modelpress report{job}", class_="brand") + heading, class_="top")


def _banners(report: Mapping[str, Any]) -> str:
    """Broken constraints first, then what would help, then warnings."""
    constraints = report.get("constraints") or {"met": True, "violations": []}
    stated = {**(report["recipe"].get("constraints") or {}), **(report["recipe"].get("goal") or {})}
    demanded = any(stated.get(name) is not None for name in _LIMITS)
    made = ""
    if (damage := report.get("damage")) and constraints["met"]:
        text = f"The result no longer resembles the original: {damage}."
        made += tag("div", tag("strong", escape(text)), class_="banner bad")
    if not constraints["met"]:
        listed = "".join(tag("li", escape(text)) for text in constraints["violations"])
        made += tag("div", tag("strong", "Constraints not met") + tag("ul", listed), class_="banner bad")
    elif demanded and not damage:
        made += tag("div", tag("strong", "All constraints are met."), class_="banner good")
    if advice := report.get("advice"):
        listed = "".join(tag("li", f"{escape(item['text'])} {tag('code', escape(item['command']))}") for item in advice)
        made += tag("div", tag("strong", "What would help") + tag("ul", listed), class_="banner good")
    if reused := report.get("reused"):
        counts = ", ".join(f"{count} {kind}" for kind, count in reused.items())
        made += tag("div", f"Earlier jobs on the same model and data had found out: {escape(counts)}.", class_="banner")
    if report["warnings"]:
        listed = "".join(tag("li", escape(text)) for text in report["warnings"])
        made += tag("div", tag("strong", "Please note") + tag("ul", listed), class_="banner warn")
    return made


def _cards(report: Mapping[str, Any]) -> str:
    original, optimized = report["original"], report["optimized"]
    cards = [
        _card(
            "Size",
            size(original["onnx_size_bytes"]),
            size(optimized["size_bytes"]),
            f"{change(original['onnx_size_bytes'], optimized['size_bytes'])}{_times_smaller(report['size_ratio'])}",
            size_bar(1 / report["size_ratio"]),
        ),
        _latency_card(report["latency"]),
        _quality_card(report),
        _card(
            "Parameters",
            count(original["parameters"]),
            count(optimized["parameters"]),
            f"{change(original['parameters'], optimized['parameters'])}{_zeros(optimized)}",
        ),
        _card(
            "Multiply-accumulates",
            count(original["macs"]),
            count(optimized["macs"]),
            "shapes are not known" if original["macs"] is None else change(original["macs"], optimized["macs"]),
        ),
    ]
    return tag("div", "".join(cards), class_="cards")


def _card(title: str, before: str, after: str, note: str, extra: str = "", *, worse: bool = False) -> str:
    """Before, after and one line; all texts are plain, `extra` is HTML. `worse`: what came out is set off."""
    kind = "values worse" if worse else "values"
    values = tag("p", tag("span", escape(before)) + tag("i", "→") + tag("b", escape(after)), class_=kind)
    return tag("article", tag("h2", escape(title)) + values + extra + tag("p", escape(note), class_="note"))


def _times_smaller(size_ratio: float) -> str:
    return f" · {ratio(size_ratio)} smaller" if size_ratio >= 1.2 else ""


def _zeros(figures: Mapping[str, Any]) -> str:
    total, nonzero = figures["parameters"], figures["nonzero_parameters"]
    share = 1 - nonzero / total if total else 0.0
    return f" · {percent(share)} are zero" if share >= 0.0005 else ""


def _latency_card(latency: Any) -> str:
    if not latency:
        return _card("Latency", NOT_MEASURED, NOT_MEASURED, "not measured")
    row = latency[0]
    speedup = row["speedup"]
    note = ", ".join(filter(None, (speed_words(speedup), interval(speedup), against_medians(row))))
    setting = f"Latency, batch {row['batch_size']}, {counted(row['threads'], 'thread')}"
    before, after = (milliseconds(row[role]["p50_ms"]) for role in ("original", "optimized"))
    return _card(setting, before, after, note, worse=speed_kind(speedup) == "slower")


def _quality_card(report: Mapping[str, Any]) -> str:
    accuracy, fidelity = report["accuracy"], report["fidelity"]
    if accuracy is not None:
        better = "lower is better" if accuracy.get("lower_is_better") else "higher is better"
        source = "your metric" if accuracy["samples"] is None else counted(accuracy["samples"], "labelled sample")
        note = f"{source}, {better}"
        before, after = _metric(accuracy, "original"), _metric(accuracy, "optimized")
        return _card(f"Accuracy, {accuracy['metric']}", before, after, note, worse=bool(report.get("damage")))
    if fidelity is None:
        return _card("Fidelity", NOT_MEASURED, NOT_MEASURED, "not measured")
    samples = f"on {counted(fidelity['samples'], fidelity['data'] + ' sample')}"
    cosine = _lowest_cosine(fidelity)
    if fidelity["top1_agreement"] is not None:
        value, note = percent(fidelity["top1_agreement"]), f"same top answer, {samples}"
    else:
        value, note = NOT_MEASURED if cosine is None else f"{cosine:.4f}", f"lowest cosine of the outputs, {samples}"
    values = tag("p", tag("b", escape(value)), class_="values worse" if report.get("damage") else "values")
    return tag("article", tag("h2", "Fidelity") + values + tag("p", escape(note), class_="note"))


def _body(report: Mapping[str, Any]) -> str:
    layers = report.get("layers") or []
    stored = [row for row in layers if row["original_bytes"] or row["optimized_bytes"]]
    fidelity = report["fidelity"]
    made = [
        sections.section(
            "Latency",
            legend() + latency_picture(report["latency"]) if report["latency"] else "",
            "Both models ran in turns in one process, so that what disturbed one disturbed the other. "
            "The dot is the median, the thick line reaches to p90, the thin one to p99.",
        ),
        sections.section(
            "Hardware",
            sections.hardware(report.get("target")),
            "From synthesis, placement and routing, and a simulation of every gate.",
        ),
        sections.section("Size by layer", legend() + layer_picture(stored) if stored else ""),
        sections.section(
            "Time by layer",
            sections.layer_times(layers),
            "From onnxruntime's profiler, which slows small layers down: their sum is more than the model takes. "
            "What was merged into another kernel has no time of its own.",
        ),
        sections.section("What each step did", sections.steps(report)),
        sections.section("Candidates", sections.candidates(report["candidates"])),
        sections.section(
            "Outputs against the original",
            sections.outputs(fidelity),
            f"Compared on {counted(fidelity['samples'], fidelity['data'] + ' sample')}." if fidelity else "",
        ),
        sections.section("Graph", sections.operators(report) + sections.files(report)),
        sections.section("Environment", sections.environment(report["environment"])),
        sections.section("Recipe", sections.recipe(report["recipe"])),
    ]
    return "".join(made)
