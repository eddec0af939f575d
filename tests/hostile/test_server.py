"""Hostile models against a real server with real workers: typed refusals, and the server as it was before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from modelpress_protos.v1 import common_pb2, model_service_pb2
from modelpress_server.app import Server
from modelpress_server.config import GIB, Settings
from onnx_files import functions, hostile_names, relu, value
from server_harness import DEFAULTS, PROJECT, Client
from torch_files import Endless, Greedy, Loud, Net, ReadsFile, make_program, make_script, renamed, with_payload
from zip_writer import swapped

pytestmark = pytest.mark.slow

ACTIVE, PROCESSING = model_service_pb2.Model.STATE_ACTIVE, model_service_pb2.Model.STATE_PROCESSING


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    settings = {"inspect_time_limit_s": 45.0, "worker_memory_bytes": 6 * GIB, "data_dir": tmp_path / "data"}
    server = Server(Settings(**{**DEFAULTS, **settings}))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Client(channel)
    finally:
        await server.stop()


async def inspected(client: Client, content: bytes) -> Any:
    """The model once it is accepted or refused."""
    hint = common_pb2.TensorSpec(name="x", dtype="float32")
    hint.shape.add(symbol="batch")
    hint.shape.add(value=4)
    files = [common_pb2.FileEntry(path="model.bin", digest=await client.upload(content))]
    hints = [hint] if content.startswith(b"PK") else []
    request = model_service_pb2.CreateModelRequest(
        parent=PROJECT, model=model_service_pb2.Model(files=files, input_hints=hints)
    )
    model = await client.models.CreateModel(request)
    while model.state == PROCESSING:
        await asyncio.sleep(0.1)
        model = await client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
    return model


def reason_of(model: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert model.error.details[0].Unpack(info)
    return str(info.reason)


@pytest.mark.timeout(900)
async def test_a_day_of_hostile_models(client: Client, tmp_path: Path) -> None:
    """Each is refused for what it is or taken for what it computes; nothing is executed, and the next one is served."""
    marker = tmp_path / "executed"
    program, good, evil = make_program(), make_script(Net()), make_script(ReadsFile())
    many_inputs = [value("x", [2, 4]), *(value(f"x{number}" + "y" * 4000, [2, 4]) for number in range(2000))]
    rows: list[tuple[str, bytes, str]] = [
        ("samples that execute", with_payload(program, marker).build(), "MODEL_REJECTED"),
        ("two programs in one", swapped(with_payload(program, marker), program), "MODEL_REJECTED"),
        ("two scripts in one", swapped(evil, good), "MODEL_REJECTED"),
        ("code in capitals", renamed(evil, lambda name: name.replace(b"/code/", b"/CODE/")).build(), "MODEL_REJECTED"),
        ("an endless loop", make_script(Endless()).build(), "WORKER_TIMEOUT"),
        ("a hundred gigabytes", make_script(Greedy()).build(), "WORKER_OUT_OF_MEMORY"),
        ("a recursive function", functions(3, closed=True).SerializeToString(), "MODEL_REJECTED"),
        ("a name of megabytes", relu(inputs=[value("x" * 5_000_000, [2, 4])]).SerializeToString(), "MODEL_REJECTED"),
        ("an input of terabytes", relu(inputs=[value("x", [1 << 40, 4])]).SerializeToString(), "INVALID_INPUTS"),
        ("many inputs", relu(inputs=many_inputs).SerializeToString(), "MODEL_REJECTED"),
        ("a script that prints", make_script(Loud()).build(), "ACTIVE"),
        ("names of escapes", hostile_names(tmp_path / "names.onnx").read_bytes(), "ACTIVE"),
        ("an honest script", good.build(), "ACTIVE"),
    ]
    for what, content, expected in rows:
        model = await inspected(client, content)
        found = "ACTIVE" if model.state == ACTIVE else reason_of(model)
        assert found == expected, f"{what}: {model.error}"
        assert model.error.message.isprintable()
        assert str(tmp_path) not in model.error.message, what
    assert not marker.exists()
