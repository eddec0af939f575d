"""What each page shows: from messages of the API to what a template is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import yaml
from modelpress_protos import recipe as recipe_language
from modelpress_protos.v1 import job_service_pb2

from modelpress_server.console import figures, live
from modelpress_server.console.candidates import MAX_REPORT_BYTES, plot, read_candidates
from modelpress_server.console.visitor import Visitor
from modelpress_server.errors import ResourceNotFoundError, ServiceError, reason_of
from modelpress_server.names import format_name, parse_name, parse_project
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.records import job_state_name

LOG_LINES = 200
PAGE_SIZE = 50
QUEUE_SIZE = 200
AT_WORK = "state = RUNNING OR state = CANCELLING OR state = QUEUED"
STATES = tuple(name.removeprefix("JOB_STATE_") for name, number in job_service_pb2.JobState.items() if number)
_KINDS = job_service_pb2.Artifact
_VERDICTS = {
    job_service_pb2.SPEED_VERDICT_FASTER: "faster",
    job_service_pb2.SPEED_VERDICT_SLOWER: "slower",
    job_service_pb2.SPEED_VERDICT_NOT_DISTINGUISHABLE: "not distinguishable",
}


@dataclass(frozen=True)
class JobRow:
    """A job in a list."""

    name: str
    project: str
    id: str
    state: str
    labels: Mapping[str, str]
    created: str
    took: str
    size: str
    ratio: str
    speed: str
    verdict: str
    live: Mapping[str, Any]
    path: str


def row_of(job: job_service_pb2.Job) -> JobRow:
    """What a list shows of a job."""
    project, job_id = parse_name(job.name, "jobs")
    summary = job.summary if job.HasField("summary") else job_service_pb2.ReportSummary()
    speed = figures.measured(summary, "speedup")
    ratio = summary.original_size_bytes / summary.optimized_size_bytes if summary.optimized_size_bytes else None
    ended = job.end_time if job.state in ENDED_STATES else None
    ran_s = figures.between(job.start_time, ended or type(job.end_time)()) if job.HasField("start_time") else None
    return JobRow(
        name=job.name,
        project=project,
        id=job_id,
        state=job_state_name(job.state),
        labels=dict(sorted(job.labels.items())),
        created=figures.moment(job.create_time),
        took="" if ran_s is None else figures.duration(ran_s),
        size=figures.size(summary.optimized_size_bytes) if summary.optimized_size_bytes else "",
        ratio="" if ratio is None else f"{ratio:.2f}×",
        speed="" if speed is None else f"{speed:.2f}×",
        verdict=_VERDICTS.get(summary.speed_verdict, ""),
        live=live.shown(job),
        path=f"/console/projects/{project}/jobs/{job_id}",
    )


async def projects(visitor: Visitor) -> dict[str, Any]:
    """All projects of the caller, and the server."""
    rows = []
    for name, states in (await visitor.projects()).items():
        counts = {state: states.get(state, 0) for state in STATES}
        running = counts["RUNNING"] + counts["CANCELLING"]
        ended = sum(counts.values()) - running - counts["QUEUED"]
        rows.append({"name": name, "queued": counts["QUEUED"], "running": running, "ended": ended, "counts": counts})
    return {"projects": rows, "server": await visitor.server()}


async def queue(visitor: Visitor) -> dict[str, Any]:
    """What runs and what waits, in the order of their turns."""
    page = await visitor.jobs(parent="projects/-", filter=AT_WORK, page_size=QUEUE_SIZE)
    waits = job_service_pb2.JOB_STATE_QUEUED
    ordered = sorted(page.jobs, key=lambda job: (job.state == waits, job.progress.queue_position, job.name))
    return {"jobs": [row_of(job) for job in ordered], "more": bool(page.next_page_token)}


async def project(visitor: Visitor, name: str, state: str, page_token: str) -> dict[str, Any]:
    """The jobs of a project, and what it uses."""
    parent = f"projects/{parse_project(f'projects/{name}')}"
    chosen = state if state in STATES else ""
    page = await visitor.jobs(
        parent=parent, filter=f"state = {chosen}" if chosen else "", page_size=PAGE_SIZE, page_token=page_token
    )
    following = {"page": page.next_page_token, **({"state": chosen} if chosen else {})}
    return {
        "project": name,
        "usage": await visitor.usage(name),
        "jobs": [row_of(job) for job in page.jobs],
        "states": STATES,
        "state": chosen,
        "next_page": f"?{urlencode(following)}" if page.next_page_token else "",
        "first_page": not page_token,
    }


async def job(visitor: Visitor, project_name: str, job_id: str) -> dict[str, Any]:
    """One job, with its candidates and the end of its log."""
    found = await visitor.job(format_name(project_name, "jobs", job_id))
    candidates = await _candidates(visitor, found)
    return {
        "project": project_name,
        "job": found,
        "row": row_of(found),
        "facts": _facts(found),
        "cards": _cards(found),
        "error": found.error.message if found.HasField("error") else "",
        "reason": reason_of(found.error) if found.HasField("error") else "",
        "model": await _model_name(visitor, found),
        "recipe": _recipe(found),
        "artifacts": _artifacts(found),
        "has_report": _artifact(found, _KINDS.KIND_REPORT_HTML) is not None,
        "candidates": candidates,
        "plot": plot(candidates),
        "log": [
            {"time": figures.moment(line.time)[11:], "severity": line.severity, "text": line.text}
            for line in await visitor.log(found.name, LOG_LINES)
        ],
        "log_lines": LOG_LINES,
    }


async def compare(visitor: Visitor, names: list[str]) -> dict[str, Any]:
    """Two jobs side by side."""
    if len(names) != 2:
        return {"jobs": [], "rows": [], "recipes": []}
    jobs = [await visitor.job(format_name(*parse_jobs_name(name))) for name in names]
    models = [await _model_name(visitor, found) for found in jobs]
    columns = [{"Model": model, **_figures(found), **_facts(found)} for found, model in zip(jobs, models, strict=True)]
    rows = []
    for title in dict.fromkeys(title for column in columns for title in column):
        values = [column.get(title, "") for column in columns]
        if any(values):
            shown = [value or figures.NOT_MEASURED for value in values]
            rows.append({"title": title, "values": shown, "differs": values[0] != values[1]})
    recipes = [_recipe(found).splitlines() for found in jobs]
    marked = [[(line, line not in recipes[1 - index]) for line in lines] for index, lines in enumerate(recipes)]
    return {"jobs": [row_of(found) for found in jobs], "rows": rows, "recipes": marked}


def parse_jobs_name(name: str) -> tuple[str, Any, str]:
    """The parts of a job's name, for `format_name`. Raises InvalidFieldsError."""
    project_name, job_id = parse_name(name, "jobs")
    return project_name, "jobs", job_id


