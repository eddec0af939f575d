"""The strict reader refuses whatever two readers could take for different archives."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
from modelpress_compression.archive import Archive, Member
from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.checked_copy import checked_copy, checked_file
from modelpress_compression.loaders.formats.torch_archive import inner_members

EXAMPLES = Path(__file__).parents[2] / "examples" / "mnist"


def zip_of(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> io.BytesIO:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own warning of duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return buffer


def check(file: io.BytesIO) -> dict[str, Member]:
    return inner_members(Archive(file))


@pytest.mark.parametrize("name", ["model_scripted.pt", "model_traced.pt", "model.pt2", "state_dict.pt"])
def test_archives_of_torch_are_copied_whole(name: str) -> None:
    """What torch wrote is admitted, and the copy has the same members, stored, each once, at multiples of 64 bytes."""
    with (
        Archive.open(EXAMPLES / name) as archive,
        checked_copy(archive) as path,
        Archive.open(path) as copy,
        zipfile.ZipFile(EXAMPLES / name) as original,
        zipfile.ZipFile(path) as stored,
    ):
        assert inner_members(archive)
        assert stored.namelist() == original.namelist()
        assert all(stored.read(info) == original.read(info.filename) for info in stored.infolist())
        assert not any(member.deflated or member.data_at % 64 for member in copy.members)


def test_a_file_that_is_no_archive_is_given_as_it_is(tmp_path: Path) -> None:
    """torch's old format is a bare pickle."""
    (tmp_path / "old.pt").write_bytes(b"\x80\x02.")
    with checked_file(tmp_path / "old.pt", "The file") as path:
        assert path == tmp_path / "old.pt"


def test_archives_within_archives_are_copied_too() -> None:
    """A copy of an archive within an archive holds its members, whatever stood between them."""
    inner = zip_of(("in/data.pkl", b"1"), ("in/data/0", b"weights")).getvalue()
    outer = Archive(zip_of(("out/samples.pt", inner), ("out/other", b"2")))
    with checked_copy(outer, ["out/samples.pt"]) as path, Archive.open(path) as copy:
        samples = copy.nested(copy.members[0], "the samples")
        assert [(member.name, samples.read(member, 99)) for member in samples.members] == [
            ("in/data.pkl", b"1"),
            ("in/data/0", b"weights"),
        ]


def test_content_is_held_against_its_checksum() -> None:
    """A flipped bit in a member is damage, whether it is stored or deflated."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raw = bytearray(zip_of(("a/1", b"weights of a model" * 9), method=method).getvalue())
        raw[40] ^= 1
        archive = Archive(io.BytesIO(bytes(raw)))
        with pytest.raises(UnsupportedFormatError, match="damaged or cut short"):
            archive.read(archive.members[0], 1000)


@pytest.mark.parametrize(
    "members",
    [
        [("a/data.pkl", b"1"), ("a/data.pkl", b"2")],
        [("a/data.pkl", b"1"), ("a/DATA.pkl", b"2")],
        [("/etc/passwd", b"1")],
        [("a/../../b", b"1")],
        [("C:/b", b"1")],
        [("a\\b", b"1")],
        [("a/data.pkl", b"1"), ("b/other", b"2")],
        [("a/data.pkl", b"1"), ("b/data.pkl", b"2")],
        [("evil/", b""), ("a/data.pkl", b"1")],
        [("a/\x1b[2J", b"1")],
    ],
)
def test_bad_names(members: list[tuple[str, bytes]]) -> None:
    """Duplicates (torch ignores case), absolute names and names that leave the archive are refused."""
    with pytest.raises(RejectedModelError) as caught:
        check(zip_of(*members))
    assert caught.value.metadata["finding"] == "ARCHIVE"


def test_deflated_weights() -> None:
    """Weights are stored, never deflated: 64 MiB of zeros in 64 KB are a bomb."""
    with pytest.raises(RejectedModelError, match="deflated"):
        check(zip_of(("a/data/0", bytes(64 << 20)), method=zipfile.ZIP_DEFLATED))


def test_deflated_code_within_a_ratio() -> None:
    """Code may be deflated, but not by a factor that no code has."""
    check(zip_of(("a/code/m.py", b"x = 1\n" * 1000), method=zipfile.ZIP_DEFLATED))
    with pytest.raises(RejectedModelError, match="unpacks to"):
        check(zip_of(("a/code/m.py", bytes(8 << 20)), method=zipfile.ZIP_DEFLATED))


def test_overlapping_members() -> None:
    """Two directory entries for one place in the file are refused."""
    raw = bytearray(zip_of(("a/1", b"x" * 50), ("a/2", b"y" * 50)).getvalue())
    second = raw.rindex(b"PK\x01\x02")
    raw[second + 42 : second + 46] = (0).to_bytes(4, "little")
    with pytest.raises(RejectedModelError, match="lies over"):
        check(io.BytesIO(bytes(raw)))


def test_names_that_differ_between_header_and_directory() -> None:
    """A reader that goes by local headers must not see another archive."""
    raw = zip_of(("a/1", b"x"), ("a/2", b"y")).getvalue()
    with pytest.raises(RejectedModelError, match="another name"):
        check(io.BytesIO(raw.replace(b"a/2", b"a/3", 1)))


def test_something_before_or_after() -> None:
    """Readers differ in where they look for the directory, so nothing may stand before or behind the archive."""
    raw = zip_of(("a/1", b"x")).getvalue()
    for data in (b"before" + raw, raw[:-2] + (5).to_bytes(2, "little") + b"after"):
        with pytest.raises(RejectedModelError, match="before its first or after"):
            check(io.BytesIO(data))


def test_a_directory_that_the_locator_hides() -> None:
    """zipfile reads the directory before the ZIP64 locator, torch the one that the locator points at."""
    evil, good = (zip_of(("a/1", data)).getvalue() for data in (b"evil", b"good"))
    # One member: 4 + 33 bytes, then its directory of 49 bytes and its end of 22.
    start, end = len(evil) - 22 - 49, len(evil) - 22
    directory = bytearray(good[start:end])
    directory[42:46] = struct.pack("<I", end + 56)  # where the good member's own header lies

    def end64(directory_at: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 49, directory_at)

    def archive(locator: int) -> bytes:
        hidden = evil[:end] + end64(start) + good[:start] + bytes(directory)
        found = hidden + end64(len(hidden) - 49)
        pointer = struct.pack("<4sLQL", b"PK\x06\x07", 0, locator, 1)
        return found + pointer + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)

    honest = len(archive(0)) - 22 - 20 - 56
    with zipfile.ZipFile(io.BytesIO(archive(end))) as seen:
        assert seen.read("a/1") == b"good"
    for locator in (end, honest):
        with pytest.raises(RejectedModelError, match="before its first or after"):
            check(io.BytesIO(archive(locator)))


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_cut_short(kept: float) -> None:
    """A part of an archive is damaged, not malicious."""
    raw = (EXAMPLES / "model_scripted.pt").read_bytes()
    with pytest.raises(UnsupportedFormatError, match="damaged or cut short"):
        Archive(io.BytesIO(raw[: int(len(raw) * kept)]))
