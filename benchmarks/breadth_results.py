"""The rows of `breadth`: of a run, a line of JSON each, and of docs/breadth.json, which is kept small."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str], dict[str, Any]]
_FIGURES = ("ratio", "cosine")
_DIGITS = 4


def read(cache: Path) -> Rows:
    """The rows of the file by model and producer; of two for one cell the later counts."""
    lines = cache.read_text("utf-8").splitlines() if cache.exists() else []
    return {(row["model"], row["producer"]): row for row in map(json.loads, lines)}


def packed(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line for each row: model, producer, and part -> [outcome, ratio, cosine, why], as much of it as there is."""
    lines = []
    for row in rows:
        parts = {name: _short(part) for name, part in row.items() if isinstance(part, Mapping)}
        lines.append(json.dumps([row["model"], row["producer"], parts]))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def unpacked(text: str) -> Rows:
    """What was packed, with its figures as far as they were kept."""
    return {
        (model, producer): {"model": model, "producer": producer, **{name: _long(part) for name, part in parts.items()}}
        for model, producer, parts in json.loads(text)
    }


def _short(part: Mapping[str, Any]) -> list[Any]:
    figures = [round(part[name], _DIGITS) for name in _FIGURES if name in part]
    return [part["outcome"], *figures, *([part["why"]] if "why" in part else [])]


def _long(part: list[Any]) -> dict[str, Any]:
    outcome, *rest = part
    why = {"why": rest.pop()} if rest and isinstance(rest[-1], str) else {}
    return {"outcome": outcome, **dict(zip(_FIGURES, rest, strict=bool(rest))), **why}
