"""Tokens, TLS, and what stands open: health, reflection, server info."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from authority import Authority
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from modelpress_compression.target import measured_devices
from modelpress_protos.formats import FORMATS
from modelpress_protos.v1 import common_pb2, job_service_pb2, server_service_pb2, upload_service_pb2
from modelpress_server.interceptors import Gate
from server_harness import Client, Running, Serve, failing

Info = server_service_pb2.GetServerInfoRequest


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_tokens(serve: Serve, tmp_path: Path) -> None:
    """Without a known token: UNAUTHENTICATED. A token may be bound to projects: others do not exist for it."""
    tokens = tmp_path / "tokens"
    tokens.write_text("# for everybody\nall-of-it\n\nonly-a a b\n")
    listing = job_service_pb2.ListJobsRequest(parent="projects/c")
    async with serve(token="first", token_file=tokens) as running:
        client = running.client
        for metadata in ((), bearer("wrong"), (("authorization", "first"),), bearer("")):
            failure = await failing(client.info.GetServerInfo(Info(), metadata=metadata))
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        for token in ("first", "all-of-it"):
            await client.jobs.ListJobs(listing, metadata=bearer(token))
        failure = await failing(client.jobs.ListJobs(listing, metadata=bearer("only-a")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
        listing.parent = "projects/b"
        await client.jobs.ListJobs(listing, metadata=bearer("only-a"))
        first = upload_service_pb2.WriteUploadRequest(name="projects/b/uploads/" + "0" * 26)
        assert (await failing(client.send([first]))).reason == "UNAUTHENTICATED"
        health = health_pb2_grpc.HealthStub(client.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificates")
@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(serve: Serve, tmp_path: Path, mutual: bool) -> None:
    """TLS serves clients that trust the authority; mutual TLS only those with a certificate of it."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    ca = {"tls_client_ca": authority.file} if mutual else {}
    async with serve(tls_cert=cert, tls_key=key, **ca) as running:

        async def call(*own: bytes) -> Any:
            chain, private = (own[0], own[1]) if own else (None, None)
            credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), private, chain)
            async with grpc.aio.secure_channel(running.server.address, credentials) as channel:
                return await Client(channel).info.GetServerInfo(Info(), timeout=120)

        if mutual:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            client_cert, client_key = authority.issue("client")
            assert (await call(client_cert.read_bytes(), client_key.read_bytes())).version
        else:
            assert (await call()).version
        with pytest.raises(grpc.aio.AioRpcError):
            await running.client.info.GetServerInfo(Info(), timeout=120)


async def test_server_info(running: Running) -> None:
    """Versions, limits, techniques with options, presets, load."""
    info = await running.client.info.GetServerInfo(Info())
    assert list(info.api_versions) == ["modelpress.v1"]
    assert tuple(info.devices) == measured_devices()
    assert info.max_blob_bytes == running.settings.max_blob_bytes
    assert {technique.name for technique in info.techniques} >= {"fuse", "prune", "quantize"}
    prune = next(technique for technique in info.techniques if technique.name == "prune")
    assert "[0, 1)" in {option.range for option in prune.options}
    assert info.presets[0].name == "default"
    assert info.presets[0].recipe.version == 1
    assert all(preset.summary for preset in info.presets)
    assert {"torch", "onnx", "onnxruntime"} <= set(info.toolchain)
    assert (info.sandbox_level, info.workers, info.queued_jobs, info.running_jobs) == (2, 1, 0, 0)
    assert set(info.formats) == {row.number for row in FORMATS if row.loader}
    assert common_pb2.MODEL_FORMAT_TORCHSCRIPT in info.formats


async def test_code_bearing_formats_need_the_required_sandbox(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """sandbox=require with a sandbox that does not hold: what carries code is not offered."""
    async with serve(sandbox="require") as running:
        running.executor.sandbox_level = 1
        info = await running.client.info.GetServerInfo(Info())
    assert common_pb2.MODEL_FORMAT_ONNX in info.formats
    assert not {common_pb2.MODEL_FORMAT_TORCHSCRIPT, common_pb2.MODEL_FORMAT_TORCH_EXPORT} & set(info.formats)


async def test_health_and_reflection(running: Running) -> None:
    """grpc.health.v1 names every service, reflection lists them and has their files."""
    health = health_pb2_grpc.HealthStub(running.client.channel)
    for service in ("", "modelpress.v1.JobService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="modelpress.v1.UploadService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.reflection.v1.ServerReflection"),
    ]
    for version in ("v1", "v1alpha"):
        # The messages of both versions are the same on the wire.
        call = running.client.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, found, itself = [answer async for answer in call(iter(requests))]
        names = {service.name for service in listed.list_services_response.service}
        assert {"modelpress.v1.UploadService", "grpc.health.v1.Health"} <= names
        assert {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} <= names
        assert found.file_descriptor_response.file_descriptor_proto
        (packed,) = itself.file_descriptor_response.file_descriptor_proto
        described = descriptor_pb2.FileDescriptorProto.FromString(packed)
        assert described.package == "grpc.reflection.v1"
        assert described.service[0].method[0].input_type == ".grpc.reflection.v1.ServerReflectionRequest"


async def test_an_unknown_method_is_unimplemented(running: Running) -> None:
    """A method that does not exist passes through the gate."""
    call = running.client.channel.unary_unary("/modelpress.v1.JobService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_bug_is_an_incident_without_details(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception is INTERNAL with an incident id; the text of it stands in the log only."""

    async def broken(gate: Gate, *_: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(Gate, "_enter", broken)
    failure = await failing(running.client.info.GetServerInfo(Info()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(failure.status)
    assert failure.metadata["incident"] in caplog.text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("method", ["JobService/ListJobs", "JobService/WatchJob", "UploadService/WriteUpload"])
async def test_bytes_that_are_no_message_are_told(running: Running, method: str) -> None:
    """INVALID_ARGUMENT for each kind of call, where gRPC by itself says UNKNOWN."""
    channel, path = running.client.channel, f"/modelpress.v1.{method}"
    garbage = b"\xff" * 20
    if method.endswith("ListJobs"):
        failure = await failing(channel.unary_unary(path)(garbage))
    elif method.endswith("WatchJob"):
        failure = await failing(channel.unary_stream(path)(garbage).read())
    else:
        call = channel.stream_stream(path)()
        await call.write(garbage)
        failure = await failing(call.read())
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")


async def test_too_large_a_message_is_refused(running: Running) -> None:
    """gRPC itself refuses what is over 4 MiB, also when it was compressed on the way."""
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        request = upload_service_pb2.WriteUploadRequest(data=bytes(5 * 1024 * 1024))
        call = running.client.uploads.WriteUpload(compression=compression)
        await call.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
