"""Small models in every format, written by the libraries that write them in earnest."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper


class SmallNet(torch.nn.Module):
    """Conv, BatchNorm, ReLU, pooling, Dropout, Linear: [N,1,H,W] -> [N,5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean(dim=(2, 3))))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The helpers below; test modules cannot import a conftest."""
    return SimpleNamespace(
        onnx_model=onnx_model,
        external_model=external_model,
        write_onnx=write_onnx,
        save_program=save_program,
        rewrite=rewrite,
        touching_torch_save=touching_torch_save,
        touching_pickle=touching_pickle,
    )


@pytest.fixture(scope="session")
def small_net() -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    net.norm.running_mean.uniform_(-0.5, 0.5)
    return net.eval()


@pytest.fixture(scope="session")
def save_script() -> Callable[[torch.nn.Module, Path], Path]:
    """torch.jit.script and save, without their deprecation warnings."""

    def save(module: torch.nn.Module, path: Path) -> Path:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit")
            torch.jit.script(module).save(str(path))
        return path

    return save


@pytest.fixture(scope="session")
def scripted(small_net: SmallNet, save_script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_script(small_net, tmp_path_factory.mktemp("script") / "net.pt")


@pytest.fixture(scope="session")
def traced(small_net: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "net.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        torch.jit.trace(small_net, torch.zeros(1, 1, 12, 12)).save(str(path))
    return path


@pytest.fixture(scope="session")
def exported(small_net: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "net.pt2"
    save_program(small_net, (torch.zeros(2, 1, 12, 12),), path, {"x": {0: torch.export.Dim("batch")}})
    return path


def save_program(module: torch.nn.Module, args: tuple[Any, ...], path: Path, dynamic_shapes: Any = None) -> Path:
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes)
    torch.export.save(program, path)
    return path


class TouchOnLoad:
    """Unpickling it creates the file `marker`: proof that a pickle was executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def touching_torch_save(marker: Path) -> bytes:
    """What torch.save writes of an object that executes code."""
    buffer = io.BytesIO()
    torch.save(TouchOnLoad(marker), buffer)
    return buffer.getvalue()


def touching_pickle(marker: Path) -> bytes:
    return pickle.dumps(TouchOnLoad(marker))


def rewrite(
    source: Path, target: Path, changes: dict[str, bytes | Callable[[Any], Any] | None], *, folder: str | None = None
) -> Path:
    """A copy of an archive with members replaced (bytes), edited (a function on their JSON), or removed (None).

    Keys are members' names without the archive's folder; bytes under a new name are added. `folder`: another name for
    the archive's own.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        folder = folder or old.namelist()[0].split("/", 1)[0]
        left = dict(changes)
        for info in old.infolist():
            inner = info.filename.split("/", 1)[1]
            data: bytes | None = old.read(info)
            if inner in left:
                change = left.pop(inner)
                if callable(change):
                    document = json.loads(data or b"null")
                    data = json.dumps(change(document) or document).encode()
                else:
                    data = change
            if data is not None:
                new.writestr(zipfile.ZipInfo(f"{folder}/{inner}", (1980, 1, 1, 0, 0, 0)), data)
        for inner, change in left.items():
            assert isinstance(change, bytes)
            new.writestr(zipfile.ZipInfo(f"{folder}/{inner}", (1980, 1, 1, 0, 0, 0)), change)
    return target


def onnx_model(
    nodes: list[onnx.NodeProto],
    *,
    initializers: list[onnx.TensorProto] | None = None,
    opset: int = 17,
    ir_version: int = 10,
    inputs: dict[str, list[Any]] | None = None,
    outputs: dict[str, list[Any]] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    domains: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """A model of float inputs and outputs, by default x [N,4] -> y [N,4]."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in (inputs or {"x": ["N", 4]}).items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in (outputs or {"y": ["N", 4]}).items()],
        initializers or [],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(k, v) for k, v in (domains or {}).items())]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions or [])
    model.ir_version = ir_version
    return model


def external_model(location: str, *, offset: int = 0, length: int | None = None) -> onnx.ModelProto:
    """y = x @ w with w [4,4] float32 (64 bytes) in the file `location`."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    fields = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    for key, value in fields.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return onnx_model([helper.make_node("MatMul", ["x", "w"], ["y"])], initializers=[weight])


def write_onnx(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
