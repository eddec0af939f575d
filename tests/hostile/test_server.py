"""Hostile models against a real server with real workers: typed refusals, and the server as it was before."""

from __future__ import annotations

import asyncio
import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch
from footprint import Footprint, settled
from google.rpc import error_details_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2
from onnx import helper, numpy_helper
from onnx_files import external, functions, hostile_names, model_of, relu, value
from server_harness import PROJECT, Client
from torch_files import (
    Endless,
    Greedy,
    Loud,
    Net,
    ReadsFile,
    Touch,
    make_program,
    make_script,
    renamed,
    with_payload,
    zip_of,
)
from zip_writer import Member, Zip, swapped

pytestmark = pytest.mark.slow

OTHER = "projects/other"
# What the allocator keeps, and connections that come and go.
SPARE_DESCRIPTORS, SPARE_MIB = 6, 32.0
ACTIVE, PROCESSING = model_service_pb2.Model.STATE_ACTIVE, model_service_pb2.Model.STATE_PROCESSING


@dataclass(frozen=True)
class Served:
    """A server process, and a client of it."""

    client: Client
    pid: int


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The server as an operator starts it, with real workers."""
    limits = ("--inspect-time-limit-s", "45", "--worker-memory-bytes", "6GiB", "--reserve-bytes", "0")
    command = (sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", *limits)
    process = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data")], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
async def served(process: subprocess.Popen[str]) -> AsyncIterator[Served]:
    """It, once it serves."""
    assert process.stdout is not None
    address = process.stdout.readline().removeprefix("listening on ").strip()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(Client(channel), process.pid)


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


def deflated(archive: Zip, zeros_mib: int) -> bytes:
    """The archive as zipfile compresses it, with zeros for its weights."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as written:
        for member in archive.members:
            weights = b"/data/" in member.name
            written.writestr(member.name.decode(), bytes(zeros_mib << 20) if weights else member.data)
    return target.getvalue()


def saved(content: Any) -> bytes:
    """A file of torch.save."""
    target = io.BytesIO()
    torch.save(content, target)
    return target.getvalue()


def claims(pickle: bytes) -> bytes:
    """A file of torch.save whose pickle is another one."""
    members = [Member(item.name, pickle if item.name.endswith(b"data.pkl") else item.data)
               for item in zip_of(saved({"w": torch.ones(4)})).members]  # fmt: skip
    return Zip(members).build()


def constants(count: int, elements: int) -> bytes:
    """A graph of a few hundred bytes that a careless reader folds to gigabytes."""
    shape = numpy_helper.from_array(np.array([elements], np.int64), "n")
    nodes = [helper.make_node("ConstantOfShape", ["n"], [f"c{index}"]) for index in range(count)]
    nodes += [helper.make_node("ReduceSum", [f"c{index}"], [f"s{index}"], keepdims=0) for index in range(count)]
    nodes.append(helper.make_node("Sum", ["x", *(f"s{index}" for index in range(count))], ["y"]))
    return model_of(nodes, weights=[shape]).SerializeToString()


def rows(folder: Path, marker: Path) -> list[tuple[str, bytes, str]]:
    """What is sent, and the state or the reason of its refusal; an empty one: any, and the server goes on."""
    program, good, evil = make_program(), make_script(Net()), make_script(ReadsFile())
    many_inputs = [value("x", [2, 4]), *(value(f"x{number}" + "y" * 4000, [2, 4]) for number in range(2000))]
    return [
        ("a pickle that executes", saved(Touch(marker)), "MODEL_REJECTED"),
        ("a whole module", saved(Net()), "MODEL_REJECTED"),
        ("weights alone", saved(Net().state_dict()), "UNSUPPORTED_FORMAT"),
        ("weights of safetensors that lie", struct.pack("<Q", 1 << 40) + b'{"a":', "UNSUPPORTED_FORMAT"),
        ("a pickle that claims 4 GiB", claims(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 32) + b"x."), ""),
        ("weights that unpack a thousandfold", deflated(good, 64), "MODEL_REJECTED"),
        ("samples that execute", with_payload(program, marker).build(), "MODEL_REJECTED"),
        ("two programs in one", swapped(with_payload(program, marker), program), "MODEL_REJECTED"),
        ("two scripts in one", swapped(evil, good), "MODEL_REJECTED"),
        ("code in capitals", renamed(evil, lambda name: name.replace(b"/code/", b"/CODE/")).build(), "MODEL_REJECTED"),
        ("an endless loop", make_script(Endless()).build(), "WORKER_TIMEOUT"),
        ("a hundred gigabytes", make_script(Greedy()).build(), "WORKER_OUT_OF_MEMORY"),
        ("a recursive function", functions(3, closed=True).SerializeToString(), "MODEL_REJECTED"),
        ("functions that double", functions(26, closed=False).SerializeToString(), "MODEL_REJECTED"),
        ("constants of ten gigabytes", constants(20, 1 << 27), ""),
        ("data that is elsewhere", external(("location", "../w.bin")).SerializeToString(), "MODEL_REJECTED"),
        ("a name of megabytes", relu(inputs=[value("x" * 5_000_000, [2, 4])]).SerializeToString(), "MODEL_REJECTED"),
        ("an input of terabytes", relu(inputs=[value("x", [1 << 40, 4])]).SerializeToString(), "INVALID_INPUTS"),
        ("many inputs", relu(inputs=many_inputs).SerializeToString(), "MODEL_REJECTED"),
        ("a script that prints", make_script(Loud()).build(), "ACTIVE"),
        ("names of escapes", hostile_names(folder / "names.onnx").read_bytes(), "ACTIVE"),
        ("an honest script", good.build(), "ACTIVE"),
    ]


async def started_job(client: Client) -> Any:
    """A job of another project, on an honest model."""
    digest = await client.upload(relu().SerializeToString(), OTHER)
    files = [common_pb2.FileEntry(path="model.onnx", digest=digest)]
    request = model_service_pb2.CreateModelRequest(parent=OTHER, model=model_service_pb2.Model(files=files))
    return await client.job(await client.models.CreateModel(request), skip_cache=True)


@pytest.mark.timeout(1800)
async def test_a_day_of_hostile_models(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused for what it is or taken for what it computes; nothing is executed; another project's jobs, begun
    before each third of them, are done; the server holds what it held before."""
    client, marker = served.client, tmp_path / "executed"
    first = await client.wait(await started_job(client))
    assert first.state == job_service_pb2.JOB_STATE_SUCCEEDED, first.error
    before = await settled(served.pid, Footprint(0, 0, 0, 0.0), descriptors=40, memory_mib=500.0)
    jobs, seen = [], {}
    for number, (what, content, expected) in enumerate(rows(tmp_path, marker)):
        if number % 3 == 0:
            jobs.append(await started_job(client))
        model = await inspected(client, content)
        found = "ACTIVE" if model.state == ACTIVE else reason_of(model)
        seen[what] = found
        assert found == (expected or found), f"{what}: {model.error}"
        assert found != "INTERNAL", what
        assert model.error.message.isprintable()
        assert str(tmp_path) not in model.error.message, what
    assert not marker.exists()
    for job in jobs:
        ended = await client.wait(job)
        assert ended.state == job_service_pb2.JOB_STATE_SUCCEEDED, ended.error
    after = await settled(served.pid, before, descriptors=SPARE_DESCRIPTORS, memory_mib=SPARE_MIB)
    with capsys.disabled():
        print(f"\nhostile models: before {before}, after {len(seen)} of them {after}")
    assert after.descriptors <= before.descriptors + SPARE_DESCRIPTORS
    assert after.memory_mib <= before.memory_mib + SPARE_MIB
