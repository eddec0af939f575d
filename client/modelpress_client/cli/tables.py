"""Models, jobs and the server as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from google.protobuf.timestamp_pb2 import Timestamp
from modelpress_protos.v1.job_service_pb2 import SpeedVerdict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelpress_client.cli import units
from modelpress_client.cli.progress import describe
from modelpress_client.errors import status_details
from modelpress_client.inputs import format_input
from modelpress_client.jsonable import enum_name
from modelpress_client.names import short_name
from modelpress_client.recipes import to_yaml
from modelpress_client.resources import Model, job_event, job_state

if TYPE_CHECKING:
    from modelpress_protos.v1 import job_service_pb2 as jobs_pb
    from modelpress_protos.v1 import server_service_pb2 as server_pb
    from modelpress_protos.v1 import upload_service_pb2 as uploads_pb

_COLORS = {
    "SUCCEEDED": "green",
    "ACTIVE": "green",
    "FAILED": "red",
    "REJECTED": "red",
    "EXPIRED": "red",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
    "RUNNING": "cyan",
    "PROCESSING": "cyan",
}
_MINUTE = "%m-%d %H:%M"
_CREATED = "Created UTC"
WIDE = 100  # columns from which on lists show more than fits 80
_SEVERITIES = {1: ("note", "dim"), 2: ("warning", "yellow"), 3: ("refused", "red")}


def plain_table(*columns: str, right: Sequence[int] = (), wrap: Sequence[int] = (-1,)) -> Table:
    """A table without lines; only the columns of `wrap`, by default the last, give way when it is too wide."""
    wrapping = {index % len(columns) for index in wrap}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=index not in wrapping)
    return table


def facts(console: Console, rows: Iterable[tuple[str, str | Text]]) -> None:
    """Pairs, one a line; rows without a value are left out."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(name, value if isinstance(value, Text) else Text(value))
    console.print(table)


def print_models(console: Console, found: Sequence[Model]) -> None:
    """One line a model; the format where there is room for it."""
    wide = console.width >= WIDE
    table = plain_table("Model", "State", *(["Format"] if wide else []), "Size", _CREATED, "File", right=(2 + wide,))
    for model in found:
        form = model.format if model.format != "UNSPECIFIED" else ""
        table.add_row(
            short_name(model.name),
            _state(model.state),
            *([form] if wide else []),
            units.size(model.size_bytes),
            _time(model.message.create_time, _MINUTE),
            Text(model.display_name),
        )
    console.print(table)


def print_usage(console: Console, found: server_pb.Usage) -> None:
    """What there is, what was used, and the limits beside it."""

    def of(count: int, most: int) -> str:
        return f"{count} of {most}" if most else str(count)

    def after(ttl_s: float) -> str:
        return f"deleted after {units.seconds(ttl_s)}, unless labelled pin" if ttl_s else "kept"

    per_s = found.max_requests_per_second
    stored = units.size(found.stored_bytes)
    if found.max_stored_bytes:
        stored = f"{stored} of {units.size(found.max_stored_bytes)}"
    facts(
        console,
        [
            ("Stored", f"{stored} in {units.counted(found.blobs, 'file')}"),
            ("Findings", f"{units.size(found.findings_bytes)} of {units.size(found.max_findings_bytes)}"),
            ("Models", f"{of(found.models, found.max_models)}, {after(found.model_ttl_seconds)}"),
            ("Jobs waiting", of(found.queued_jobs, found.max_queued_jobs)),
            ("Jobs running", of(found.running_jobs, found.max_running_jobs)),
            ("Jobs ended", f"{found.ended_jobs}, {after(found.job_ttl_seconds)}"),
            ("Open uploads", of(found.open_uploads, found.max_open_uploads)),
            ("Used so far", f"{units.seconds(found.cpu_seconds)} of processors in {found.runs} runs"),
            ("Requests", f"{per_s:g} a second at most" if per_s else "no limit"),
        ],
    )


def print_uploads(console: Console, found: Sequence[uploads_pb.Upload]) -> None:
    """One line an upload."""
    table = plain_table("Upload", "Received", "Of", _CREATED, "Expires UTC", right=(1, 2))
    for upload in found:
        table.add_row(
            short_name(upload.name),
            units.size(upload.committed_size),
            units.size(upload.digest.size_bytes),
            _time(upload.create_time, _MINUTE),
            _time(upload.expire_time, _MINUTE),
        )
    console.print(table)


