"""The pictures of the report: inline SVG in percent of the width, so that they fit a phone and a printed page alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelpress_compression.report.formats import (
    NOT_MEASURED,
    against_medians,
    change,
    escape,
    interval,
    milliseconds,
    size,
    speed_kind,
    speed_words,
    tag,
)

_OPEN_LAYERS = 12
_ROLES = ("original", "optimized")
# Less than 100, so that the last mark is not cut off.
_SCALE_PERCENT = 98.0
_FAMILY_HEIGHT = 240
_LAST_TICK = 0.93  # of the scale: the text of a later tick ends at it
_WHOLE = re.compile(r"\.0+(?!\d)")


def latency_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each row both models: a dot at p50, a thick line to p90, a thin one to p99; each row has its own scale."""
    several = len({row["execution_provider"] for row in rows}) > 1
    return tag("div", "".join(_latency_row(row, named=several) for row in rows), class_="latency")


def legend() -> str:
    """Which colour is which model."""
    return tag("p", "".join(tag("span", role, class_=f"key {role}") for role in _ROLES), class_="legend")


def layer_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of each layer before and after, on one scale; the smaller ones are folded."""
    largest = max((value for row in rows for value in _sizes(row) if value), default=1)
    drawn = [_layer_row(row, largest) for row in rows]
    axis = tag("div", tag("span", "") + _axis(largest, size) + tag("span", ""), class_="layer")
    first = tag("div", "".join(drawn[:_OPEN_LAYERS]) + axis, class_="layers")
    rest = tag("div", "".join(drawn[_OPEN_LAYERS:]), class_="layers")
    more = f"{len(drawn) - _OPEN_LAYERS} more rows"
    return first + (tag("details", tag("summary", more) + rest) if len(drawn) > _OPEN_LAYERS else "")


def family_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Candidates by time and size, both against the original and from zero: lower left is better.

    Empty for fewer than two that were timed. A mark leads to its row, and shows its figures while it is pointed at.
    """
    timed = [row for row in rows if row.get("speedup") and row.get("size_bytes")]
    if len(timed) < 2:
        return ""
    slowest = max(1.0, *(1 / row["speedup"]["median"] for row in timed))
    largest = max(row["size_bytes"] for row in timed)
    # What was chosen is drawn last, over the others.
    timed.sort(key=lambda row: (bool(row.get("chosen")), bool(row.get("pareto"))))
    marks = "".join(_family_mark(row, slowest, largest) for row in timed)
    rails = "".join(
        f'<line x1="0" x2="100%" y1="{y}" y2="{y}" class="axis"/>'
        f'<text x="0" y="{y - 3}" class="rail">{size(value)}</text>'
        for value, y in ((largest, _family_y(1.0)), (largest / 2, _family_y(0.5)), (0, _family_y(0.0)))
    )
    picture = f'<svg width="100%" height="{_FAMILY_HEIGHT + 12}">{rails}{marks}</svg>'
    axis = _axis(slowest, lambda share: f"{share:.2f}")
    words = tag("p", "Size upwards, time as a share of the original's to the right.", class_="quiet")
    return tag("div", picture + axis + words, class_="family")


def _family_y(share: float) -> float:
    return 12 + (_FAMILY_HEIGHT - 12) * (1 - share)


def _family_mark(row: Mapping[str, Any], slowest: float, largest: float) -> str:
    time = 1 / row["speedup"]["median"]
    x, y = _SCALE_PERCENT * time / slowest, _family_y(row["size_bytes"] / largest)
    kind = "chosen" if row.get("chosen") else "front" if row.get("pareto") else "beaten"
    right = x > 50
    place = f'x="{x:.2f}%" dx="{-11 if right else 11}" y="{y + 4:.1f}" text-anchor="{"end" if right else "start"}"'
    label, name = escape(row.get("id", "")), escape(row.get("name", ""))
    figures = f"{name}: {size(row['size_bytes'])}, {escape(speed_words(row['speedup']))}"
    return (
        f'<a href="#{label}" class="{kind}"><title>{figures}</title>'
        f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="6"/><text {place} class="id">{label}</text>'
        f'<text {place} class="more">{label} {figures}</text></a>'
    )


def size_bar(share: float) -> str:
    """The share of the original that is left, as a bar; a share over 1 fills the bar."""
    width = max(1.0, min(100.0, share * 100))
    track = '<rect width="100%" height="6" rx="3" class="track"/>'
    bar = f'<rect width="{width:.2f}%" height="6" rx="3" class="bar"/>'
    return f'<svg class="gauge" width="100%" height="6" aria-hidden="true">{track}{bar}</svg>'


def _latency_row(row: Mapping[str, Any], *, named: bool) -> str:
    """`named`: with the runtime in the title."""
    threads, batch = row["threads"], row["batch_size"]
    runtime = f"{row['execution_provider'].removesuffix('ExecutionProvider')}, " if named else ""
    title = f"{runtime}{threads} thread{'s' if threads != 1 else ''}, batch {batch}"
    speedup = row["speedup"]
    words = tag("b", escape(speed_words(speedup)), class_=f"verdict {speed_kind(speedup)}")
    head = tag("strong", escape(title)) + tag("span", f"{words} {tag('small', escape(interval(speedup)))}")
    slowest = max(row[role]["p99_ms"] for role in _ROLES) or 1.0
    lines = "".join(_range(role, row[role], slowest) for role in _ROLES) + _axis(slowest, milliseconds)
    said = (against_medians(row), f"{row['rounds']} interleaved rounds", row["execution_provider"])
    foot = tag("small", escape(", ".join(filter(None, said))), class_="quiet")
    return tag("section", tag("header", head) + lines + foot)


def _axis(largest: float, written: Callable[[float], str]) -> str:
    """Ticks with their numbers under a picture in which `largest` lies at `_SCALE_PERCENT`."""
    marks = "".join(_tick(tick / largest, _WHOLE.sub("", written(tick)) if tick else "0") for tick in _ticks(largest))
    return f'<svg class="scale" width="100%" height="18" aria-hidden="true">{marks}</svg>'


def _tick(share: float, text: str) -> str:
    place = f"{_SCALE_PERCENT * share:.2f}%"
    anchor = "start" if share == 0 else "end" if share > _LAST_TICK else "middle"
    line = f'<line x1="{place}" x2="{place}" y1="0" y2="4" class="tick"/>'
    return f'{line}<text x="{place}" y="15" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(largest: float) -> list[float]:
    """0 and two to four round numbers up to `largest`."""
    power = math.floor(math.log10(largest)) - 1
    step = next(
        factor * 10.0**exponent
        for exponent in (power, power + 1)
        for factor in (1, 2, 5)
        if largest / (factor * 10.0**exponent) < 5
    )
    return [index * step for index in range(int(largest / step) + 1)]


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
        _bar(index, role, value / largest)
        for index, (role, value) in enumerate(zip(_ROLES, (before, after), strict=True))
        if value
    )
    picture = f'<svg width="100%" height="14" aria-hidden="true">{bars}</svg>'
    text = f"{size(before)} → <b>{size(after)}</b>" if before is not None else f"{NOT_MEASURED} → <b>{size(after)}</b>"
    share = change(before, after)
    figures = tag("span", text + (f" <small>{escape(share)}</small>" if share else ""), class_="figures")
    return tag("div", label + picture + figures, class_="layer")


def _bar(index: int, role: str, share: float) -> str:
    width = max(_SCALE_PERCENT * share, 0.3)
    return f'<rect y="{index * 8}" width="{width:.2f}%" height="6" rx="1.5" class="{role}"/>'
