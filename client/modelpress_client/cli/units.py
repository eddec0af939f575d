"""Figures for people; `-` stands for what was not measured."""

from __future__ import annotations

NOT_MEASURED = "–"
LAYOUT = "\n\t\u00a0"  # what is not printable and stays: line ends, tabs, and the space before a unit


def size(size_bytes: float | None) -> str:
    """27.1 kB."""
    if size_bytes is None:
        return NOT_MEASURED
    value, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def count(value: float | None) -> str:
    """24.6 k."""
    if value is None:
        return NOT_MEASURED
    if value < 10_000:
        return f"{value:,.0f}"
    scaled, unit = float(value), ""
    for unit in ("", " k", " M", " G", " T"):
        if scaled < 999.5 or unit == " T":
            break
        scaled /= 1000
    return f"{scaled:.3g}{unit}"


def counted(number: int, what: str) -> str:
    """1 sample, 1,200 samples."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def milliseconds(value: float | None) -> str:
    """0.213 ms."""
    return NOT_MEASURED if value is None else f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def number(value: float | None, digits: int = 4) -> str:
    """0.9781."""
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    """12.3 s, or 3 min 20 s."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def percent(value: float) -> str:
    """25 %, rounded down so that 100 % means the end."""
    return f"{int(max(0.0, min(1.0, value)) * 100)} %"
