"""Records of models; `sql_models` implements the store."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from modelpress_protos.v1 import model_service_pb2

from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.queries import ListQuery, Page, Rank, RequestKey, etag


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model. `inspection_key` is the same for models that an inspection must find the same of.

    `owner`: the server that inspects it.
    """

    project: str
    id: str
    version: int
    inspection_key: bytes
    message: model_service_pb2.Model
    owner: str | None = None

    def to_message(self) -> model_service_pb2.Model:
        """A copy for the client."""
        copy = model_service_pb2.Model()
        copy.CopyFrom(self.message)
        copy.etag = etag(self.version)
        return copy


@dataclass(frozen=True, slots=True)
class ModelQuota:
    """Most models of a project, and most of them that wait for inspection; 0: no limit."""

    models: int = 0
    pending: int = 0


class ModelStore(Protocol):
    """Models of all projects."""

    async def create(
        self, record: ModelRecord, blobs: Collection[BlobKey], request: RequestKey | None, *, most: ModelQuota
    ) -> ModelRecord:
        """Stores a model, or returns the one that the request id made before.

        An earlier inspection of the same content in the same project is taken over. Raises BlobMissingError,
        RequestIdReusedError, QuotaExceededError.
        """
        ...

    async def get(self, project: str, model_id: str) -> ModelRecord:
        """Raises ResourceNotFoundError."""
        ...

    async def list_page(self, query: ListQuery) -> Page[ModelRecord]:
        """One page, newest first."""
        ...

    async def update(
        self, project: str, model_id: str, etag: str, change: Callable[[model_service_pb2.Model], None]
    ) -> ModelRecord:
        """Applies a change. Raises ResourceNotFoundError, EtagMismatchError."""
        ...

    async def delete(self, project: str, model_id: str, etag: str) -> None:
        """Raises ResourceNotFoundError, EtagMismatchError."""
        ...

    async def claim_inspection(self, busy: Collection[str], rank: Rank, owner: str) -> ModelRecord | None:
        """Takes the oldest model of the first ranked project that has one to inspect, for the server `owner`.

        Not one in `busy`, nor one that another server inspects or a running job inspects anyway.
        """
        ...

    async def processing_positions(self) -> dict[str, int]:
        """About how many inspections come before that of each model, when projects take turns one by one."""
        ...

    async def finish_inspection(self, model_id: str, found: model_service_pb2.Model) -> None:
        """Stores state, format, inspection and error of `found`; nothing where the model is gone or was inspected."""
        ...
