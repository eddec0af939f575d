"""Which files hold a model's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.formats.weight_files import weight_files


def index(folder: Path, *shards: str) -> Path:
    """An index of shards, and the shards."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}))
    return path


def test_a_file_is_itself(tmp_path: Path) -> None:
    """Whatever else lies beside it; config.json is known."""
    (tmp_path / "config.json").write_text("{}")
    found = weight_files(tmp_path / "weights.pt")
    assert found.files == (tmp_path / "weights.pt",)
    assert found.config == tmp_path / "config.json"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("pytorch_model.bin", "model.safetensors", "optimizer.pt"), "model.safetensors"),
        (("training_args.bin", "optimizer.pt", "last.ckpt"), "last.ckpt"),
        (("adapter_model.safetensors", "consolidated.pth"), "consolidated.pth"),
    ],
)
def test_the_weights_of_a_folder(tmp_path: Path, names: tuple[str, ...], wanted: str) -> None:
    """The usual names in the order of the library's own loader, else the only file of weights."""
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert weight_files(tmp_path).files == (tmp_path / wanted,)


def test_the_latest_of_deepspeed(tmp_path: Path) -> None:
    """The folder of a training stands for what its file `latest` names, within it."""
    inner = tmp_path / "run" / "global_step10"
    inner.mkdir(parents=True)
    for folder in (inner, tmp_path):
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (inner / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    (tmp_path / "run" / "latest").write_text("global_step10\n")
    assert weight_files(tmp_path / "run").files == (inner / "mp_rank_00_model_states.pt",)
    (tmp_path / "run" / "latest").write_text("..")
    with pytest.raises(UnsupportedFormatError, match="without a model"):
        weight_files(tmp_path / "run")


def test_shards(tmp_path: Path) -> None:
    """A folder, its index and one of its shards stand for the same files, each once."""
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        (tmp_path / shard).write_bytes(b"x")
    path = index(tmp_path, *shards, shards[0])
    for named in (tmp_path, path, tmp_path / shards[1]):
        found = weight_files(named)
        assert found.files == tuple(tmp_path / shard for shard in shards)
        assert found.beside == (path,)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (("gone-1.safetensors", "gone-2.safetensors"), "2 are missing: gone-1.safetensors, gone-2.safetensors"),
        (("../outside.safetensors",), "outside of its folder"),
        (("/etc/passwd",), "outside of its folder"),
        ((), "no 'weight_map'"),
    ],
)
def test_indexes_that_are_refused(tmp_path: Path, shards: tuple[str, ...], said: str) -> None:
    """Missing shards are named; an index reaches nothing outside of its folder."""
    with pytest.raises(UnsupportedFormatError, match=said):
        weight_files(index(tmp_path, *shards))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_indexes_that_are_none(tmp_path: Path, text: str) -> None:
    """Damaged JSON of any kind is an error of ours."""
    (tmp_path / "x.index.json").write_text(text)
    with pytest.raises(UnsupportedFormatError):
        weight_files(tmp_path / "x.index.json")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.pt", "b.pt"), r"2 files of weights \(a.pt, b.pt\)"),
        (("adapter_config.json", "adapter_model.safetensors"), "merge_and_unload"),
        (("__0_0.distcp", ".metadata"), "dcp_to_torch"),
        (("readme.md",), "without a model or weights"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    """Each says what the folder is, and what works."""
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedFormatError, match=said):
        weight_files(tmp_path)


def test_a_shard_without_its_index(tmp_path: Path) -> None:
    """One shard is never taken for the model."""
    shard = tmp_path / "model-00001-of-00003.safetensors"
    shard.write_bytes(b"x")
    with pytest.raises(UnsupportedFormatError, match=r"one shard of several.*model.safetensors.index.json"):
        weight_files(shard)
