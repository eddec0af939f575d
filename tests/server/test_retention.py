"""What a project keeps, what goes after its time, what it has used, and lost uploads that stand in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2, server_service_pb2, upload_service_pb2
from modelpress_server import runs
from modelpress_server.names import first_id_at, new_id
from modelpress_server.services.upload_service import MIN_IDLE_S
from modelpress_server.stores.records import JUST_USED_US, now_us
from modelpress_server.stores.tables import uploads
from server_harness import PROJECT, Running, Serve, failing, until
from sqlalchemy import update

HOUR = 3600.0


async def sweep(running: Running, after_s: float) -> None:
    """A sweep as it will be after so many seconds."""
    await running.server._janitor.sweep(now_us() + round(after_s * 1e6))


async def names(running: Running, parent: str = PROJECT) -> set[str]:
    """Jobs and models that there are."""
    jobs = await running.client.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=parent))
    models = await running.client.models.ListModels(model_service_pb2.ListModelsRequest(parent=parent))
    return {job.name for job in jobs.jobs} | {model.name for model in models.models}


async def test_jobs_and_models_have_their_time(serve: Serve, tmp_path: Path) -> None:
    """They go after it; what is pinned, waits or runs stays, and so does another project's."""
    projects = tmp_path / "projects.toml"
    projects.write_text("[keeper]\njob_ttl_s = 0\nmodel_ttl_s = 0\n")
    async with serve(workers=2, job_ttl_s=HOUR, model_ttl_s=10 * HOUR, projects_file=projects) as running:
        client = running.client
        model = await client.model()
        pinned_model = await client.model(labels={"pin": "true"}, n="1")
        old = await client.wait(await client.job(model))
        pinned = await client.wait(await client.job(model, labels={"pin": ""}, skip_cache=True))
        unpinned = await client.wait(await client.job(model, labels={"pin": "false"}, skip_cache=True))
        busy = await client.model(compress="wait")
        running_job = await client.job(busy)
        kept = await client.wait(await client.job(await client.model("projects/keeper")))
        await sweep(running, HOUR / 2)
        assert {old.name, pinned.name, unpinned.name} <= await names(running)
        await sweep(running, 2 * HOUR)
        everything = {model.name, pinned_model.name, busy.name, running_job.name, pinned.name}
        assert await names(running) == everything
        await sweep(running, 20 * HOUR)
        assert await names(running) == everything - {model.name}
        assert kept.name in await names(running, "projects/keeper")
        running.executor.gate.set()
        await client.wait(running_job)


async def test_a_job_is_pinned_later(serve: Serve) -> None:
    """UpdateJob changes labels, checks the etag, and refuses what is no label."""
    async with serve(job_ttl_s=HOUR) as running:
        client = running.client
        job = await client.wait(await client.job(await client.model(), labels={"team": "a"}))
        update_job = job_service_pb2.UpdateJobRequest(job=job_service_pb2.Job(name=job.name, labels={"pin": "yes"}))
        updated = await client.jobs.UpdateJob(update_job)
        assert (dict(updated.labels), updated.etag != job.etag) == ({"pin": "yes"}, True)
        nothing = job_service_pb2.UpdateJobRequest(job=job_service_pb2.Job(name=job.name))
        assert dict((await client.jobs.UpdateJob(nothing)).labels) == {"pin": "yes"}
        await sweep(running, 2 * HOUR)
        assert job.name in await names(running)
        found = await client.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=PROJECT, filter='labels.pin = "yes"'))
        assert [item.name for item in found.jobs] == [job.name]
        update_job.job.etag = job.etag
        assert (await failing(client.jobs.UpdateJob(update_job))).reason == "ETAG_MISMATCH"
        update_job.job.labels["NOT A KEY"] = "x"
        assert (await failing(client.jobs.UpdateJob(update_job))).reason == "INVALID_FIELDS"


