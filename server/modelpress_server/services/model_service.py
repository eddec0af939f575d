"""ModelService: manifests of uploaded blobs, inspected by a worker before use."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf import empty_pb2
from modelpress_protos.v1 import model_service_pb2, model_service_pb2_grpc

from modelpress_server.config import Settings
from modelpress_server.filters import Fields
from modelpress_server.findings import Findings
from modelpress_server.interceptors import check_project, check_projects
from modelpress_server.listing import fitted, list_query, page_token
from modelpress_server.names import format_name, new_id, parse_name, parse_project, parse_projects
from modelpress_server.projects import Projects
from modelpress_server.scheduler import Scheduler
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.models import ModelQuota, ModelRecord, ModelStore
from modelpress_server.stores.records import now_us, unique
from modelpress_server.toolchain import toolchain_hash
from modelpress_server.validation import (
    MAX_DISPLAY_NAME_CHARS,
    Checks,
    check_model,
    message_hash,
    request_key,
    update_paths,
)
from modelpress_server.waiting import SharedLook

_Model = model_service_pb2.Model
STATES = {
    "PROCESSING": int(_Model.STATE_PROCESSING),
    "ACTIVE": int(_Model.STATE_ACTIVE),
    "REJECTED": int(_Model.STATE_REJECTED),
}
FIELDS = Fields(STATES, times=("create_time",))
MUTABLE = ("display_name", "labels")
AHEAD_S = 1.0


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """Standard methods (AIP-131 to 135)."""

    def __init__(
        self, settings: Settings, projects: Projects, models: ModelStore, scheduler: Scheduler, findings: Findings
    ) -> None:
        self._projects = projects
        self._settings = settings
        self._models = models
        self._ahead = SharedLook(models.processing_positions)
        self._scheduler = scheduler
        self._findings = findings

    async def CreateModel(  # noqa: N802  # the name of the method in the API
        self, request: model_service_pb2.CreateModelRequest, context: Any
    ) -> model_service_pb2.Model:
        project = check_project(parse_project(request.parent))
        checks = check_model(request.model, self._settings.max_blob_bytes)
        request_id = request_key(request.request_id, request.model, checks)
        checks.finish()
        model = _new_model(project, request.model)
        record = ModelRecord(
            project=project,
            id=model.name.rpartition("/")[2],
            version=1,
            inspection_key=message_hash(content_of(model), toolchain_hash()),
            message=model,
        )
        blobs = unique(BlobKey.of(entry.digest) for entry in model.files)
        limits = self._projects.limits(project)
        quota = ModelQuota(limits.max_models, limits.max_pending_models)
        created = await self._models.create(record, blobs, request_id, most=quota)
        self._scheduler.expect_job(record.id)
        return created.to_message()

    async def GetModel(  # noqa: N802
        self, request: model_service_pb2.GetModelRequest, context: Any
    ) -> model_service_pb2.Model:
        project, model_id = parse_name(request.name, "models")
        record = await self._models.get(check_project(project), model_id)
        message = record.to_message()
        if message.state == _Model.STATE_PROCESSING:
            self._scheduler.inspect_soon(model_id)
            message.inspection_stage = self._scheduler.inspection_stage(record)
            if message.inspection_stage == model_service_pb2.INSPECTION_STAGE_QUEUED:
                message.inspections_ahead = await self._inspections_ahead(model_id)
        return message

    async def ListModels(  # noqa: N802
        self, request: model_service_pb2.ListModelsRequest, context: Any
    ) -> model_service_pb2.ListModelsResponse:
        scope = check_projects(parse_projects(request.parent))
        query = list_query(scope, request.page_size, request.page_token, request.filter, FIELDS)
        page = await self._models.list_page(query)
        found, more = fitted([record.to_message() for record in page.items], has_more=page.has_more)
        token = page_token(scope, request.filter, page.items[len(found) - 1].id) if more else ""
        return model_service_pb2.ListModelsResponse(models=found, next_page_token=token)

    async def UpdateModel(  # noqa: N802
        self, request: model_service_pb2.UpdateModelRequest, context: Any
    ) -> model_service_pb2.Model:
        project, model_id = parse_name(request.model.name, "models", "model.name")
        checks = Checks()
        paths = update_paths(request.model, request.update_mask, MUTABLE, checks)
        checks.text("model.display_name", request.model.display_name, MAX_DISPLAY_NAME_CHARS)
        checks.labels("model.labels", request.model.labels)
        checks.finish()

        def change(stored: model_service_pb2.Model) -> None:
            if "display_name" in paths:
                stored.display_name = request.model.display_name
            if "labels" in paths:
                stored.labels.clear()
                stored.labels.update(request.model.labels)

        record = await self._models.update(check_project(project), model_id, request.model.etag, change)
        return record.to_message()

    async def DeleteModel(  # noqa: N802
        self, request: model_service_pb2.DeleteModelRequest, context: Any
    ) -> empty_pb2.Empty:
        project, model_id = parse_name(request.name, "models")
        manifest = (await self._models.get(check_project(project), model_id)).message
        await self._models.delete(project, model_id, request.etag)
        await self._findings.forget(project, manifest)
        return empty_pb2.Empty()

    async def _inspections_ahead(self, model_id: str) -> int:
        """As it was within the last `AHEAD_S`: of how many wait, nobody needs to know it better."""
        ahead = await self._ahead.since(asyncio.get_running_loop().time() - AHEAD_S)
        if model_id not in ahead:
            ahead = await self._ahead()
        return ahead.get(model_id, 0)


def content_of(model: model_service_pb2.Model) -> model_service_pb2.Model:
    """What a result depends on: the files, the hints and what they were converted from; no names of people's choice."""
    content = model_service_pb2.Model(files=model.files, input_hints=model.input_hints)
    if model.HasField("source"):
        content.source.CopyFrom(model.source)
    return content


def _new_model(project: str, given: model_service_pb2.Model) -> model_service_pb2.Model:
    model = content_of(given)
    model.name = format_name(project, "models", new_id())
    model.display_name = given.display_name or given.files[0].path.rpartition("/")[2]
    model.labels.update(given.labels)
    model.state = _Model.STATE_PROCESSING
    now = now_us()
    model.create_time.FromMicroseconds(now)
    model.update_time.FromMicroseconds(now)
    return model
