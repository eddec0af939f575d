"""Archives that are built to be checked as one thing and loaded as another."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modelpress_compression.errors import CompressionError, RejectedModelError
from modelpress_compression.loaders import load
from torch_files import Net, ReadsFile, Touch, make_program, make_script, renamed, with_payload, with_samples, zip_of
from zip_writer import Member, Zip, swapped

INPUTS = ["x:float32[batch,4]"]


@pytest.fixture(scope="module")
def program() -> Zip:
    """An exported program."""
    return make_program()


@pytest.fixture(scope="module")
def scripts() -> dict[str, Zip]:
    """TorchScript that computes, and TorchScript that reads a file of this machine."""
    return {"good": make_script(Net()), "evil": make_script(ReadsFile())}


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What the payload of an evil program creates; nothing may have done so in the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def refused(path: Path, data: bytes, finding: str) -> CompressionError:
    path.write_bytes(data)
    with pytest.raises(RejectedModelError) as caught:
        load(path, INPUTS)
    assert caught.value.metadata["finding"] == finding
    return caught.value


def test_the_payload_is_real(program: Zip, tmp_path: Path) -> None:
    """torch itself executes it: what the other tests show to be refused would do harm."""
    path, executed = tmp_path / "evil.pt2", tmp_path / "executed here"
    path.write_bytes(swapped(with_payload(program, executed), program))
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # torch expects other sample inputs
        warnings.simplefilter("ignore")
        torch.export.load(str(path))
    assert executed.exists()


def test_sample_inputs_that_execute(program: Zip, marker: Path, tmp_path: Path) -> None:
    """The plain attack, in the place where torch unpickles whatever it finds."""
    refused(tmp_path / "m.pt2", with_payload(program, marker).build(), "PICKLE_GLOBAL")


def test_the_locator_hides_a_program(program: Zip, marker: Path, tmp_path: Path) -> None:
    """The ZIP64 record before the locator is a good program's, the one that it points at an evil one's."""
    refused(tmp_path / "m.pt2", swapped(with_payload(program, marker), program), "ARCHIVE")
    refused(tmp_path / "n.pt2", swapped(program, with_payload(program, marker)), "ARCHIVE")


def test_an_archive_before_the_first_member(program: Zip, marker: Path, tmp_path: Path) -> None:
    """Readers that count from the file's start and readers that count from the directory see different members."""
    evil = with_payload(program, marker).build()
    for fixed in (True, False):
        hidden = Zip(program.members, prefix=evil)
        data = hidden.build() if fixed else evil + program.build()
        refused(tmp_path / "m.pt2", data, "ARCHIVE")


def test_two_top_folders(program: Zip, marker: Path, tmp_path: Path) -> None:
    """torch reads the first folder, whatever it is called; nobody else does."""
    evil = renamed(with_payload(program, marker), lambda name: name.replace(b"archive", b"evil", 1)).members
    good = renamed(program, lambda name: b"good/" + name.split(b"/", 1)[1]).members
    for members in (evil + good, good + evil):
        refused(tmp_path / "m.pt2", Zip(members).build(), "ARCHIVE")


def test_an_evil_archive_within_the_samples(program: Zip, marker: Path, tmp_path: Path) -> None:
    """What torch unpickles within the archive is an archive itself, and is read as strictly."""
    saved = [io.BytesIO(), io.BytesIO()]
    torch.save((((torch.ones(2, 4),), {})), saved[0])
    torch.save(Touch(marker), saved[1])
    good, evil = (zip_of(item.getvalue()) for item in saved)
    for data in (swapped(evil, good), evil.build() + good.build()):
        refused(tmp_path / "m.pt2", with_samples(program, data).build(), "ARCHIVE")


def test_code_in_capitals(scripts: dict[str, Zip], tmp_path: Path) -> None:
    """torch finds CODE/ where it looks for code/, so it is checked as code."""
    data = renamed(scripts["evil"], lambda name: name.replace(b"/code/", b"/CODE/")).build()
    refused(tmp_path / "m.pt", data, "SCRIPT_OPERATOR")


def test_code_twice_but_for_its_case(scripts: dict[str, Zip], tmp_path: Path) -> None:
    """Of two members whose names differ in case torch takes one; which one is not for us to guess."""
    evil = renamed(scripts["evil"], lambda name: name.replace(b"/code/", b"/CODE/")).members
    refused(tmp_path / "m.pt", Zip([*scripts["good"].members, *evil]).build(), "ARCHIVE")


def test_the_locator_hides_a_script(scripts: dict[str, Zip], tmp_path: Path) -> None:
    """As with programs."""
    refused(tmp_path / "m.pt", swapped(scripts["evil"], scripts["good"]), "ARCHIVE")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"central": {"attributes": 0x10}}, "both as a file and as a folder"),
        ({"local": {"name": b"net/evil"}}, "another name"),
        ({"local": {"method": 8}}, "size, checksum or method"),
        ({"central": {"crc": 1}, "local": {"crc": 1}}, "checksum"),
        ({"central": {"extra": b"\x75\x70\x09\x00\x01aaaaevil"}}, "extra fields"),
        ({"central": {"flags": 1}}, "encrypted"),
        ({"central": {"size": 1}}, "two sizes"),
    ],
)
def test_members_that_lie(scripts: dict[str, Zip], lie: dict[str, Any], said: str, tmp_path: Path) -> None:
    """One field of one header is enough to be refused."""
    members = scripts["good"].members
    first = members[0]
    path = tmp_path / "m.pt"
    path.write_bytes(Zip([Member(first.name, first.data, **lie), *members[1:]]).build())
    with pytest.raises(CompressionError, match=said):
        load(path, INPUTS)


def test_what_is_honest_is_loaded(program: Zip, scripts: dict[str, Zip], tmp_path: Path) -> None:
    """The same archives without a lie in them."""
    for name, archive in (("m.pt2", program), ("m.pt", scripts["good"])):
        (tmp_path / name).write_bytes(archive.build())
        assert load(tmp_path / name, INPUTS if name == "m.pt" else ()).inputs
