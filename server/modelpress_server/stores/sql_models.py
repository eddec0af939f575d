"""Models in SQL."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from sqlalchemy import Connection, Row, delete, exists, func, insert, select, update

from modelpress_server.errors import ResourceNotFoundError
from modelpress_server.stores import records
from modelpress_server.stores.base import BlobKey, ListQuery, ModelRecord, Page, RequestKey
from modelpress_server.stores.database import Database
from modelpress_server.stores.tables import jobs, models

_KIND = "model"
_State = model_service_pb2.Model
_AT_WORK = (job_service_pb2.JOB_STATE_RUNNING, job_service_pb2.JOB_STATE_CANCELLING)


class SqlModelStore:
    """ModelStore on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, record: ModelRecord, blobs: Collection[BlobKey], request: RequestKey | None) -> ModelRecord:
        def work(connection: Connection) -> ModelRecord:
            earlier = records.earlier_request(connection, record.project, _KIND, request)
            if earlier is not None:
                return fetch_model(connection, record.project, earlier)
            records.refer(connection, record.project, record.id, blobs)
            records.remember_request(connection, record.project, _KIND, request, record.id)
            message = _State()
            message.CopyFrom(record.message)
            _take_over_inspection(connection, record, message)
            connection.execute(
                insert(models).values(
                    id=record.id,
                    project=record.project,
                    state=message.state,
                    version=record.version,
                    inspection_key=record.inspection_key,
                    message=message.SerializeToString(),
                )
            )
            records.set_labels(connection, record.id, message.labels)
            return fetch_model(connection, record.project, record.id)

        return await self._database.write(work)

    async def get(self, project: str, model_id: str) -> ModelRecord:
        return await self._database.read(lambda connection: fetch_model(connection, project, model_id))

    async def list_page(self, query: ListQuery) -> Page[ModelRecord]:
        def work(connection: Connection) -> Page[ModelRecord]:
            rows, has_more = records.page_of(connection, models, query)
            return Page(tuple(_record(row) for row in rows), has_more)

        return await self._database.read(work)

    async def update(
        self, project: str, model_id: str, etag: str, change: Callable[[model_service_pb2.Model], None]
    ) -> ModelRecord:
        def work(connection: Connection) -> ModelRecord:
            record = fetch_model(connection, project, model_id)
            records.check_etag(etag, record.version)
            change(record.message)
            _write(connection, record)
            records.set_labels(connection, model_id, record.message.labels)
            return fetch_model(connection, project, model_id)

        return await self._database.write(work)

    async def delete(self, project: str, model_id: str, etag: str) -> None:
        def work(connection: Connection) -> None:
            record = fetch_model(connection, project, model_id)
            records.check_etag(etag, record.version)
            connection.execute(delete(models).where(models.c.id == model_id))
            records.forget_owner(connection, model_id)

        await self._database.write(work)

    async def next_processing(self, busy: Collection[str]) -> ModelRecord | None:
        def work(connection: Connection) -> ModelRecord | None:
            row = connection.execute(
                select(models)
                .where(
                    models.c.state == _State.STATE_PROCESSING,
                    models.c.id.not_in(busy),
                    ~exists().where(jobs.c.model_id == models.c.id, jobs.c.state.in_(_AT_WORK)),
                )
                .order_by(models.c.id)
                .limit(1)
            ).first()
            return _record(row) if row is not None else None

        return await self._database.read(work)

    async def processing_before(self, model_id: str) -> int:
        def work(connection: Connection) -> int:
            older = (models.c.state == _State.STATE_PROCESSING) & (models.c.id < model_id)
            return int(connection.execute(select(func.count()).select_from(models).where(older)).scalar_one())

        return await self._database.read(work)

    async def finish_inspection(self, model_id: str, found: model_service_pb2.Model) -> None:
        def work(connection: Connection) -> None:
            row = connection.execute(select(models).where(models.c.id == model_id).with_for_update()).first()
            if row is None:
                return
            record = _record(row)
            if record.message.state != _State.STATE_PROCESSING:
                return
            _copy_inspection(found, record.message)
            _write(connection, record)

        await self._database.write(work)


def fetch_model(connection: Connection, project: str, model_id: str) -> ModelRecord:
    """One model. Raises ResourceNotFoundError."""
    row = connection.execute(select(models).where(models.c.id == model_id, models.c.project == project)).first()
    if row is None:
        raise ResourceNotFoundError(f"There is no model {model_id} in project {project}.")
    return _record(row)


def _take_over_inspection(connection: Connection, record: ModelRecord, message: model_service_pb2.Model) -> None:
    """What was found in the same content of the same project before holds for this model as well."""
    rows = connection.execute(
        select(models)
        .where(
            models.c.project == record.project,
            models.c.inspection_key == record.inspection_key,
            models.c.state == _State.STATE_ACTIVE,
        )
        .order_by(models.c.id.desc())
        .limit(1)
    )
    for row in rows:
        _copy_inspection(_record(row).message, message)


def _copy_inspection(source: model_service_pb2.Model, target: model_service_pb2.Model) -> None:
    target.state = source.state
    target.format = source.format
    for name in ("inspection", "error"):
        target.ClearField(name)
        if source.HasField(name):
            getattr(target, name).CopyFrom(getattr(source, name))


def _write(connection: Connection, record: ModelRecord) -> None:
    record.message.update_time.FromMicroseconds(records.now_us())
    connection.execute(
        update(models)
        .where(models.c.id == record.id)
        .values(state=record.message.state, version=models.c.version + 1, message=record.message.SerializeToString())
    )


def _record(row: Row[Any]) -> ModelRecord:
    return ModelRecord(
        project=row.project,
        id=row.id,
        version=row.version,
        inspection_key=row.inspection_key,
        message=_State.FromString(row.message),
    )
