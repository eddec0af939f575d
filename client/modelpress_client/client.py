"""The blocking client: AsyncClient on an event loop in a thread of its own, method by method."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from modelpress_client.async_client import AsyncClient, RecipeSource
from modelpress_client.async_job import AsyncJob
from modelpress_client.report import Report
from modelpress_client.resources import JobEvent, Model
from modelpress_client.settings import DEFAULT_PROJECT, DEFAULT_SERVER, RetryPolicy, Settings
from modelpress_client.transfers import OnProgress

if TYPE_CHECKING:
    from modelpress_protos.v1.common_pb2 import TensorSpec
    from modelpress_protos.v1.job_service_pb2 import Job as JobMessage
    from modelpress_protos.v1.job_service_pb2 import StreamJobLogsResponse
    from modelpress_protos.v1.recipe_pb2 import Recipe
    from modelpress_protos.v1.server_service_pb2 import ServerInfo, Usage
    from modelpress_protos.v1.upload_service_pb2 import Upload

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_ignore_shared_poller)
        self._thread = threading.Thread(target=self._loop.run_forever, name="modelpress-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Runs a coroutine to its end; an interrupt here cancels it there."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("The client is closed.")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, iterator: AsyncIterator[ItemT]) -> Iterator[ItemT]:
        """The items of an async generator, one by one; closes it when the caller stops early."""

        async def following() -> ItemT:
            return await anext(iterator)

        async def close() -> None:
            if (aclose := getattr(iterator, "aclose", None)) is not None:
                await aclose()

        try:
            while True:
                try:
                    item = self.run(following())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._loop.is_closed():
                self.run(close())

    def stop(self) -> None:
        """Ends the thread; may be called again."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def _ignore_shared_poller(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """grpc.aio has one poller for all loops of a process: the loop that comes second finds its wake-up byte taken."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


class Job:
    """A job. `message` is as last read: by `refresh`, `watch`, `wait` or `cancel`."""

    def __init__(self, thread: _LoopThread, job: AsyncJob) -> None:
        self._thread = thread
        self._job = job

    def __repr__(self) -> str:
        return f"<Job {self.name} {self.state}>"

    @property
    def message(self) -> JobMessage:
        """Every field."""
        return self._job.message

    @property
    def name(self) -> str:
        """projects/P/jobs/J."""
        return self._job.name

    @property
    def state(self) -> str:
        """QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED or EXPIRED."""
        return self._job.state

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self._job.has_ended

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return self._job.to_dict()

    def refresh(self) -> None:
        """Reads the job again."""
        self._thread.run(self._job.refresh())

    def watch(self) -> Iterator[JobEvent]:
        """Every event until the job has ended; survives cuts."""
        return self._thread.iterate(self._job.watch())

    def wait(self, timeout_s: float | None = None) -> Report:
        """Waits for the end and returns the report; raises as AsyncJob.wait does."""
        return self._thread.run(self._job.wait(timeout_s))

    def report(self) -> Report:
        """The report of a job that has succeeded; the exception of one that has not."""
        return self._thread.run(self._job.report())

    def read_artifact(self, artifact: str) -> bytes:
        """`report.json` or `report.html` as bytes."""
        return self._thread.run(self._job.read_artifact(artifact))

    @property
    def candidates(self) -> list[str]:
        """The ids of the candidates whose models can be downloaded; `report` has the figures of all."""
        return self._job.candidates

    def download(
        self,
        path: str | Path,
        *,
        artifact: str = "model",
        candidate: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Path]:
        """Writes an artifact, or a candidate's model, to `path`, data files beside it. Returns the paths written."""
        return self._thread.run(
            self._job.download(path, artifact=artifact, candidate=candidate, on_progress=on_progress)
        )

    def cancel(self) -> None:
        """Asks for cancellation; a job that has ended stays as it is."""
        self._thread.run(self._job.cancel())

    def logs(self, *, follow: bool = False) -> Iterator[StreamJobLogsResponse]:
        """The lines of its log; with `follow` until it has ended."""
        return self._thread.iterate(self._job.logs(follow=follow))


