"""kill -9 of client, worker and server at bad moments, all of them real processes: afterwards everything ends well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from modelpress_client import Client, TransferProgress

MNIST = Path(__file__).parents[2] / "examples" / "mnist" / "model.onnx"
MIB = 1024 * 1024
PATIENCE_S = 280.0
# Seconds of measuring: long enough to be killed in the middle.
SLOW_RECIPE = {"version": 1, "steps": [], "benchmark": {"rounds": 4_000}}
# Builds a dozen models, and then measures as long.
SLOW_SEARCH = {
    "version": 1,
    "goal": {"objective": "smallest", "techniques": ["fuse", "quantize"]},
    "benchmark": {"rounds": 4_000},
}

pytestmark = pytest.mark.slow


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits until the condition gives something true, and returns it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")


class ServerUnderTest:
    """A compress-server on one data folder and one port, which can be killed and started again."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts it and waits until it listens."""
        command = [
            sys.executable,
            "-m",
            "modelpress_server",
            "--listen",
            self.address,
            "--data-dir",
            str(self.data_dir),
        ]
        command += ["--worker-start", "exec", "--ack-interval-bytes", "1MiB"]
        with (self.data_dir.parent / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        log_text = (self.data_dir.parent / "server.log").read_text()
        assert line.strip() == f"listening on {self.address}", log_text

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process = None

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children()
        return [child for child in children if "modelpress_server.worker" in child.cmdline()]

    def stop(self) -> None:
        """Ends it if it runs."""
        if self._process is not None:
            self.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """A running server."""
    (tmp_path / "data").mkdir()
    made = ServerUnderTest(tmp_path / "data")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(server: ServerUnderTest) -> Iterator[Client]:
    """A client of it in this process."""
    with Client(server.address) as made:
        yield made


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """An ONNX model of 256 MiB: y = x @ w."""
    rows, columns = 4096, 16384
    weights = np.frombuffer(np.random.default_rng(0).bytes(rows * columns * 4), np.uint8).copy()
    weights[3::4] = 0x3F  # the upper bytes: all numbers between 0.5 and 2
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, (rows, columns), weights.tobytes(), raw=True)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("batch", rows))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ("batch", columns))],
        [tensor],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def start_client(server: ServerUnderTest, *arguments: str) -> subprocess.Popen[str]:
    """The command line client as a process."""
    command = [sys.executable, "-m", "modelpress_client", *arguments, "--server", server.address, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its JSON document; it must have gone well."""
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output + errors
    document: dict[str, Any] = json.loads(output)
    return document


def partial_bytes(server: ServerUnderTest) -> int:
    """Bytes of unfinished uploads on the server's disk."""
    return sum(path.stat().st_size for path in (server.data_dir / "uploads").iterdir() if path.is_file())


def wait_for_half_an_upload(server: ServerUnderTest, size_bytes: int) -> None:
    """Until a good part of the file has come, but by far not all of it."""
    found = until(lambda: partial_bytes(server) if partial_bytes(server) > 16 * MIB else 0, "no bytes came")
    assert found < size_bytes


def running_worker(server: ServerUnderTest, client: Client, job: str) -> psutil.Process:
    """The worker of a job that is being measured."""
    until(lambda: client.job(job).message.progress.stage == "measure", "the job did not begin to measure")
    (worker,) = server.workers()
    return worker


def test_a_client_killed_in_mid_upload(server: ServerUnderTest, client: Client, large_model: Path) -> None:
    """The next upload of the file goes on where the dead one stopped, and the model is whole."""
    process = start_client(server, "upload", str(large_model), "--no-compress")
    wait_for_half_an_upload(server, large_model.stat().st_size)
    process.kill()
    process.communicate()
    seen: list[int] = []

    def note(progress: TransferProgress) -> None:
        if progress.phase == "upload":
            seen.append(progress.done_bytes)

    model = client.upload(large_model, on_progress=note)
    assert seen[0] >= 8 * MIB  # what was durable before is not sent again
    assert seen[-1] == large_model.stat().st_size
    assert client.inspect(model).state == "ACTIVE"


def test_a_server_killed_in_mid_upload(server: ServerUnderTest, client: Client, large_model: Path) -> None:
    """The client waits for the server and sends the rest; nobody has to do anything."""
    process = start_client(server, "upload", str(large_model), "--no-compress")
    wait_for_half_an_upload(server, large_model.stat().st_size)
    server.kill()
    server.start()
    name = finish(process)["model"]
    assert client.inspect(name).state == "ACTIVE"


def test_a_worker_killed_in_mid_job(server: ServerUnderTest, client: Client) -> None:
    """The job is tried again in a new worker and succeeds as its second attempt."""
    job = client.compress(client.upload(MNIST), recipe=SLOW_RECIPE)
    running_worker(server, client, job.name).kill()
    report = job.wait(timeout_s=PATIENCE_S)
    assert job.message.attempt == 2
    assert report.to_dict()["job"] == job.name
    assert any("SIGKILL" in line.text for line in job.logs())


def findings(folder: Path) -> list[Path]:
    """What a search below this folder has found out so far."""
    return list(folder.rglob("*.zip"))


def has_model(finding: Path) -> bool:
    """Whether it is a candidate, which comes with its file."""
    with zipfile.ZipFile(finding) as archive:
        return len(archive.namelist()) > 1


def test_a_worker_killed_in_mid_search(server: ServerUnderTest, client: Client) -> None:
    """The second attempt takes the models that the first one has built, and builds the others."""
    job = client.compress(client.upload(MNIST), recipe=SLOW_SEARCH)
    until(lambda: len(findings(server.data_dir / "work")) > 3, "nothing was found out")
    (worker,) = server.workers()
    worker.kill()
    report = job.wait(timeout_s=PATIENCE_S).to_dict()
    assert job.message.attempt == 2
    assert report["reused"]["candidates"] >= 1
    assert report["size_ratio"] > 3


def test_a_server_killed_in_mid_search(server: ServerUnderTest, client: Client) -> None:
    """The next server goes on from what the dead one had noted of the search."""
    job = client.compress(client.upload(MNIST), recipe=SLOW_SEARCH)
    # One file after the other is taken, and those of facts alone may come first.
    until(lambda: any(map(has_model, findings(server.data_dir / "findings"))), "no candidate was kept")
    server.kill()
    server.start()
    report = job.wait(timeout_s=PATIENCE_S).to_dict()
    assert report["reused"]["candidates"] >= 1
    assert report["size_ratio"] > 3


def test_a_server_killed_in_mid_job(server: ServerUnderTest, client: Client, tmp_path: Path) -> None:
    """Its worker dies with it; the next server runs the job again; the client that waits gets the result."""
    recipe = tmp_path / "slow.yaml"
    recipe.write_text(json.dumps(SLOW_RECIPE), "utf-8")
    output = tmp_path / "result.onnx"
    process = start_client(server, "upload", str(MNIST), "--recipe", str(recipe), "-o", str(output))
    (job,) = until(client.jobs, "no job was created")
    worker = running_worker(server, client, job.name)
    server.kill()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker lives on")
    server.start()
    answer = finish(process)
    assert answer["state"] == "SUCCEEDED"
    assert any("restarted" in line.text for line in client.job(job.name).logs())
    assert output.stat().st_size == answer["report"]["optimized"]["size_bytes"]
    # Nothing half-done is left: no working folders, no unfinished uploads.
    assert list((server.data_dir / "work").iterdir()) == []
    assert partial_bytes(server) == 0


def test_everything_killed_at_once(server: ServerUnderTest, tmp_path: Path) -> None:
    """Client, server and worker die in mid-job; later another client finds the job done."""
    recipe = tmp_path / "slow.yaml"
    recipe.write_text(json.dumps(SLOW_RECIPE), "utf-8")
    with Client(server.address) as first:
        process = start_client(server, "upload", str(MNIST), "--recipe", str(recipe), "-o", str(tmp_path / "x.onnx"))
        (job,) = until(first.jobs, "no job was created")
        running_worker(server, first, job.name)
    os.kill(process.pid, 9)
    server.kill()
    process.communicate()
    server.start()
    with Client(server.address) as second:
        report = second.job(job.name).wait(timeout_s=PATIENCE_S)
    assert report.to_dict()["job"] == job.name
    assert not (tmp_path / "x.onnx").exists()
