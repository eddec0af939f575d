"""The Python clients: blocking and asyncio, one implementation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2, status_pb2
from modelpress_client import (
    AsyncClient,
    AsyncJob,
    Client,
    Job,
    JobCancelledError,
    JobFailedError,
    NotFoundError,
    RetryPolicy,
    TimedOutError,
    UsageError,
)


@pytest.fixture
def client(fake_server: Any, patient: RetryPolicy) -> Any:
    with Client(fake_server.address, retry=patient) as client:
        yield client


def test_the_documented_way(client: Client, model_file: Path, tmp_path: Path) -> None:
    """upload, compress, watch, wait, download."""
    model = client.upload(model_file, inputs=["x:float32[batch,1,28,28]"])
    job = client.compress(model, recipe="default", overrides=["quantize.scheme=dynamic"])
    events = list(job.watch())
    assert events[0].kind == "snapshot"
    assert [event.stage for event in events if event.kind == "progress"] == ["load", "fuse", "measure"]
    assert events[-1].state == "SUCCEEDED"
    report = job.wait()
    assert report.to_dict()["job"] == job.name
    assert report.size_ratio == 3.642
    assert job.download(tmp_path / "model.onnx") == [tmp_path / "model.onnx"]
    assert client.report(job.name).to_dict() == report.to_dict()


def test_a_watcher_who_comes_late(client: Client, fake_server: Any, model_file: Path) -> None:
    """What the first snapshot holds already comes as past."""
    job = client.compress(client.upload(model_file))
    fake_server.jobs[job.name].last_sequence = 2
    assert [event.stage for event in job.watch() if event.kind == "progress" and not event.is_past] == ["measure"]


async def test_asyncio_has_the_same_methods(fake_server: Any, model_file: Path, patient: RetryPolicy) -> None:
    """The same way as coroutines."""
    async with AsyncClient(fake_server.address, retry=patient) as client:
        job = await client.compress(await client.upload(model_file), recipe={"version": 1, "steps": [{"fuse": {}}]})
        assert (await job.wait()).constraints.met
        assert [line.text async for line in job.logs()] == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize(("blocking", "coroutines"), [(Client, AsyncClient), (Job, AsyncJob)])
def test_signatures_agree(blocking: type, coroutines: type) -> None:
    """Whatever one client takes, the other takes."""
    for name, method in inspect.getmembers(coroutines, inspect.isfunction):
        if name.startswith("_") or name == "raise_unless_succeeded":
            continue
        expected = list(inspect.signature(method).parameters)
        assert list(inspect.signature(getattr(blocking, name)).parameters) == expected, name


def test_a_lost_answer_makes_no_second_job(client: Client, fake_server: Any, model_file: Path) -> None:
    """The request id lets a repeated call find what the first one made."""
    fake_server.script.lost_answers = 1
    model = client.upload(model_file)
    fake_server.script.lost_answers = 1
    client.compress(model)
    assert (len(fake_server.models), len(fake_server.jobs)) == (1, 1)
    assert fake_server.seen.count("CreateJob") == 2


def test_a_collected_blob_is_sent_again(client: Client, fake_server: Any, model_file: Path) -> None:
    """A blob that the server dropped between upload and use costs one more upload, not the command."""
    fake_server.script.collected_blobs = 1
    client.upload(model_file)
    assert len(fake_server.models) == 1
    assert len(fake_server.blobs) == 1


def test_a_cut_watch_goes_on(client: Client, fake_server: Any, model_file: Path) -> None:
    """No event is lost, and none comes twice."""
    job = client.compress(client.upload(model_file))
    fake_server.script.cut_watches = 2
    events = list(job.watch())
    assert [event.sequence for event in events if event.sequence] == [1, 2, 3, 4]
    fake_server.script.cut_watches = 2
    assert [line.text for line in job.logs()] == ["line 1", "line 2", "line 3"]


def test_wait_raises_for_jobs_without_a_result(client: Client, fake_server: Any, model_file: Path) -> None:
    """Failed and cancelled jobs have their exceptions; a time limit leaves the job alone."""
    model = client.upload(model_file)
    fake_server.script.hang_job = True
    job = client.compress(model)
    with pytest.raises(TimedOutError, match="goes on"):
        job.wait(timeout_s=0.3)
    with pytest.raises(UsageError, match="no result yet"):
        job.report()
    job.cancel()
    assert job.state == "CANCELLED"
    with pytest.raises(JobCancelledError):
        job.wait()
    fake_server.script.hang_job = False
    fake_server.script.job_status = status_pb2.Status(code=code_pb2.INTERNAL, message="It broke.")
    with pytest.raises(JobFailedError, match="It broke"):
        client.compress(model).wait()


def test_a_watch_may_be_left(client: Client, fake_server: Any, model_file: Path) -> None:
    """Breaking out of the loop ends the stream and leaves the client usable."""
    fake_server.script.hang_job = True
    job = client.compress(client.upload(model_file))
    for event in job.watch():
        if event.stage == "fuse":
            break
    job.refresh()
    assert job.state == "RUNNING"


def test_not_found(client: Client) -> None:
    """A name that is not there."""
    with pytest.raises(NotFoundError, match="There is no projects/default/jobs/nope"):
        client.job("nope")


def test_closing_twice(fake_server: Any) -> None:
    """close may be called again; a closed client says that it is closed."""
    client = Client(fake_server.address)
    assert client.health() == "SERVING"
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.health()


def test_pages(client: Client, model_file: Path) -> None:
    """Lists ask for further pages until the limit."""
    for _ in range(5):
        client.upload(model_file)
    assert len(client.models()) == 5
    assert len(client.models(limit=3)) == 3


def test_a_folder_stands_for_its_model(client: Client, fake_server: Any, model_file: Path) -> None:
    """With one .onnx file in it, and with no other number."""
    assert client.upload(model_file.parent).display_name == "net.onnx"
    (model_file.parent / "other.onnx").touch()
    with pytest.raises(UsageError, match=r"2 \.onnx files"):
        client.upload(model_file.parent)


def test_data_must_be_npz(client: Client, model_file: Path, tmp_path: Path) -> None:
    """Refused before the job exists."""
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(Exception, match=r"not an \.npz file"):
        client.compress(client.upload(model_file), data=tmp_path / "data.csv")
