"""The client for asyncio; the blocking one runs it in a thread."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from modelpress_protos.recipe import to_dict
from modelpress_protos.v1 import job_service_pb2 as jobs_pb
from modelpress_protos.v1 import model_service_pb2 as models_pb
from modelpress_protos.v1 import server_service_pb2 as server_pb
from modelpress_protos.v1 import upload_service_pb2 as uploads_pb
from modelpress_protos.v1.common_pb2 import FileEntry, TensorSpec
from modelpress_protos.v1.recipe_pb2 import Recipe

from modelpress_client import names, recipes
from modelpress_client.async_job import AsyncJob
from modelpress_client.connection import Connection
from modelpress_client.convert import Conversion
from modelpress_client.errors import TimedOutError, TransferError, UsageError, from_job_status
from modelpress_client.inputs import parse_inputs
from modelpress_client.report import Report
from modelpress_client.resources import Model
from modelpress_client.settings import DEFAULT_PROJECT, DEFAULT_SERVER, RetryPolicy, Settings
from modelpress_client.sources import check_data, check_source, prepared
from modelpress_client.transfers import LocalBlob, OnProgress, hash_file
from modelpress_client.uploads import upload_blobs

POLL_INTERVAL_S = 0.1  # of a model that is being inspected; doubles up to
MAX_POLL_INTERVAL_S = 2.0
PAGE_SIZE = 100
LABEL_TRIES = 10

ResultT = TypeVar("ResultT")
RecipeSource = str | Path | Mapping[str, Any] | Recipe


class AsyncClient:
    """A client of one server and one project. Connects on first use; use as an async context manager."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        project: str = DEFAULT_PROJECT,
        token: str | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """ca, cert, key: PEM files; any of them turns TLS on. See Settings for the spelling of `server`."""
        self.settings = Settings(
            server=server,
            project=names.check_project(project),
            token=token,
            ca=Path(ca) if ca else None,
            cert=Path(cert) if cert else None,
            key=Path(key) if key else None,
            retry=retry or RetryPolicy(),
        )
        self._opened: Connection | None = None

    @property
    def _connection(self) -> Connection:
        # Made on first use, so that it belongs to the event loop that runs then.
        if self._opened is None:
            self._opened = Connection(self.settings)
        return self._opened

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Jobs go on."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    # --- models --------------------------------------------------------------------------------------------------

    async def upload(
        self,
        path: str | Path,
        *,
        inputs: Sequence[str | TensorSpec] = (),
        architecture: str | None = None,
        trust_pickle: bool = False,
        state_dict_key: str | None = None,
        ignore_weights: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        display_name: str | None = None,
        on_progress: OnProgress | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Model:
        """Brings a model to the server; what it already has is not sent again.

        inputs: `NAME:DTYPE[DIM,...]`, for formats that do not record them. architecture: `package.module:factory` for
        weights alone (state dict, safetensors, a folder of them), or `transformers:auto` for a folder with config.json.
        state_dict_key: where in the file the weights lie, as `params_ema`. ignore_weights: patterns of names of weights
        that are left out. trust_pickle: read a pickled module, on this machine, running its code. on_note: gets what
        was chosen or left out where weights were converted.

        Raises UsageError for wrong arguments, UnusableInputError for a file that no server would take, and what the
        transfer raises. The server inspects the model after this returns: see `inspect`.
        """
        specs = parse_inputs(inputs)
        wanted = Conversion(architecture, trust_pickle, tuple(specs), state_dict_key, tuple(ignore_weights))
        source = await asyncio.to_thread(check_source, Path(path), wanted)
        async with prepared(source, wanted) as (files, converted):
            if converted and on_note:
                for note in converted.notes:
                    on_note(note)
            await self._connection.reach()
            blobs = {name: await hash_file(file, on_progress) for name, file in files.items()}
            model = models_pb.Model(
                display_name=display_name or source.path.name,
                files=[FileEntry(path=name, digest=blob.digest) for name, blob in blobs.items()],
                input_hints=specs,
                source=converted.source if converted else None,
                labels=labels or {},
            )
            request = models_pb.CreateModelRequest(
                parent=self.settings.parent, model=model, request_id=str(uuid.uuid4())
            )
            create = partial(self._connection.call, self._connection.models.CreateModel, request)
            return Model(await self._with_blobs(list(blobs.values()), create, on_progress))

    async def model(self, name: str) -> Model:
        """Reads a model."""
        request = models_pb.GetModelRequest(name=names.full_name(name, "models", self.settings.project))
        return Model(await self._connection.call(self._connection.models.GetModel, request))

    async def inspect(
        self,
        model: Model | str,
        *,
        timeout_s: float | None = None,
        raise_if_rejected: bool = True,
        on_wait: Callable[[Model], None] | None = None,
    ) -> Model:
        """Waits until the server has inspected a model. Raises JobFailedError when the server refuses it.

        on_wait: gets the model whenever it was read and is not inspected yet.
        """
        name = model if isinstance(model, str) else model.name
        delay_s = POLL_INTERVAL_S
        try:
            async with asyncio.timeout(timeout_s):
                while (current := await self.model(name)).state == "PROCESSING":
                    if on_wait is not None:
                        on_wait(current)
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, MAX_POLL_INTERVAL_S)
        except TimeoutError:
            raise TimedOutError(f"{name} was not inspected within {timeout_s:g} s.", details={"model": name}) from None
        if raise_if_rejected and current.state == "REJECTED":
            raise from_job_status(current.message.error, details={"model": name})
        return current

    async def models(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Model]:
        """Models, newest first."""
        found: list[Model] = []
        request = models_pb.ListModelsRequest(parent=self.settings.parent, filter=names.filter_text(state, labels))
        while limit is None or len(found) < limit:
            request.page_size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            page = await self._connection.call(self._connection.models.ListModels, request)
            found += map(Model, page.models)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return found[:limit]

    # --- jobs ----------------------------------------------------------------------------------------------------

    async def compress(
        self,
        model: Model | str,
        *,
        recipe: RecipeSource = "default",
        data: str | Path | None = None,
        eval: str | Path | None = None,
        overrides: Sequence[str] = (),
        metric: str | None = None,
        max_drop: float | None = None,
        labels: Mapping[str, str] | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        max_attempts: int = 0,
        priority: int = 0,
        skip_cache: bool = False,
        on_progress: OnProgress | None = None,
    ) -> AsyncJob:
        """Submits a job and returns at once.

        recipe: a preset's name, a YAML file, a mapping or a message. overrides: `path=value` as in --set. data: .npz of
        representative inputs; eval: .npz of inputs and `labels`. metric and max_drop set the recipe's constraints.
        priority: -100 to 100; the highest of a project's queued jobs is next.

        Raises InvalidRecipeError with all violations before anything is sent.
        """
        message = await self.resolve_recipe(recipe, overrides=overrides, metric=metric, max_drop=max_drop)
        name = names.full_name(model, "models", self.settings.project) if isinstance(model, str) else model.name
        spec = jobs_pb.JobSpec(
            model=name, recipe=message, max_attempts=max_attempts, priority=priority, skip_cache=skip_cache
        )
        blobs = []
        for path, digest in ((data, spec.data), (eval, spec.eval_data)):
            if path is not None:
                blobs.append(await _data_blob(Path(path), on_progress))
                digest.CopyFrom(blobs[-1].digest)
        for limit_s, field in ((queue_timeout_s, spec.queue_timeout), (run_timeout_s, spec.run_timeout)):
            if limit_s is not None:
                field.CopyFrom(Duration(seconds=int(limit_s), nanos=round(limit_s % 1 * 1e9)))
        request = jobs_pb.CreateJobRequest(
            parent=self.settings.parent, job=jobs_pb.Job(spec=spec, labels=labels or {}), request_id=str(uuid.uuid4())
        )
        create = partial(self._connection.call, self._connection.jobs.CreateJob, request)
        return AsyncJob(self._connection, await self._with_blobs(blobs, create, on_progress))

    async def resolve_recipe(
        self,
        recipe: RecipeSource = "default",
        *,
        overrides: Sequence[str] = (),
        metric: str | None = None,
        max_drop: float | None = None,
    ) -> Recipe:
        """The message of a recipe with its overrides; asks the server only for presets."""
        if isinstance(recipe, Recipe):
            document: Mapping[str, Any] | None = to_dict(recipe)
        else:
            document = recipes.local_document(recipe)
        presets: Sequence[server_pb.Preset] = ()
        if document is None:
            presets = (await self.server_info()).presets
            document = recipes.preset_document(str(recipe), presets)
        return recipes.build(document, overrides=overrides, metric=metric, max_drop=max_drop, presets=presets)

    async def job(self, name: str) -> AsyncJob:
        """Reads a job."""
        request = jobs_pb.GetJobRequest(name=names.full_name(name, "jobs", self.settings.project))
        return AsyncJob(self._connection, await self._connection.call(self._connection.jobs.GetJob, request))

    async def jobs(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[AsyncJob]:
        """Jobs, newest first."""
        found: list[AsyncJob] = []
        request = jobs_pb.ListJobsRequest(parent=self.settings.parent, filter=names.filter_text(state, labels))
        while limit is None or len(found) < limit:
            request.page_size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            page = await self._connection.call(self._connection.jobs.ListJobs, request)
            found += [AsyncJob(self._connection, job) for job in page.jobs]
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return found[:limit]

    async def report(self, job: str) -> Report:
        """The report of a job, by its name."""
        return await (await self.job(job)).report()

    # --- server --------------------------------------------------------------------------------------------------

    async def delete(self, name: str) -> None:
        """Deletes a model or a job that has ended, by its full name or `models/M`, `jobs/J`."""
        full = names.full_name(name, None, self.settings.project)
        if "/jobs/" in full:
            await self._connection.call(self._connection.jobs.DeleteJob, jobs_pb.DeleteJobRequest(name=full))
        else:
            await self._connection.call(self._connection.models.DeleteModel, models_pb.DeleteModelRequest(name=full))

    async def label(self, name: str, labels: Mapping[str, str], *, remove: Collection[str] = ()) -> dict[str, str]:
        """Gives a model or a job labels, and takes others away; returns all that it has then.

        `pin` keeps it from being deleted after its time. name: as of `delete`. Raises UsageError for a wrong label.
        """
        full = names.full_name(name, None, self.settings.project)
        names.parse_labels(f"{key}={value}" for key, value in labels.items())
        tries = LABEL_TRIES
        while True:
            try:
                return await self._label(full, labels, remove)
            except UsageError as error:
                tries -= 1
                # A job that runs changes with each step that it makes.
                if error.reason != "ETAG_MISMATCH" or not tries:
                    raise

    async def _label(self, full: str, labels: Mapping[str, str], remove: Collection[str]) -> dict[str, str]:
        connection = self._connection
        if "/jobs/" in full:
            job = await connection.call(connection.jobs.GetJob, jobs_pb.GetJobRequest(name=full))
            changed = jobs_pb.Job(name=full, etag=job.etag, labels=_labelled(job.labels, labels, remove))
            update = jobs_pb.UpdateJobRequest(job=changed, update_mask=FieldMask(paths=["labels"]))
            job = await connection.call(connection.jobs.UpdateJob, update)
            return dict(job.labels)
        model = await connection.call(connection.models.GetModel, models_pb.GetModelRequest(name=full))
        wanted = models_pb.Model(name=full, etag=model.etag, labels=_labelled(model.labels, labels, remove))
        request = models_pb.UpdateModelRequest(model=wanted, update_mask=FieldMask(paths=["labels"]))
        return dict((await connection.call(connection.models.UpdateModel, request)).labels)

    async def usage(self) -> server_pb.Usage:
        """What the project has, has used so far, and may have."""
        request = server_pb.GetUsageRequest(parent=self.settings.parent)
        return await self._connection.call(self._connection.server.GetUsage, request)

    async def uploads(self) -> list[uploads_pb.Upload]:
        """Unfinished uploads of the project, newest first."""
        found: list[uploads_pb.Upload] = []
        request = uploads_pb.ListUploadsRequest(parent=self.settings.parent)
        while True:
            page = await self._connection.call(self._connection.uploads.ListUploads, request)
            found += page.uploads
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return found

    async def cancel_upload(self, name: str) -> None:
        """Drops an unfinished upload and frees its space."""
        full = name if "/" in name else f"{self.settings.parent}/uploads/{name}"
        await self._connection.call(self._connection.uploads.CancelUpload, uploads_pb.CancelUploadRequest(name=full))

    async def server_info(self) -> server_pb.ServerInfo:
        """Version, limits, formats, techniques, presets, devices."""
        return await self._connection.call(self._connection.server.GetServerInfo, server_pb.GetServerInfoRequest())

    async def health(self) -> str:
        """SERVING, NOT_SERVING or UNKNOWN. Raises ServerUnreachableError."""
        return await self._connection.serving_status()

    async def _with_blobs(
        self, blobs: Sequence[LocalBlob], create: Callable[[], Awaitable[ResultT]], on_progress: OnProgress | None
    ) -> ResultT:
        """Creates what refers to blobs; a blob that the server has collected meanwhile is sent once more."""
        if blobs:
            await upload_blobs(self._connection, blobs, on_progress)
        try:
            return await create()
        except TransferError as error:
            if error.reason != "BLOB_MISSING" or not blobs:
                raise
        await upload_blobs(self._connection, blobs, on_progress)
        return await create()


def _labelled(present: Mapping[str, str], labels: Mapping[str, str], remove: Collection[str]) -> dict[str, str]:
    return {key: value for key, value in {**present, **labels}.items() if key not in remove}


async def _data_blob(path: Path, on_progress: OnProgress | None) -> LocalBlob:
    await asyncio.to_thread(check_data, path)
    return await hash_file(path, on_progress)
