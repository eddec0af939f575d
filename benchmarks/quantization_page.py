"""The page of the docs: what quantization brings, ours beside onnxruntime's own, from the gathered figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelpress_compression.measure.fidelity import MAX_SQNR_DB
from quantization_aims import AIMS
from quantization_contenders import BATCH_SIZES, OURS
from quantization_measuring import CONTROL, FLOAT, HOPELESS
from quantization_verdict import (
    MAX_DROP,
    MIN_COSINE,
    Duel,
    drop,
    duels,
    geometric_mean,
    label,
    regressions,
    why_not,
)

Row = Mapping[str, Any]
MIB = 1 << 20
RELATIVELY_ROUGH_DB = 3.0  # twice the error's power
KINDS = {
    "real": "trained models with a task metric",
    "packaged": "trained models without labels",
    "architecture": "architectures with random weights",
}
ENTROPY_CASE, ENTROPY_OURS, ENTROPY_THEIRS = "ppocr_rec", "static_entropy", "ort_entropy"
ENTROPY_AIM_BYTES = 1 << 30

INTRODUCTION = f"""\
# Quantization beside onnxruntime's own tools

Written by `benchmarks/quantization.py`; do not edit.

Every model goes as the same ONNX file, converted without any step, to every contender: onnxruntime's `quantize_dynamic`
(S8 weights per channel) and `quantize_static` (QDQ, U8 activations, S8 weights per channel, after its own
pre-processing, calibrated by minmax, entropy and percentile, one sample at a time, and on a half or a quarter of the
samples where memory does not suffice for all), and ours: `auto` is the preset
`default` with data, `static` the preset `static-int8`. Each works in a process of its own, bounded in time and memory.
Three in four of the representative inputs are for calibration; fidelity and latency are measured on the others, and the
task metric on an evaluation set that none of them holds.

**Latency** is time over that of the float model, one thread, all contenders of a model in one process, each once in
every round in random order: the median over rounds of the ratio, and its 95 % interval, for which nothing is assumed
about how times are distributed. What else runs on the machine slows all parts of a round; the intervals grow, and
where caches and vector units are shared, ratios of small models move by a tenth: the load average stands beside the
figures, and those taken on an idle machine count. The row "float32, second session" shows how far chance alone goes.
What takes more than {HOPELESS:g} times as long as the float model has six rounds only.

**Fidelity** is that of the first output on the held-out inputs: SQNR pooled over all elements, cosine, the share of
equal top classes (of classifiers), of equal nearest neighbours (of encoders), IoU (of masks).

**Time and memory** are those of quantizing: wall time without imports and the process's own processor time, which other
work on the machine does not lengthen; and the peak of resident memory, of which so much lay there before the work began
(our process holds torch, theirs does not). `auto` measures fidelity and latency of its candidates, and both presets
measure their result: that is in their time; "steps" is the wall time of the recipe's steps alone.

