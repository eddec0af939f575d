"""The recipe as the engine reads it."""

import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.recipe import Recipe, Step, presets


def test_every_preset_is_valid_and_round_trips() -> None:
    """What ships is readable, has a summary, and survives the way through a dictionary; `default` comes first."""
    assert next(iter(presets())) == "default"
    for name, summary in presets().items():
        recipe = Recipe.preset(name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert summary.endswith(".")
        assert len(summary) > 20


def test_the_default_is_a_balanced_goal() -> None:
    """The default preset has no steps: what is best in size and time together is looked for."""
    recipe = Recipe.preset("default")
    assert recipe.steps == ()
    assert recipe.goal is not None
    assert recipe.goal.objective == "balanced"


def test_limits_of_a_goal_stand_beside_the_constraints() -> None:
    """What both say is the goal's; what only one says stays."""
    document = {
        "version": 1,
        "goal": {"max_drop": 0.02, "min_ratio": 3},
        "constraints": {"max_drop": 0.1, "metric": "top5"},
    }
    limits = Recipe.from_dict(document).limits
    assert (limits.max_drop, limits.min_ratio, limits.metric) == (0.02, 3.0, "top5")


def test_the_example_of_the_documentation() -> None:
    """YAML 1.1 takes 1e-3 for a string; it is the number. Augmentations have their number, or their default."""
    recipe = Recipe.from_dict(
        yaml.safe_load(
            """{version: 1, steps: [
            {distill: {epochs: 3, learning_rate: 1e-3, augment: [horizontal_flip, {rotation: 30}]}}]}"""
        )
    )
    config = recipe.steps[0].config
    assert config.learning_rate == 1e-3
    assert [(item.name, item.amount) for item in config.augment] == [("horizontal_flip", 0.5), ("rotation", 30.0)]


def test_all_violations_come_at_once_with_their_paths() -> None:
    """Wrong types, ranges, names and keys are all listed, in the order of the document."""
    document = {
        "version": 2,
        "colour": 1,
        "steps": [
            {"prune": {"sparsity": 1.4, "spars": 1}},
            {"paint": {}},
            {"quantize": {"per_channel": 1, "weights": "int4"}},
            "fuse",
        ],
        "benchmark": {"rounds": 1, "threads": [0]},
        "constraints": {"max_drop": -1},
    }
    with pytest.raises(InvalidRecipeError) as error:
        Recipe.from_dict(document)
    assert [violation.path for violation in error.value.violations] == [
        "version",
        "colour",
        "steps[0].prune.sparsity",
        "steps[0].prune.spars",
        "steps[1].paint",
        "steps[2].quantize.per_channel",
        "steps[2].quantize.weights",
        "steps[3]",
        "benchmark.rounds",
        "benchmark.threads[0]",
        "constraints.max_drop",
    ]
    assert "steps[0].prune.sparsity: 1.4 is not in [0, 1)" in str(error.value)


def test_a_step_may_be_given_its_options_as_a_mapping() -> None:
    """In Python `Step("prune", {...})` is the step with its configuration, checked."""
    assert Step("prune", {"sparsity": 0.3}) == Step("prune", PruneConfig(sparsity=0.3))
    with pytest.raises(InvalidRecipeError, match=r"sparsity: 2.0 is not in \[0, 1\)"):
        Step("prune", {"sparsity": 2.0})


def test_unknown_preset_lists_what_there_is() -> None:
    """A misspelt preset is answered with the names that exist, and the one that was meant."""
    with pytest.raises(InvalidRecipeError, match=r"did you mean 'default'\?\); there are default, "):
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
