"""Figures and times for people; `–` stands for what was not measured."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

NOT_MEASURED = "–"


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


def number(value: float | None, digits: int = 4) -> str:
    """0.9781."""
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def percent(fraction: float) -> str:
    """25 %, rounded down, so that 100 % is the end."""
    return f"{int(max(0.0, min(1.0, fraction)) * 100)} %"


def duration(seconds: float | None) -> str:
    """12.3 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{max(seconds, 0)} s" if isinstance(seconds, int) else f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(time: Timestamp) -> str:
    """2026-11-01 12:30:05, in UTC; empty where it is not set."""
    return time.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S") if time.ToNanoseconds() else ""


def between(start: Timestamp, end: Timestamp) -> float | None:
    """Seconds from one to the other; to now where `end` is not set; None where `start` is not."""
    if not start.ToNanoseconds():
        return None
    until = end.ToDatetime(UTC) if end.ToNanoseconds() else datetime.now(UTC)
    return (until - start.ToDatetime(UTC)).total_seconds()


def measured(message: Any, field: str) -> float | None:
    """An optional figure of a message; None where it was not measured."""
    return float(getattr(message, field)) if message.HasField(field) else None
