"""A server that starts on what an earlier version left: stored here as that version wrote it.

`stores/data_folder_0002`: of the schema 0002, killed while a job ran, two more waited, and an upload was half done.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from modelpress_protos.v1 import job_service_pb2, upload_service_pb2
from server_harness import PROJECT, Serve, chunks

STORED = Path(__file__).parent / "stores"
S = job_service_pb2
DONE, RAN, LOW, HIGH = (
    f"{PROJECT}/jobs/{job}"
    for job in (
        "01m8mdxwfe9wt7ajsvb7qcxek4",
        "01m8mdxws3396t095gf00jwnan",
        "01m8mdxwsq96mze438vsnrmt57",
        "01m8mdxwt9cfh09we8m51wnwpr",
    )
)
UPLOAD = f"{PROJECT}/uploads/01m8mdxwtw4c59jhc3ddtb4np7"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The folder as it was left."""
    made = tmp_path / "older"
    shutil.copytree(STORED / "data_folder_0002", made)
    records = (made / "records.sql").read_text()
    (made / "records.sql").unlink()
    with closing(sqlite3.connect(made / "modelpress.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(records)
    return made


async def test_a_server_goes_on_with_what_an_earlier_version_left(serve: Serve, data_dir: Path) -> None:
    """Results are kept, the lost job runs again, the others by priority, the upload goes on where it was."""
    async with serve(data_dir=data_dir) as running:
        client = running.client
        running.executor.gate.set()
        done = await client.jobs.GetJob(S.GetJobRequest(name=DONE))
        assert (done.state, dict(done.labels)) == (S.JOB_STATE_SUCCEEDED, {"run": "first"})
        assert await client.read(done.artifacts[0].files[0].digest) == b"small"
        ended = [await client.wait(await client.jobs.GetJob(S.GetJobRequest(name=name))) for name in (RAN, LOW, HIGH)]
        assert [(job.state, job.attempt) for job in ended] == [
            (S.JOB_STATE_SUCCEEDED, 2), (S.JOB_STATE_SUCCEEDED, 1), (S.JOB_STATE_SUCCEEDED, 1),
        ]  # fmt: skip
        assert running.executor.started == [HIGH, RAN, LOW]
        answers = await client.send(chunks(UPLOAD, b"0123456789", start=5))
        assert answers[-1].upload.state == upload_service_pb2.Upload.STATE_COMPLETED
        assert await client.read(answers[-1].upload.digest) == (b"0123456789")
