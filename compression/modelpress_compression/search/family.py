"""The family of a model: its candidates, with their figures, and those that can be had as models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelpress_compression.model import Model

# All models of a family together, in sizes of the original. What is left out is still in the report.
FAMILY_SHARE = 2.5
ORIGINAL = "original"  # id of the model as it was given, as ONNX


@dataclass(frozen=True)
class FamilyMember(Mapping[str, Any]):
    """A candidate: `figures` is its row of the report, and it can be read as that row.

    `model`: the compressed model; None where it is not `downloadable`.
    """

    figures: Mapping[str, Any]
    model: Model | None = None

    @property
    def id(self) -> str:
        """Names it within its job."""
        return str(self.figures["id"])

    def __getitem__(self, name: str) -> Any:
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)


def family(
    rows: Sequence[Mapping[str, Any]], models: Sequence[Model | None], original_bytes: int
) -> tuple[FamilyMember, ...]:
    """The rows with an `id`, those that have none by their place, and with the models that are worth having.

    That is the chosen one, those that a client's metric must see, and what no other candidate beats in size, speed and
    cosine at once: of the last the smallest first, as long as all together have at most `FAMILY_SHARE` of
    `original_bytes`.
    `models`: None for a candidate that may not be given away.
    """
    offered = _offered(rows, models, original_bytes)
    return tuple(
        FamilyMember(
            {"id": f"c{place + 1}", **row, "downloadable": place in offered}, model if place in offered else None
        )
        for place, (row, model) in enumerate(zip(rows, models, strict=True))
    )


def _offered(rows: Sequence[Mapping[str, Any]], models: Sequence[Model | None], original_bytes: int) -> frozenset[int]:
    wanted = [row["chosen"] or row.get("leads_further") or row.get("id") == ORIGINAL for row in rows]
    places = [place for place, row in enumerate(rows) if models[place] is not None and (wanted[place] or row["pareto"])]
    places.sort(key=lambda place: (not wanted[place], rows[place]["size_bytes"]))
    offered, left_bytes = [], FAMILY_SHARE * original_bytes
    for place in places:
        left_bytes -= rows[place]["size_bytes"]
        if left_bytes >= 0 or wanted[place]:
            offered.append(place)
    return frozenset(offered)
