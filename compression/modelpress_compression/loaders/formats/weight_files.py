"""Which files hold a model's weights, where they are a folder, an index of shards, or one shard among others.

Hugging Face's layout: `config.json` beside `model.safetensors` or `pytorch_model.bin`. Large models are cut into
shards; `model.safetensors.index.json` says under `weight_map` which shard holds which tensor.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.formats.refusals import refused

INDEX_SUFFIX = ".index.json"
CONFIG_NAME = "config.json"
_MAX_JSON_BYTES = 100 * 1024 * 1024  # 100 MiB; an index has a line for every tensor
_MAX_NAME_BYTES = 255
_MAX_SHARDS = 10_000
_SHARD = re.compile(r"(?P<stem>.+)-\d{5,6}-of-\d{5,6}(?P<suffix>\.(?:safetensors|bin|pt|pth))")
# In the order in which Hugging Face's own loaders look.
_USUAL_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "mp_rank_00_model_states.pt",
)  # fmt: skip
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What training leaves beside the weights.
_NO_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler", "adapter_")


@dataclass(frozen=True)
class WeightFiles:
    """`files`: in the index's order, one of them for most models. `beside`: the index and the folder's config.json."""

    files: tuple[Path, ...]
    beside: tuple[Path, ...] = ()

    @property
    def config(self) -> Path | None:
        """The folder's config.json, where there is one."""
        return next((path for path in self.beside if path.name == CONFIG_NAME), None)


def weight_files(path: Path) -> WeightFiles:
    """The files behind what a person names: a folder, an index, a shard, or simply one file.

    Raises UnsupportedFormatError where a folder has no weights or more than one set of them, or a shard is missing.
    """
    path = _latest(path) if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    config = tuple(item for item in (folder / CONFIG_NAME,) if item.is_file())
    main = _in_folder(path) if path.is_dir() else path
    index = main if main.name.endswith(INDEX_SUFFIX) else _index_of(main)
    if index is None:
        return WeightFiles((main,), config)
    return WeightFiles(_shards(index), (index, *config))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises UnsupportedFormatError, OSError."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UnsupportedFormatError(f"{path.name} has more than {_MAX_JSON_BYTES} bytes; it is no file of settings.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormatError(f"{path.name} is no readable JSON; fetch or write it again.") from error
    if not isinstance(found, dict):
        raise UnsupportedFormatError(f"{path.name} holds no JSON object; fetch or write it again.")
    return found


def _latest(folder: Path) -> Path:
    """The folder within that DeepSpeed's file `latest` names; itself where there is none."""
    told = folder / "latest"
    if not told.is_file() or told.stat().st_size > _MAX_NAME_BYTES:
        return folder
    name = told.read_text("utf-8", "replace").strip()
    within = name == Path(name).name and name not in ("", "..")
    return folder / name if within and (folder / name).is_dir() else folder


def _in_folder(folder: Path) -> Path:
    """The file of weights in a folder, or the index of them."""
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [
        item
        for item in sorted(folder.iterdir())
        if item.suffix in _WEIGHT_SUFFIXES and item.is_file() and not item.name.startswith(_NO_WEIGHTS)
    ]
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return indexes[0]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(item.name for item in found[:5])
        raise refused("SEVERAL_WEIGHTS", folder=folder.name, count=len(found), listed=names)
    if (folder / "adapter_config.json").is_file():
        raise refused("ADAPTER", folder=folder.name)
    if any(folder.glob("*.distcp")):
        raise refused("DISTRIBUTED", folder=folder.name)
    raise refused("NO_MODEL_IN_FOLDER", folder=folder.name)


def _index_of(main: Path) -> Path | None:
    """The index that a shard belongs to; None for a file that is no shard."""
    match = _SHARD.fullmatch(main.name)
    if match is None:
        return None
    index = main.parent / f"{match['stem']}{match['suffix']}{INDEX_SUFFIX}"
    if not index.is_file():
        raise refused("SHARD_ALONE", shard=main.name, index=index.name)
    return index


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise UnsupportedFormatError(f"{index.name!r} is no index of shards: it has no 'weight_map'.")
    names = list(dict.fromkeys(weight_map.values()))
    if len(names) > _MAX_SHARDS or any(name != Path(name).name or name in ("", "..") for name in names):
        raise refused("SHARDS_ELSEWHERE", index=index.name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        listed = ", ".join(missing[:5])
        raise refused("SHARDS_MISSING", index=index.name, count=len(names), missing=len(missing), listed=listed)
    return tuple(index.parent / name for name in names)
