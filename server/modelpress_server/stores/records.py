"""What the SQL stores share: references, request ids, labels, pages."""

from __future__ import annotations

import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from modelpress_protos.v1 import job_service_pb2, model_service_pb2, upload_service_pb2
from sqlalchemy import ColumnElement, Connection, Row, Select, Table, delete, exists, func, insert, or_, select, update

from modelpress_server.errors import BlobMissingError, EtagMismatchError, RequestIdReusedError, StoredQuotaError
from modelpress_server.names import first_id_at
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.database import insert_missing
from modelpress_server.stores.queries import ListQuery, RequestKey, Term, etag
from modelpress_server.stores.tables import blob_references, labels, project_blobs, request_ids, uploads

# SQLite allows 32,766 bound values in a statement; a manifest has at most 1,000 files.
_CHUNK = 500
# `used_us` of a blob that somebody deleted.
LET_GO_US = 0
JUST_USED_US = 60 * 1_000_000
STORED_RETRY_S = 300.0  # about when the janitor has been there


def job_state_name(state: int) -> str:
    """SUCCEEDED and so on."""
    return job_service_pb2.JobState.Name(cast(Any, state)).removeprefix("JOB_STATE_")


def model_state_name(state: int) -> str:
    """ACTIVE and so on."""
    return model_service_pb2.Model.State.Name(cast(Any, state)).removeprefix("STATE_")


def now_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def visible_blobs(connection: Connection, project: str, blobs: Collection[BlobKey]) -> set[BlobKey]:
    """Those of `blobs` that the project has."""
    found: set[BlobKey] = set()
    wanted = list(blobs)
    for start in range(0, len(wanted), _CHUNK):
        hashes = [blob.sha256 for blob in wanted[start : start + _CHUNK]]
        rows = connection.execute(
            select(project_blobs.c.sha256, project_blobs.c.size_bytes).where(
                project_blobs.c.project == project, project_blobs.c.sha256.in_(hashes)
            )
        )
        found |= {BlobKey(row.sha256, row.size_bytes) for row in rows}
    return found & set(blobs)


def add_project_blob(connection: Connection, project: str, blob: BlobKey) -> None:
    """Makes a stored blob visible to a project."""
    values = {"project": project, "sha256": blob.sha256, "size_bytes": blob.size_bytes, "used_us": now_us()}
    insert_missing(connection, project_blobs, values)


def stored(connection: Connection, project: str) -> tuple[int, int]:
    """How many blobs a project has, and their bytes; what it has let go of counts no longer."""
    sizes = select(func.count(), func.coalesce(func.sum(project_blobs.c.size_bytes), 0))
    held = (project_blobs.c.project == project) & (project_blobs.c.used_us != LET_GO_US)
    blobs, size_bytes = connection.execute(sizes.where(held)).one()
    return int(blobs), int(size_bytes)


def check_stored(connection: Connection, project: str, more_bytes: int, most_bytes: int) -> None:
    """Raises StoredQuotaError where so many bytes more, besides what is announced, are too many; 0: no limit."""
    if not most_bytes:
        return
    active = uploads.c.state == upload_service_pb2.Upload.STATE_ACTIVE
    announced = select(func.coalesce(func.sum(uploads.c.size_bytes), 0)).where(uploads.c.project == project, active)
    used_bytes = stored(connection, project)[1] + int(connection.execute(announced).scalar_one())
    if used_bytes + more_bytes > most_bytes:
        raise StoredQuotaError(
            f"Project {project} has {used_bytes / 1e6:,.1f} MB of the {most_bytes / 1e6:,.1f} MB that it may have "
            "stored, unfinished uploads included. Delete jobs and models that are no longer needed.",
            subject=f"projects/{project}",
            retry_after_s=STORED_RETRY_S,
        )


def refer(connection: Connection, project: str, owner: str, blobs: Collection[BlobKey]) -> None:
    """Keeps blobs alive for `owner`. Raises BlobMissingError for those that the project does not have."""
    missing = set(blobs) - visible_blobs(connection, project, blobs)
    if missing:
        digests = sorted(blob.sha256.hex() for blob in missing)
        raise BlobMissingError(
            f"{len(missing)} blob(s) are not there, the first is {digests[0]}. Upload them, then call again.",
            metadata={"sha256": digests[0], "count": str(len(missing))},
        )
    for blob in set(blobs):
        insert_missing(connection, blob_references, {"owner": owner, "sha256": blob.sha256, "project": project})


def earlier_request(connection: Connection, project: str, kind: str, request: RequestKey | None) -> str | None:
    """The id of the resource that this request made before. Raises RequestIdReusedError."""
    if request is None:
        return None
    row = connection.execute(
        select(request_ids.c.payload_sha256, request_ids.c.resource_id).where(
            request_ids.c.project == project,
            request_ids.c.kind == kind,
            request_ids.c.request_id == request.request_id,
        )
    ).first()
    if row is None:
        return None
    if row.payload_sha256 != request.payload_sha256:
        raise RequestIdReusedError(
            f"request_id {request.request_id} was used with another request. Use a new UUID for a new request.",
            metadata={"request_id": request.request_id},
        )
    return str(row.resource_id)


