"""Who calls, and what they may do: roles, tokens without restarts, throttling, the audit log, renewed certificates."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from authority import Authority
from click.testing import CliRunner
from google.rpc import error_details_pb2
from manual_clock import ManualClock
from modelpress_protos.v1 import job_service_pb2, model_service_pb2, server_service_pb2, upload_service_pb2
from modelpress_server.cli import command
from modelpress_server.config import Settings, SettingsError
from modelpress_server.identity.roles import Role, needed_role, parse_grant
from modelpress_server.identity.throttle import MAX_KEYS, Throttle
from modelpress_server.identity.tokens import TokenKeeper, Tokens, digest
from modelpress_server.interceptors import RECHECK_S
from server_harness import PROJECT, Client, Failure, Serve, chunks, digest_of, failing, failure_of, until

Info = server_service_pb2.GetServerInfoRequest
List = job_service_pb2.ListJobsRequest(parent=PROJECT)
EVERYTHING = {"*": Role.ADMIN}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class TestRoles:
    @pytest.mark.parametrize(
        ("method", "role"),
        [
            ("GetJob", Role.READER), ("ListModels", Role.READER), ("WatchJob", Role.READER), ("ReadBlob", Role.READER),
            ("CreateJob", Role.SUBMITTER), ("WriteUpload", Role.SUBMITTER), ("CancelJob", Role.SUBMITTER),
            ("DeleteModel", Role.ADMIN), ("UpdateModel", Role.ADMIN), ("SomethingNew", Role.ADMIN),
        ],
    )  # fmt: skip
    def test_what_methods_need(self, method: str, role: Role) -> None:
        """Reading, making work, deleting; what nobody thought of needs the most."""
        assert needed_role(method) is role

    def test_grants(self) -> None:
        """PROJECT:ROLE; without a role everything; nonsense is told."""
        assert parse_grant("team-a:reader") == ("team-a", Role.READER)
        assert parse_grant("*") == ("*", Role.ADMIN)
        for text in ("team-a:boss", "a b:reader", "", ":reader"):
            with pytest.raises(ValueError, match=r"is no role|neither"):
                parse_grant(text)

    async def test_each_role_in_a_real_server(self, serve: Serve, tmp_path: Path) -> None:
        """A reader reads, a submitter makes work, an admin deletes; each in its projects only."""
        data = tmp_path / "data"
        keeper = TokenKeeper(data)
        tokens = {role: keeper.add(role.name, {"default": role}, 0.0) for role in Role}
        async with serve(data_dir=data) as running:

            async def attempt(role: Role, call: Callable[..., Any], request: Any) -> Failure | None:
                try:
                    await call(request, metadata=bearer(tokens[role]))
                except grpc.aio.AioRpcError:
                    return await failing(call(request, metadata=bearer(tokens[role])))
                return None

            client = running.client
            upload = upload_service_pb2.CreateUploadRequest(parent=PROJECT, digest=digest_of(b"x"))
            delete = model_service_pb2.DeleteModelRequest(name=f"{PROJECT}/models/{'0' * 26}")
            for role in Role:
                assert await attempt(role, client.jobs.ListJobs, List) is None
            refused = await attempt(Role.READER, client.uploads.CreateUpload, upload)
            assert refused is not None
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            assert "needs the role submitter" in refused.message
            assert await attempt(Role.SUBMITTER, client.uploads.CreateUpload, upload) is None
            refused = await attempt(Role.SUBMITTER, client.models.DeleteModel, delete)
            assert refused is not None
            assert refused.reason == "PERMISSION_DENIED"
            allowed = await attempt(Role.ADMIN, client.models.DeleteModel, delete)
            assert allowed is not None
            assert allowed.reason == "RESOURCE_NOT_FOUND"
            elsewhere = await attempt(
                Role.ADMIN, client.jobs.ListJobs, job_service_pb2.ListJobsRequest(parent="projects/b")
            )
            assert elsewhere is not None
            assert elsewhere.reason == "RESOURCE_NOT_FOUND"


class TestKeptTokens:
    def run(self, data: Path, *arguments: str, fails: bool = False) -> str:
        result = CliRunner().invoke(command, ["token", "--data-dir", str(data), *arguments])
        assert (result.exit_code != 0) == fails, result.output
        return result.output

    async def test_added_and_revoked_while_the_server_runs(self, serve: Serve, tmp_path: Path) -> None:
        """The first token closes an open server; a revoked one is refused from the next call on."""
        data = tmp_path / "data"
        async with serve(data_dir=data) as running:
            jobs = running.client.jobs
            await jobs.ListJobs(List)
            token = self.run(data, "add", "ci", "--grant", "default:reader").strip()
            assert (await failing(jobs.ListJobs(List))).reason == "UNAUTHENTICATED"
            await jobs.ListJobs(List, metadata=bearer(token))
            self.run(data, "revoke", "ci")
            assert (await failing(jobs.ListJobs(List, metadata=bearer(token)))).reason == "UNAUTHENTICATED"

    async def test_a_revoked_one_ends_what_it_began(self, serve: Serve, clock: ManualClock, tmp_path: Path) -> None:
        """Watching, following a log and uploading end soon, with a status; what came is kept, and others go on."""
        data = tmp_path / "data"
        async with serve(clock, data_dir=data) as running:
            client = running.client
            job = await client.job(await client.model(compress="wait"))
            upload = await client.start_upload(b"0123456789")
            token = self.run(data, "add", "ci", "--grant", "default:submitter").strip()
            other = self.run(data, "add", "other", "--grant", "default:reader").strip()
            watch = job_service_pb2.WatchJobRequest(name=job.name)
            logs = job_service_pb2.StreamJobLogsRequest(name=job.name, follow=True)
            watching = client.jobs.WatchJob(watch, metadata=bearer(token))
            others = client.jobs.WatchJob(watch, metadata=bearer(other))
            following = client.jobs.StreamJobLogs(logs, metadata=bearer(token))
            writing = client.uploads.WriteUpload(metadata=bearer(token))
            await writing.write(chunks(upload.name, b"01234", finish=False)[0])
            await running.received(upload, 5)
            assert (await watching.read()).snapshot.name == job.name
            assert (await following.read()).text
            clock.advance(RECHECK_S)
            self.run(data, "revoke", "ci")
            for call in (watching, following, writing):
                reading = asyncio.ensure_future(ends_with(call))
                await until(lambda reading=reading: clock.advance(RECHECK_S / 2) or reading.done())
                assert await reading == "UNAUTHENTICATED"
            get = upload_service_pb2.GetUploadRequest(name=upload.name)
            assert (await client.uploads.GetUpload(get, metadata=bearer(other))).committed_size == 5
            assert (await others.read()).snapshot.name == job.name
            others.cancel()
            running.executor.gate.set()

    def test_nothing_of_a_token_is_kept(self, tmp_path: Path) -> None:
        """The file has its hash alone, and nobody else may read it; the list shows names and grants."""
        token = self.run(
            tmp_path, "add", "ci", "--grant", "a:reader", "--grant", "*:submitter", "--expires", "2d"
        ).strip()
        file = tmp_path / "tokens.json"
        assert token not in file.read_text()
        assert digest(token).hex() in file.read_text()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        listed = self.run(tmp_path, "list")
        assert listed.startswith("ci\ta:reader,*:submitter\t")
        assert token not in listed

    def test_wrong_commands_are_told(self, tmp_path: Path) -> None:
        """Names twice, names that are not there, grants and times that are none, a file that is no list."""
        self.run(tmp_path, "add", "ci", "--grant", "a:reader")
        assert "There is a token named ci" in self.run(tmp_path, "add", "ci", "--grant", "a:reader", fails=True)
        assert "no token named ic" in self.run(tmp_path, "revoke", "ic", fails=True)
        assert "no role" in self.run(tmp_path, "add", "x", "--grant", "a:boss", fails=True)
        assert "not a time" in self.run(tmp_path, "add", "x", "--grant", "a:reader", "--expires", "soon", fails=True)
        (tmp_path / "tokens.json").write_text("[]")
        assert "no list of tokens" in self.run(tmp_path, "list", fails=True)
        with pytest.raises(SettingsError, match="no list of tokens"):
            Tokens(Settings(data_dir=tmp_path))

    def test_an_expired_token_is_unknown(self, tmp_path: Path) -> None:
        """From the second on that it names."""
        token = TokenKeeper(tmp_path).add("ci", EVERYTHING, now_s=100.0, expires_s=200.0)
        tokens = Tokens(Settings(data_dir=tmp_path))
        assert tokens.find(token, 199.0) is not None
        assert tokens.find(token, 200.0) is None

    def test_a_server_with_all_tokens_revoked_stays_closed(self, tmp_path: Path) -> None:
        """No token is not no protection."""
        keeper = TokenKeeper(tmp_path)
        keeper.add("ci", EVERYTHING, 0.0)
        keeper.revoke("ci")
        assert Tokens(Settings(data_dir=tmp_path)).any
        assert Settings(data_dir=tmp_path).authenticates
        assert not Tokens(Settings(data_dir=tmp_path / "new")).any

    def test_a_token_file_may_hold_hashes_and_roles(self, tmp_path: Path) -> None:
        """And is read again when it changes."""
        file = tmp_path / "tokens"
        file.write_text(f"sha256:{digest('secret').hex()} a:reader b\n")
        tokens = Tokens(Settings(data_dir=tmp_path / "data", token_file=file))
        caller = tokens.find("secret", 0.0)
        assert caller is not None
        assert (caller.role("a"), caller.role("b"), caller.role("c")) == (Role.READER, Role.ADMIN, None)
        file.write_text("another\n")
        assert tokens.find("secret", 0.0) is None
        assert tokens.find("another", 0.0) is not None
        for text, message in (("", "holds no token"), ("t a:boss", "line 1"), ("sha256:xy", "line 1")):
            file.write_text(text)
            with pytest.raises(SettingsError, match=message):
                Tokens(Settings(data_dir=tmp_path / "data", token_file=file))


class TestThrottle:
    def test_a_bucket(self) -> None:
        """So many at once, then so many a second, each key for itself."""
        throttle = Throttle()
        for _ in range(3):
            assert throttle.wait_s("a", 0.0, burst=3, per_s=0.5) == 0.0
            throttle.take("a", 0.0, burst=3, per_s=0.5)
        assert throttle.wait_s("a", 0.0, burst=3, per_s=0.5) == 2.0
        assert throttle.wait_s("a", 1.0, burst=3, per_s=0.5) == 1.0
        assert throttle.wait_s("a", 2.0, burst=3, per_s=0.5) == 0.0
        assert throttle.wait_s("b", 0.0, burst=3, per_s=0.5) == 0.0

    def test_its_memory_is_bounded(self) -> None:
        """Any number of addresses."""
        throttle = Throttle()
        for number in range(MAX_KEYS + 100):
            throttle.take(str(number), 0.0, burst=3, per_s=1.0)
        assert len(throttle._buckets) == MAX_KEYS

    async def test_wrong_tokens_are_slowed_down_and_right_ones_are_not(self, serve: Serve, clock: ManualClock) -> None:
        """After a burst, an address gets no more answers to wrong tokens for a while; who has the right one goes on."""
        async with serve(clock, token="right") as running:
            jobs = running.client.jobs
            reasons = [(await failing(jobs.ListJobs(List, metadata=bearer(f"wrong-{n}")))).reason for n in range(25)]
            assert reasons == ["UNAUTHENTICATED"] * 20 + ["TOO_MANY_ATTEMPTS"] * 5
            failure = await failing(jobs.ListJobs(List, metadata=bearer("wrong")))
            assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert failure.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 5
            await jobs.ListJobs(List, metadata=bearer("right"))
            clock.advance(5.0)
            assert (await failing(jobs.ListJobs(List, metadata=bearer("wrong")))).reason == "UNAUTHENTICATED"

    async def test_requests_of_a_project_are_limited(self, serve: Serve, clock: ManualClock) -> None:
        """Ten seconds' worth at once; another project goes on."""
        async with serve(clock, requests_per_s=0.5) as running:
            jobs = running.client.jobs
            for _ in range(5):
                await jobs.ListJobs(List)
            failure = await failing(jobs.ListJobs(List))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert failure.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 2
            await jobs.ListJobs(job_service_pb2.ListJobsRequest(parent="projects/b"))
            clock.advance(2.0)
            await jobs.ListJobs(List)