def print_jobs(console: Console, found: Sequence[jobs_pb.Job]) -> None:
    """One line a job; its model where there is room for it."""
    wide = console.width >= WIDE
    table = plain_table("Job", "State", *(["Model"] if wide else []), _CREATED, "Result")
    for job in found:
        table.add_row(
            short_name(job.name),
            _state(job_state(job.state)),
            *([short_name(job.spec.model)] if wide else []),
            _time(job.create_time, _MINUTE),
            Text(_result(job)),
        )
    console.print(table)


def _result(job: jobs_pb.Job) -> str:
    """`89.8 → 21.9 kB, 1.69x faster`, or what keeps it from a result."""
    if job_state(job.state) != "SUCCEEDED":
        return _remark(job)
    summary = job.summary
    sizes = _sizes(summary)
    return "; ".join(filter(None, [", ".join(filter(None, [sizes, _speed(summary)])), _remark(job)]))


def _sizes(summary: jobs_pb.ReportSummary) -> str:
    """The unit once where both have the same."""
    before, after = units.size(summary.original_size_bytes), units.size(summary.optimized_size_bytes)
    (number, _, unit), same = before.partition(" "), after.partition(" ")[2]
    return f"{number if unit == same else before} → {after}"


def _speed(summary: jobs_pb.ReportSummary) -> str:
    """A word beside every figure: a bare 0.98 says less than it seems to."""
    if not summary.HasField("speedup"):
        return ""
    verdict, speedup = enum_name(SpeedVerdict, summary.speed_verdict, "SPEED_VERDICT_"), summary.speedup
    return {
        "FASTER": f"{speedup:.2f}x faster",
        "SLOWER": f"{1 / max(speedup, 1e-9):.2f}x slower",
        "NOT_DISTINGUISHABLE": "as fast",
    }.get(verdict, f"{speedup:.2f} times the speed")


def _measured_speed(summary: jobs_pb.ReportSummary) -> str:
    """With its interval, and whether the machine was quiet."""
    text = _speed(summary)
    if summary.HasField("speedup_low") and summary.HasField("speedup_high"):
        text += f"; round by round {summary.speedup:.2f} [{summary.speedup_low:.2f}, {summary.speedup_high:.2f}]"
    if summary.HasField("trusted") and not summary.trusted:
        text += f"; not to be relied on: wall time was {summary.contention:.1f} times CPU time"
    return text


def _measured_size(summary: jobs_pb.ReportSummary) -> str:
    before, after = summary.original_size_bytes, summary.optimized_size_bytes
    text = _sizes(summary)
    if not before or not after or before == after:
        return text
    return f"{text}, {before / after:.2f}x smaller" if before > after else f"{text}, {after / before:.2f}x larger"


def print_job(console: Console, job: jobs_pb.Job) -> None:
    """Everything that a person asks of a job."""
    details = status_details(job.error)
    facts(
        console,
        [
            ("Job", job.name),
            ("State", _state(job_state(job.state))),
            ("", _remark(job)),
            ("Size", _measured_size(job.summary) if job.HasField("summary") else ""),
            ("Speed", _measured_speed(job.summary)),
            ("Error", f"{details.reason}: {job.error.message}" if job.error.message else ""),
            ("Model", job.spec.model),
            ("Attempt", str(job.attempt) if job.attempt > 1 else ""),
            ("From cache", "yes" if job.from_cache else ""),
            ("Labels", ", ".join(f"{key}={job.labels[key]}" for key in sorted(job.labels))),
            ("Created", _time(job.create_time)),
            ("Started", _time(job.start_time)),
            ("Ended", _time(job.end_time)),
            ("Results", ", ".join(entry.path for item in job.artifacts for entry in item.files)),
        ],
    )
    if job.spec.HasField("recipe"):
        console.print("\n[bold]Recipe[/bold]")
        console.print(Text(to_yaml(job.spec.recipe).rstrip()))