@pytest.mark.parametrize(
    ("paths", "given", "left"),
    [
        ([], {}, {"a": "1"}),
        ([], {"b": "2"}, {"b": "2"}),
        (["labels"], {}, {}),
        (["labels"], {"b": "2"}, {"b": "2"}),
        (["*"], {}, {}),
        (["state"], {"b": "2"}, None),
        (["*", "labels"], {"b": "2"}, None),
    ],
)
async def test_masks_of_updates(
    running: Running, paths: list[str], given: dict[str, str], left: dict[str, str] | None
) -> None:
    """AIP-134, for jobs and models alike: an empty mask changes what is set, `*` everything; others are refused."""
    client, mask = running.client, FieldMask(paths=paths)
    model = await client.model(labels={"a": "1"})
    job = await client.wait(await client.job(model, labels={"a": "1"}))
    of_job = job_service_pb2.Job(name=job.name, labels=given)
    of_model = model_service_pb2.Model(name=model.name, labels=given)
    calls = [
        client.jobs.UpdateJob(job_service_pb2.UpdateJobRequest(job=of_job, update_mask=mask)),
        client.models.UpdateModel(model_service_pb2.UpdateModelRequest(model=of_model, update_mask=mask)),
    ]
    for call in calls:
        if left is None:
            assert (await failing(call)).reason == "INVALID_FIELDS"
        else:
            assert dict((await call).labels) == left


async def test_a_model_in_use_stays(serve: Serve) -> None:
    """A job after the model's own time, or a change of it, gives it new time."""
    async with serve(model_ttl_s=HOUR) as running:
        client = running.client
        model = await client.model()
        await client.wait(await client.job(model))
        await sweep(running, HOUR - 60)
        assert model.name in await names(running)
        await sweep(running, HOUR + 60)
        assert model.name not in await names(running)


async def test_usage(serve: Serve) -> None:
    """What there is, what was used, limits; of this project alone."""
    async with serve(max_models=5, job_ttl_s=HOUR) as running:
        client = running.client
        first = await client.wait(await client.job(await client.model()))
        await client.start_upload(b"under way")
        usage = await client.info.GetUsage(server_service_pb2.GetUsageRequest(parent=PROJECT))
        files = {entry.digest.sha256: entry.digest.size_bytes for item in first.artifacts for entry in item.files}
        assert usage.stored_bytes == sum(files.values()) + len("{}")
        assert (usage.blobs, usage.models, usage.open_uploads) == (len(files) + 1, 1, 1)
        assert (usage.queued_jobs, usage.running_jobs, usage.ended_jobs, usage.runs) == (0, 0, 1, 1)
        assert (usage.cpu_seconds, usage.run_seconds) == (2.5, 1.5)
        assert (usage.max_models, usage.job_ttl_seconds, usage.weight) == (5, HOUR, 1.0)
        await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name=first.name))
        usage = await client.info.GetUsage(server_service_pb2.GetUsageRequest(parent=PROJECT))
        assert (usage.ended_jobs, usage.runs, usage.cpu_seconds) == (0, 1, 2.5)
        other = await client.info.GetUsage(server_service_pb2.GetUsageRequest(parent="projects/b"))
        assert (other.stored_bytes, other.runs, other.cpu_seconds) == (0, 0, 0.0)


