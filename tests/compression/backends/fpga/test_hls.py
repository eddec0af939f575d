"""The network in C++ by hls4ml, and what a compiler makes of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import Model
from modelpress_compression.backends.fpga import hls
from modelpress_compression.backends.fpga.emulator import Design, run
from modelpress_compression.backends.fpga.network import Network, read_network
from modelpress_compression.backends.fpga.parts import PARTS
from modelpress_compression.backends.fpga.search import choose_formats

pytest.importorskip("hls4ml", reason="hls4ml is not installed: pip install 'modelpress[fpga]'")

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
DENSE = "g (float[n,5] x) => (float[n,3] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
IMAGES = """g (float[n,1,8,8] x) => (float[n,3] y) { c = Conv(x, w)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
    r = Relu(m)  f = Flatten(r)  y = MatMul(f, v) }"""


def _designed(model: Model, samples: np.ndarray, path: Path) -> tuple[Network, Design]:
    model.save(path)
    network = read_network(path)
    return network, choose_formats(network, samples)[0]


def _dense(model_from_text: Callable[..., Model], path: Path) -> tuple[Network, Design, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((5, 8)), "v": rng.standard_normal((8, 3))}
    samples = rng.standard_normal((200, 5))
    model = model_from_text(HEAD + DENSE, {name: array.astype(np.float32) for name, array in weights.items()})
    return *_designed(model, samples, path), samples


@pytest.mark.parametrize("tool", sorted(hls.TOOLS))
def test_each_tool_has_its_project(model_from_text: Callable[..., Model], tool: str, tmp_path: Path) -> None:
    """The same bytes each time, nothing of this machine in them, for a part that the tool knows."""
    network, design, samples = _dense(model_from_text, tmp_path / "model.onnx")
    first, second = (
        hls.write_project(network, design, tool, PARTS["lfe5u-45f"], 100.0, samples[:16], tmp_path / name)
        for name in ("first", "second")
    )
    assert first == second
    assert first.part == hls.TOOLS[tool].part
    assert not [name for name, content in first.files.items() if str(tmp_path).encode() in content]
    assert {"firmware/network.cpp", "tb_data/tb_output_predictions.dat"} <= set(first.files) | {
        name.replace("src/", "") for name in first.files
    }
    if hls.TOOLS[tool].amd:
        own = hls.write_project(network, design, tool, PARTS["xc7z020"], 100.0, samples[:16], tmp_path / "own")
        assert own.part == "xc7z020clg400-1"


def test_a_confined_worker_writes_the_same(
    model_from_text: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where modes and times of files may not be changed, as in the sandbox."""
    network, design, samples = _dense(model_from_text, tmp_path / "model.onnx")
    made = hls.write_project(network, design, "vitis", PARTS["xc7z020"], 100.0, samples[:16], tmp_path / "free")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("os.chmod", "os.utime"):
        monkeypatch.setattr(name, forbidden)
    again = hls.write_project(network, design, "vitis", PARTS["xc7z020"], 100.0, samples[:16], tmp_path / "confined")
    assert again == made


def test_what_hls4ml_does_not_take_is_told(model_from_text: Callable[..., Model], tmp_path: Path) -> None:
    """A Relu with a ceiling: in its own words, and no project."""
    weights = {"w": 9 * np.eye(5, dtype=np.float32), "low": np.float32(0), "high": np.float32(6)}
    text = "g (float[n,5] x) => (float[n,5] y) { h = MatMul(x, w)  y = Clip(h, low, high) }"
    samples = np.random.default_rng(0).standard_normal((50, 5))
    network, design = _designed(model_from_text(HEAD + text, weights), samples, tmp_path / "model.onnx")
    with pytest.raises(hls.NotTakenError, match="Clip"):
        hls.write_project(network, design, "vitis", PARTS["xc7z020"], 100.0, samples, tmp_path / "hls")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("images", [False, True])
def test_its_emulation_answers_as_ours(model_from_text: Callable[..., Model], images: bool, tmp_path: Path) -> None:
    """Compiled by g++, on samples of twice the range that bits were chosen for: every bit is the same."""
    if images:
        rng = np.random.default_rng(1)
        weights = {"w": rng.standard_normal((2, 1, 3, 3)), "v": rng.standard_normal((18, 3))}
        samples = rng.standard_normal((100, 1, 8, 8))
        model = model_from_text(HEAD + IMAGES, {name: array.astype(np.float32) for name, array in weights.items()})
        network, design = _designed(model, samples, tmp_path / "model.onnx")
    else:
        network, design, samples = _dense(model_from_text, tmp_path / "model.onnx")
    given = (2 * samples).astype(np.float32)
    made = hls.write_project(
        network, design, "vitis", PARTS["xc7z020"], 100.0, given.astype(np.float64), tmp_path / "w"
    )
    for name, content in made.files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    subprocess.run(["/bin/bash", "build_lib.sh"], cwd=tmp_path / "project", check=True, capture_output=True)
    (library,) = (tmp_path / "project" / "firmware").glob("*.so")
    answer, floats = ctypes.CDLL(str(library)).network_float, ctypes.POINTER(ctypes.c_float)
    expected = run(network, given.astype(np.float64), design)
    for sample, wanted in zip(np.moveaxis(given, 1, -1) if images else given, expected, strict=True):
        seen = np.zeros(len(wanted), np.float32)
        answer(np.ascontiguousarray(sample).ctypes.data_as(floats), seen.ctypes.data_as(floats))
        np.testing.assert_array_equal(seen, wanted)
