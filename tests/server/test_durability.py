"""Bytes that rot, disks that fill up: what was stored is verified, healed, and can always be let go."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from manual_clock import ManualClock
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, upload_service_pb2
from modelpress_server import ballast
from modelpress_server.background_scrub import FIRST_AFTER_S
from modelpress_server.cli import command
from modelpress_server.config import MIB
from modelpress_server.errors import StorageFullError
from modelpress_server.shortage import storage_full
from modelpress_server.space import Space
from modelpress_server.stores.database import Database
from modelpress_server.stores.records import JUST_USED_US, now_us
from modelpress_server.waiting import Waits
from server_harness import PROJECT, Client, Running, Serve, chunks, digest_of, failing, until

S = job_service_pb2
U = upload_service_pb2
usage = namedtuple("usage", "total used free")
Model = model_service_pb2.Model


def blob_path(running: Running, sha256: bytes) -> Path:
    name = sha256.hex()
    return running.settings.data_dir / "blobs" / name[:2] / name


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


async def missing(client: Client, digest: common_pb2.Digest) -> bool:
    request = U.FindMissingBlobsRequest(parent=PROJECT, digests=[digest])
    return bool((await client.uploads.FindMissingBlobs(request)).missing)


class TestBitRot:
    async def test_a_rotten_model_is_not_compressed_and_heals(self, serve: Serve, clock: ManualClock) -> None:
        """The job says what to do, the blob counts as missing, its upload is not skipped, and the model works again."""
        content = json.dumps({}).encode()
        async with serve(clock) as running:
            client = running.client
            model = await client.model()
            digest = digest_of(content)
            flip_a_bit(blob_path(running, digest.sha256))
            ended = await client.wait(await client.job(model))
            assert (ended.state, running.executor.started) == (S.JOB_STATE_FAILED, [])
            assert "Upload the file again" in ended.error.message
            assert (running.settings.data_dir / "quarantine" / digest.sha256.hex()).exists()
            assert await missing(client, digest)
            failure = await failing(client.job(model))
            assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BLOB_MISSING")
            upload = await client.start_upload(content)
            assert upload.state == U.Upload.STATE_ACTIVE
            await client.send(chunks(upload.name, content))
            ended = await client.wait(await client.job(model))
            assert ended.state == S.JOB_STATE_SUCCEEDED

    async def test_a_rotten_model_waits_for_its_inspection(self, serve: Serve, clock: ManualClock) -> None:
        """It is PROCESSING until somebody uploads the file again, and never refused."""
        content = json.dumps({}).encode()
        async with serve(clock) as running:
            running.executor.broken = True
            model = await running.client.model()
            await until(lambda: not running.server._scheduler._host.able)
            flip_a_bit(blob_path(running, digest_of(content).sha256))
            running.executor.broken = False

            async def state(wanted: int) -> bool:
                clock.advance(Waits.MAX_S)
                request = model_service_pb2.GetModelRequest(name=model.name)
                return (await running.client.models.GetModel(request)).state == wanted

            await until(
                lambda: missing(running.client, digest_of(content)) if clock.advance(Waits.MAX_S) is None else 0
            )
            assert await state(Model.STATE_PROCESSING)
            await running.client.upload(content)
            await until(lambda: state(Model.STATE_ACTIVE))

    async def test_a_rotten_blob_is_not_handed_out_whole(self, running: Running) -> None:
        """A download ends with an error before its last chunk, and the blob is set aside."""
        content = os.urandom(3 * MIB)
        digest = await running.client.upload(content)
        flip_a_bit(blob_path(running, digest.sha256))
        call = running.client.uploads.ReadBlob(U.ReadBlobRequest(parent=PROJECT, digest=digest))
        received = [await call.read(), await call.read()]
        assert sum(len(chunk.data) for chunk in received) == 2 * MIB
        failure = await failing(call.read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BLOB_MISSING")
        assert await missing(running.client, digest)
        await running.client.upload(content)
        assert await running.client.read(digest) == content

    async def test_stored_files_are_read_again(self, serve: Serve, clock: ManualClock) -> None:
        """Without anybody asking for them, no faster than at the rate; damage is set aside, the rest stays."""
        async with serve(clock, scrub_bytes_per_s=MIB) as running:
            whole, rotten = [await running.client.upload(bytes([fill]) * 2 * MIB) for fill in (1, 2)]
            flip_a_bit(blob_path(running, rotten.sha256))
            began_s = clock.now_s()
            clock.advance(FIRST_AFTER_S)
            aside = running.settings.data_dir / "quarantine" / rotten.sha256.hex()
            steps = 0
            while not aside.exists() or steps < 4:
                await until(lambda: clock.now_s() + 1.0 in clock.sleeping or aside.exists())
                clock.advance(1.0)
                steps += 1
            assert clock.now_s() - began_s >= FIRST_AFTER_S + 2
            assert blob_path(running, whole.sha256).exists()
            assert await missing(running.client, rotten)

    async def test_reading_again_can_be_turned_off(self, serve: Serve, clock: ManualClock) -> None:
        """With a rate of 0."""
        async with serve(clock, scrub_bytes_per_s=0):
            assert FIRST_AFTER_S not in clock.sleeping

    async def test_a_rotten_result_is_made_again(self, running: Running) -> None:
        """A result of which a part is gone serves no identical job."""
        model = await running.client.model()
        first = await running.client.wait(await running.client.job(model))
        blob_path(running, first.artifacts[0].files[0].digest.sha256).unlink()
        second = await running.client.wait(await running.client.job(model))
        assert (second.state, second.from_cache) == (S.JOB_STATE_SUCCEEDED, False)
        third = await running.client.wait(await running.client.job(model))
        assert third.from_cache


class TestCheck:
    def run(self, running: Running, *arguments: str) -> Any:
        return CliRunner().invoke(command, ["check", "--data-dir", str(running.settings.data_dir), *arguments])

    async def test_it_finds_what_is_damaged(self, running: Running) -> None:
        """Exit 0 where all is well; else 1 and what is damaged, missing or short; beside a server that runs."""
        rotten, lost = await running.client.upload(b"rotten" * 1000), await running.client.upload(b"lost" * 1000)
        upload = await running.client.start_upload(b"0123456789")
        await running.client.send(chunks(upload.name, b"01234", finish=False))
        result = await asyncio.to_thread(self.run, running)
        assert (result.exit_code, "2 blobs" in result.output) == (0, True), result.output
        flip_a_bit(blob_path(running, rotten.sha256))
        blob_path(running, lost.sha256).unlink()
        os.truncate(running.settings.data_dir / "uploads" / upload.name.rpartition("/")[2], 2)
        for _ in range(2):
            result = await asyncio.to_thread(self.run, running, "--leave")
            assert result.exit_code == 1
            assert f"damaged: blob {rotten.sha256.hex()}" in result.output
            assert f"missing: blob {lost.sha256.hex()}" in result.output
            assert "2 of 5 acknowledged bytes" in result.output
        assert not await missing(running.client, rotten)
        await asyncio.to_thread(self.run, running)
        assert await missing(running.client, rotten)

    def test_a_folder_without_a_database_is_told(self, tmp_path: Path) -> None:
        """Exit 2, and what is wrong with the folder."""
        result = CliRunner().invoke(command, ["check", "--data-dir", str(tmp_path)])
        assert result.exit_code == 2
        assert "no data folder" in result.output

    async def test_a_damaged_database_is_told(self, running: Running) -> None:
        """Exit 1 and the word of SQLite."""
        path = running.settings.data_dir / "copy"
        path.mkdir()
        (path / "modelpress.db").write_bytes(b"SQLite format 3\0" + bytes(4096))
        result = await asyncio.to_thread(CliRunner().invoke, command, ["check", "--data-dir", str(path)])
        assert result.exit_code == 1
        assert "damaged: the database" in result.output


class TestRoom:
    async def test_room_is_promised_once(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """Uploads are admitted while all of them fit; the next is told at once; one that is cancelled makes room."""
        async with serve() as running:
            monkeypatch.setattr(Space, "_measure", lambda _: 25 * MIB)
            contents = [bytes([index]) * 10 * MIB for index in range(3)]
            uploads = [await running.client.start_upload(content) for content in contents[:2]]
            failure = await failing(running.client.start_upload(contents[2]))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
            # What was promised stays promised.
            assert (await running.client.start_upload(contents[0])).name == uploads[0].name
            await running.client.uploads.CancelUpload(U.CancelUploadRequest(name=uploads[0].name))
            await running.client.start_upload(contents[2])

    async def test_a_job_waits_for_room(
        self, serve: Serve, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is QUEUED without an attempt as long as there is none, and runs when there is."""
        room = [10 * MIB]
        async with serve(clock) as running:
            monkeypatch.setattr(Space, "_measure", lambda _: room[0])
            model = await running.client.model()
            room[0] = 0
            job = await running.client.job(model)
            await until(running.server._scheduler._waits.names)
            waiting = await running.client.jobs.GetJob(S.GetJobRequest(name=job.name))
            assert (waiting.state, waiting.attempt) == (S.JOB_STATE_QUEUED, 0)
            room[0] = 10 * MIB

            async def ended() -> bool:
                clock.advance(Waits.MAX_S)
                return (await running.client.jobs.GetJob(S.GetJobRequest(name=job.name))).HasField("end_time")

            await until(ended)
            assert (await running.client.wait(job)).state == S.JOB_STATE_SUCCEEDED

    async def test_one_blob_under_many_names_counts_for_each(
        self, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A manifest that would unfold beyond the whole disk is refused, and says how much it needs."""
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(total=100 * MIB, used=0, free=100 * MIB))
        script, weights = await running.client.upload(b"{}"), await running.client.upload(bytes(MIB))
        files = [common_pb2.FileEntry(path="model.onnx", digest=script)]
        files += [common_pb2.FileEntry(path=f"w{index}", digest=weights) for index in range(200)]
        request = model_service_pb2.CreateModelRequest(parent=PROJECT, model=Model(files=files))
        model = await running.client.models.CreateModel(request)

        async def refused() -> Any:
            found = await running.client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
            return found if found.state == Model.STATE_REJECTED else None

        assert "about 202 MiB of disk" in (await until(refused)).error.message

    async def test_a_model_that_meets_a_full_disk_is_inspected_later(self, serve: Serve, clock: ManualClock) -> None:
        """It is PROCESSING as long as there is no room, and never refused for that."""
        async with serve(clock) as running:
            running.executor.raises = [storage_full() for _ in range(3)]
            model = await running.client.model()

            async def state(wanted: int) -> bool:
                clock.advance(Waits.MAX_S)
                request = model_service_pb2.GetModelRequest(name=model.name)
                return (await running.client.models.GetModel(request)).state == wanted

            await until(lambda: len(running.executor.raises) < 3)
            assert await state(Model.STATE_PROCESSING)
            await until(lambda: state(Model.STATE_ACTIVE))
            assert running.executor.raises == []

    async def test_deleting_lets_go_at_once(self, running: Running) -> None:
        """What only a deleted model used goes with the next pass of the janitor, not a day later."""
        model = await running.client.model()
        await running.client.wait(await running.client.job(model, skip_cache=True))
        path = blob_path(running, model.files[0].digest.sha256)

        def age(connection: Any) -> None:
            connection.exec_driver_sql("UPDATE project_blobs SET used_us = used_us - ?", (2 * JUST_USED_US,))

        await running.server._database.write(age)
        (job,) = (await running.client.jobs.ListJobs(S.ListJobsRequest(parent=PROJECT))).jobs
        await running.client.jobs.DeleteJob(S.DeleteJobRequest(name=job.name))
        assert path.exists()
        await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name))
        await running.server._janitor.sweep(now_us() + 2 * JUST_USED_US)
        assert not path.exists()


async def test_what_must_be_written_is_written_on_a_full_disk(tmp_path: Path) -> None:
    """Other writes fail; those that let go of something use up the ballast, and succeed."""
    held = ballast.Ballast(tmp_path / "ballast")
    held.take_on()
    assert (tmp_path / "ballast").stat().st_blocks * 512 >= ballast.BALLAST_BYTES
    database = Database.open(tmp_path / "test.db", held)

    def fill(connection: Any) -> None:
        # As large a disk as there is, once the ballast has gone.
        pages = 10 if (tmp_path / "ballast").exists() else 100_000
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").close()
        connection.exec_driver_sql("CREATE TABLE filler AS SELECT randomblob(1000000) AS x").close()

    with pytest.raises(StorageFullError):
        await database.write(fill)
    await database.write(fill, must=True)
    assert (tmp_path / "ballast").exists()
    with held.lent() as there_was_some:
        assert there_was_some
        assert not (tmp_path / "ballast").exists()
    await database.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_recovers(serve: Serve, small_disk: Path) -> None:
    """On a disk with no byte left, cancelling and deleting work and free room; a server starts there as well."""
    filler = small_disk / "filler"
    async with serve(data_dir=small_disk / "data") as running:
        client = running.client
        model = await client.model()
        job = await client.wait(await client.job(model))
        upload = await client.start_upload(bytes(4 * MIB))
        await client.send(chunks(upload.name, bytes(2 * MIB), finish=False))
        fill(filler)
        failure = await failing(client.start_upload(b"more"))
        assert failure.reason == "STORAGE_FULL"
        await client.uploads.CancelUpload(U.CancelUploadRequest(name=upload.name))
        fill(filler)
        await client.jobs.DeleteJob(S.DeleteJobRequest(name=job.name))
        await client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name))
        await running.server._janitor.sweep(now_us())
    fill(filler)
    async with serve(data_dir=small_disk / "data") as running:
        assert (
            await running.client.models.ListModels(model_service_pb2.ListModelsRequest(parent=PROJECT))
        ).models == []
        filler.unlink()
        await running.server._janitor.sweep(now_us())
        assert (small_disk / "data" / "ballast").exists()
        ended = await running.client.wait(await running.client.job(await running.client.model()))
        assert ended.state == S.JOB_STATE_SUCCEEDED


def fill(path: Path) -> None:
    """Grows a file until the disk holds no byte more."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue
