"""External data stays in the model's folder, or the model is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders import load
from oracles.plain_run import run_onnx

WEIGHT = np.eye(4, dtype=np.float32) * 2


def test_data_files_are_read(tmp_path: Path, make: SimpleNamespace) -> None:
    """Beside the model, in a folder below it, given or found; the digest covers them."""
    (tmp_path / "weights").mkdir()
    data = tmp_path / "weights" / "w.bin"
    data.write_bytes(bytes(16) + WEIGHT.tobytes())
    path = make.write_onnx(make.external_model("weights/w.bin", offset=16, length=64), tmp_path / "m.onnx")
    found, given = load(path), load([path, data])
    x = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(run_onnx(given, [{"x": x}])[0]["y"], 2 * x, rtol=0, atol=0)
    assert found.provenance == given.provenance
    assert found.provenance.size_bytes == path.stat().st_size + 80
    data.write_bytes(bytes(80))
    assert load(path).provenance.sha256 != found.provenance.sha256


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/hostname", "a/../../w.bin", "..\\w.bin", "C:/w.bin", "", "a\0b"]
)
def test_paths_that_leave_the_folder(tmp_path: Path, make: SimpleNamespace, location: str) -> None:
    """Refused by name, whether or not something lies there."""
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    path = make.write_onnx(make.external_model(location), folder / "m.onnx")
    with pytest.raises(RejectedModelError) as caught:
        load(path)
    assert caught.value.metadata["finding"] == "EXTERNAL_PATH"


@pytest.mark.parametrize("link", ["file", "folder", "hard"])
def test_links_are_refused(tmp_path: Path, make: SimpleNamespace, link: str) -> None:
    """A symbolic link, a linked folder or a hard link may show any file of this machine."""
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.mkdir()
    folder.mkdir()
    (secret / "w.bin").write_bytes(WEIGHT.tobytes())
    if link == "file":
        (folder / "w.bin").symlink_to(secret / "w.bin")
    elif link == "folder":
        (folder / "sub").symlink_to(secret, target_is_directory=True)
    else:
        os.link(secret / "w.bin", folder / "w.bin")
    location = "sub/w.bin" if link == "folder" else "w.bin"
    path = make.write_onnx(make.external_model(location), folder / "m.onnx")
    with pytest.raises(RejectedModelError) as caught:
        load(path)
    assert caught.value.metadata["finding"] == "EXTERNAL_PATH"


def test_missing_and_short_files(tmp_path: Path, make: SimpleNamespace) -> None:
    """The error names the file and what is wrong with it."""
    path = make.write_onnx(make.external_model("w.bin"), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedFormatError, match=r"'w\.bin', which is not there"):
        load(path)
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:60])
    with pytest.raises(UnsupportedFormatError, match="cut short"):
        load(path)


@pytest.mark.parametrize(("offset", "length"), [(-4, None), (0, 32), (0, 2**40)])
def test_ranges_that_do_not_fit_the_shape(
    tmp_path: Path, make: SimpleNamespace, offset: int, length: int | None
) -> None:
    """Negative offsets and lengths of another shape are refused before anything is mapped."""
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = make.write_onnx(make.external_model("w.bin", offset=offset, length=length), tmp_path / "m.onnx")
    with pytest.raises(RejectedModelError) as caught:
        load(path)
    assert caught.value.metadata["finding"] == "EXTERNAL_DATA"
