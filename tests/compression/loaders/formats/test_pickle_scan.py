"""The scan names what a pickle would import, and refuses what it cannot follow."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.formats.pickle_scan import TENSOR_GLOBALS, scan_pickle


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_names_its_globals(protocol: int) -> None:
    """GLOBAL and STACK_GLOBAL, memoized names included."""
    data = pickle.dumps([OrderedDict, Path, OrderedDict, Path.touch], protocol=protocol)
    found = scan_pickle(data, "it").globals
    assert "collections OrderedDict" in found
    assert any(name.startswith("pathlib") for name in found)


def test_saved_tensors_are_within_the_list(small_net: torch.nn.Module) -> None:
    """Parameters, buffers and scalars of several types need nothing but what the list allows."""
    buffer = io.BytesIO()
    torch.save(
        {**small_net.state_dict(), "h": torch.zeros(2, dtype=torch.bfloat16), "p": small_net.head.weight}, buffer
    )
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    assert not scan_pickle(data, "it").globals - TENSOR_GLOBALS


def test_names_made_at_run_time_are_refused() -> None:
    """STACK_GLOBAL on what is not a literal cannot be followed, so it is refused."""
    # "os", "system", then two allowed strings that are popped again before STACK_GLOBAL.
    hidden = b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93."
    assert [op.name for op, _, _ in pickletools.genops(hidden)][-2:] == ["STACK_GLOBAL", "STOP"]
    with pytest.raises(RejectedModelError, match="names of what it imports"):
        scan_pickle(hidden, "it")


def test_memo_is_followed() -> None:
    """A name that comes back from the memo is the name that was put there, not the last one seen."""
    data = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x05torch\x8c\x04Size00h\x00h\x01\x93."
    assert scan_pickle(data, "it").globals == {"os system"}


def test_extension_codes_are_refused() -> None:
    """copyreg's extension registry could name anything."""
    with pytest.raises(RejectedModelError, match="extension"):
        scan_pickle(b"\x80\x02\x82\x01.", "it")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"\x80\x04\x8c\xff", b"hello", b"\x80\x04\x8d" + b"\xff" * 8 + b"."]
)
def test_damaged(data: bytes) -> None:
    """Cut short, of another kind, or claiming more bytes than there are."""
    with pytest.raises(UnsupportedFormatError, match="no readable pickle"):
        scan_pickle(data, "it")


def test_unknown_escapes_are_read_in_silence() -> None:
    """Python warns of them; a warning is an error in these tests, and noise in a server's log."""
    assert not scan_pickle(b"\x80\x04S'\\d'\n.", "it").globals
