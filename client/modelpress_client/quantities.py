"""Sizes, times and shares as people write them on a command line: `5MB`, `10ms`, `1%`."""

from __future__ import annotations

import re

_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z%]*)")
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size_bytes(text: str) -> int:
    """`5MB`, `800kB`, `1.5GiB`; a bare number is in bytes. Raises ValueError."""
    number, unit = _split(text, "5MB or 800kB")
    factor = _BYTES.get(unit.lower() or "b")
    if factor is None:
        raise ValueError(f"{text!r} has no unit of size; write B, kB, MB, GB, KiB, MiB or GiB")
    size_bytes = round(number * factor)
    if size_bytes < 1:
        raise ValueError(f"{text!r} is no size that a file can have")
    return size_bytes


def parse_duration_s(text: str) -> float:
    """`10ms`, `90s`, `10m`, `1h`, in seconds. A number without a unit is refused. Raises ValueError."""
    number, unit = _split(text, "10ms, 90s or 10m")
    if not unit:
        raise ValueError(f"{text!r} needs a unit, such as {text}ms, {text}s or {text}m")
    factor = _SECONDS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} has no unit of time; write us, ms, s, m or h")
    if number <= 0:
        raise ValueError(f"{text!r} is no time to be held")
    return number * factor


def parse_share(text: str) -> float:
    """`1%` or `0.01`. A bare `1` could mean either one percent or everything, and is refused. Raises ValueError."""
    number, unit = _split(text, "1% or 0.01")
    if unit == "%" and number > 100:
        raise ValueError(f"{text!r} is more than all of it; a share is at most 100%, such as 1% or 0.01")
    if unit == "%":
        return number / 100
    if unit:
        raise ValueError(f"{text!r} is no share; write 1% or 0.01")
    if number >= 1 and "." not in text:
        raise ValueError(f"{text!r} can be read in two ways; write {text}% for {number / 100:g}, or {text}.0")
    return number


def _split(text: str, examples: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not of the form {examples}")
    return float(match["number"]), match["unit"]
