"""The candidates of a goal for the terminal: a table, a plot of size against time, two side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from modelpress_client.cli import units
from modelpress_client.cli.tables import plain_table

Row = Mapping[str, Any]
_HEIGHT = 12
_MAX_WIDTH = 72
_MARGIN = 10  # columns for the numbers beside the plot


def print_family(console: Console, rows: Sequence[Row]) -> None:
    """All candidates; above them the plot of those that were timed."""
    if not rows:
        console.print("The recipe ran its steps as they stand: there were no candidates.")
        return
    plotted = [row for row in rows if row.get("speedup") and row.get("size_bytes")]
    if len(plotted) > 1:
        console.print(_plot(plotted, min(_MAX_WIDTH, console.width - _MARGIN)))
    table = plain_table("", "Candidate", "Size", "Speed", "Cosine", "Drop", right=(2, 3, 4, 5), wrap=(1,))
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    if any(row.get("downloadable") for row in rows):
        console.print(Text("* can be downloaded: download JOB --candidate ID", style="dim"))


def print_comparison(console: Console, first: Row, second: Row) -> None:
    """Both with all their figures."""
    table = plain_table("", _id(first), _id(second), wrap=(1, 2))
    for name, write in _FIGURES.items():
        if name == "Speed":  # stands with its interval
            continue
        table.add_row(Text(name, style="bold"), Text(write(first)), Text(write(second)))
    console.print(table)


def _cells(row: Row) -> tuple[Text, ...]:
    name = Text(str(row.get("name", "")))
    if row.get("chosen"):
        name.append(" (chosen)", style="bold green")
    elif row.get("pareto"):
        name.append(" (front)", style="cyan")
    if row.get("reason"):
        name.append(f"\n{row['reason']}", style="dim")
    return (Text(_id(row)), name, *(Text(_FIGURES[figure](row)) for figure in ("Size", "Speed", "Cosine", "Drop")))


def _id(row: Row) -> str:
    return f"{row.get('id', '')}{'*' if row.get('downloadable') else ''}"


def _speed(row: Row) -> str:
    speedup = row.get("speedup")
    return f"{speedup['median']:.2f}x" if speedup else units.NOT_MEASURED


def _speed_interval(row: Row) -> str:
    speedup = row.get("speedup")
    return f"{_speed(row)} [{speedup['low']:.2f}, {speedup['high']:.2f}]" if speedup else units.NOT_MEASURED


def _drop(row: Row) -> str:
    drop, expected = row.get("drop"), row.get("expected_drop")
    return units.number(drop) if drop is not None else f"~{expected:.2g}" if expected is not None else ""


_FIGURES: dict[str, Callable[[Row], str]] = {
    "Candidate": lambda row: str(row.get("name", "")),
    "Size": lambda row: units.size(row.get("size_bytes")),
    "Speed": _speed,
    "Speed, with its interval": _speed_interval,
    "Cosine": lambda row: units.number(row.get("cosine"), 5),
    "Agreement": lambda row: units.number(row.get("agreement")),
    "Drop": _drop,
    "Why not": lambda row: "chosen" if row.get("chosen") else str(row.get("reason") or ""),
}


def _plot(rows: Sequence[Row], width: int) -> Text:
    """Size upwards, time to the right, both from zero, so that lower left is better; each mark is an id's number."""
    times = [1 / row["speedup"]["median"] for row in rows]
    largest = max(row["size_bytes"] for row in rows)
    slowest = max(*times, 1.0)
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    # What matters more is drawn later, over the rest.
    for row, time in sorted(zip(rows, times, strict=True), key=lambda pair: (_weight(pair[0]), pair[0]["size_bytes"])):
        label = _id(row).rstrip("*").removeprefix("c")
        column = min(round(time / slowest * (width - len(label))), width - len(label))
        line = round((1 - row["size_bytes"] / largest) * (_HEIGHT - 1))
        style = "bold green" if row.get("chosen") else "cyan" if row.get("pareto") else "dim"
        for offset, character in enumerate(label):
            cells[line, column + offset] = (character, style)
    drawn = Text()
    for line in range(_HEIGHT):
        said = units.size(largest) if line == 0 else "0" if line == _HEIGHT - 1 else ""
        drawn.append(f"{said:>8} │", style="dim")
        for column in range(width):
            character, style = cells.get((line, column), (" ", ""))
            drawn.append(character, style=style)
        drawn.append("\n")
    end = f"{slowest:.2f} of the original's time"
    drawn.append(f"{'':>8} └{'─' * width}\n{'':>9} 0{end:>{width - 1}}\n", style="dim")
    return drawn


def _weight(row: Row) -> int:
    return 2 if row.get("chosen") else 1 if row.get("pareto") else 0
