"""Numbers as people read them, and text that is safe in HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from modelpress_compression.printable import printable

NOT_MEASURED = "–"
# A number never stands on another line than its unit.
_SPACE = "\u00a0"


def escape(value: object) -> str:
    """Text, quotes included, safe as content and as an attribute; it neither turns nor hides what stands beside it."""
    return html.escape(printable(str(value), keep=f"\n{_SPACE}"), quote=True)


def size(value: float | None) -> str:
    """Bytes as '10.9 MB' (powers of 1000)."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def plain_size(value: float | None) -> str:
    """As `size`, for messages and logs, where a no-break space would be written out."""
    return size(value).replace(_SPACE, " ")


def count(value: float | None) -> str:
    """'22.6 M', '1.43 G'; below 10,000 the number itself."""
    if value is not None and abs(value) < 10_000:
        return f"{value:,.0f}"
    return _scaled(value, ("", "k", "M", "G", "T")).strip()


def milliseconds(value: float | None) -> str:
    """Three significant digits, with the unit that suits."""
    if value is None:
        return NOT_MEASURED
    if value < 1.0:
        return f"{_significant(value * 1000)}{_SPACE}µs"
    return f"{_significant(value / 1000)}{_SPACE}s" if value >= 10_000 else f"{_significant(value)}{_SPACE}ms"


def seconds(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f}{_SPACE}s" if value < 120 else f"{value / 60:.1f}{_SPACE}min"


def duration(value_s: float) -> str:
    """About so long: '40 s', '4 min', '2.5 h'."""
    if value_s < 60:
        return f"{max(1, round(value_s))} s"
    return f"{round(value_s / 60)} min" if value_s < 5400 else f"{value_s / 3600:.1f} h"


def ratio(value: float | None) -> str:
    """'3.9×'."""
    return NOT_MEASURED if value is None else f"{_significant(value)}×"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as '99.7 %'. Only 1 itself is '100 %', and only 0 itself '0 %'."""
    if value is None:
        return NOT_MEASURED
    if value in (0.0, 1.0):
        return f"{value:.0%}".replace("%", f"{_SPACE}%")
    shown = round(value * 100, digits)
    edge = 10.0**-digits
    if shown >= 100 > value * 100:
        return f">{_SPACE}{100 - edge:.{digits}f}{_SPACE}%"
    if shown <= 0 < value:
        return f"<{_SPACE}{edge:.{digits}f}{_SPACE}%"
    return f"{shown:.{digits}f}{_SPACE}%"


def speed_kind(speedup: Mapping[str, float]) -> str:
    """What the interval allows to say: faster, slower or even."""
    return "faster" if speedup["low"] > 1 else "slower" if speedup["high"] < 1 else "even"


def speed_words(speedup: Mapping[str, float]) -> str:
    """'2.19× faster', '1.75× slower', 'no clear difference (0.98×)'."""
    median = speedup["median"]
    if speed_kind(speedup) == "even":
        return f"no clear difference ({ratio(median)})"
    return f"{ratio(median)} faster" if speedup["low"] > 1 else f"{ratio(1 / median)} slower"


def interval(speedup: Mapping[str, float]) -> str:
    """'95 %: 1.80 to 2.20'."""
    return f"95{_SPACE}%: {speedup['low']:.2f} to {speedup['high']:.2f}"


def against_medians(row: Mapping[str, Any]) -> str:
    """A word where a latency row's own medians seem to say the opposite of its speed-up; else empty."""
    before, after = row["original"]["p50_ms"], row["optimized"]["p50_ms"]
    kind = speed_kind(row["speedup"])
    if (kind == "slower" and after < before) or (kind == "faster" and after > before):
        return "round by round; the medians of all rounds say otherwise"
    return ""


def number(value: Any) -> str:
    """A figure of unknown kind."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def change(before: float | None, after: float | None) -> str:
    """'−74 %', '+3 %', 'unchanged'; empty where one is not known, and of 0, of which nothing is a share."""
    if before is None or after is None:
        return ""
    if after == before:
        return "unchanged"
    if before == 0:
        return ""
    difference = after / before - 1
    sign = "−" if difference < 0 else "+"
    if abs(difference) < 0.0005:
        return "≈ equal"
    digits = 1 if abs(difference) < 0.095 else 0
    return f"{sign}{abs(difference) * 100:.{digits}f}{_SPACE}%"


def words(name: str) -> str:
    """'conv_batchnorm' as 'conv batchnorm'."""
    return name.replace("_", " ")


def yaml_text(value: Any) -> str:
    """A recipe as YAML, short lists and mappings on one line."""
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    return text


def tag(name: str, content: str, **attributes: str) -> str:
    """An element; `content` is HTML already, attribute values are escaped (`class_` is class)."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in `numeric` are set to the right. Scrolls sideways where it is too wide."""

    def line(name: str, cells: Sequence[str]) -> str:
        return "".join(
            tag(name, cell, class_="number") if index in numeric else tag(name, cell)
            for index, cell in enumerate(cells)
        )

    head = tag("thead", tag("tr", line("th", [escape(header) for header in headers])))
    body = tag("tbody", "".join(tag("tr", line("td", row)) for row in rows))
    return tag("div", tag("table", head + body), class_="scroll")


def definitions(items: Mapping[str, str]) -> str:
    """A list of names and values; values are HTML already."""
    return tag("dl", "".join(tag("div", tag("dt", escape(key)) + tag("dd", value)) for key, value in items.items()))


def _scaled(value: float | None, units: Sequence[str]) -> str:
    if value is None:
        return NOT_MEASURED
    scaled, index = float(value), 0
    while abs(scaled) >= 999.5 and index + 1 < len(units):
        scaled, index = scaled / 1000, index + 1
    return f"{scaled:.0f}{_SPACE}{units[0]}" if index == 0 else f"{_significant(scaled)}{_SPACE}{units[index]}"


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
