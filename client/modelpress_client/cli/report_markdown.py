"""A report as Markdown, for issues and pull requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelpress_protos.printable import printable

from modelpress_client.cli import units
from modelpress_client.cli.report_rows import changes_text, fidelity_lines, main_rows, skipped_lines, untaken_lines
from modelpress_client.report import Report


def to_markdown(report: Report) -> str:
    """The whole report; tables in GitHub's dialect."""
    blocks = [
        "# Compression report",
        report.verdict,
        f"**The result no longer resembles the original: {_escape(report.damage)}.**" if report.damage else "",
        _table(
            ["", f"Original ({report.original.format})", "Optimized (onnx)", "Change"],
            ([row.name, row.original, row.optimized, row.change] for row in main_rows(report)),
            align=["---", "---:", "---:", "---"],
        ),
        _list("Outputs", fidelity_lines(report)),
        _steps(report),
        _list("No step was taken", untaken_lines(report)),
        _list("Warnings", report.warnings),
        _list("Constraints not met", report.constraints.violations),
        _items("What would help", [f"{_escape(item.text)} {_code(item.command)}" for item in report.advice]),
        _environment(report),
    ]
    return "\n\n".join(block for block in blocks if block)


def _steps(report: Report) -> str:
    if not report.steps:
        return ""
    rows: list[list[str | list[str]]] = []
    for step in report.steps:
        did = [changes_text(step), *step.notes, *(f"not: {line}" for line in skipped_lines(step))]
        rows.append([step.name, did, units.size(step.size_bytes), units.seconds(step.duration_s)])
    return "## Steps\n\n" + _table(["Step", "What it did", "Size", "Time"], rows, align=["---", "---", "---:", "---:"])


def _environment(report: Report) -> str:
    shown = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in report.environment.items()
    }
    values = ", ".join(f"{name} {value}" for name, value in shown.items() if value)
    return f"Job `{report.job}`" + (f"; measured with {_escape(values)}." if values else ".")


def _list(title: str, lines: Iterable[str]) -> str:
    return _items(title, map(_escape, lines))


def _items(title: str, escaped: Iterable[str]) -> str:
    items = [f"- {line}" for line in escaped]
    return "\n".join([f"## {title}", "", *items]) if items else ""


def _table(header: list[str], rows: Iterable[Sequence[str | list[str]]], *, align: list[str]) -> str:
    lines: list[Sequence[str | list[str]]] = [header, align, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: str | list[str]) -> str:
    return _escape(value) if isinstance(value, str) else "<br>".join(map(_escape, value))


def _code(text: str) -> str:
    """In a span of code nothing is escaped, and a backtick would end it."""
    return f"`{printable(text).replace('`', '')}`"


def _escape(text: str) -> str:
    """Names of nodes come from the model: nothing in them may become markup."""
    text = printable(text, keep="\n")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