async def test_usage_is_noted_while_a_job_runs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed now has noted what the attempt has taken so far."""
    monkeypatch.setattr(runs, "CHARGE_INTERVAL_S", 0.05)
    request = server_service_pb2.GetUsageRequest(parent=PROJECT)
    async with serve() as running:
        client = running.client
        job = await client.job(await client.model(compress="wait"))

        async def noted() -> bool:
            return (await client.info.GetUsage(request)).run_seconds > 0

        await until(noted)
        usage = await client.info.GetUsage(request)
        assert (usage.running_jobs, usage.runs, usage.cpu_seconds) == (1, 1, 1.0)
        running.executor.gate.set()
        await client.wait(job)
        usage = await client.info.GetUsage(request)
        assert (usage.runs, usage.cpu_seconds, usage.run_seconds) == (1, 3.5, 2.5)


class TestLimitsOfAProject:
    @pytest.fixture
    def projects(self, tmp_path: Path) -> Path:
        """A project that may have less than others."""
        path = tmp_path / "projects.toml"
        path.write_text("[small]\nmax_stored_bytes = 100\nmax_open_uploads = 2\n")
        return path

    async def test_bytes(self, serve: Serve, projects: Path) -> None:
        """Stored and announced bytes count together; what is deleted makes room at once; other projects have theirs."""
        async with serve(projects_file=projects) as running:
            client, small = running.client, "projects/small"
            announced = await client.start_upload(bytes(60), small)
            failure = await failing(client.start_upload(bytes(41), small))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert "Delete jobs and models" in failure.message
            assert failure.detail(error_details_pb2.QuotaFailure).violations[0].subject == small
            await client.start_upload(bytes(41))
            await client.uploads.CancelUpload(upload_service_pb2.CancelUploadRequest(name=announced.name))
            model = await client.model(small)
            await client.upload(bytes(98), small)
            refused = await failing(client.job(model))
            assert refused.reason == "QUOTA_EXCEEDED"
            usage = await client.info.GetUsage(server_service_pb2.GetUsageRequest(parent=small))
            assert (usage.stored_bytes, usage.max_stored_bytes, usage.max_open_uploads) == (100, 100, 2)

            def age(connection: Any) -> None:
                connection.exec_driver_sql("UPDATE project_blobs SET used_us = used_us - ?", (2 * JUST_USED_US,))

            await running.server._database.write(age)
            await client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name))
            usage = await client.info.GetUsage(server_service_pb2.GetUsageRequest(parent=small))
            assert usage.stored_bytes == 98
            await client.start_upload(bytes(2), small)

    async def test_open_uploads(self, serve: Serve, projects: Path) -> None:
        """The file's number holds for its project, the setting's for others."""
        async with serve(projects_file=projects, max_open_uploads=3) as running:
            for parent, most in (("projects/small", 2), (PROJECT, 3)):
                for number in range(most):
                    await running.client.start_upload(bytes([number]), parent)
                assert (await failing(running.client.start_upload(b"more", parent))).reason == "QUOTA_EXCEEDED"


class TestLostUploads:
    async def listed(self, running: Running, **fields: Any) -> upload_service_pb2.ListUploadsResponse:
        request = upload_service_pb2.ListUploadsRequest(parent=PROJECT, **fields)
        return await running.client.uploads.ListUploads(request)

    async def test_they_are_listed_and_can_be_cancelled(self, serve: Serve) -> None:
        """In pages, newest first, the unfinished alone."""
        async with serve(max_open_uploads=3) as running:
            client = running.client
            await client.upload(b"complete")
            made = [await client.start_upload(bytes([number]) * 10) for number in range(3)]
            failure = await failing(client.start_upload(b"one more"))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert "compress-client uploads --cancel" in failure.message
            page = await self.listed(running, page_size=2)
            assert [upload.name for upload in page.uploads] == [made[2].name, made[1].name]
            rest = await self.listed(running, page_size=2, page_token=page.next_page_token)
            assert ([upload.name for upload in rest.uploads], rest.next_page_token) == ([made[0].name], "")
            await client.uploads.CancelUpload(upload_service_pb2.CancelUploadRequest(name=made[1].name))
            await client.start_upload(b"one more")

    async def test_one_that_is_idle_gives_way(self, serve: Serve) -> None:
        """A project that lost all of its uploads is not locked out: the longest idle goes, the others stay."""
        async with serve(max_open_uploads=3) as running:
            client = running.client
            made = [await client.start_upload(bytes([number]) * 10) for number in range(3)]
            idle = made[1].name.rpartition("/")[2]
            ttl_us = round(running.settings.upload_ttl_s * 1e6)
            expires_us = now_us() - round(MIN_IDLE_S * 1e6) + ttl_us
            await running.server._database.write(
                lambda connection: connection.execute(
                    update(uploads).where(uploads.c.id == idle).values(expire_time_us=expires_us)
                )
            )
            fresh = await client.start_upload(b"one more")
            listed = await self.listed(running)
            assert {upload.name for upload in listed.uploads} == {made[0].name, made[2].name, fresh.name}
            assert (await failing(client.start_upload(b"yet another"))).reason == "QUOTA_EXCEEDED"


def test_ids_by_time() -> None:
    """An id that is made later is larger, one that was made before smaller."""
    before, now = new_id(), Timestamp()
    now.GetCurrentTime()
    assert first_id_at(now.ToMicroseconds() - 10_000_000) < before < first_id_at(now.ToMicroseconds() + 10_000_000)
