"""What a job has found out serves later jobs of its project on the same model and data, and nobody else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelpress_protos.v1 import model_service_pb2, recipe_pb2, server_service_pb2
from modelpress_server import findings
from modelpress_server.stores.records import now_us
from server_harness import PROJECT, Running, Serve, until

NAME = "a" * 64 + ".zip"
OTHER = "b" * 64 + ".zip"
_DROPS = itertools.count(1)


def leaving(**content: bytes) -> Callable[[Path], None]:
    """Leaves these files in the folder for findings."""

    def leave(folder: Path) -> None:
        for name, written in content.items():
            (folder / name).write_bytes(written)

    return leave


def kept(running: Running) -> set[str]:
    """Names of all that is kept."""
    return {path.name for path in (running.settings.data_dir / "findings").rglob("*") if path.is_file()}


async def ask(running: Running, model: Any, **spec: Any) -> dict[str, bytes]:
    """Runs one more job with a question of its own; what its worker was given of earlier findings."""
    recipe = recipe_pb2.Recipe(version=1, goal=recipe_pb2.Goal(max_drop=next(_DROPS) / 1e6))
    await running.client.wait(await running.client.job(model, recipe=recipe, **spec))
    return running.executor.known[-1]


async def test_the_next_job_on_the_same_model_and_data_is_given_them(running: Running) -> None:
    """Also where the model was uploaded again; not for other data, another model or project, nor with skip_cache."""
    model = await running.client.model(name="one")
    running.executor.leave = leaving(**{NAME: b"found"})
    assert await ask(running, model) == {}
    running.executor.leave = leaving(**{OTHER: b"more"})
    assert await ask(running, model) == {NAME: b"found"}
    running.executor.leave = leaving()
    both = {NAME: b"found", OTHER: b"more"}
    assert await ask(running, model) == both
    assert await ask(running, await running.client.model(name="one")) == both
    assert await ask(running, model, skip_cache=True) == {}
    assert await ask(running, model, data=await running.client.upload(b"data")) == {}
    assert await ask(running, model, eval_data=await running.client.upload(b"data")) == both
    assert await ask(running, await running.client.model(name="two")) == {}
    assert await ask(running, await running.client.model("projects/other", name="one")) == {}


async def test_what_is_found_again_takes_the_place_of_what_was(running: Running) -> None:
    """One name is one finding; workers are given files that they cannot change for others."""
    model = await running.client.model()
    for content in (b"first", b"second"):
        running.executor.leave = leaving(**{NAME: content})
        await ask(running, model)
    assert await ask(running, model) == {NAME: b"second"}
    (path,) = (running.settings.data_dir / "findings").rglob(NAME)
    assert path.stat().st_mode & 0o777 == 0o444


async def test_what_a_lost_worker_had_found_out_is_given_to_the_next_attempt(running: Running) -> None:
    """The first attempt crashes after it has left something; the second one is given it."""
    running.executor.leave = leaving(**{NAME: b"found"})
    model = await running.client.model(compress="crash_once")
    job = await running.client.wait(await running.client.job(model))
    assert job.attempt == 2
    assert running.executor.known == [{}, {NAME: b"found"}]


async def test_they_are_kept_while_the_worker_runs(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server that is killed loses little; what has changed since is taken once more."""
    monkeypatch.setattr(findings, "COLLECT_EVERY_S", 0.01)
    running.executor.leave = leaving(**{NAME: b"found"})
    model = await running.client.model(compress="wait")
    job = await running.client.job(model)
    await running.executor.running.wait()
    await until(lambda: kept(running) == {NAME})
    (found,) = (running.settings.data_dir / "work").rglob(NAME)
    (kept_one,) = (running.settings.data_dir / "findings").rglob(NAME)
    (found.parent / "new").write_bytes(b"found and changed")
    (found.parent / "new").replace(found)
    await until(lambda: kept_one.read_bytes() == b"found and changed")
    running.executor.gate.set()
    await running.client.wait(job)


def a_link(folder: Path) -> None:
    """A symbolic link under the name of a finding."""
    (folder / NAME).symlink_to("/etc/passwd")


def a_second_name(folder: Path) -> None:
    """A file that has another name elsewhere."""
    (folder / "x").write_bytes(b"x")
    os.link(folder / "x", folder / NAME)


def a_pipe(folder: Path) -> None:
    """What nobody writes to."""
    os.mkfifo(folder / NAME)


def a_folder(folder: Path) -> None:
    """With a finding inside."""
    (folder / NAME).mkdir()
    (folder / NAME / NAME).write_bytes(b"x")


def many(folder: Path) -> None:
    """More than a search leaves."""
    for number in range(1001):
        (folder / f"{number:064x}.zip").touch()


@pytest.mark.parametrize(
    "leave", [a_link, a_second_name, a_pipe, a_folder, many, leaving(x=b"1", **{f"{NAME}.partial": b"2"})]
)
async def test_a_worker_that_leaves_something_else_leaves_nothing(
    running: Running, leave: Callable[[Path], None]
) -> None:
    """The job succeeds, and the next one is given nothing of it."""
    model = await running.client.model()
    running.executor.leave = leave
    job = await running.client.wait(await running.client.job(model))
    assert len(job.artifacts) == 2
    assert kept(running) == set()


async def test_they_are_bounded_for_each_project(serve: Serve) -> None:
    """What was not asked for the longest goes first; what alone is too large is not kept."""
    async with serve(findings_bytes=25_000) as running:
        names = [f"{number:064x}.zip" for number in range(4)]
        for number, name in enumerate(names):
            running.executor.leave = leaving(**{name: bytes(10_000)})
            await ask(running, await running.client.model(name=str(number)))
        assert kept(running) == set(names[2:])
        running.executor.leave = leaving(**{NAME: bytes(30_000)})
        await ask(running, await running.client.model(name="large"))
        assert NAME not in kept(running)


async def test_nothing_is_kept_where_nothing_may_be(serve: Serve) -> None:
    """The setting 0 turns it off."""
    async with serve(findings_bytes=0) as running:
        running.executor.leave = leaving(**{NAME: b"found"})
        model = await running.client.model()
        await ask(running, model)
        assert await ask(running, model) == {}
        assert kept(running) == set()


async def test_they_go_with_the_model_and_with_time(running: Running) -> None:
    """Deleting the model removes them; so does a day without use."""
    running.executor.leave = leaving(**{NAME: b"found"})
    first, second = [await running.client.model(name=name) for name in ("one", "two")]
    for model in (first, second):
        await ask(running, model)
    await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=first.name))
    folder = running.settings.data_dir / "findings"
    assert len(list(folder.rglob(NAME))) == 1
    ttl_us = round(running.settings.blob_ttl_s * 1e6)
    await running.server._janitor.sweep(now_us() + ttl_us // 2)
    assert len(list(folder.rglob(NAME))) == 1
    await running.server._janitor.sweep(now_us() + ttl_us + 1_000_000)
    assert list(folder.iterdir()) == []


async def test_usage_says_how_much_is_kept(running: Running) -> None:
    """Beside the bytes of the project's files."""
    asked = server_service_pb2.GetUsageRequest(parent=PROJECT)
    running.executor.leave = leaving(**{NAME: bytes(100_000)})
    await ask(running, await running.client.model())
    used = await running.client.info.GetUsage(asked)
    assert used.findings_bytes == 100_000
    assert used.max_findings_bytes == running.settings.findings_bytes
    assert used.stored_bytes < 1000
