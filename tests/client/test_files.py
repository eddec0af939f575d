"""What the client sees in a model file, without torch and onnx; the files are made with the real libraries."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelpress_client.convert import Conversion
from modelpress_client.errors import UnusableInputError, UsageError
from modelpress_client.inputs import parse_inputs
from modelpress_client.onnx_files import NotOnnxError, check_location, external_locations, model_files
from modelpress_client.sources import check_source, format_of


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def tensor(name: str, location: str | None = None) -> onnx.TensorProto:
    result = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), name)
    if location is not None:
        result.ClearField("raw_data")
        result.data_location = onnx.TensorProto.EXTERNAL
        result.external_data.add(key="location", value=location)
        result.external_data.add(key="offset", value="0")
    return result


def save_model(path: Path) -> None:
    """External data of an initializer, a Constant node, a subgraph's initializer and a function's Constant node."""
    constant = make.make_node("Constant", [], ["c"], value=tensor("c", "constant.bin"))
    branch = make.make_graph([], "branch", [], [], initializer=[tensor("b", "sub/branch.bin")])
    condition = make.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=branch)
    graph = make.make_graph([constant, condition], "g", [], [], [tensor("w", "weights.bin"), tensor("inline")])
    inner = make.make_node("Constant", [], ["z"], value=tensor("z", "function.bin"))
    function = make.make_function("local", "f", [], ["z"], [inner], [make.make_opsetid("", 20)])
    path.write_bytes(make.make_model(graph, functions=[function]).SerializeToString())


def test_finds_external_data_wherever_it_is(tmp_path: Path) -> None:
    """Initializers, Constant nodes, subgraphs and functions."""
    save_model(tmp_path / "m.onnx")
    assert external_locations(tmp_path / "m.onnx") == {"constant.bin", "sub/branch.bin", "weights.bin", "function.bin"}


def test_manifest_of_a_model_with_external_data(tmp_path: Path) -> None:
    """The model comes first, its data files keep their relative names, and a missing one is named."""
    path = tmp_path / "m.onnx"
    save_model(path)
    (tmp_path / "sub").mkdir()
    for name in ("constant.bin", "sub/branch.bin", "weights.bin"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"function\.bin"):
        model_files(path)
    (tmp_path / "function.bin").touch()
    assert list(model_files(path)) == ["m.onnx", "constant.bin", "function.bin", "sub/branch.bin", "weights.bin"]


@pytest.mark.parametrize(
    "location", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\\b", "a\x00b", "m.onnx", "x" * 300]
)
def test_refuses_locations_outside_the_folder(tmp_path: Path, location: str) -> None:
    """A model cannot make the client read other files."""
    with pytest.raises(UnusableInputError):
        check_location(tmp_path / "m.onnx", location)


def test_refuses_what_is_cut_off(tmp_path: Path) -> None:
    """Every proper prefix that ends within a field is noticed."""
    path = tmp_path / "m.onnx"
    save_model(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnusableInputError, match="cut off"):
        model_files(path)


@given(st.binary(min_size=1, max_size=300))
def test_walking_garbage_ends(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever the bytes, the outcome is a set of names or NotOnnxError."""
    path = tmp_path_factory.getbasetemp() / "garbage.onnx"
    path.write_bytes(data)
    try:
        locations = external_locations(path)
    except NotOnnxError:
        return
    assert isinstance(locations, set)


def test_kinds_of_real_files(tmp_path: Path) -> None:
    """Content decides; the names here say nothing."""
    net = Net().eval()
    example = (torch.zeros(1, 4),)
    save_model(tmp_path / "onnx")
    torch.save(net.state_dict(), tmp_path / "state_dict")
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "checkpoint")
    torch.save(net.state_dict(), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    torch.save(net, tmp_path / "module")
    torch.export.save(torch.export.export(net, example), tmp_path / "exported.pt2")
    (tmp_path / "safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    with zipfile.ZipFile(tmp_path / "npz", "w") as archive:
        archive.writestr("x.npy", b"")
    expected = {
        "onnx": "onnx",
        "state_dict": "state_dict",
        "checkpoint": "state_dict",
        "legacy": "state_dict",
        "module": "pickled_module",
        "exported.pt2": "torch_export",
        "safetensors": "safetensors",
        "text": None,
        "empty": None,
        "npz": None,
    }
    assert {name: found.name if (found := format_of(tmp_path / name)) else None for name in expected} == expected


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_the_server_reads_or_judges_is_left_to_it(tmp_path: Path) -> None:
    """TorchScript carries its own code; of what the client does not know a newer server may know more."""
    torch.jit.save(torch.jit.trace(Net().eval(), torch.zeros(1, 4)), tmp_path / "m.pt")  # type: ignore[no-untyped-call]
    (tmp_path / "unknown").write_text("hello")
    (tmp_path / "damaged").write_bytes((tmp_path / "m.pt").read_bytes()[:500])
    for name, expected in (("m.pt", "torchscript"), ("unknown", None), ("damaged", None)):
        source = check_source(tmp_path / name, Conversion())
        assert (source.format.name if source.format else None) == expected
        assert not source.convert


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("weights.pt", "--architecture"), ("weights.safetensors", "--architecture"), ("module.pt", "--trust-pickle")],
)
def test_refusals_name_the_way_out(tmp_path: Path, name: str, way_out: str) -> None:
    """The option that converts the file on the user's machine, and the file that it is about."""
    torch.save(Net().state_dict(), tmp_path / "weights.pt")
    torch.save(Net(), tmp_path / "module.pt")
    (tmp_path / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnusableInputError, match=way_out) as caught:
        check_source(tmp_path / name, Conversion())
    assert str(tmp_path / name) in caught.value.message
    assert "--input" in caught.value.message


def test_a_folder_of_weights(tmp_path: Path) -> None:
    """It stands for the weights in it; without --architecture the file is named, and what works."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnusableInputError, match=r"model\.safetensors is a safetensors file.*transformers:auto"):
        check_source(tmp_path, Conversion())
    wanted = Conversion("transformers:auto", inputs=tuple(parse_inputs(["x:float32[batch,4]"])))
    source = check_source(tmp_path, wanted)
    assert (source.path, source.convert) == (tmp_path, True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnusableInputError, match="without a model or weights"):
        check_source(tmp_path, wanted)
