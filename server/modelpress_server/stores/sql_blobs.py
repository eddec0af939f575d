"""Uploads, and which project sees which blob, in SQL."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from modelpress_protos.v1 import upload_service_pb2
from sqlalchemy import Connection, Row, delete, exists, func, insert, select, tuple_, update

from modelpress_server.errors import QuotaExceededError, StorageFullError, UploadExpiredError
from modelpress_server.shortage import MAKE_ROOM
from modelpress_server.stores import records
from modelpress_server.stores.blob_index import StorageQuota, Sweep, UploadRecord
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.database import Database, hold, hold_all
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.queries import ListQuery, Page
from modelpress_server.stores.tables import blob_references, job_events, jobs, project_blobs, request_ids, uploads

ACTIVE = upload_service_pb2.Upload.STATE_ACTIVE
COMPLETED = upload_service_pb2.Upload.STATE_COMPLETED
CANCELLED = upload_service_pb2.Upload.STATE_CANCELLED
QUOTA_RETRY_S = 30.0
FEW_BLOBS = 16  # that are looked up without a thread
REQUEST_ID_TTL_US = 7 * 24 * 3600 * 1_000_000


class SqlBlobIndex:
    """BlobIndex on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def visible(self, project: str, blobs: Collection[BlobKey], *, touch_us: int | None) -> set[BlobKey]:
        read = self._database.look_up if len(blobs) <= FEW_BLOBS else self._database.read
        found = await read(lambda connection: records.visible_blobs(connection, project, blobs))
        if not found or touch_us is None:
            return found

        def touch(connection: Connection) -> set[BlobKey]:
            hold(connection, project)
            # Looked up again: the janitor may have been quicker.
            present = records.visible_blobs(connection, project, found)
            for blob in present:
                connection.execute(
                    update(project_blobs)
                    .where(project_blobs.c.project == project, project_blobs.c.sha256 == blob.sha256)
                    .values(used_us=touch_us)
                )
            return present

        return await self._database.write(touch)

    async def create_upload(
        self, record: UploadRecord, *, present: bool, most: StorageQuota, left_bytes: int
    ) -> UploadRecord:
        return await self._database.write(
            lambda connection: _create_upload(connection, record, present, most, left_bytes)
        )

    async def list_uploads(self, query: ListQuery) -> Page[UploadRecord]:
        def work(connection: Connection) -> Page[UploadRecord]:
            rows, has_more = records.page_of(connection, uploads, query)
            return Page(tuple(_record(row) for row in rows), has_more)

        return await self._database.read(work)

    async def idle_uploads(self, project: str, expire_before_us: int) -> list[str]:
        def work(connection: Connection) -> list[str]:
            # An upload expires a fixed time after its last byte: the order of the one is that of the other.
            idle = select(uploads.c.id).where(
                uploads.c.project == project, uploads.c.state == ACTIVE, uploads.c.expire_time_us < expire_before_us
            )
            return list(connection.execute(idle.order_by(uploads.c.expire_time_us)).scalars())

        return await self._database.read(work)

    async def get_upload(self, project: str, upload_id: str) -> UploadRecord:
        return await self._database.look_up(lambda connection: _fetch(connection, upload_id, project))

    async def take_upload(self, project: str, upload_id: str, writer: str) -> UploadRecord:
        if not self._database.shared:  # this server knows all writers
            return await self.get_upload(project, upload_id)

        def work(connection: Connection) -> UploadRecord:
            record = _fetch(connection, upload_id, project)
            connection.execute(update(uploads).where(uploads.c.id == upload_id).values(writer=writer))
            # Read again: a commit of the writer before may have been under way, and is waited for.
            return _fetch(connection, record.id, project)

        return await self._database.write(work, must=True)

    async def commit_upload(self, upload_id: str, writer: str, committed_size: int, expire_time_us: int) -> bool:
        def work(connection: Connection) -> bool:
            row = connection.execute(
                select(uploads.c.writer).where(uploads.c.id == upload_id).with_for_update()
            ).first()
            if row is not None and row.writer not in (None, writer):
                return False
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload_id, uploads.c.state == ACTIVE)
                .values(committed_size=committed_size, expire_time_us=expire_time_us)
            )
            return True

        return await self._database.write(work, must=True)

    async def complete_upload(self, upload_id: str, now_us: int) -> UploadRecord:
        def work(connection: Connection) -> UploadRecord:
            hold(connection, _row(connection, upload_id).project)
            record = _fetch(connection, upload_id)
            records.add_project_blob(connection, record.project, record.blob)
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload_id)
                .values(state=COMPLETED, committed_size=record.blob.size_bytes)
            )
            return _fetch(connection, upload_id)

        return await self._database.write(work, must=True)

    async def cancel_upload(self, project: str, upload_id: str) -> UploadRecord:
        def work(connection: Connection) -> UploadRecord:
            hold(connection, project)
            row = _row(connection, upload_id, project)
            if row.state == ACTIVE:
                connection.execute(update(uploads).where(uploads.c.id == upload_id).values(state=CANCELLED))
            return _record(_row(connection, upload_id, project))

        return await self._database.write(work, must=True)

    async def active_uploads(self) -> set[str]:
        def work(connection: Connection) -> set[str]:
            return {row.id for row in connection.execute(select(uploads.c.id).where(uploads.c.state == ACTIVE))}

        return await self._database.read(work)

    async def awaited_bytes(self) -> int:
        def work(connection: Connection) -> int:
            awaited = func.sum(uploads.c.size_bytes - uploads.c.committed_size)
            return int(connection.execute(select(awaited).where(uploads.c.state == ACTIVE)).scalar() or 0)

        return await self._database.read(work)

    async def known(self, blobs: Collection[BlobKey]) -> set[BlobKey]:
        def work(connection: Connection) -> set[BlobKey]:
            hashes = [blob.sha256 for blob in blobs]
            rows = connection.execute(select(project_blobs.c.sha256).where(project_blobs.c.sha256.in_(hashes)))
            present = {row.sha256 for row in rows}
            return {blob for blob in blobs if blob.sha256 in present}

        return await self._database.read(work)

    async def drop_unknown(self, blob: BlobKey, drop: Callable[[], None]) -> bool:
        def work(connection: Connection) -> bool:
            hold_all(connection)
            known = select(project_blobs.c.sha256).where(project_blobs.c.sha256 == blob.sha256).limit(1)
            if connection.execute(known).first() is not None:
                return False
            drop()
            return True

        return await self._database.write(work, must=True)

    async def renew(self, used_us: int, *, upload_expire_us: int) -> None:
        def work(connection: Connection) -> None:
            for column, least_us in (
                (uploads.c.expire_time_us, upload_expire_us),
                (project_blobs.c.used_us, used_us),
                (request_ids.c.create_time_us, used_us),
            ):
                older = (column < least_us) & (column != records.LET_GO_US)
                connection.execute(update(column.table).where(older).values({column: least_us}))

        await self._database.write(work, must=True)

    async def undo_future(self, now_us: int, *, upload_expire_us: int) -> None:
        def work(connection: Connection) -> None:
            for column, most_us in (
                (uploads.c.expire_time_us, upload_expire_us),
                (project_blobs.c.used_us, now_us),
                (request_ids.c.create_time_us, now_us),
            ):
                connection.execute(update(column.table).where(column > most_us).values({column: most_us}))

        await self._database.write(work, must=True)

    async def sweep(self, *, blobs_before_us: int, events_before_us: int, now_us: int) -> Sweep:
        def work(connection: Connection) -> Sweep:
            hold_all(connection)
            return Sweep(
                blobs=_sweep_blobs(connection, blobs_before_us),
                uploads=_sweep_uploads(connection, now_us),
                jobs_compacted=_sweep_events(connection, events_before_us, now_us),
            )

        return await self._database.write(work, must=True)


