"""A report for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from modelpress_client.cli import units
from modelpress_client.cli.report_rows import changes_text, fidelity_lines, main_rows, skipped_lines, untaken_lines
from modelpress_client.cli.tables import WIDE, plain_table
from modelpress_client.report import Report

_GOOD = {True: "green", False: "red", None: "dim"}


def print_report(console: Console, report: Report) -> None:
    """Prints the figures, what each step did and did not do, and the warnings."""
    if report.verdict:
        style = "bold red" if report.damage or not report.constraints.met else "bold"
        console.print(Text(f"\n{report.verdict}", style=style))
    if report.damage and report.constraints.met:
        console.print(Text(f"The result no longer resembles the original: {report.damage}.", style="bold red"))
    _figures(console, report)
    _section(console, "Outputs", fidelity_lines(report), style="red" if report.damage else "")
    _steps(console, report)
    _section(console, "No step was taken", untaken_lines(report), style="")
    if report.warnings:
        console.print(Text("\nWarnings", style="bold yellow"))
        for warning in report.warnings:
            console.print(Padding(Text(warning), (0, 0, 0, 2)))
    if not report.constraints.met:
        console.print(Text("\nConstraints not met", style="bold red"))
        for violation in report.constraints.violations:
            console.print(Padding(Text(violation), (0, 0, 0, 2)))
    console.print()


def print_layers(console: Console, report: Report) -> None:
    """Prints each layer's time before and after, the kernel that ran, and why it is not faster; the longest first."""
    rows = [row for row in report.layers if row.get("original_ms") is not None or row.get("optimized_ms") is not None]
    if not rows:
        console.print("The layers of this job were not timed: the model was too large, or there was no time left.")
        return
    rows.sort(key=lambda row: -max(row.get("original_ms") or 0.0, row.get("optimized_ms") or 0.0))
    table = plain_table("Layer", "Original", "Optimized", "Error", "Kernel, and why it is not faster", right=(1, 2, 3))
    for row in rows:
        share = row.get("error_share")
        kernel = f"{row['kernel']} ({row.get('types')})\n" if row.get("kernel") else ""
        table.add_row(
            Text(str(row.get("name"))),
            units.milliseconds(row.get("original_ms")),
            units.milliseconds(row.get("optimized_ms")),
            "" if share is None else f"{share:.1%}",
            Text(kernel).append(str(row.get("why") or ""), style="dim"),
        )
    console.print(table)


def _figures(console: Console, report: Report) -> None:
    console.print()
    space = " " if console.width >= WIDE else "\n"
    before, after = f"Original{space}({report.original.format})", f"Optimized{space}(onnx)"
    table = plain_table("", before, after, "Change", right=(1, 2), wrap=(0, 3))
    for row in main_rows(report):
        table.add_row(
            Text(row.name, style="bold"), row.original, row.optimized, Text(row.change, style=_GOOD[row.good])
        )
    console.print(table)


def _section(console: Console, title: str, lines: list[str], style: str) -> None:
    if lines:
        console.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            console.print(Padding(Text(line, style=style), (0, 0, 0, 2)))


def _steps(console: Console, report: Report) -> None:
    if not report.steps:
        return
    console.print()
    table = plain_table("Step", "What it did", "Size", "Time", right=(2, 3), wrap=(1,))
    for step in report.steps:
        did = Text(changes_text(step))
        for note in step.notes:
            did.append(f"\n{note}")
        for line in skipped_lines(step):
            did.append(f"\nnot: {line}", style="dim")
        table.add_row(Text(step.name), did, units.size(step.size_bytes), units.seconds(step.duration_s))
    console.print(table)
