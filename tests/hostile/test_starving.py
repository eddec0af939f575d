"""One tenant that takes all there is, and another that wants little."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import google_crc32c
import grpc.aio
import numpy as np
import pytest
from modelpress_protos.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc, upload_service_pb2
from modelpress_protos.v1.upload_service_pb2_grpc import UploadServiceStub
from modelpress_server.app import Server
from modelpress_server.config import Settings
from onnx import TensorProto, helper, numpy_helper

Model = model_service_pb2.Model


def graph(nodes: list[object], initializers: list[object]) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    model: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


def endless(number: int) -> bytes:
    """A loop that ends after 2^62 rounds: a few hundred bytes."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["state"], ["next"])],
        f"body{number}",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2]),
        ],
    )
    constants = [
        numpy_helper.from_array(np.array(2**62), "n"),
        numpy_helper.from_array(np.array(True), "t"),
    ]
    return graph([helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)], constants)


class Tenant:
    """A project that uploads models."""

    def __init__(self, channel: grpc.aio.Channel, project: str) -> None:
        self.parent = f"projects/{project}"
        self.uploads = UploadServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)

    async def send(self, content: bytes) -> Model:
        digest = common_pb2.Digest(sha256=hashlib.sha256(content).digest(), size_bytes=len(content))
        request = upload_service_pb2.CreateUploadRequest(parent=self.parent, digest=digest)
        upload = await self.uploads.CreateUpload(request)
        chunk = upload_service_pb2.WriteUploadRequest(
            name=upload.name, data=content, crc32c=google_crc32c.value(content), finish_write=True
        )

        async def chunks() -> AsyncIterator[upload_service_pb2.WriteUploadRequest]:
            yield chunk

        async for _ in self.uploads.WriteUpload(chunks()):
            pass
        model = Model(files=[common_pb2.FileEntry(path="model.onnx", digest=digest)])
        return await self.models.CreateModel(model_service_pb2.CreateModelRequest(parent=self.parent, model=model))

    async def states(self) -> list[int]:
        listed = await self.models.ListModels(model_service_pb2.ListModelsRequest(parent=self.parent))
        return [model.state for model in listed.models]


@pytest.mark.slow
async def test_endless_loops_hold_up_nobody_else(tmp_path: Path) -> None:
    """Fifty models that never end to inspect: another project's is inspected after one of them, and their number is
    limited."""
    settings = Settings(
        listen="127.0.0.1:0", data_dir=tmp_path, inspect_time_limit_s=20.0, max_pending_models=50, reserve_bytes=0
    )
    server = Server(settings)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            greedy, other = Tenant(channel, "greedy"), Tenant(channel, "other")
            for number in range(50):
                await greedy.send(endless(number))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await greedy.send(endless(50))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            await other.send(graph([helper.make_node("Relu", ["x"], ["y"])], []))
            while await other.states() == [Model.STATE_PROCESSING]:
                await server._clock.sleep(0.2)
            assert await other.states() == [Model.STATE_ACTIVE]
            ended = [state for state in await greedy.states() if state != Model.STATE_PROCESSING]
            assert len(ended) <= 2
            assert set(ended) <= {Model.STATE_REJECTED}
    finally:
        await server.stop()