def _create_upload(
    connection: Connection, record: UploadRecord, present: bool, most: StorageQuota, left_bytes: int
) -> UploadRecord:
    hold(connection, record.project)
    wanted = COMPLETED if present else ACTIVE
    same = (
        select(uploads)
        .where(
            uploads.c.project == record.project,
            uploads.c.sha256 == record.blob.sha256,
            uploads.c.size_bytes == record.blob.size_bytes,
            uploads.c.state == wanted,
        )
        .order_by(uploads.c.id.desc())
        .limit(1)
    )
    earlier = connection.execute(same).first()
    if earlier is not None:
        return _record(earlier)
    if not present:
        _check_room(connection, record, most, left_bytes)
    connection.execute(
        insert(uploads).values(
            id=record.id,
            project=record.project,
            sha256=record.blob.sha256,
            size_bytes=record.blob.size_bytes,
            state=wanted,
            committed_size=record.blob.size_bytes if present else 0,
            create_time_us=record.create_time_us,
            expire_time_us=record.expire_time_us,
        )
    )
    return _fetch(connection, record.id)


def _check_room(connection: Connection, record: UploadRecord, most: StorageQuota, left_bytes: int) -> None:
    """Raises QuotaExceededError, StorageFullError."""
    condition = (uploads.c.project == record.project) & (uploads.c.state == ACTIVE)
    count = connection.execute(select(func.count()).select_from(uploads).where(condition)).scalar_one()
    if most.uploads and count >= most.uploads:
        raise QuotaExceededError(
            f"Project {record.project} has {count} unfinished uploads, the most that this server allows. "
            "Finish or cancel some: ListUploads and CancelUpload, or `compress-client uploads --cancel ID`.",
            subject=f"projects/{record.project}",
            retry_after_s=QUOTA_RETRY_S,
        )
    records.check_stored(connection, record.project, record.blob.size_bytes, most.size_bytes)
    if record.blob.size_bytes > left_bytes:
        raise StorageFullError(
            "The server's disk is full: besides what it has promised to other uploads and jobs, it has no room for "
            f"{record.blob.size_bytes / 1e6:,.1f} MB more. {MAKE_ROOM}"
        )


