"""The memory: what was put comes back whole or not at all, within a bounded folder."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from modelpress_compression.memory import SUFFIX, Memory, key_of, shrink


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "memory", limit_bytes=100_000)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(1000))
    return path


def only_entry(memory: Memory) -> Path:
    (path,) = memory.folder.glob(f"*{SUFFIX}")
    return path


def test_facts_and_files_come_back(memory: Memory, model: Path, tmp_path: Path) -> None:
    """Under the same key, and under no other."""
    key = key_of("step", {"scheme": "static"}, [1, 2.5, None])
    memory.put(key, {"figures": [0.1, None]}, [model])
    entry = memory.get(key)
    assert entry is not None
    assert entry.facts == {"figures": [0.1, None]}
    assert entry.extract(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == model.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert memory.get(key_of("step", {"scheme": "static"}, [1, 2.5])) is None


def test_the_order_of_names_is_no_part_of_a_key() -> None:
    """What is written in another order is the same."""
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 2, "b": 1})


@pytest.mark.parametrize("at", [0, 40, 700, -30])
def test_a_damaged_entry_is_unknown(memory: Memory, model: Path, tmp_path: Path, at: int) -> None:
    """One byte anywhere: either the entry is not found, or its files are refused."""
    memory.put("key", {"x": 1}, [model])
    path = only_entry(memory)
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    entry = memory.get("key")
    assert entry is None or not entry.extract(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive at all" * 100])
def test_what_is_no_entry_is_removed(memory: Memory, content: bytes) -> None:
    """It would be in the way of what belongs there."""
    memory.put("key", {})
    path = only_entry(memory)
    path.write_bytes(content)
    assert memory.get("key") is None
    assert not path.exists()


@pytest.mark.parametrize("facts", ["[1]", "{", "[" * 100_000])
def test_facts_that_are_no_mapping_are_unknown(memory: Memory, facts: str) -> None:
    """Whatever JSON there is, or none."""
    memory.folder.mkdir()
    with zipfile.ZipFile(memory.folder / f"key{SUFFIX}", "w") as archive:
        archive.writestr("facts.json", facts)
    assert memory.get("key") is None


def test_files_stay_in_their_folder(memory: Memory, tmp_path: Path) -> None:
    """A name that leads out of it is refused."""
    memory.folder.mkdir()
    with zipfile.ZipFile(memory.folder / f"key{SUFFIX}", "w") as archive:
        archive.writestr("facts.json", "{}")
        archive.writestr("../outside", "x")
    entry = memory.get("key")
    assert entry is not None
    assert not entry.extract(tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_what_was_not_asked_for_the_longest_goes_first(memory: Memory, tmp_path: Path) -> None:
    """The folder stays within its limit, whatever is put."""
    content = tmp_path / "content"
    content.write_bytes(bytes(20_000))
    for number in range(20):
        memory.put(f"key{number}", {}, [content])
        for path in memory.folder.iterdir():
            status = path.stat()
            os.utime(path, (status.st_mtime - 10, status.st_mtime - 10))
        assert memory.get("key0") is not None  # asked for all the time
    assert sum(path.stat().st_size for path in memory.folder.iterdir()) <= memory.limit_bytes
    assert memory.get("key19") is not None
    assert memory.get("key5") is None


def test_what_is_too_large_is_not_kept(memory: Memory, tmp_path: Path) -> None:
    """It would drive out all others."""
    content = tmp_path / "content"
    content.write_bytes(bytes(60_000))
    memory.put("small", {})
    memory.put("large", {}, [content])
    assert memory.get("large") is None
    assert memory.get("small") is not None


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(tmp_path: Path) -> None:
    """Nothing is remembered, and nothing is raised."""
    (tmp_path / "file").touch()
    memory = Memory(tmp_path / "file" / "memory")
    memory.put("key", {})
    assert memory.get("key") is None


def test_earlier_entries_are_found_and_left_alone(memory: Memory, model: Path, tmp_path: Path) -> None:
    """They may be somebody else's files."""
    memory.put("key", {"x": 1}, [model])
    later = Memory(tmp_path / "later", earlier=memory.folder)
    entry = later.get("key")
    assert entry is not None
    assert entry.facts == {"x": 1}
    later.put("other", {})
    assert [path.name for path in later.folder.iterdir()] == [f"other{SUFFIX}"]
    assert memory.get("other") is None


def test_shrinking_counts_all_that_lies_below(tmp_path: Path) -> None:
    """Folders included; the newest stays."""
    for number, name in enumerate(("a/old", "b/new")):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    shrink(tmp_path, 150)
    assert not (tmp_path / "a" / "old").exists()
    assert (tmp_path / "b" / "new").exists()
