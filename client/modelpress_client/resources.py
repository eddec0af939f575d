"""Models, and what a job reports: thin views over the messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelpress_protos.v1 import job_service_pb2 as jobs
from modelpress_protos.v1 import model_service_pb2 as models
from modelpress_protos.v1.common_pb2 import ModelFormat

from modelpress_client.inputs import format_input
from modelpress_client.jsonable import enum_name, to_json

ENDED = frozenset({jobs.JOB_STATE_SUCCEEDED, jobs.JOB_STATE_FAILED, jobs.JOB_STATE_CANCELLED, jobs.JOB_STATE_EXPIRED})
JOB_STATES = ("QUEUED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
MODEL_STATES = ("PROCESSING", "ACTIVE", "REJECTED")
ARTIFACTS = {
    "model": jobs.Artifact.KIND_OPTIMIZED_MODEL,
    "report.json": jobs.Artifact.KIND_REPORT_JSON,
    "report.html": jobs.Artifact.KIND_REPORT_HTML,
    "project.zip": jobs.Artifact.KIND_TARGET_PROJECT,
}


@dataclass(frozen=True)
class Model:
    """A model on the server, as it was when it was read. `message` has every field."""

    message: models.Model

    @property
    def name(self) -> str:
        """projects/P/models/M."""
        return self.message.name

    @property
    def display_name(self) -> str:
        """By default the name of the uploaded file."""
        return self.message.display_name

    @property
    def state(self) -> str:
        """PROCESSING, ACTIVE or REJECTED."""
        return enum_name(models.Model.State, self.message.state, "STATE_")

    @property
    def inspection_stage(self) -> str:
        """While PROCESSING: QUEUED, STARTING_WORKER or RUNNING; else UNSPECIFIED."""
        return enum_name(models.InspectionStage, self.message.inspection_stage, "INSPECTION_STAGE_")

    @property
    def format(self) -> str:
        """ONNX, TORCHSCRIPT ...; UNSPECIFIED until it was inspected."""
        return enum_name(ModelFormat, self.message.format, "MODEL_FORMAT_")

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.digest.size_bytes for entry in self.message.files)

    @property
    def inputs(self) -> list[str]:
        """`NAME:DTYPE[DIM,...]` of every input; empty until it was inspected."""
        return [format_input(spec) for spec in self.message.inspection.inputs]

    @property
    def outputs(self) -> list[str]:
        """`NAME:DTYPE[DIM,...]` of every output; empty until it was inspected."""
        return [format_input(spec) for spec in self.message.inspection.outputs]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return to_json(self.message)


@dataclass(frozen=True)
class JobEvent:
    """One event of a job. kind: `snapshot` (where it stands now), `progress` or `state`.

    fraction: share of the whole job, 0 to 1. queue_position: jobs ahead of this one. is_past: it happened before the
    snapshot that came first, which shows where the job has got to since.
    """

    kind: str
    sequence: int
    state: str
    stage: str
    stage_index: int
    stage_count: int
    fraction: float
    message: str
    queue_position: int
    is_past: bool = False


def job_event(kind: str, sequence: int, state: int, progress: jobs.Progress, *, is_past: bool = False) -> JobEvent:
    """Builds an event from the newest state and progress."""
    return JobEvent(
        kind=kind,
        sequence=sequence,
        state=job_state(state),
        stage=progress.stage,
        stage_index=progress.stage_index,
        stage_count=progress.stage_count,
        fraction=progress.fraction,
        message=progress.message,
        queue_position=progress.queue_position,
        is_past=is_past,
    )


def job_state(state: int) -> str:
    """SUCCEEDED for JOB_STATE_SUCCEEDED."""
    return enum_name(jobs.JobState, state, "JOB_STATE_")
