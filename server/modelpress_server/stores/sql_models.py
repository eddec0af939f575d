"""Models in SQL."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from modelpress_protos.v1 import model_service_pb2
from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, select, update

from modelpress_server.errors import QuotaExceededError, ResourceNotFoundError, reason_of
from modelpress_server.stores import records
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.database import Database, hold, note_change, time_us
from modelpress_server.stores.job_rows import AT_WORK
from modelpress_server.stores.models import ModelQuota, ModelRecord
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.queries import ListQuery, Page, Rank, RequestKey
from modelpress_server.stores.tables import jobs, models, servers

_KIND = "model"
QUOTA_RETRY_S = 30.0
_State = model_service_pb2.Model


class SqlModelStore:
    """ModelStore on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, record: ModelRecord, blobs: Collection[BlobKey], request: RequestKey | None, *, most: ModelQuota
    ) -> ModelRecord:
        def work(connection: Connection) -> ModelRecord:
            hold(connection, record.project)
            earlier = records.earlier_request(connection, record.project, _KIND, request)
            if earlier is not None:
                return fetch_model(connection, record.project, earlier)
            _check_quota(connection, record.project, most)
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
            note_change(connection, _change(record.project, record.id, message, created=True))
            return fetch_model(connection, record.project, record.id)

        return await self._database.write(work)

    async def get(self, project: str, model_id: str) -> ModelRecord:
        return await self._database.look_up(lambda connection: fetch_model(connection, project, model_id))

    async def list_page(self, query: ListQuery) -> Page[ModelRecord]:
        def work(connection: Connection) -> Page[ModelRecord]:
            rows, has_more = records.page_of(connection, models, query)
            return Page(tuple(_record(row) for row in rows), has_more)

        return await self._database.read(work)

    async def update(
        self, project: str, model_id: str, etag: str, change: Callable[[model_service_pb2.Model], None]
    ) -> ModelRecord:
        def work(connection: Connection) -> ModelRecord:
            record = fetch_model(connection, project, model_id, lock=True)
            records.check_etag(etag, record.version)
            change(record.message)
            _write(connection, record)
            records.set_labels(connection, model_id, record.message.labels)
            return fetch_model(connection, project, model_id)

        return await self._database.write(work)

    async def delete(self, project: str, model_id: str, etag: str) -> None:
        def work(connection: Connection) -> None:
            hold(connection, project)
            record = fetch_model(connection, project, model_id, lock=True)
            records.check_etag(etag, record.version)
            connection.execute(delete(models).where(models.c.id == model_id))
            records.forget_owner(connection, model_id)

        await self._database.write(work, must=True)

    async def claim_inspection(self, busy: Collection[str], rank: Rank, owner: str) -> ModelRecord | None:
        def work(connection: Connection) -> ModelRecord | None:
            another = exists().where(
                servers.c.id == models.c.owner, servers.c.id != owner, servers.c.lease_until_us > time_us(connection)
            )
            waits = and_(
                models.c.state == _State.STATE_PROCESSING,
                models.c.id.not_in(busy),
                ~another,
                ~exists().where(jobs.c.model_id == models.c.id, jobs.c.state.in_(AT_WORK)),
            )
            waiting = select(models.c.project).where(waits).group_by(models.c.project)
            projects = connection.execute(waiting.order_by(func.min(models.c.id))).scalars().all()
            for project in rank(projects)[:1]:
                oldest = select(models).where(waits, models.c.project == project).order_by(models.c.id).limit(1)
                row = connection.execute(oldest.with_for_update(skip_locked=True)).first()
                if row is None:  # others were quicker
                    return None
                connection.execute(update(models).where(models.c.id == row.id).values(owner=owner))
                return replace(_record(row), owner=owner)
            return None

        return await self._database.write(work)

    async def processing_positions(self) -> dict[str, int]:
        def work(connection: Connection) -> dict[str, int]:
            processing = select(models.c.id, models.c.project).where(models.c.state == _State.STATE_PROCESSING)
            rows = connection.execute(processing.order_by(models.c.id))
            return records.positions_in_turns((str(row.project), str(row.id)) for row in rows)

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
            note_change(connection, _change(record.project, record.id, record.message))

        await self._database.write(work, must=True)


def fetch_model(connection: Connection, project: str, model_id: str, *, lock: bool = False) -> ModelRecord:
    """One model. Raises ResourceNotFoundError. `lock`: nobody else changes it until the transaction ends."""
    statement = select(models).where(models.c.id == model_id, models.c.project == project)
    row = connection.execute(statement.with_for_update() if lock else statement).first()
    if row is None:
        raise ResourceNotFoundError(f"There is no model {model_id} in project {project}.")
    return _record(row)


def _check_quota(connection: Connection, project: str, most: ModelQuota) -> None:
    """Raises QuotaExceededError."""
    of_project = select(func.count()).select_from(models).where(models.c.project == project)
    if most.models and connection.execute(of_project).scalar_one() >= most.models:
        raise QuotaExceededError(
            f"Project {project} has {most.models} models, the most that it may have. Delete some.",
            subject=f"projects/{project}",
            retry_after_s=QUOTA_RETRY_S,
        )
    pending = of_project.where(models.c.state == _State.STATE_PROCESSING)
    if most.pending and connection.execute(pending).scalar_one() >= most.pending:
        raise QuotaExceededError(
            f"Project {project} has {most.pending} models that wait for their inspection, the most that it may have. "
            "Wait, or delete some.",
            subject=f"projects/{project}",
            retry_after_s=QUOTA_RETRY_S,
        )


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


def _change(project: str, model_id: str, message: model_service_pb2.Model, *, created: bool = False) -> StateChange:
    return StateChange(
        kind="model",
        project=project,
        id=model_id,
        state=records.model_state_name(message.state),
        reason=reason_of(message.error) if message.HasField("error") else "",
        created=created,
    )


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
        owner=row.owner,
    )
