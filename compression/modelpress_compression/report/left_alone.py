"""What a step left alone, folded: one row for each reason, however many nodes it holds for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")


def folded_reasons(skipped: Sequence[tuple[str, str]], candidates: Collection[str]) -> list[dict[str, Any]]:
    """Rows of `count`, `what` (node or candidate), `reason` and `names`, most frequent first.

    `skipped`: (name, reason). Reasons that differ in their numbers alone are one: "its 64 to 144 weights are too few".
    """
    groups: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, reason in skipped:
        what = "candidate" if name in candidates else "node"
        groups[what, _NUMBER.sub("#", reason)].append((name, reason))
    rows = [
        {
            "count": len(found),
            "what": what,
            "reason": _spanning([reason for _, reason in found]),
            "names": [name for name, _ in found],
        }
        for (what, _), found in groups.items()
    ]
    return sorted(rows, key=lambda row: -len(row["names"]))


def _spanning(reasons: Sequence[str]) -> str:
    """The reasons as one, with the span of each number in its place."""
    columns = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    spans = iter([_span(column) for column in columns])
    return _NUMBER.sub(lambda _: next(spans), reasons[0])


def _span(numbers: Sequence[str]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low} to {high}"