def _row(connection: Connection, upload_id: str, project: str | None = None) -> Row[Any]:
    statement = select(uploads).where(uploads.c.id == upload_id)
    if project is not None:
        statement = statement.where(uploads.c.project == project)
    row = connection.execute(statement).first()
    if row is None:
        raise UploadExpiredError("There is no such upload: it expired or was cancelled. Create it again.")
    return row


def _fetch(connection: Connection, upload_id: str, project: str | None = None) -> UploadRecord:
    row = _row(connection, upload_id, project)
    if row.state == CANCELLED:
        raise UploadExpiredError("The upload was cancelled. Create it again.")
    return _record(row)


def _sweep_blobs(connection: Connection, before_us: int) -> tuple[BlobKey, ...]:
    used = exists().where(
        blob_references.c.project == project_blobs.c.project, blob_references.c.sha256 == project_blobs.c.sha256
    )
    old = select(project_blobs).where(project_blobs.c.used_us < before_us, ~used).limit(1000)
    rows = connection.execute(old).all()
    for row in rows:
        key = tuple_(project_blobs.c.project, project_blobs.c.sha256)
        connection.execute(delete(project_blobs).where(key == (row.project, row.sha256)))
        # A completed upload vouches for the blob.
        gone = (uploads.c.project == row.project) & (uploads.c.sha256 == row.sha256) & (uploads.c.state == COMPLETED)
        connection.execute(delete(uploads).where(gone))
    return records.unique(BlobKey(row.sha256, row.size_bytes) for row in rows)


def _sweep_uploads(connection: Connection, now_us: int) -> tuple[str, ...]:
    expired = connection.execute(select(uploads.c.id).where(uploads.c.expire_time_us < now_us).limit(1000)).scalars()
    ids = tuple(expired)
    connection.execute(delete(uploads).where(uploads.c.id.in_(ids)))
    return ids


def _sweep_events(connection: Connection, before_us: int, now_us: int) -> int:
    connection.execute(delete(request_ids).where(request_ids.c.create_time_us < now_us - REQUEST_ID_TTL_US))
    old = connection.execute(
        select(jobs.c.id, jobs.c.last_sequence).where(
            jobs.c.state.in_(ENDED_STATES),
            jobs.c.end_time_us < before_us,
            jobs.c.compacted_sequence < jobs.c.last_sequence,
        )
    ).all()
    for row in old:
        connection.execute(delete(job_events).where(job_events.c.job_id == row.id))
        connection.execute(update(jobs).where(jobs.c.id == row.id).values(compacted_sequence=row.last_sequence))
    return len(old)


def _record(row: Row[Any]) -> UploadRecord:
    return UploadRecord(
        project=row.project,
        id=row.id,
        blob=BlobKey(row.sha256, row.size_bytes),
        state=row.state,
        committed_size=row.committed_size,
        create_time_us=row.create_time_us,
        expire_time_us=row.expire_time_us,
    )
