"""The figures of a report as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_client.cli import units
from modelpress_client.report import LatencyRow, LeftAlone, Report, Speedup, StepReport

MAX_REASONS = 4  # per step; report.html has all
EVEN = 0.01  # a change below 1 % is none


@dataclass(frozen=True)
class Row:
    """One figure of both models. good: whether the change is for the better; None: neither."""

    name: str
    original: str
    optimized: str
    change: str
    good: bool | None = None


def main_rows(report: Report) -> list[Row]:
    """Size, parameters, MACs, latency, accuracy."""
    original, optimized = report.original, report.optimized
    rows = [
        _ratio_row("Size as ONNX", original.onnx_size_bytes, optimized.size_bytes, report.size_ratio),
        _count_row("Parameters", original.parameters, optimized.parameters),
        _count_row("Non-zero", original.nonzero_parameters, optimized.nonzero_parameters),
        _count_row("MACs", original.macs, optimized.macs),
    ]
    rows += [_latency_row(row) for row in report.latency]
    accuracy = report.accuracy
    if accuracy is not None:
        drop = accuracy.drop
        moved = None if drop is None else drop if accuracy.lower_is_better else -drop
        change = "" if moved is None else f"{moved:+.4f}" if moved else "unchanged"
        samples = f" ({units.counted(accuracy.samples, 'sample')})" if accuracy.samples is not None else ""
        rows.append(
            Row(
                f"{accuracy.metric}{samples}",
                units.number(accuracy.original),
                units.number(accuracy.optimized),
                change,
                None if drop is None or drop == 0 else drop < 0,
            )
        )
    return rows


def fidelity_lines(report: Report) -> list[str]:
    """How close the outputs are; where the data was made up, it says so."""
    fidelity = report.fidelity
    if fidelity is None:
        return []
    source = "your data" if fidelity.data == "provided" else "synthetic inputs (pass --data for real ones)"
    samples = "samples" if fidelity.samples is None else units.counted(fidelity.samples, "sample")
    lines = [f"measured on {samples} of {source}"]
    if fidelity.top1_agreement is not None:
        lines.append(f"same class as the original on {fidelity.top1_agreement:.2%} of them")
    for name, output in fidelity.outputs.items():
        figures = [
            f"cosine {units.number(output.cosine, 6)}" if output.cosine is not None else "",
            f"SQNR {output.sqnr_db:.1f} dB" if output.sqnr_db is not None else "",
            f"largest error {units.number(output.max_abs_error, 3)}" if output.max_abs_error is not None else "",
        ]
        # Of equal outputs the ratio to the noise has no end; the number that stands for it means nothing.
        same = output.max_abs_error == 0
        lines.append(f"{name}: {'identical' if same else ', '.join(filter(None, figures)) or 'not measured'}")
    return lines


def changes_text(step: StepReport) -> str:
    """`conv_batchnorm 20, constants 5`; the largest first."""
    done = sorted(
        ((count, name) for name, count in step.changes.items() if count), key=lambda item: (-item[0], item[1])
    )
    # Shares and errors come as fractions; everything else is counted.
    shown = (
        f"{name.replace('_', ' ')} {units.count(value) if value == int(value) else units.number(value, 3)}"
        for value, name in done
    )
    return ", ".join(shown) or "nothing to do"


def skipped_lines(step: StepReport) -> list[str]:
    """`12 nodes: weight is not constant`; the most frequent reasons first. Names stand in report.html and in JSON."""
    shown = [str(row) for row in step.left_alone[:MAX_REASONS]]
    rest = len(step.left_alone) - MAX_REASONS
    return [*shown, f"{units.counted(rest, 'other reason')}: see the report"] if rest > 0 else shown


def untaken_lines(report: Report) -> list[str]:
    """Of a result that no step made: why none of the candidates was taken; the most frequent reasons first."""
    names: dict[str, list[str]] = {}
    for row in report.candidates if not report.steps else ():
        names.setdefault(str(row.get("reason") or ""), []).append(str(row.get("name")))
    rows = [LeftAlone(len(named), "candidate", reason, tuple(named)) for reason, named in names.items() if reason]
    return [str(row) for row in sorted(rows, key=lambda row: -row.count)]


def _ratio_row(name: str, before: int | None, after: int | None, ratio: float | None) -> Row:
    if ratio is None:
        return Row(name, units.size(before), units.size(after), "")
    change = (
        "unchanged" if abs(ratio - 1) < EVEN else f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"
    )
    return Row(name, units.size(before), units.size(after), change, None if change == "unchanged" else ratio > 1)


def _count_row(name: str, before: int | None, after: int | None) -> Row:
    change, good = "", None
    if before and after is not None and before != after:
        change, good = f"{(after - before) / before:+.1%}", after < before
    return Row(name, units.count(before), units.count(after), change, good)


def _latency_row(row: LatencyRow) -> Row:
    provider = row.execution_provider.removesuffix("ExecutionProvider")
    threads = "" if row.threads is None else f", {units.counted(row.threads, 'thread')}"
    batch = "" if row.batch_size is None else f", batch {row.batch_size}"
    speedup = row.speedup
    change, good = ("", None) if speedup.median is None else _speed(speedup.median, speedup, row)
    return Row(
        f"p50 {provider}{threads}{batch}",
        units.milliseconds(row.original.p50_ms),
        units.milliseconds(row.optimized.p50_ms),
        change,
        good,
    )


def _speed(median: float, speedup: Speedup, row: LatencyRow) -> tuple[str, bool | None]:
    """Words with the interval, and whether it is for the better. An interval with 1 in it shows no difference."""
    faster = median >= 1
    words = f"{median if faster else 1 / median:.2f}x {'faster' if faster else 'slower'}"
    if speedup.low is None or speedup.high is None:
        return words, faster
    interval = f" [{speedup.low:.2f}, {speedup.high:.2f}]"
    if speedup.low <= 1 <= speedup.high:
        return f"no clear difference{interval}", None
    before, after = row.original.p50_ms, row.optimized.p50_ms
    # Medians of all rounds may say the opposite of the median round: then the word says which of the two it is.
    contrary = before is not None and after is not None and (before >= after) != faster
    return f"{words}{' round by round' if contrary else ''}{interval}", faster