class Client:
    """A client of one server and one project, for code without asyncio. Use as a context manager, or call `close`.

    Methods may be called from several threads; `on_progress` is called in a thread of the client's own.
    All that AsyncClient says of arguments and exceptions holds here.
    """

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
        self._client = AsyncClient(server, project=project, token=token, ca=ca, cert=cert, key=key, retry=retry)
        self._thread = _LoopThread()

    @property
    def settings(self) -> Settings:
        """How the server is reached."""
        return self._client.settings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; may be called again. Jobs go on."""
        try:
            self._thread.run(self._client.close())
        except RuntimeError:
            return  # closed already
        self._thread.stop()

    def upload(
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
        """Brings a model to the server; what it already has is not sent again."""
        return self._thread.run(
            self._client.upload(
                path,
                inputs=inputs,
                architecture=architecture,
                trust_pickle=trust_pickle,
                state_dict_key=state_dict_key,
                ignore_weights=ignore_weights,
                labels=labels,
                display_name=display_name,
                on_progress=on_progress,
                on_note=on_note,
            )
        )

    def model(self, name: str) -> Model:
        """Reads a model."""
        return self._thread.run(self._client.model(name))

    def inspect(
        self,
        model: Model | str,
        *,
        timeout_s: float | None = None,
        raise_if_rejected: bool = True,
        on_wait: Callable[[Model], None] | None = None,
    ) -> Model:
        """Waits until the server has inspected a model."""
        return self._thread.run(
            self._client.inspect(model, timeout_s=timeout_s, raise_if_rejected=raise_if_rejected, on_wait=on_wait)
        )

    def models(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Model]:
        """Models, newest first."""
        return self._thread.run(self._client.models(state=state, labels=labels, limit=limit))

    def compress(
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
    ) -> Job:
        """Submits a job and returns at once."""
        job = self._thread.run(
            self._client.compress(
                model,
                recipe=recipe,
                data=data,
                eval=eval,
                overrides=overrides,
                metric=metric,
                max_drop=max_drop,
                labels=labels,
                queue_timeout_s=queue_timeout_s,
                run_timeout_s=run_timeout_s,
                max_attempts=max_attempts,
                priority=priority,
                skip_cache=skip_cache,
                on_progress=on_progress,
            )
        )
        return Job(self._thread, job)

    def resolve_recipe(
        self,
        recipe: RecipeSource = "default",
        *,
        overrides: Sequence[str] = (),
        metric: str | None = None,
        max_drop: float | None = None,
    ) -> Recipe:
        """The message of a recipe with its overrides."""
        return self._thread.run(
            self._client.resolve_recipe(recipe, overrides=overrides, metric=metric, max_drop=max_drop)
        )

    def job(self, name: str) -> Job:
        """Reads a job."""
        return Job(self._thread, self._thread.run(self._client.job(name)))

    def jobs(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Job]:
        """Jobs, newest first."""
        found = self._thread.run(self._client.jobs(state=state, labels=labels, limit=limit))
        return [Job(self._thread, job) for job in found]

    def report(self, job: str) -> Report:
        """The report of a job, by its name."""
        return self.job(job).report()

    def delete(self, name: str) -> None:
        """Deletes a model or a job that has ended, by its full name or `models/M`, `jobs/J`."""
        self._thread.run(self._client.delete(name))

    def label(self, name: str, labels: Mapping[str, str], *, remove: Collection[str] = ()) -> dict[str, str]:
        """Gives a model or a job labels, and takes others away; returns all that it has then."""
        return self._thread.run(self._client.label(name, labels, remove=remove))

    def usage(self) -> Usage:
        """What the project has, has used so far, and may have."""
        return self._thread.run(self._client.usage())

    def uploads(self) -> list[Upload]:
        """Unfinished uploads of the project, newest first."""
        return self._thread.run(self._client.uploads())

    def cancel_upload(self, name: str) -> None:
        """Drops an unfinished upload and frees its space."""
        self._thread.run(self._client.cancel_upload(name))

    def server_info(self) -> ServerInfo:
        """Version, limits, formats, techniques, presets, devices."""
        return self._thread.run(self._client.server_info())

    def health(self) -> str:
        """SERVING, NOT_SERVING or UNKNOWN."""
        return self._thread.run(self._client.health())
