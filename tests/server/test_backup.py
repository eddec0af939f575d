"""Backups of a data folder that is in use, and servers that start on them."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from modelpress_protos.v1 import job_service_pb2
from modelpress_server import backup
from modelpress_server.cli import command
from server_harness import Running, Serve, chunks, digest_of

S = job_service_pb2


async def run(*arguments: object) -> Result:
    """The command, beside the server that runs in this process."""
    return await asyncio.to_thread(CliRunner().invoke, command, list(map(str, arguments)))


async def back_up(running: Running, target: Path) -> Result:
    return await run("backup", target, "--data-dir", running.settings.data_dir)


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").glob("??/*")}


async def test_a_server_goes_on_from_a_backup(serve: Serve, tmp_path: Path) -> None:
    """Taken while a job runs and another waits: results are there, both jobs run, an upload begins anew."""
    async with serve() as running:
        client = running.client
        done = await client.wait(await client.job(await client.model(labels={"team": "vision"})))
        model = await client.model(compress="wait")
        ran, queued = await client.job(model), await client.job(model, skip_cache=True)
        await running.executor.running.wait()
        upload = await client.start_upload(b"0123456789")
        await client.send(chunks(upload.name, b"01234", finish=False))
        (running.settings.data_dir / "tokens.json").write_text("{}")
        result = await back_up(running, tmp_path / "backup")
        assert result.exit_code == 0, result.output
        assert "All is there." in result.output
    assert (tmp_path / "backup" / "modelpress.db").stat().st_mode & 0o777 == 0o600
    result = await run("restore", tmp_path / "backup", "--data-dir", tmp_path / "restored")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "restored" / "tokens.json").read_text() == "{}"
    (tmp_path / "restored" / "tokens.json").unlink()
    result = await run("check", "--data-dir", tmp_path / "restored")
    assert result.exit_code == 0, result.output
    async with serve(data_dir=tmp_path / "restored") as running:
        client = running.client
        running.executor.gate.set()
        kept = await client.jobs.GetJob(S.GetJobRequest(name=done.name))
        assert kept == done
        assert await client.read(kept.artifacts[0].files[0].digest) == b"small"
        for job, attempt in ((ran, 2), (queued, 1)):
            ended = await client.wait(job)
            assert (ended.state, ended.attempt) == (S.JOB_STATE_SUCCEEDED, attempt)
        again = await client.start_upload(b"0123456789")
        assert (again.committed_size, again.name != upload.name) == (0, True)


async def test_the_next_backup_copies_what_is_new(serve: Serve, tmp_path: Path) -> None:
    """What is there is kept, what is new is copied, what no record names any more goes."""
    target = tmp_path / "backup"
    async with serve() as running:
        first, second = await running.client.upload(b"first"), digest_of(b"second")
        assert "1 files" in (await back_up(running, target)).output
        await running.client.upload(b"second")
        output = (await back_up(running, target)).output
        assert "1 files" in output
        assert "1 were there already" in output
        assert files_of(target) == {first.sha256.hex(), second.sha256.hex()}
        await running.server._database.write(
            lambda connection: connection.exec_driver_sql("DELETE FROM project_blobs WHERE sha256 = ?", (first.sha256,))
        )
        output = (await back_up(running, target)).output
        assert "1 files that no record names" in output
        assert files_of(target) == {second.sha256.hex()}


async def test_damage_is_told_and_not_copied(serve: Serve, tmp_path: Path) -> None:
    """A damaged file and a missing one: exit code 1 with their names, and all else is in the backup."""
    async with serve() as running:
        whole, damaged, missing = [await running.client.upload(content) for content in (b"whole", b"damaged", b"lost")]
        blobs = running.settings.data_dir / "blobs"
        names = [digest.sha256.hex() for digest in (whole, damaged, missing)]
        spoilt = blobs / names[1][:2] / names[1]
        spoilt.chmod(0o600)
        spoilt.write_bytes(b"damagEd")
        (blobs / names[2][:2] / names[2]).unlink()
        result = await back_up(running, tmp_path / "backup")
    assert result.exit_code == 1
    assert f"damaged: blob {names[1]}" in result.output
    assert f"missing: blob {names[2]}" in result.output
    assert files_of(tmp_path / "backup") == {names[0]}


async def test_a_file_that_goes_meanwhile(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted between the look at the records and its copy: the records are taken again, and the backup is whole."""
    async with serve() as running:
        stays, goes = await running.client.upload(b"stays"), await running.client.upload(b"goes")
        records = running.settings.data_dir / "modelpress.db"
        real, calls = backup._copy_blobs, []

        def after_a_deletion(*arguments: object) -> None:
            if not calls:
                with sqlite3.connect(records, timeout=60) as connection:
                    connection.execute("DELETE FROM project_blobs WHERE sha256 = ?", (goes.sha256,))
                connection.close()
                name = goes.sha256.hex()
                (running.settings.data_dir / "blobs" / name[:2] / name).unlink()
            calls.append(arguments)
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(backup, "_copy_blobs", after_a_deletion)
        result = await back_up(running, tmp_path / "backup")
    assert result.exit_code == 0, result.output
    assert len(calls) == 2
    assert files_of(tmp_path / "backup") == {stays.sha256.hex()}


async def test_a_backup_that_is_cut_short(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it is as it was, and can be restored."""
    target = tmp_path / "backup"
    async with serve() as running:
        kept = await running.client.upload(b"kept")
        await back_up(running, target)
        await running.client.upload(b"later")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(backup, "_copy_blob", full)
            result = await back_up(running, target)
        assert result.exit_code == 1
        assert "No space left" in result.output
    result = await run("restore", target, "--data-dir", tmp_path / "restored")
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "restored") == {kept.sha256.hex()}


async def test_what_is_refused(running: Running, tmp_path: Path) -> None:
    """Folders that hold something else, folders in use, and stores that are backed up by other means."""
    data_dir = running.settings.data_dir
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    result = await back_up(running, tmp_path / "mine")
    assert result.exit_code == 1
    assert "something else" in result.output
    assert (await back_up(running, tmp_path / "backup")).exit_code == 0
    for arguments, what in (
        (("restore", tmp_path / "backup", "--data-dir", data_dir), "in use"),
        (("restore", tmp_path / "mine", "--data-dir", tmp_path / "new"), "is no backup"),
        (("backup", tmp_path / "x", "--data-dir", tmp_path / "none"), "no data folder"),
        (("--database", "postgresql://h/d", "backup", tmp_path / "x"), "pg_dump"),
    ):
        result = await run(*arguments)
        assert result.exit_code == 2
        assert what in result.output