async def report_of(visitor: Visitor, project_name: str, job_id: str) -> job_service_pb2.Artifact:
    """The HTML report. Raises ResourceNotFoundError."""
    found = await visitor.job(format_name(project_name, "jobs", job_id))
    artifact = _artifact(found, _KINDS.KIND_REPORT_HTML)
    if artifact is None:
        raise ResourceNotFoundError(f"Job {job_id} has no report.")
    return artifact


def _artifact(
    found: job_service_pb2.Job, kind: job_service_pb2.Artifact.Kind.ValueType
) -> job_service_pb2.Artifact | None:
    return next((item for item in found.artifacts if item.kind == kind and item.files), None)


async def _candidates(visitor: Visitor, found: job_service_pb2.Job) -> list[Any]:
    artifact = _artifact(found, _KINDS.KIND_REPORT_JSON)
    if artifact is None or artifact.files[0].digest.size_bytes > MAX_REPORT_BYTES:
        return []
    try:
        parts = [part async for part in visitor.read(parse_name(found.name, "jobs")[0], artifact.files[0].digest)]
    except ServiceError:
        return []  # damaged or gone: the page has the rest
    return list(read_candidates(b"".join(parts)))


async def _model_name(visitor: Visitor, found: job_service_pb2.Job) -> str:
    try:
        return (await visitor.model(found.spec.model)).display_name
    except ServiceError:
        return f"{found.spec.model.rpartition('/')[2]} (deleted)"


