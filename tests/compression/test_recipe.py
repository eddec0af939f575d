"""The recipe as the engine reads it."""

import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.recipe import Recipe, presets
from modelpress_compression.techniques import TECHNIQUES


def test_every_preset_is_valid_and_round_trips() -> None:
    """What ships is readable, has a summary, and survives the way through a dictionary; `default` comes first."""
    assert next(iter(presets())) == "default"
    for name, summary in presets().items():
        recipe = Recipe.preset(name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert summary.endswith(".")
        assert len(summary) > 20


def test_default_fuses_then_quantizes_automatically() -> None:
    """The default preset is fuse and then quantize auto."""
    steps = Recipe.preset("default").steps
    assert [step.technique for step in steps] == ["fuse", "quantize"]
    assert steps[1].config.scheme == "auto"


def test_all_violations_come_at_once_with_their_paths() -> None:
    """Wrong types, ranges, names and keys are all listed."""
    document = {
        "version": 2,
        "colour": 1,
        "steps": [{"prune": {"sparsity": 1.4, "spars": 1}}, {"paint": {}}, {"quantize": {"per_channel": 1}}, "fuse"],
        "benchmark": {"rounds": 1, "threads": [0]},
        "constraints": {"max_drop": -1},
    }
    with pytest.raises(InvalidRecipeError) as error:
        Recipe.from_dict(document)
    paths = [violation.path for violation in error.value.violations]
    assert sorted(paths) == sorted(
        [
            "version",
            "colour",
            "steps[0].prune.sparsity",
            "steps[0].prune.spars",
            "steps[1].paint",
            "steps[2].quantize.per_channel",
            "steps[3]",
            "benchmark.rounds",
            "benchmark.threads",
            "constraints.max_drop",
        ]
    )
    assert "steps[0].prune.sparsity: 1.4 is not in [0, 1)" in str(error.value)


def test_unknown_preset_lists_what_there_is() -> None:
    """A misspelt preset is answered with the names that exist."""
    with pytest.raises(InvalidRecipeError, match="default"):
        Recipe.preset("defualt")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["version", "steps", "target", "constraints", "benchmark", "x"]), json_values))
def test_garbage_is_refused_in_an_orderly_way(document: dict[str, Any]) -> None:
    """Whatever JSON is given, the answer is a recipe or InvalidRecipeError."""
    with suppress(InvalidRecipeError):
        assert isinstance(Recipe.from_dict(document), Recipe)


def test_reading_recipes_loads_no_heavy_package() -> None:
    """The server reads recipes and techniques: torch, onnx, onnxruntime and numpy must stay out of its process."""
    code = (
        "import sys, modelpress_compression, modelpress_compression.recipe as r; r.Recipe.preset('default');"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'onnx_ir', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_every_technique_has_its_pass(name: str) -> None:
    """Each registry row leads to a class that takes its config."""
    technique = TECHNIQUES[name]
    options = {"scheme": "dynamic"} if name == "quantize" else {}  # auto is the pipeline's
    assert callable(technique.make_pass(technique.config_class(**options)))
