"""The pictures of the report: inline SVG in percent of the width, so that they fit a phone and a printed page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelpress_compression.report.formats import NOT_MEASURED, change, escape, milliseconds, ratio, size, tag

_OPEN_LAYERS = 12
_ROLES = ("original", "optimized")
# Less than 100, so that the last mark is not cut off.
_SCALE_PERCENT = 98.0


def latency_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each row both models: a dot at p50, a thick line to p90, a thin one to p99; each row has its own scale."""
    return tag("div", "".join(_latency_row(row) for row in rows), class_="latency")


def legend() -> str:
    """Which colour is which model."""
    return tag("p", "".join(tag("span", role, class_=f"key {role}") for role in _ROLES), class_="legend")


def layer_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of each layer before and after, on one scale; the smaller ones are folded."""
    largest = max((value for row in rows for value in _sizes(row) if value), default=1)
    drawn = [_layer_row(row, largest) for row in rows]
    first = tag("div", "".join(drawn[:_OPEN_LAYERS]), class_="layers")
    rest = tag("div", "".join(drawn[_OPEN_LAYERS:]), class_="layers")
    more = f"{len(drawn) - _OPEN_LAYERS} more rows"
    return first + (tag("details", tag("summary", more) + rest) if len(drawn) > _OPEN_LAYERS else "")


def size_bar(share: float) -> str:
    """The share of the original that is left, as a bar; a share over 1 fills the bar."""
    width = max(1.0, min(100.0, share * 100))
    track = '<rect width="100%" height="6" rx="3" class="track"/>'
    bar = f'<rect width="{width:.2f}%" height="6" rx="3" class="bar"/>'
    return f'<svg class="gauge" width="100%" height="6" aria-hidden="true">{track}{bar}</svg>'


def _latency_row(row: Mapping[str, Any]) -> str:
    threads, batch = row["threads"], row["batch_size"]
    title = f"{threads} thread{'s' if threads != 1 else ''}, batch {batch}"
    speedup = row["speedup"]
    verdict = "faster" if speedup["low"] > 1 else "slower" if speedup["high"] < 1 else "even"
    interval = f"95 %: {speedup['low']:.2f} to {speedup['high']:.2f}"
    head = tag("strong", escape(title)) + tag(
        "span",
        tag("b", f"{ratio(speedup['median'])} speed", class_=f"verdict {verdict}")
        + f" <small>{escape(interval)}</small>",
    )
    slowest = max(row[role]["p99_ms"] for role in _ROLES) or 1.0
    lines = "".join(_range(role, row[role], slowest) for role in _ROLES)
    foot = tag("small", f"{row['rounds']} interleaved rounds, {escape(row['execution_provider'])}", class_="quiet")
    return tag("section", tag("header", head) + lines + foot)


def _range(role: str, times: Mapping[str, float], slowest: float) -> str:
    def place(key: str) -> str:
        return f"{_SCALE_PERCENT * times[key] / slowest:.2f}%"

    label = ", ".join(f"{key[:-3]} {milliseconds(times[key])}" for key in ("p50_ms", "p90_ms", "p99_ms", "mean_ms"))
    drawn = (
        f'<line x1="0" x2="100%" y1="11" y2="11" class="axis"/>'
        f'<line x1="{place("p50_ms")}" x2="{place("p99_ms")}" y1="11" y2="11" class="thin"/>'
        f'<line x1="{place("p50_ms")}" x2="{place("p90_ms")}" y1="11" y2="11" class="thick"/>'
        f'<line x1="{place("p99_ms")}" x2="{place("p99_ms")}" y1="6" y2="16" class="thin"/>'
        f'<circle cx="{place("p50_ms")}" cy="11" r="5.5" class="dot"/>'
    )
    described = f'role="img" aria-label="{role}: {label}"><title>{role}: {label}</title>'
    picture = f'<svg class="{role}" width="100%" height="22" {described}{drawn}</svg>'
    figures = (
        tag("b", milliseconds(times["p50_ms"]))
        + f" <small>p90 {milliseconds(times['p90_ms'])} · p99 {milliseconds(times['p99_ms'])}</small>"
    )
    return tag("div", picture + tag("span", figures, class_="figures"), class_="range")


def _sizes(row: Mapping[str, Any]) -> tuple[int | None, int | None]:
    return row["original_bytes"], row["optimized_bytes"]


def _layer_row(row: Mapping[str, Any], largest: int) -> str:
    before, after = _sizes(row)
    name = escape(row["name"])
    kind = f"{row['layers']} of them" if row.get("layers", 1) > 1 else escape(row["op_type"])
    label = tag("span", f"{name} <small>{kind}</small>", class_="name", title=str(row["name"]))
    bars = "".join(
        f'<rect y="{index * 8}" width="{max(100 * value / largest, 0.3):.2f}%" height="6" rx="1.5" class="{role}"/>'
        for index, (role, value) in enumerate(zip(_ROLES, (before, after), strict=True))
        if value
    )
    picture = f'<svg width="100%" height="14" aria-hidden="true">{bars}</svg>'
    text = f"{size(before)} → <b>{size(after)}</b>" if before is not None else f"{NOT_MEASURED} → <b>{size(after)}</b>"
    share = change(before, after)
    figures = tag("span", text + (f" <small>{escape(share)}</small>" if share else ""), class_="figures")
    return tag("div", label + picture + figures, class_="layer")
