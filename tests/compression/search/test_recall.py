"""Another question about the same model and data: answered from what the first one has found out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from modelpress_compression import InputData, Memory, Model, Recipe, compress
from modelpress_compression.measure.fidelity import Fidelity, compare_outputs
from modelpress_compression.measure.latency import Times
from modelpress_compression.search import judge, quantization
from modelpress_compression.search.recall import Recall


def goal(**options: Any) -> Recipe:
    """A recipe with nothing but a goal; few rounds, since nothing here asserts on time."""
    return Recipe.from_dict({"version": 1, "goal": options, "benchmark": {"rounds": 5}})


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "memory")


def never(*args: object, **options: object) -> NoReturn:
    """What must not be called."""
    raise AssertionError("this was known")


@pytest.mark.usefixtures("timed_by_size")
def test_another_goal_builds_and_compares_nothing_again(
    digits: Model, samples: InputData, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is known then; the choice is that of a search which knows nothing, and the report says so. (What
    levers cut depends on what the goal asks for.)"""
    techniques = ["fuse", "quantize"]
    first = compress(digits, goal(objective="smallest", techniques=techniques), data=samples, memory=memory).report
    assert first["reused"] == {}
    alone = compress(digits, goal(objective="fastest", techniques=techniques), data=samples).report
    for name in ("prepare_static", "Quantize"):
        monkeypatch.setattr(quantization, name, never)
    monkeypatch.setattr(quantization, "store_all", never)
    compared: list[Path] = []

    def compare(original: Path, optimized: Path, *rest: Any, **options: Any) -> Fidelity:
        compared.append(optimized)
        return compare_outputs(original, optimized, *rest, **options)

    monkeypatch.setattr(judge, "compare_outputs", compare)
    second = compress(digits, goal(objective="fastest", techniques=techniques), data=samples, memory=memory).report
    assert second["reused"]["candidates"] >= len(second["candidates"]) > 4
    assert second["reused"]["comparisons"] > 4
    assert len(compared) == 1  # what is returned is compared again
    for report in (second, alone):
        for row in report["candidates"]:
            row["speedup"] = None
    assert second["candidates"] == alone["candidates"]
    assert second["optimized"]["sha256"] == alone["optimized"]["sha256"]
    assert second["fidelity"] == alone["fidelity"]


@pytest.mark.usefixtures("timed_by_size")
def test_another_limit_only_builds_what_is_new(digits: Model, samples: InputData, memory: Memory) -> None:
    """A permitted drop that lets nothing pass asks for other layers in float32: the rest is known."""
    compress(digits, goal(), data=samples, memory=memory)
    strict = compress(digits, goal(max_drop=0.0, objective="accurate"), data=samples, memory=memory).report
    alone = compress(digits, goal(max_drop=0.0, objective="accurate"), data=samples).report
    assert strict["reused"]["candidates"] >= 4
    assert [row["name"] for row in strict["candidates"]] == [row["name"] for row in alone["candidates"]]
    assert strict["optimized"]["sha256"] == alone["optimized"]["sha256"]


@pytest.mark.usefixtures("timed_by_size")
def test_other_data_finds_nothing(digits: Model, samples: InputData, memory: Memory) -> None:
    """Ranges and answers are those of the data; without data there is other data again."""
    compress(digits, goal(), data=samples, memory=memory)
    other = InputData(samples.specs, {name: array[:-1] for name, array in samples.arrays.items()})
    for data in (other, None):
        assert compress(digits, goal(), data=data, memory=memory).report["reused"] == {}


@pytest.mark.usefixtures("timed_by_size")
def test_damaged_entries_are_found_out_anew(digits: Model, memory: Memory) -> None:
    """The answer is the same, and the entries are whole again."""
    first = compress(digits, goal(), memory=memory).report
    for path in memory.folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    second = compress(digits, goal(), memory=memory).report
    assert second["optimized"]["sha256"] == first["optimized"]["sha256"]
    third = compress(digits, goal(), memory=memory).report
    assert third["reused"]["candidates"] > second["reused"].get("candidates", 0)


def times_of(paths: Sequence[Path]) -> Times:
    """Of the original and these, [1 + models, rounds]: a file takes as many times as long as it has bytes."""
    unit = np.linspace(1.0, 2.0, 10)
    return np.asarray([unit, *(unit * path.stat().st_size for path in paths)])


def test_only_new_files_are_timed(tmp_path: Path, memory: Memory) -> None:
    """Those that are known stand with their ratio to the original; `anew` forgets them."""
    files = []
    for number in (2, 3, 4):
        files.append(tmp_path / f"{number}.onnx")
        files[-1].write_bytes(bytes([number]) * number)
    asked: list[list[Path]] = []

    def timed(paths: Sequence[Path]) -> Times:
        asked.append(list(paths))
        return times_of(paths) * (10.0 if len(asked) > 1 else 1.0)

    recall = Recall(memory, "scope")
    assert not recall.prices(files[:2], ["60 rounds"], timed).remembered
    again = recall.prices(files[1::-1], ["60 rounds"], timed)
    assert again.remembered
    assert asked == [files[:2]]
    np.testing.assert_allclose(again.times_s, times_of(files[1::-1]), rtol=1e-12)
    more = recall.prices(files, ["60 rounds"], timed)
    assert more.remembered
    assert asked[1:] == [files[2:]]
    np.testing.assert_allclose(more.times_s / more.times_s[0], times_of(files) / times_of(files)[0], rtol=1e-12)
    assert not recall.prices(files, ["60 rounds"], timed, anew=True).remembered
    assert not recall.prices(files, ["30 rounds"], timed).remembered
    assert asked[2:] == [files, files]


def test_without_a_memory_everything_is_found_anew(tmp_path: Path) -> None:
    """And nothing is counted as reused."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"xx")
    recall = Recall()
    for _ in range(2):
        assert not recall.prices([path], [], times_of).remembered
        assert recall.facts("orders", [], lambda: {"layers": ["a"]}) == {"layers": ["a"]}
    assert not recall.reused
