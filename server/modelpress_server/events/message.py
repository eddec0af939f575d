"""The end of a job as a CloudEvent (1.0, JSON format), and signatures as of Standard Webhooks (v1, HMAC-SHA256)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from google.protobuf.json_format import MessageToDict
from modelpress_protos.v1 import job_service_pb2

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
TYPE_PREFIX = "modelpress.v1.job."
# Of the job, what says how it ended; its recipe and its files are read over gRPC by who wants them.
_FIELDS = ("name", "state", "attempt", "from_cache", "summary", "labels", "create_time", "start_time", "end_time")


def cloud_event(job: job_service_pb2.Job, event_id: str) -> bytes:
    """The event that a job has ended, as it is sent. `data`: the job in protobuf's JSON, without recipe and files."""
    shown = job_service_pb2.Job()
    given = {field.name for field, _ in job.ListFields()}
    for name in (name for name in _FIELDS if name in given):
        if name == "labels":
            shown.labels.update(job.labels)
        elif job.DESCRIPTOR.fields_by_name[name].message_type is not None:
            getattr(shown, name).CopyFrom(getattr(job, name))
        else:
            setattr(shown, name, getattr(job, name))
    data = MessageToDict(shown)
    data["model"] = job.spec.model
    if job.HasField("error"):  # its details are of types that a receiver need not know
        data["error"] = {"code": job.error.code, "message": job.error.message}
    state = job_service_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    event = {
        "specversion": "1.0",
        "id": event_id,
        "source": "/modelpress/" + job.name.rpartition("/jobs/")[0],
        "type": TYPE_PREFIX + state,
        "subject": job.name,
        "time": job.end_time.ToJsonString(),
        "datacontenttype": "application/json",
        "data": data,
    }
    if job.trace_parent:  # the extension for distributed tracing
        event["traceparent"] = job.trace_parent
    return json.dumps(event, separators=(",", ":")).encode()


def signature(secret: bytes, event_id: str, timestamp_s: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = hmac.digest(secret, f"{event_id}.{timestamp_s}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"
