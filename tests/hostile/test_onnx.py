"""ONNX files that lie, explode, or point elsewhere: each is refused by name, before anything follows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from modelpress_compression.errors import CompressionError
from modelpress_compression.loaders import load
from onnx import helper
from onnx_files import claiming, external, functions, model_of, nested, relu, value

OK = (("location", "w.bin"), ("offset", "0"), ("length", "16"))
ROWS: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "recursive function": (lambda: functions(3, closed=True), "RECURSIVE_FUNCTION"),
    "exploding functions": (lambda: functions(26, closed=False), "FUNCTION_BOMB"),
    "an input that is nowhere": (lambda: relu(inputs=[value("z", [2, 4])]), "INVALID_GRAPH"),
    "deep nesting": (lambda: nested(10_000), "UNSUPPORTED_FORMAT"),
    "unknown domain": (
        lambda: model_of([helper.make_node("Evil", ["x"], ["y"], domain="evil.lib")], domains=["evil.lib"]),
        "UNSUPPORTED_OPERATOR",
    ),
    "a name of megabytes": (lambda: relu(inputs=[value("x" * 5_000_000, [2, 4])]), "NAME_TOO_LONG"),
    "an input of terabytes": (lambda: relu(inputs=[value("x", [1 << 40, 4])]), "INVALID_INPUTS"),
    "an input that overflows": (lambda: relu(inputs=[value("x", [(1 << 63) - 1] * 2)]), "INVALID_INPUTS"),
    "a weight that claims more": (lambda: claiming(1 << 40, 1 << 40), "WEIGHT_SIZE"),
    "a weight of negative size": (lambda: claiming(-4), ""),
    "data above the folder": (lambda: external(("location", "../w.bin")), "EXTERNAL_PATH"),
    "data at an absolute path": (lambda: external(("location", "/etc/passwd")), "EXTERNAL_PATH"),
    "data through a link": (lambda: external(("location", "link.bin")), "EXTERNAL_PATH"),
    "data through a hard link": (lambda: external(("location", "hard.bin")), "EXTERNAL_PATH"),
    "data with a NUL in its name": (lambda: external(("location", "w.bin\0")), "EXTERNAL_PATH"),
    "data at an address in memory": (lambda: external(("location", "*/_ORT_MEM_ADDR_/*")), "UNSUPPORTED_FORMAT"),
    "data that is nowhere": (lambda: external(("location", "no.bin")), "UNSUPPORTED_FORMAT"),
    "data beyond the end": (lambda: external(*OK[:1], ("offset", "999999999999")), "UNSUPPORTED_FORMAT"),
    "data before the start": (lambda: external(*OK[:1], ("offset", "-16")), "EXTERNAL_DATA"),
    "data longer than the weight": (lambda: external(*OK[:1], ("length", "99999")), "EXTERNAL_DATA"),
    "data at no number": (lambda: external(*OK[:1], ("offset", "abc")), "EXTERNAL_DATA"),
    "data of more than there is": (lambda: external(*OK[:1], dims=(1 << 40, 1 << 22)), "UNSUPPORTED_FORMAT"),
    "a location given twice": (lambda: external(*OK, ("location", "../w.bin")), "EXTERNAL_PATH"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with data, a link and a hard link out of it."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "w.bin").write_bytes(bytes(16))
    (made / "link.bin").symlink_to("../w.bin")
    os.link(tmp_path / "w.bin", made / "hard.bin")
    return made


@pytest.mark.parametrize("row", ROWS)
def test_it_is_refused_by_name(folder: Path, row: str) -> None:
    """With the reason or finding of the table; an empty one: any that is ours."""
    make, expected = ROWS[row]
    made = make()
    (folder / "m.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(CompressionError) as caught:
        load(folder / "m.onnx")
    assert caught.value.reason != "INTERNAL"
    assert expected in ("", caught.value.reason, caught.value.metadata.get("finding"))
    assert len(caught.value.message) < 1000


def test_what_is_honest_is_loaded(folder: Path) -> None:
    """Data in the folder, named once, with the numbers that its weight has."""
    (folder / "m.onnx").write_bytes(external(*OK).SerializeToString())
    (weight,) = load(folder / "m.onnx").graph.initializers.values()
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), np.arange(4, dtype=np.float32))


def test_data_beside_external_data(folder: Path) -> None:
    """A weight that is in the model and in a file is the file's, for whoever reads it."""
    model = external(*OK)
    model.graph.initializer[0].raw_data = bytes(16)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    (weight,) = load(folder / "m.onnx").graph.initializers.values()
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), np.arange(4, dtype=np.float32))
