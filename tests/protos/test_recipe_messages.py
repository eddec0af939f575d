"""recipe.proto, which is rendered from the engine's schema of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_tools import protoc
from modelpress_compression.options import Config, option
from modelpress_compression.options import schema_of as schema_of_config
from modelpress_compression.passes.distill.config import AUGMENTATIONS, Augmentation
from modelpress_compression.recipe import Recipe
from modelpress_compression.schema import LessThan, Needs, Schema
from modelpress_compression.techniques import TECHNIQUES, Technique, step_schema
from modelpress_protos.recipe import schema_of
from modelpress_protos.v1 import options_pb2

ROOT = Path(__file__).parents[2] / "protos"


@dataclass(frozen=True)
class LowRankConfig(Config):
    """An option of every kind with every rule; the choice of `augment` is one that another technique has too."""

    rank_ratio: float = option(0.25, 1, 'Share of the rank that stays, "as it were".', gt=0, lte=1)
    method: str = option(
        "svd", 7, "How.", choices=("svd", "n:m", "cp"), needs=Needs(("cp",), "basis", "own", ("each",))
    )
    basis: str = option("shared", 10, "Which.", choices=("shared", "own", "each"))
    least: int = option(
        16, 2, "At least.", gte=2, power_of_two=True, less_than=LessThan("most", where="method", value="n:m")
    )
    most: int | None = option(None, 3, "At most.", kind="int64", gte=-5, lt=1e12)
    exact: bool = option(False, 4, "Exactly.")
    ranks: tuple[int, ...] = option((1, 2), 5, "Ranks.", min_items=1)
    words: tuple[str, ...] = option((), 6, "Words.")
    overrides: tuple[tuple[str, float], ...] = option((), 8, "Shares of layers.", lt=1)
    augment: tuple[Augmentation, ...] = option((), 9, "Random changes.", kind=AUGMENTATIONS)


LOW_RANK = Technique("low_rank", 99, "Replaces a product by two of lower rank.", LowRankConfig, "nowhere:LowRank")


def grown_recipe() -> Schema:
    """The schema of a recipe that may name one technique more."""
    steps = step_schema([*TECHNIQUES.values(), LOW_RANK])
    options = schema_of_config(Recipe).options
    return Schema("Recipe", tuple(replace(item, kind=steps) if item.name == "steps" else item for item in options))


def schema_of_text(proto: str, folder: Path) -> Schema:
    """Compiles a recipe.proto, and reads the schema from its descriptor."""
    path = folder / "grown.proto"
    path.write_text(
        proto.replace("package modelpress.v1;", "package modelpress.grown;").replace("(rules)", "(v1.rules)")
    )
    compiled = folder / "compiled.pb"
    include = [f"-I{parent}" for parent in (ROOT, folder, files("grpc_tools") / "_proto")]
    assert protoc.main(["protoc", *include, f"-o{compiled}", path.name]) == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    assert options_pb2.DESCRIPTOR.name in file.dependency
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return schema_of(descriptor_pool.Default().FindMessageTypeByName("modelpress.grown.Recipe"))


def test_a_new_technique_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dataclass to schema, to messages, to descriptor, and back: the same schema, whatever the options and rules.

    The name of the technique is of two words, which must not matter.
    """
    monkeypatch.syspath_prepend(ROOT)
    recipe_proto = import_module("recipe_messages").recipe_proto

    schema = grown_recipe()
    text = recipe_proto(schema)
    assert "LowRankStep low_rank = 99" in text
    assert asdict(schema_of_text(text, tmp_path)) == asdict(schema)