**Rules.** A model is acceptable where its metric falls by at most {MAX_DROP * 100:g} point; without a metric, where the
cosine of its outputs with those of the float model is at least {MIN_COSINE} (10 dB) and, in trained classifiers, the
float model expects by its own probabilities to lose at most {MAX_DROP * 100:g} point of accuracy. Which class an
architecture with random weights names means nothing, so the recipe of `auto` says `constraints.metric: cosine` there,
and `auto` keeps 0.99 on the samples that it has. The best of theirs is the fastest acceptable one, or the float model
where none is faster. A result of ours that is not acceptable counts with the time of the float model. Ours is behind
where the interval of our time over the best's lies above 1. A regression is a result of `auto` that is not acceptable,
or is slower than float32: its interval lies above 1 and above the second session's.
"""


def page(models: Mapping[str, Row]) -> str:
    """Markdown."""
    parts = [INTRODUCTION, "## Summary", "", *_summary(models), "", *_duel_table(models), ""]
    parts += ["## Aims", "", *_aims(models), "", *_entropy(models), ""]
    for kind, title in KINDS.items():
        chosen = {name: model for name, model in models.items() if model["kind"] == kind}
        if chosen:
            parts += [f"## {title.capitalize()}", ""]
        for name, model in chosen.items():
            parts += _section(name, model)
    return "\n".join(parts).rstrip() + "\n"


def _summary(models: Mapping[str, Row]) -> list[str]:
    found = duels(models)
    lines = [
        f"- {title}: " + ", ".join(_mean(found, models, kind, size) for size in BATCH_SIZES) + "."
        for kind, title in KINDS.items()
        if any(model["kind"] == kind for model in models.values())
    ]
    behind = [one for one in found if one.behind]
    rough = sum(_is_rougher(one, models) for one in behind)
    listed = "; ".join(_named(one, models) for one in behind)
    worse = regressions(models)
    lines += [
        f"- Behind the best of theirs: {len(behind)} of {len(found)}{': ' if behind else ''}{listed}."
        + (f" In {rough} of them theirs errs at least twice as much (3 dB)." if behind else ""),
        f"- Regressions: {len(worse)} of {len(models)} models{': ' if worse else ''}{'; '.join(worse)}.",
    ]
    return lines


def _named(one: Duel, models: Mapping[str, Row]) -> str:
    contenders = models[one.model]["contenders"]
    theirs, ours = (_decibels(contenders[name]["fidelity"]) for name in (one.best, OURS))
    return (
        f"{one.model} at batch {one.batch_size} ({one.ratio['median']:.2f} times the time of {label(one.best)}; "
        f"ours {ours} dB, theirs {theirs} dB)"
    )


def _is_rougher(one: Duel, models: Mapping[str, Row]) -> bool:
    """Whether theirs has at least twice the error of ours."""
    contenders = models[one.model]["contenders"]
    theirs, ours = (contenders[name]["fidelity"].get("sqnr_db") for name in (one.best, OURS))
    return theirs is not None and ours is not None and bool(theirs <= ours - RELATIVELY_ROUGH_DB)


def _mean(found: Sequence[Duel], models: Mapping[str, Row], kind: str, batch_size: int) -> str:
    mine = [one for one in found if one.batch_size == batch_size and models[one.model]["kind"] == kind]
    if not mine:
        return f"batch {batch_size}: not measured"
    over_best = geometric_mean(one.ratio["median"] for one in mine)
    theirs = geometric_mean(one.best_ratio for one in mine)
    ours = geometric_mean(one.our_ratio for one in mine)
    return (
        f"batch {batch_size}, geometric mean of {len(mine)} models: ours takes {over_best:.3f} of the time of the best "
        f"of theirs (over float32: ours {ours:.3f}, theirs {theirs:.3f})"
    )


def _duel_table(models: Mapping[str, Row]) -> list[str]:
    rows = [["model", "batch", "best of theirs", "its time", "our time", "ours over the best's [95 %]",
             "size: best's, ours", "metric: float32, best's, ours", "SQNR dB: best's, ours", ""]]  # fmt: skip
    for one in duels(models):
        contenders = models[one.model]["contenders"]
        best, ours = contenders[one.best], contenders[OURS]
        metrics = [contenders[FLOAT].get("metric"), best.get("metric"), ours.get("metric")]
        rows.append([
            one.model,
            f"{one.batch_size}",
            label(one.best),
            f"{one.best_ratio:.2f}",
            f"{one.our_ratio:.2f}",
            _interval(one.ratio),
            f"{best['size_ratio']:.3f}, {ours['size_ratio']:.3f}",
            "" if metrics[0] is None else ", ".join(_number(metric, ".3f") for metric in metrics),
            f"{_decibels(best['fidelity'])}, {_decibels(ours['fidelity'])}",
            _standing(one),
        ])  # fmt: skip
    return _markdown(rows)


def _standing(one: Duel) -> str:
    standing = "behind" if one.behind else "ahead" if one.ratio["high"] < 1 else "level"
    return f"{standing}; ours is not acceptable, counted as float32" if one.unacceptable else standing


def _aims(models: Mapping[str, Row]) -> list[str]:
    rows = [["model", "best of ten tools before (size, latency, fidelity)", "aim: size", "latency", "fidelity",
             "ours: size", "latency", "fidelity", "reached"]]  # fmt: skip
    return _markdown([*rows, *(aim.cells(models.get(aim.model)) for aim in AIMS)])


def _entropy(models: Mapping[str, Row]) -> list[str]:
    """Peak memory of entropy calibration on the OCR recognition model."""
    contenders = models.get(ENTROPY_CASE, {}).get("contenders", {})
    rows = [["entropy calibration of ppocr_rec", "peak memory", "before it began", "aim"]]
    for name, aim in ((ENTROPY_OURS, f"under {ENTROPY_AIM_BYTES // MIB} MiB"), (ENTROPY_THEIRS, "")):
        row = contenders.get(name)
        if row is not None:
            row = row.get("with_all_samples", row)
            peak = f"{row['peak_bytes'] / MIB:.0f} MiB" + ("" if row["outcome"] == "ok" else f", {row['error']}")
            before = f"{row['start_bytes'] / MIB:.0f} MiB" if "start_bytes" in row else ""
            rows.append([label(name), peak, before, aim])
    return _markdown(rows)


HEADINGS = ("contender", "size", "time, batch 1 [95 %]", "time, batch 8 [95 %]", "SQNR dB", "cosine", "agreement",
            "metric", "quantizing", "peak memory", "acceptable")  # fmt: skip


def _section(name: str, model: Row) -> list[str]:
    contenders = model["contenders"]
    float_row = contenders[FLOAT]
    about = f"{float_row['size_bytes'] / 1e6:.2f} MB"
    if float_row.get("metric") is not None:
        about += f", {model['metric_name']} {float_row['metric']:.3f}"
    timed = [_timed(size, row) for size, row in model["latency"].items() if row]
    rows: list[Sequence[str]] = [HEADINGS, _control(model)]
    rows += [_cells(model, contender) for contender in contenders if contender != FLOAT]
    notes = []
    for contender, row in contenders.items():
        texts = [row["error"]] if row.get("error") else []
        texts += [f"chose {row['chosen']}"] if row.get("chosen") else []
        texts += row.get("notes", []) + row.get("fidelity", {}).get("notes", [])
        notes += [f"- {label(contender)}: {'; '.join(texts)}"] if texts else []
    samples = model["samples"]
    return [
        f"### {name}",
        "",
        f"{about}. {samples['calibration']} samples for calibration, {samples['held_out']} held out. "
        + ". ".join(timed)
        + f". {_machine(model['environment'])}.",
        "",
        *_markdown(rows),
        "",
        *(["Notes", "", *notes, ""] if notes else []),
    ]


def _timed(batch_size: str, row: Row) -> str:
    float_row, (before, after) = row["contenders"][FLOAT], row["load"]
    return (
        f"Batch {batch_size}: {float_row['p50_ms']:.2f} ms in float32, {float_row['rounds']} rounds, load average "
        f"{before:.1f} to {after:.1f}"
    )


def _machine(environment: Row) -> str:
    instructions = ", ".join(environment["instructions"])
    versions = ", ".join(f"{name} {environment[name]}" for name in ("onnxruntime", "onnx", "torch", "numpy"))
    return f"Measured on {environment['measured_on']}: {environment['cpu']} ({instructions}), {versions}"


def _control(model: Row) -> list[str]:
    times = [_time(model, CONTROL, size) for size in BATCH_SIZES]
    return [label(CONTROL), "1.000", *times, *[""] * (len(HEADINGS) - 4)]


def _cells(model: Row, name: str) -> list[str]:
    row = model["contenders"][name]
    fidelity = row.get("fidelity", {})
    if row["outcome"] != "ok":
        middle = [row["outcome"], *[""] * 6]
    else:
        middle = [
            f"{row['size_ratio']:.3f}",
            *(_time(model, name, size) for size in BATCH_SIZES),
            _decibels(fidelity),
            _number(fidelity["cosine"], ".4f"),
            _agreement(fidelity),
            _number(row.get("metric"), ".3f"),
        ]
    spans = [f"processor {row['cpu_s']:.1f} s"] if row.get("cpu_s") is not None else []
    spans += [f"steps {row['steps_s']:.1f} s"] if row.get("steps_s") is not None else []
    quantizing = f"{row['wall_s']:.1f} s" + (f" ({', '.join(spans)})" if spans else "")
    peak = f"{row['peak_bytes'] / MIB:.0f} MiB"
    peak += f", {row['start_bytes'] / MIB:.0f} before" if "start_bytes" in row else ""
    reason = why_not(model, name) if row["outcome"] == "ok" else ""
    verdict = "no" if row["outcome"] != "ok" else f"no: {reason}" if reason else "yes"
    fallen = drop(model, name) if row["outcome"] == "ok" else None
    if fallen is not None and middle[-1]:
        middle[-1] += f" ({round(-fallen, 3) + 0.0:+.3f})"
    return [label(name), *middle, quantizing, peak, verdict]


def _agreement(fidelity: Row) -> str:
    names = {"top1_agreement": "", "neighbours": "neighbours ", "iou": "IoU "}
    return ", ".join(f"{text}{fidelity[key]:.3f}" for key, text in names.items() if fidelity.get(key) is not None)


def _time(model: Row, name: str, batch_size: int) -> str:
    timed = (model["latency"].get(str(batch_size)) or {}).get("contenders", {}).get(name, {})
    return _interval(timed["ratio"]) if "ratio" in timed else "does not run" if "error" in timed else ""


def _interval(ratio: Row) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _decibels(fidelity: Row) -> str:
    value = fidelity["sqnr_db"]
    return "equal" if value is not None and value >= MAX_SQNR_DB else _number(value, ".1f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["|" + "|".join(cell.replace("|", "\\|") for cell in row) + "|" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