def remember_request(
    connection: Connection, project: str, kind: str, request: RequestKey | None, resource_id: str
) -> None:
    """Notes what a request made."""
    if request is not None:
        connection.execute(
            insert(request_ids).values(
                project=project,
                kind=kind,
                request_id=request.request_id,
                payload_sha256=request.payload_sha256,
                resource_id=resource_id,
                create_time_us=now_us(),
            )
        )


def set_labels(connection: Connection, owner: str, values: Mapping[str, str]) -> None:
    """Replaces the labels of a model or job."""
    connection.execute(delete(labels).where(labels.c.owner == owner))
    rows = [{"owner": owner, "key": key, "value": value} for key, value in values.items()]
    if rows:
        connection.execute(insert(labels), rows)


def forget_owner(connection: Connection, owner: str) -> None:
    """Removes what hangs on a deleted model or job; blobs that nothing else of the project uses may go at once."""
    connection.execute(delete(labels).where(labels.c.owner == owner))
    held = connection.execute(select(blob_references).where(blob_references.c.owner == owner)).all()
    connection.execute(delete(blob_references).where(blob_references.c.owner == owner))
    for row in held:
        others = exists().where(
            blob_references.c.project == project_blobs.c.project, blob_references.c.sha256 == project_blobs.c.sha256
        )
        connection.execute(
            update(project_blobs)
            .where(
                project_blobs.c.project == row.project,
                project_blobs.c.sha256 == row.sha256,
                # Whoever asked for it a moment ago is about to use it.
                project_blobs.c.used_us < now_us() - JUST_USED_US,
                ~others,
            )
            .values(used_us=LET_GO_US)
        )


def check_etag(given: str, version: int) -> None:
    """Raises EtagMismatchError where an etag is given and not the current one."""
    if given and given != etag(version):
        raise EtagMismatchError(
            f"etag is {given!r}, but the resource is at {etag(version)!r}. Read it again, then repeat the change.",
            metadata={"etag": etag(version)},
        )


def page_of(connection: Connection, table: Table, query: ListQuery) -> tuple[Sequence[Row[Any]], bool]:
    """The rows of one page, newest first, and whether others follow."""
    statement: Select[Any] = select(table)
    if query.projects is not None:
        statement = statement.where(table.c.project.in_(query.projects))
    if query.before_id is not None:
        statement = statement.where(table.c.id < query.before_id)
    for clause in query.where:
        statement = statement.where(or_(*(_condition(table, term) for term in clause)))
    rows = connection.execute(statement.order_by(table.c.id.desc()).limit(query.page_size + 1)).all()
    return rows[: query.page_size], len(rows) > query.page_size


def _condition(table: Table, term: Term) -> ColumnElement[bool]:
    if term.field == "label":
        has = (labels.c.owner == table.c.id) & (labels.c.key == term.key)
        if term.operator == ":":
            return exists().where(has)
        equal = exists().where(has, labels.c.value == term.value)
        return ~equal if term.operator == "!=" else equal
    if term.field == "create_time":
        return _created(table, term.operator, int(term.value))
    column: ColumnElement[Any] = table.c[{"state": "state", "model": "model_id", "end_time": "end_time_us"}[term.field]]
    condition: ColumnElement[bool] = _COMPARE[term.operator](column, term.value)
    return condition


def _created(table: Table, comparison: str, time_us: int) -> ColumnElement[bool]:
    """An id says when it was made, to the millisecond, and is indexed."""
    first, next_one = first_id_at(time_us), first_id_at(time_us + 1000)
    if comparison in ("=", "!="):
        same = (table.c.id >= first) & (table.c.id < next_one)
        return ~same if comparison == "!=" else same
    # Later than a millisecond, or not later than it: from the next one on.
    bound = next_one if comparison in (">", "<=") else first
    return table.c.id >= bound if comparison in (">", ">=") else table.c.id < bound


_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def positions_in_turns(queued: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How many are ahead of each of (project, id), in the order of each project's queue, when projects take turns."""
    queues: dict[str, list[str]] = defaultdict(list)
    for project, item_id in queued:
        queues[project].append(item_id)
    lengths = sorted(len(queue) for queue in queues.values())
    positions = {}
    for queue in queues.values():
        for place, item_id in enumerate(queue):
            # Before each round, every queue that is long enough has had one turn a round.
            positions[item_id] = place + sum(min(place, length) for length in lengths) - min(place, len(queue))
    return positions


def unique(blobs: Iterable[BlobKey]) -> tuple[BlobKey, ...]:
    """Without repetitions, in order."""
    return tuple(dict.fromkeys(blobs))