async def ends_with(call: Any) -> str:
    """The reason that a stream ends with."""
    while True:
        try:
            assert await call.read() is not grpc.aio.EOF
        except grpc.aio.AioRpcError as error:
            return failure_of(error).reason


async def test_the_audit_log(serve: Serve, tmp_path: Path) -> None:
    """A line for each change and each refusal: who, what, how it ended; none for reading. It follows a log rotation."""
    log, data = tmp_path / "audit.log", tmp_path / "data"
    keeper = TokenKeeper(data)
    ann = keeper.add("ann", {"default": Role.SUBMITTER}, 0.0)
    async with serve(data_dir=data, audit_log=log) as running:
        client = running.client
        upload = upload_service_pb2.CreateUploadRequest(parent=PROJECT, digest=digest_of(b"x"))
        made = await client.uploads.CreateUpload(upload, metadata=bearer(ann))
        call = client.uploads.WriteUpload(metadata=bearer(ann))
        await call.write(chunks(made.name, b"x")[0])
        await call.done_writing()
        assert [answer.upload.name async for answer in call] == [made.name]
        await client.jobs.ListJobs(List, metadata=bearer(ann))
        await failing(client.jobs.ListJobs(List, metadata=bearer("wrong")))
        log.rename(tmp_path / "audit.log.1")
        delete = job_service_pb2.DeleteJobRequest(name=f"{PROJECT}/jobs/{'0' * 26}")
        await failing(client.jobs.DeleteJob(delete, metadata=bearer(ann)))
    first = [json.loads(line) for line in (tmp_path / "audit.log.1").read_text().splitlines()]
    (last,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["caller"], line["method"], line["outcome"]) for line in (*first, last)] == [
        ("token:ann", "CreateUpload", "OK"),
        ("token:ann", "WriteUpload", "OK"),
        ("anonymous", "ListJobs", "UNAUTHENTICATED"),
        ("token:ann", "DeleteJob", "PERMISSION_DENIED"),
    ]
    for line in first[:2]:
        assert (line["project"], line["resource"]) == ("default", made.name)
    assert first[0]["peer"].startswith("ipv4:127.0.0.1")
    assert stat.S_IMODE((tmp_path / "audit.log.1").stat().st_mode) == 0o600


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificates")
async def test_a_renewed_certificate_is_taken(serve: Serve, tmp_path: Path) -> None:
    """New connections see the new one; a file that cannot be read leaves the old one in use."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    cert, key = old.issue("server")
    async with serve(tls_cert=cert, tls_key=key) as running:

        async def call(authority: Authority) -> Any:
            credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
            # A channel of the same target and arguments would share its connection.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(running.server.address, credentials, options) as channel:
                return await Client(channel).info.GetServerInfo(Info(), timeout=120)

        await call(old)
        for source, target in zip(new.issue("server"), (cert, key), strict=True):
            source.replace(target)
        await call(new)
        with pytest.raises(grpc.aio.AioRpcError):
            await call(old)
        cert.unlink()
        await call(new)
