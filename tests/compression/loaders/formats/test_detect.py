"""Formats are told by content alone."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
import zipfile
from collections import Counter
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import CompressionError, RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders import load
from modelpress_compression.loaders.formats import FORMATS, detect
from modelpress_compression.loaders.formats.refusals import REFUSALS, STRANGERS, refused
from onnx import helper
from safetensors.torch import save_file


def test_torchscript_and_torch_export_under_any_name(scripted: Path, exported: Path, tmp_path: Path) -> None:
    """A TorchScript archive named .onnx is TorchScript, a .pt2 named .pt is torch_export."""
    assert detect(shutil.copy(scripted, tmp_path / "a.onnx")).name == "torchscript"
    assert detect(shutil.copy(exported, tmp_path / "b.pt")).name == "torch_export"


@pytest.mark.parametrize("new_format", [True, False])
def test_state_dict_and_pickled_module(small_net: torch.nn.Module, tmp_path: Path, new_format: bool) -> None:
    """torch.save's two containers, with weights alone and with a whole module."""
    torch.save(small_net.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    torch.save(small_net, tmp_path / "m.pt", _use_new_zipfile_serialization=new_format)
    assert detect(tmp_path / "w.pt").name == "state_dict"
    assert detect(tmp_path / "m.pt").name == "pickled_module"


def test_safetensors_and_onnx(tmp_path: Path, make: SimpleNamespace) -> None:
    """Both are recognized without an extension."""
    save_file({"w": torch.zeros(2)}, tmp_path / "w")
    make.write_onnx(make.onnx_model([helper.make_node("Relu", ["x"], ["y"])]), tmp_path / "m")
    assert detect(tmp_path / "w").name == "safetensors"
    assert detect(tmp_path / "m").name == "onnx"


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """A header of 640 bytes starts with the first bytes of a pickle."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(640)
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert (tmp_path / "w").read_bytes().startswith(b"\x80\x02")
    assert detect(tmp_path / "w").name == "safetensors"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello, this is no model at all", "no known format"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, "HDF5"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x1c\0\0\0TFL3" + b"\0" * 20, "tf2onnx.convert --tflite"),
        (b"\x08\x01\x12\xff\xff\x07" + b"\x0a" * 20, "tf2onnx.convert --saved-model"),
        (b"tree\nversion=v4\n", "onnxmltools.convert_lightgbm"),
        (b"GGUF\3\0\0\0", "transformers:auto"),
        (struct.pack("<Q", 2**40) + b'{"a":', "claims"),
        (b"PK\x03\x04" + b"\0" * 40, "damaged"),
    ],
)
def test_strangers_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    """What is no model gets an error that says what it is."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match=said):
        detect(path)


@given(
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x08\x0a\x12", bytes(8) + b"{"]), st.binary()
)
def test_any_bytes_are_a_format_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes
) -> None:
    """Whatever the bytes, the sniffers end, and with nothing but a row of the table or a CompressionError."""
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(start + rest)
    try:
        found = detect(path)
    except CompressionError:
        return
    assert found in FORMATS


def test_every_row_is_loaded_or_has_a_way_out() -> None:
    """Each loader can be imported and called with files and inputs; each other row says what to do instead."""
    for row in FORMATS:
        assert (row.loader is None) == (row.way_out is not None)
        if row.loader is not None:
            module, function = row.loader.split(":")
            loader = getattr(import_module(f"modelpress_compression.loaders.{module}"), function)
            assert list(signature(loader).parameters) == ["source", "specs"]


def test_names_and_numbers_are_of_one_row_each() -> None:
    """A number is the format's in stored messages and in the API."""
    assert len({row.name for row in FORMATS}) == len({row.number for row in FORMATS}) == len(FORMATS)
    assert min(row.number for row in FORMATS) > 0


def test_arrays_are_not_a_model(tmp_path: Path) -> None:
    """An .npz is taken for data, deflated or not."""
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10))
    with pytest.raises(UnsupportedFormatError, match="--data"):
        detect(tmp_path / "a.npz")


def test_weights_alone_are_refused_with_the_way_out(small_net: torch.nn.Module, tmp_path: Path) -> None:
    """`load` of a state dict or a pickled module names the options that convert it."""
    torch.save(small_net.state_dict(), tmp_path / "w.pt")
    torch.save(small_net, tmp_path / "m.pt")
    with pytest.raises(UnsupportedFormatError, match=r"--architecture package\.module:factory"):
        load(tmp_path / "w.pt")
    with pytest.raises(RejectedModelError, match="--trust-pickle"):
        load(tmp_path / "m.pt")


def test_a_pickle_is_never_executed(tmp_path: Path, make: SimpleNamespace) -> None:
    """Neither a bare pickle nor torch.save's archive runs what it contains."""
    marker = tmp_path / "executed"
    files = (
        ("a.pt", make.touching_torch_save(marker), "PICKLED_MODULE"),
        ("b.pt", make.touching_pickle(marker), "OTHER_PICKLE"),
    )
    for name, data, finding in files:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RejectedModelError) as caught:
            load(tmp_path / name)
        assert caught.value.metadata["finding"] == finding
    assert not marker.exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """Both are told apart, without a path of this machine in the message."""
    with pytest.raises(UnsupportedFormatError, match="'nothing' is missing"):
        load(tmp_path / "nothing")
    with pytest.raises(UnsupportedFormatError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "finding"),
    [
        (["m/data/weights/weight_0", "m/data/weights/model_weights_config.json", "m/archive_format"], "CUT_PROGRAM"),
        (["config.json", "metadata.json", "model.weights.h5"], "KERAS"),
        (["notes/old_config.json"], "OTHER_ZIP"),
    ],
)
def test_archives_without_a_model(tmp_path: Path, names: list[str], finding: str) -> None:
    """A program whose saving failed is no archive of Keras, which has a configuration as well."""
    with zipfile.ZipFile(tmp_path / "m", "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    with pytest.raises(UnsupportedFormatError) as caught:
        detect(tmp_path / "m")
    assert caught.value.metadata["finding"] == finding


def test_pickles_of_other_libraries(tmp_path: Path) -> None:
    """They are not called PyTorch's; what they would import is named, and what to do."""
    for protocol in range(2, 6):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"counts": Counter(a=1)}, protocol))
        with pytest.raises(RejectedModelError, match=r"names collections\.Counter.*skl2onnx") as caught:
            detect(tmp_path / "m.pkl")
        assert caught.value.metadata["finding"] == "OTHER_PICKLE"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_old_format_of_torch_under_any_protocol(tmp_path: Path, protocol: int) -> None:
    """It is torch's, whatever the pickle's protocol."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert detect(tmp_path / "w.pt").name == "state_dict"


def test_every_refusal_says_what_to_do() -> None:
    """Each names what the file is and what works; each code stands for one kind of error."""
    for row in (*REFUSALS.values(), *STRANGERS):
        assert row.what
        assert row.works
        assert REFUSALS[row.code].error is row.error
        assert all(text == "" or text.endswith((".", ")")) for text in (row.what, row.lacks, row.works))
    for stranger in STRANGERS:
        error = refused(stranger.code)
        assert error.metadata == {"finding": stranger.code}
        assert stranger.works in error.message
