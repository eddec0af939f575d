"""Conversion of what only the user's own code can read."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from modelpress_client import AsyncClient, MissingExtraError, UnusableInputError, UsageError, convert
from modelpress_client.convert import Conversion, needs_conversion
from modelpress_client.engine import last_json_object
from modelpress_client.inputs import parse_inputs
from modelpress_protos.formats import FORMATS

INPUTS = ["x:float32[batch,4]"]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state dict and, importable in subprocesses, the code of its network."""
    import torch

    (tmp_path / "my_net.py").write_text(
        "from torch.nn import Linear, Sequential\nprint('hello')\ndef build():\n    return Sequential(Linear(4, 3))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 3)).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.slow
async def test_a_state_dict_is_converted_here(fake_server: Any, weights: Path) -> None:
    """The server gets ONNX, with the digest of what it came from; the user's code may print."""
    async with AsyncClient(fake_server.address) as client:
        model = await client.upload(weights, inputs=INPUTS, architecture="my_net:build")
    assert [entry.path for entry in model.message.files] == ["w.onnx"]
    content = await asyncio.to_thread(weights.read_bytes)
    assert model.message.source.digest.sha256 == hashlib.sha256(content).digest()
    assert model.display_name == "w.pt"


@pytest.mark.slow
async def test_a_conversion_that_fails(fake_server: Any, weights: Path) -> None:
    """The engine's words reach the user."""
    async with AsyncClient(fake_server.address) as client:
        with pytest.raises(UnusableInputError, match="no_such_module"):
            await client.upload(weights, inputs=INPUTS, architecture="no_such_module:build")
    assert fake_server.models == {}


async def test_without_the_engine(fake_server: Any, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact pip line."""
    monkeypatch.setattr(convert, "ENGINE_PACKAGES", ("torch", "a_package_that_is_missing"))
    async with AsyncClient(fake_server.address) as client:
        with pytest.raises(MissingExtraError, match=r"pip install 'modelpress\[engine\]'"):
            await client.upload(weights, inputs=INPUTS, architecture="my_net:build")


def test_options_must_fit_the_file() -> None:
    """--architecture is for files with weights, and what says how weights are read goes with it."""
    path, specs = Path("m"), tuple(parse_inputs(INPUTS))
    named = {row.name: row for row in FORMATS}
    assert needs_conversion(path, named["state_dict"], Conversion("a:b", False, specs))
    assert needs_conversion(path, named["pickled_module"], Conversion(None, True, specs))
    assert not needs_conversion(path, named["onnx"], Conversion(None, True, specs))
    assert needs_conversion(path, named["pickled_module"], Conversion("a:b", False, specs))  # its weights alone
    for found in (named["onnx"], None):
        with pytest.raises(UsageError):
            needs_conversion(path, found, Conversion("a:b", False, specs))
    with pytest.raises(UsageError, match="give --architecture"):
        needs_conversion(path, named["state_dict"], Conversion(None, False, specs, state_dict_key="ema"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"a": 1}', {"a": 1}), ('noise\n{"a": 1}\n', {"a": 1}), ("noise", None), ("", None), ("[1]", None)],
)
def test_finds_the_document(text: str, expected: object) -> None:
    """The last line counts: the user's code may have printed before."""
    assert last_json_object(text) == expected
