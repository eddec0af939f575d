"""Data files that lie about their arrays, unpack to gigabytes, or hold objects."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import InputData
from modelpress_compression.specs import TensorSpec
from zip_writer import Member, Zip, swapped

SPECS = (TensorSpec("x", "float32", ("batch", 2, 64)),)


class Touch:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def array(shape: str, descr: str = "<f4", data: bytes = bytes(512)) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(**arrays: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return target.getvalue()


def objects() -> bytes:
    target = io.BytesIO()
    np.savez(target, x=np.array([Touch()], dtype=object))
    return target.getvalue()


def bomb() -> bytes:
    """Zeros that fill a little more than a small file may unpack to, in 270 kB: a thousandth of that."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as sink:
        sink.write(array(f"({(257 << 20) // 512}, 2, 64)", data=b""))
        for _ in range(257):
            sink.write(bytes(1 << 20))
    return target.getvalue()


def two_in_one() -> bytes:
    evil, good = (Zip([Member(b"x.npy", array("(1, 2, 64)", data=bytes([fill]) * 512))]) for fill in (1, 0))
    return swapped(evil, good)


ROWS: dict[str, Callable[[], bytes]] = {
    "more than there is": lambda: npz(x=array("(1000000000000, 2, 64)")),
    "a negative size": lambda: npz(x=array("(-1, 2, 64)")),
    "two negative sizes": lambda: npz(x=array("(-1, -2, 64)")),
    "a size that overflows": lambda: npz(x=array(f"({1 << 62}, {1 << 62}, 64)")),
    "a size that is code": lambda: npz(x=array("(__import__('os').mkdir('executed'), 2, 64)")),
    "a size of many brackets": lambda: npz(x=array("(" * 3000 + ")" * 3000)),
    "a bracket alone": lambda: npz(x=b"\x93NUMPY\x01\x00\x01\x00)"),
    "texts of a megabyte": lambda: npz(x=array("(4, 2, 64)", "|S1000000", b"")),
    "objects": objects,
    "an archive for an array": lambda: npz(x=npz(y=array("(1, 2, 64)"))),
    "a pickle for an array": lambda: npz(x=b"\x80\x04\x95."),
    "a bomb": bomb,
    "two archives in one": two_in_one,
    "nothing": npz,
    "no archive": lambda: b"PK\x03\x04 and nothing else",
}


@pytest.mark.parametrize("row", ROWS)
def test_it_is_refused_by_name(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data that cannot be used, with little taken from the disk, and nothing executed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.npz").write_bytes(ROWS[row]())
    with pytest.raises(InvalidDataError) as caught:
        InputData.read(tmp_path / "data.npz", SPECS, tmp_path)
    assert len(caught.value.message) < 1000
    assert not (tmp_path / "executed").exists()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 << 20


@pytest.mark.parametrize("name", ["../../x", "/x", "x\\y"])
def test_names_lead_nowhere(name: str, tmp_path: Path) -> None:
    """An array may be called what it likes: its file is not."""
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    (tmp_path / "data.npz").write_bytes(npz(**{name: array("(1, 2, 64)")}))
    assert len(InputData.read(tmp_path / "data.npz", SPECS, work)) == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "data.npz", "data-0.npy"}