def _recipe(found: job_service_pb2.Job) -> str:
    return yaml.safe_dump(recipe_language.to_dict(found.spec.recipe), sort_keys=False, allow_unicode=True).rstrip()


def _figures(found: job_service_pb2.Job) -> dict[str, str]:
    summary = found.summary
    if not found.HasField("summary"):
        return {}
    low, high = figures.measured(summary, "speedup_low"), figures.measured(summary, "speedup_high")
    speed = figures.measured(summary, "speedup")
    interval = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    ratio = summary.original_size_bytes / summary.optimized_size_bytes if summary.optimized_size_bytes else None
    return {
        "Size before": figures.size(summary.original_size_bytes),
        "Size after": figures.size(summary.optimized_size_bytes),
        "Times smaller": "" if ratio is None else f"{ratio:.2f}",
        "Times as fast": "" if speed is None else f"{speed:.2f}{interval}",
        "Speed": _VERDICTS.get(summary.speed_verdict, ""),
        "Same class": _share(figures.measured(summary, "top1_agreement")),
        "Metric lost": figures.number(figures.measured(summary, "accuracy_drop")),
        "Constraints": "met" if summary.constraints_met else "not met",
        "Measurement": ("" if not summary.HasField("trusted") else "undisturbed" if summary.trusted else "disturbed"),
    }


def _cards(found: job_service_pb2.Job) -> list[dict[str, str]]:
    """The figures that matter most, with what stands below each."""
    shown = _figures(found)
    if not shown:
        return []
    cards = [{"title": "Size", "value": shown["Size after"], "note": f"was {shown['Size before']}"}]
    if shown["Times as fast"]:
        value, _, interval = shown["Times as fast"].partition(" ")
        note = " ".join(filter(None, (shown["Speed"], interval)))
        cards.append({"title": "Times as fast", "value": f"{value}×", "note": note})
    if shown["Same class"]:
        cards.append({"title": "Same class", "value": shown["Same class"], "note": "of original and result"})
    if shown["Metric lost"] != figures.NOT_MEASURED:
        cards.append({"title": "Metric lost", "value": shown["Metric lost"], "note": "less is better"})
    cards.append({"title": "Constraints", "value": shown["Constraints"], "note": shown["Measurement"]})
    return cards


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}".replace("%", " %")


def _facts(found: job_service_pb2.Job) -> dict[str, str]:
    unset = type(found.end_time)()
    waited_s = figures.between(found.create_time, found.start_time) if found.HasField("start_time") else None
    ended = found.state in ENDED_STATES
    ran_s = figures.between(found.start_time, found.end_time if ended else unset)
    return {
        "State": job_state_name(found.state),
        "Created": figures.moment(found.create_time),
        "Ended": figures.moment(found.end_time),
        "Waited": "" if waited_s is None else figures.duration(waited_s),
        "Ran": "" if ran_s is None else figures.duration(ran_s),
        "Attempt": f"{found.attempt} of {found.spec.max_attempts}" if found.attempt else "",
        "Priority": str(found.spec.priority) if found.spec.priority else "",
        "Result": "taken from an earlier identical job" if found.from_cache else "",
    }


def _artifacts(found: job_service_pb2.Job) -> list[dict[str, str]]:
    return [
        {
            "kind": _KINDS.Kind.Name(item.kind).removeprefix("KIND_").replace("_", " ").lower(),
            "path": entry.path,
            "size": figures.size(entry.digest.size_bytes),
            "sha256": entry.digest.sha256.hex()[:12],
        }
        for item in found.artifacts
        for entry in item.files
    ][:100]