def print_model(console: Console, model: Model) -> None:
    """What the server found in a model."""
    inspection = model.message.inspection
    macs = inspection.macs if inspection.HasField("macs") else None
    active = model.state == "ACTIVE"
    error = model.message.error
    facts(
        console,
        [
            ("Model", model.name),
            ("File", model.display_name),
            ("State", _state(model.state)),
            ("Refused", f"{status_details(error).reason}: {error.message}" if error.message else ""),
            ("Format", model.format if model.format != "UNSPECIFIED" else ""),
            ("Size", units.size(model.size_bytes)),
            ("Parameters", units.count(inspection.parameter_count) if active else ""),
            ("MACs", units.count(macs) if active else ""),
            ("Opset", str(inspection.opset) if inspection.opset else ""),
            ("Producer", inspection.producer),
            ("Inputs", "\n".join(map(format_input, inspection.inputs))),
            ("Outputs", "\n".join(map(format_input, inspection.outputs))),
            ("Operators", _operators(inspection.op_counts)),
        ],
    )
    for finding in inspection.findings:
        word, color = _SEVERITIES.get(finding.severity, ("note", "dim"))
        console.print(Text.assemble((f"{word}: ", color), f"{finding.detail} ", (f"[{finding.code}]", "dim")))


def print_presets(console: Console, presets: Iterable[server_pb.Preset]) -> None:
    """One line a preset."""
    table = plain_table("Preset", "Steps", "Good for")
    for preset in presets:
        steps = " → ".join(step.WhichOneof("technique") or "" for step in preset.recipe.steps)
        objective = preset.recipe.goal.objective or "balanced"
        done = steps or (f"goal: {objective}" if preset.recipe.HasField("goal") else "convert only")
        table.add_row(Text(preset.name, style="bold"), done, Text(preset.summary))
    console.print(table)


def print_server(console: Console, server: server_pb.ServerInfo) -> None:
    """What the server is and allows."""
    from modelpress_protos.v1.common_pb2 import ModelFormat

    sandbox = {1: "1: limits, own process group", 2: "2: no files, no network"}
    users = ", users of their own" if server.separate_worker_users else ""
    facts(
        console,
        [
            ("Version", server.version),
            ("API", ", ".join(server.api_versions)),
            ("Formats", ", ".join(enum_name(ModelFormat, value, "MODEL_FORMAT_") for value in server.formats)),
            ("Devices", ", ".join(server.devices)),
            ("Jobs", f"{server.running_jobs} running of {server.workers} at a time, {server.queued_jobs} waiting"),
            ("Largest file", units.size(server.max_blob_bytes)),
            ("Longest run", units.seconds(server.max_run_seconds)),
            ("Worker memory", units.size(server.worker_memory_bytes) if server.worker_memory_bytes else "no limit"),
            ("Sandbox", sandbox.get(server.sandbox_level, str(server.sandbox_level)) + users),
            ("Toolchain", ", ".join(f"{name} {server.toolchain[name]}" for name in sorted(server.toolchain))),
        ],
    )
    for technique in server.techniques:
        console.print(Text.assemble("\n", (technique.name, "bold"), f"  {technique.summary}"))
        table = plain_table("  option", "type", "default", "values", "", wrap=(3, 4))
        for option in technique.options:
            values = ", ".join(option.allowed) or option.range
            table.add_row(f"  {option.name}", option.type, option.default_value, Text(values), Text(option.description))
        console.print(table)
    console.print()
    print_presets(console, server.presets)


def _state(state: str) -> Text:
    return Text(state.lower(), style=_COLORS.get(state, ""))


def _remark(job: jobs_pb.Job) -> str:
    state = job_state(job.state)
    if state in ("QUEUED", "RUNNING"):
        line = describe(job_event("snapshot", 0, job.state, job.progress))
        return f"{line}, {units.percent(job.progress.fraction)}" if state == "RUNNING" else line
    if state == "SUCCEEDED":
        return "" if job.summary.constraints_met else "a constraint is not met"
    return str(job.error.message).split("\n", 1)[0]


def _time(time: Timestamp, form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    return str(time.ToDatetime().strftime(form)) if time.seconds else ""


def _operators(counts: Mapping[str, int]) -> str:
    items = counts.items()
    return ", ".join(f"{name} {count}" for name, count in sorted(items, key=lambda item: (-item[1], item[0])))
