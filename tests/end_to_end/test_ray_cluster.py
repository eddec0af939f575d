"""Two servers and two nodes of a Ray cluster on one PostgreSQL and one bucket: jobs run on both, one node is killed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from modelpress_client import Client
from modelpress_protos.v1 import job_service_pb2, job_service_pb2_grpc
from modelpress_server.toolchain import processor_name

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
import postgres_server
import ray_nodes
import s3_server
from shared_servers import ENDED, compress_server, ended, until
from shared_stores import new_database

S = job_service_pb2
MNIST = Path(__file__).parents[2] / "examples" / "mnist" / "model.onnx"
# As many as one has time for.
JOBS = int(os.environ.get("MODELPRESS_KILLED_JOBS", "8"))
RECIPE = "lossless"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def places(logs: list[Path]) -> dict[str, list[str]]:
    """The nodes that each job was begun on, in order, as the servers' logs say: eight digits of their ids."""
    found: dict[str, list[str]] = {}
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.endswith("}")]
    for line in sorted(lines, key=lambda line: line["time"]):
        if (node := re.search(r"runs on node \S+ \(([0-9a-f]{8})\)", line["message"])) and "job" in line:
            found.setdefault(line["job"], []).append(node[1])
    return found


@dataclass(frozen=True)
class Shared:
    """What servers share: URL of a PostgreSQL server, keys of a bucket, the cluster."""

    postgres: str
    keys: dict[str, str]
    cluster: ray_nodes.RayProcesses

    def server(self, folder: Path, database: str, *options: str) -> Any:
        """A server that runs its jobs on the cluster."""
        stores = ["--blobs", f"s3://{s3_server.BUCKET}/{database.rpartition('/')[2]}", "--log-format", "json"]
        nodes = ["--ray-address", self.cluster.address, "--node-dir", str(folder.parent / "nodes")]
        environment = {"COMPRESS_SERVER_DATABASE": database, **self.keys}
        return compress_server(folder, *stores, *nodes, "--lease-s", "10", *options, **environment)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """A cluster without nodes, and the stores. Skipped where one of the three cannot be had."""
    with ExitStack() as stack:
        try:
            postgres = stack.enter_context(postgres_server.postgres_server())
            keys = s3_server.environment(stack.enter_context(s3_server.s3_server()))
            cluster = stack.enter_context(ray_nodes.ray_cluster(keys))
        except (postgres_server.NotHereError, s3_server.NotHereError, ray_nodes.NotHereError) as error:
            pytest.skip(str(error))
        yield Shared(postgres, keys, cluster)


def test_a_node_killed_among_many_jobs(shared: Shared, tmp_path: Path) -> None:
    """Jobs run on both nodes. One is killed in the middle of a job, and another one joins: each job ends once, with its
    files, and the one that was lost there costs no attempt of its own."""
    with ExitStack() as stack:
        nodes = [shared.cluster.add_node(name) for name in ("first", "second")]
        for node in nodes:
            stack.callback(ray_nodes.kill_node, node)
        ids = [ray_nodes.node_id(node)[:8] for node in nodes]
        database = new_database(shared.postgres)
        servers = [
            stack.enter_context(shared.server(tmp_path / name, database, "--workers", "2")) for name in ("one", "other")
        ]
        logs = [tmp_path / "one.log", tmp_path / "other.log"]
        with Client(servers[0][1]) as one, Client(servers[1][1]) as other:
            model = one.upload(MNIST)
            names = {
                (one, other)[number % 2].compress(model.name, recipe=RECIPE, skip_cache=True).name
                for number in range(JOBS)
            }
            stub = job_service_pb2_grpc.JobServiceStub(stack.enter_context(grpc.insecure_channel(servers[1][1])))

            def states() -> dict[str, Any]:
                return {name.rpartition("/")[2]: stub.GetJob(S.GetJobRequest(name=name)).state for name in names}

            def runs_on_doomed() -> bool:
                now = states()
                seen = places(logs)
                both = {node for nodes in seen.values() for node in nodes} == set(ids)
                doomed = any(now[job] == S.JOB_STATE_RUNNING and on[-1] == ids[0] for job, on in seen.items())
                return both and doomed and sum(state in ENDED for state in now.values()) >= JOBS // 4

            until(runs_on_doomed, "no job ran on the node to be killed")
            ray_nodes.kill_node(nodes[0])
            nodes.append(shared.cluster.add_node("third"))
            stack.callback(ray_nodes.kill_node, nodes[2])
            jobs = {name: until(lambda name=name: ended(stub, name), f"{name} did not end") for name in names}
            assert {job.state for job in jobs.values()} == {S.JOB_STATE_SUCCEEDED}
            seen = places(logs)
            again = 0
            for name, job in jobs.items():
                events = [event for event in stub.WatchJob(S.WatchJobRequest(name=name)) if event.sequence]
                assert [event.sequence for event in events] == list(range(1, len(events) + 1))
                told = [event.state for event in events if event.WhichOneof("event") == "state"]
                assert sum(state in ENDED for state in told) == 1, told
                again += job.excused_losses
                on = seen[name.rpartition("/")[2]]
                assert len(on) == 1 + job.excused_losses
                assert job.attempt == 1
                other.job(name).download(tmp_path / f"{name.rpartition('/')[2]}.onnx")
            assert again >= 1
            runs = Counter(node for on in seen.values() for node in on)
            third = ray_nodes.node_id(nodes[2])[:8]
            shares = f"first {runs[ids[0]]}, second {runs[ids[1]]}, third {runs[third]}"
            print(f"\n{JOBS} jobs; runs by node: {shares}; lost with the first: {again}")
        for log in logs:
            assert "Traceback" not in log.read_text()
            assert "not-so-secret-key" not in log.read_text()


def test_jobs_run_on_nodes_that_measure(shared: Shared, tmp_path: Path) -> None:
    """With --measure-on, jobs run on nodes with the label alone. The report names the processor of the node, and the
    same job is answered with what such a node has found."""
    with ExitStack() as stack:
        plain = shared.cluster.add_node("plain")
        measuring = shared.cluster.add_node("measuring", labels="bench=quiet")
        for node in (plain, measuring):
            stack.callback(ray_nodes.kill_node, node)
        options = ["--workers", "2", "--measure-on", "bench=quiet"]
        process, address = stack.enter_context(
            shared.server(tmp_path / "server", new_database(shared.postgres), *options)
        )
        with Client(address) as client:
            model = client.upload(MNIST)
            jobs = [client.compress(model.name, recipe=RECIPE, skip_cache=True) for _ in range(3)]
            reports = [job.wait() for job in jobs]
            # Found again, by the kind of processor that the nodes have told.
            assert client.compress(model.name, recipe=RECIPE).wait().to_dict() in [one.to_dict() for one in reports]
        process.terminate()
        assert process.wait() == 0
        on = [node for nodes in places([tmp_path / "server.log"]).values() for node in nodes]
        assert on == [ray_nodes.node_id(measuring)[:8]] * 3
        assert {report.to_dict()["environment"]["cpu"] for report in reports} == {processor_name()}
