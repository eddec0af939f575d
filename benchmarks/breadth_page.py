"""The page of `breadth`: docs/breadth.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
GOOD = ("equal", "close")
WRONG = ("error", "wrong", "stopped")
_LONGEST_REASON = 240
_INTRODUCTION = """# Breadth

Written by `python benchmarks/breadth.py --docs`; do not edit.

A cell is a model in small (published architectures with random weights, few layers and few channels) in a form that a
producer writes. It is loaded, and held against what the file gives in torch or onnxruntime, at the extents that it was
written with and, where dimensions are dynamic, at others. Then it goes through four recipes: the default goal (without
distillation), static quantization, channel pruning of 30 %, and weights of 4 bits; names, types,
dynamic dimensions and metadata of each result are compared with the upload's."""


def document(rows: Sequence[Row], everything: Sequence[tuple[str, str]], recipes: Sequence[str]) -> str:
    """The page on the rows that were run, of all models and producers."""
    run = {row["model"] for row in rows}
    missing = ", ".join(dict.fromkeys(name for name, _ in everything if name not in run)) or "none"
    written = [row for row in rows if row["load"]["outcome"] != "not written"]
    loaded = [row for row in written if row["load"]["outcome"] == "equal"]
    treated = [row[recipe] for row in loaded for recipe in recipes if recipe in row]
    good = sum(one["outcome"] in GOOD for one in treated)
    lines = [
        _INTRODUCTION,
        "",
        f"- Models: {len(run)}. Cells run: {len(rows)} of {len(everything)}; "
        f"{len(rows) - len(written)} of them are files that the producer does not write.",
        f"- Loaded, and equal: {len(loaded)} of {len(written)} ({len(loaded) / max(1, len(written)):.1%}).",
        f"- Results equal or close, with names, types, dynamic dimensions and metadata kept: {good} of {len(treated)}"
        f" ({good / max(1, len(treated)):.1%}).",
        f"- Models of which no cell has run yet: {missing}.",
        "",
        "A recipe's column: size over the loaded model's, and the least cosine of an output with the loaded model's, "
        "at other extents than the calibrated ones where the model has dynamic dimensions. Pruning is not fitted anew "
        "here, so that its answers move; it must run, and keep the interface. Where outputs are a selection (of "
        "boxes), both models select what the loaded one selects, and the scores of all candidates are compared beside "
        "them: of untrained scores, which are nearly equal, a thousandth of noise in the image makes others the best. "
        "What is still further away, static and int4, is held against the model with its weights disturbed as much at "
        "random. A row without figures was loaded alone.",
        "",
        *_table(["model", "producer", "load", *recipes], [cells(row, recipes) for row in rows]),
        "",
        "## What fails",
        "",
        *_failures(written, ("load", *recipes)),
        "",
        "## What producers do not write",
        "",
        *_counted([row for row in rows if row not in written], ("load",)),
        "",
    ]
    return "\n".join(lines)


def cells(row: Row, recipes: Sequence[str]) -> list[str]:
    """The row's texts, a column each."""
    texts = [_figures(row[recipe]) if recipe in row else "" for recipe in recipes]
    return [row["model"], row["producer"], _emphasized(row["load"]["outcome"]), *texts]


def _figures(one: Row) -> str:
    figures = f"{one['ratio']:.2f}, {one['cosine']:.3f}" if "ratio" in one else ""
    return figures if one["outcome"] in GOOD else f"{_emphasized(one['outcome'])} {figures}".strip()


def _emphasized(outcome: str) -> str:
    return f"**{outcome}**" if outcome in (*WRONG, "refused") else outcome


def _failures(rows: Sequence[Row], parts: Sequence[str]) -> list[str]:
    failed = [row for row in rows if any(row.get(part, {"outcome": "equal"})["outcome"] not in GOOD for part in parts)]
    return _counted(failed, parts)


def _counted(rows: Sequence[Row], parts: Sequence[str]) -> list[str]:
    """Reasons with how many cells they concern, and the first of them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for part in parts:
            one = row.get(part, {"outcome": "equal"})
            if one["outcome"] not in GOOD:
                reason = " ".join(one["why"].split())[:_LONGEST_REASON]
                found.setdefault(f"{part}: {one['outcome']}: {reason}", []).append(f"{row['model']}, {row['producer']}")
    counts = Counter({reason: len(names) for reason, names in found.items()})
    rows_of_table = [[str(count), found[reason][0], reason] for reason, count in counts.most_common()]
    return _table(["cells", "as in", "what"], rows_of_table) if rows_of_table else ["Nothing."]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
