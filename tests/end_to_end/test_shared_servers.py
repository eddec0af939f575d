"""Two server processes on one PostgreSQL and one bucket, one killed among many jobs: nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from modelpress_client import Client
from modelpress_protos.v1 import job_service_pb2, job_service_pb2_grpc

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
import postgres_server
import s3_server
from shared_servers import ENDED, compress_server, ended, started, until
from shared_stores import new_database

S = job_service_pb2
MNIST = Path(__file__).parents[2] / "examples" / "mnist" / "model.onnx"
# As many as one has time for.
JOBS = int(os.environ.get("MODELPRESS_KILLED_JOBS", "12"))
RECIPE = {"version": 1, "steps": [], "benchmark": {"rounds": 50}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_server_killed_among_many_jobs(tmp_path: Path) -> None:
    """Jobs made through both servers; one is killed while it runs one of them. Each job ends once, with its files."""
    with ExitStack() as stack:
        try:
            database = new_database(stack.enter_context(postgres_server.postgres_server()))
            endpoint = stack.enter_context(s3_server.s3_server())
        except (postgres_server.NotHereError, s3_server.NotHereError) as error:
            pytest.skip(str(error))
        arguments = ["--blobs", f"s3://{s3_server.BUCKET}/shared", "--lease-s", "5", "--log-format", "json"]
        environment = {"COMPRESS_SERVER_DATABASE": database, **s3_server.environment(endpoint)}
        (doomed, one), (_, other) = (
            stack.enter_context(compress_server(tmp_path / name, *arguments, **environment))
            for name in ("one", "other")
        )
        with Client(one) as first, Client(other) as second:
            model = first.upload(MNIST)
            names = {
                (first, second)[number % 2].compress(model.name, recipe=RECIPE, skip_cache=True).name
                for number in range(JOBS)
            }
            assert len(names) == JOBS
            stub = job_service_pb2_grpc.JobServiceStub(stack.enter_context(grpc.insecure_channel(other)))

            def runs_on_one() -> bool:
                states = {name.rpartition("/")[2]: stub.GetJob(S.GetJobRequest(name=name)).state for name in names}
                done = sum(state in ENDED for state in states.values())
                begun = started(tmp_path / "one.log")
                return done >= JOBS // 4 and any(states[job] == S.JOB_STATE_RUNNING for job in begun)

            def stopped_in_a_job() -> bool:
                if not runs_on_one():
                    return False
                doomed.send_signal(signal.SIGSTOP)
                if runs_on_one():  # still, now that it stands
                    return True
                doomed.send_signal(signal.SIGCONT)
                return False

            until(stopped_in_a_job, "no job ran on the server to be killed")
            doomed.kill()
            doomed.wait()
            jobs = {name: until(lambda name=name: ended(stub, name), f"{name} did not end") for name in names}
            page = stub.ListJobs(S.ListJobsRequest(parent="projects/default", page_size=200))
            assert sorted(job.name for job in page.jobs) == sorted(names)
            assert {job.state for job in jobs.values()} == {S.JOB_STATE_SUCCEEDED}
            again = 0
            for name, job in jobs.items():
                events = [event for event in stub.WatchJob(S.WatchJobRequest(name=name)) if event.sequence]
                assert [event.sequence for event in events] == list(range(1, len(events) + 1))
                states = [event.state for event in events if event.WhichOneof("event") == "state"]
                assert sum(state in ENDED for state in states) == 1, states
                assert states.count(S.JOB_STATE_RUNNING) == job.attempt
                again += job.attempt > 1
                second.job(name).download(tmp_path / f"{name.rpartition('/')[2]}.onnx")
            # The one that was killed in its work, and no other one.
            assert again == 1
        for name in ("one.log", "other.log"):
            text = (tmp_path / name).read_text()
            assert "Traceback" not in text
            assert "not-so-secret-key" not in text
