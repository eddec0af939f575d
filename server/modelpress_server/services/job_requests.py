"""What CreateJob makes of its request."""

from __future__ import annotations

from google.protobuf import duration_pb2
from modelpress_protos.recipe import validate
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server.config import Settings
from modelpress_server.errors import InvalidFieldsError
from modelpress_server.names import format_name, new_id, parse_name
from modelpress_server.recipes import DEFAULT_PRESET, canonical, preset
from modelpress_server.services.model_service import content_of
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.jobs import JobRecord
from modelpress_server.stores.queries import RequestKey
from modelpress_server.stores.records import now_us
from modelpress_server.validation import Checks, message_hash, request_key

DEFAULT_ATTEMPTS = 3
MAX_ATTEMPTS = 10
MAX_PRIORITY = 100
# So that a page of a list fits a gRPC message.
MAX_JOB_BYTES = 256 * 1024


def check_job(
    project: str, request: job_service_pb2.CreateJobRequest, settings: Settings
) -> tuple[Checks, RequestKey | None]:
    """All violations of the request itself; the caller adds those of the references and finishes."""
    checks, spec = Checks(), request.job.spec
    size_bytes = request.job.ByteSize()
    checks.require(size_bytes <= MAX_JOB_BYTES, "job", f"has {size_bytes} bytes; at most {MAX_JOB_BYTES} are allowed")
    try:
        model_project, _ = parse_name(spec.model, "models", "job.spec.model")
        checks.require(model_project == project, "job.spec.model", f"is not a model of projects/{project}")
    except InvalidFieldsError as error:
        checks.violations.extend(error.violations)
    for violation in validate(spec.recipe) if spec.HasField("recipe") else ():
        checks.add(f"job.spec.recipe.{violation.path}".rstrip("."), violation.description)
    for field, value in spec.ListFields():
        if field.name in ("data", "eval_data"):
            checks.digest(f"job.spec.{field.name}", value)
        elif field.name in ("queue_timeout", "run_timeout"):
            _check_duration(checks, f"job.spec.{field.name}", value)
    in_range = 0 <= spec.max_attempts <= MAX_ATTEMPTS
    checks.require(in_range, "job.spec.max_attempts", f"{spec.max_attempts} is not in [0, {MAX_ATTEMPTS}]")
    checks.require(abs(spec.priority) <= MAX_PRIORITY, "job.spec.priority", f"{spec.priority} is not in [-100, 100]")
    checks.labels("job.labels", request.job.labels)
    return checks, request_key(request.request_id, request.job, checks)


def blobs_of(source: job_service_pb2.JobSpec | model_service_pb2.Model) -> dict[str, BlobKey]:
    """Blobs that a job or a model refers to, by field."""
    if isinstance(source, model_service_pb2.Model):
        return {entry.path: BlobKey.of(entry.digest) for entry in source.files}
    fields = {field.name: value for field, value in source.ListFields() if field.name in ("data", "eval_data")}
    return {name: BlobKey.of(digest) for name, digest in fields.items()}


def new_job(
    project: str, given: job_service_pb2.Job, model: model_service_pb2.Model, trace_parent: str = ""
) -> JobRecord:
    """A queued job with every default of its spec written out."""
    job_id = new_id()
    job = job_service_pb2.Job(name=format_name(project, "jobs", job_id), state=job_service_pb2.JOB_STATE_QUEUED)
    job.spec.CopyFrom(given.spec)
    job.spec.recipe.CopyFrom(canonical(given.spec.recipe) if given.spec.HasField("recipe") else preset(DEFAULT_PRESET))
    job.spec.max_attempts = given.spec.max_attempts or DEFAULT_ATTEMPTS
    job.labels.update(given.labels)
    job.trace_parent = trace_parent
    now = now_us()
    job.create_time.FromMicroseconds(now)
    job.update_time.FromMicroseconds(now)
    return JobRecord(
        project=project,
        id=job_id,
        version=1,
        cache_key=_cache_key(job.spec, model),
        last_sequence=0,
        compacted_sequence=0,
        message=job,
        manifest=content_of(model),
    )


def _cache_key(spec: job_service_pb2.JobSpec, model: model_service_pb2.Model) -> bytes:
    data = spec.data if spec.HasField("data") else b""
    eval_data = spec.eval_data if spec.HasField("eval_data") else b""
    return message_hash(content_of(model), spec.recipe, data, eval_data)


def _check_duration(checks: Checks, field: str, duration: duration_pb2.Duration) -> None:
    try:
        positive = duration.ToNanoseconds() > 0
    except ValueError:
        positive = False
    checks.require(positive, field, "is not a positive duration")
