"""The recipe exists twice: as the API's message and as the engine's dataclasses. Here the two are held together."""

from dataclasses import fields
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.passes.distill.config import AUGMENTATIONS
from modelpress_compression.recipe import METRICS, Benchmark, Constraints, Recipe, presets
from modelpress_compression.target import Target
from modelpress_compression.techniques import TECHNIQUES
from modelpress_protos import recipe as language
from modelpress_protos.v1 import options_pb2, recipe_pb2

SECTIONS = {
    **{name: (TECHNIQUES[name].config_class, f"{name.title()}Step") for name in TECHNIQUES},
    "target": (Target, "Target"),
    "constraints": (Constraints, "Constraints"),
    "benchmark": (Benchmark, "Benchmark"),
}


def rules(message: str) -> dict[str, options_pb2.FieldRules]:
    descriptor = getattr(recipe_pb2, message).DESCRIPTOR
    return {field.name: field.GetOptions().Extensions[options_pb2.rules] for field in descriptor.fields}


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_same_options_and_defaults(name: str) -> None:
    """Every option has the same name and default on both sides."""
    config_class, message = SECTIONS[name]
    ours = {item.name: item.default for item in fields(config_class)}
    theirs = rules(message)
    assert ours.keys() == theirs.keys()
    for option, default in ours.items():
        stated = yaml.safe_load(theirs[option].default_value) if theirs[option].default_value else None
        assert stated == (list(default) or None if isinstance(default, tuple) else default), option


def test_same_techniques() -> None:
    """The API offers the techniques that the engine has, with the same sentence."""
    assert {technique.name: technique.summary for technique in language.techniques()} == {
        technique.name: technique.summary for technique in TECHNIQUES.values()
    }


def test_same_augmentations() -> None:
    """Both sides know the same augmentations, with the same defaults and the same bounds."""
    theirs = rules("Augmentation")
    assert theirs.keys() == AUGMENTATIONS.keys()
    for name, limits in AUGMENTATIONS.items():
        assert (float(theirs[name].default_value), theirs[name].gt, theirs[name].lte) == (*limits[:1], 0, limits[1])


@pytest.mark.parametrize(
    "augment", [["rotation"], [{"rotation": 30}], [{"noise": None}, "mixup"], ["horizontal_flip", {"rotation": "3e1"}]]
)
def test_augmentations_survive_the_api(augment: list[Any]) -> None:
    """Names and names with a number mean the same on both sides, and arrive as they were sent."""
    document = {"version": 1, "steps": [{"distill": {"augment": augment}}]}
    recipe = Recipe.from_dict(document)
    assert len(recipe.steps[0].config.augment) == len(augment)
    assert Recipe.from_dict(language.to_dict(language.from_dict(document))) == recipe


def test_the_example_of_the_documentation_is_read_by_both() -> None:
    """YAML 1.1 takes 1e-3 for a string; both sides take it for the number."""
    document = yaml.safe_load(
        """{version: 1, steps: [
        {distill: {epochs: 3, learning_rate: 1e-3, augment: [horizontal_flip, {rotation: 30}]}}]}"""
    )
    ours = Recipe.from_dict(document)
    assert ours.steps[0].config.learning_rate == 1e-3
    assert Recipe.from_dict(language.to_dict(language.from_dict(document))) == ours


def test_metrics_agree() -> None:
    """Both sides know the same metrics."""
    assert tuple(getattr(rules("Constraints")["metric"], "in")) == METRICS


@pytest.mark.parametrize("preset", list(presets()))
def test_presets_survive_the_api(preset: str) -> None:
    """A preset sent as a message arrives as the same recipe."""
    recipe = Recipe.preset(preset)
    assert Recipe.from_dict(language.to_dict(language.from_dict(recipe.to_dict()))) == recipe


augmentations = st.one_of(
    st.sampled_from([*AUGMENTATIONS, "x"]),
    st.dictionaries(st.sampled_from([*AUGMENTATIONS, "x"]), st.one_of(st.none(), st.floats(-1, 200)), max_size=2),
    st.integers(),
)
values = st.one_of(
    st.none(),
    st.lists(augmentations, max_size=2),
    st.just("1e-3"),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(-2, 2),
    st.sampled_from(["auto", "n:m", "l1", "x", "layer", "static", "channel", "activation", "taylor", "macs"]),
    st.dictionaries(st.sampled_from(["layer4*", "a.b"]), st.one_of(st.none(), st.floats(-1, 2)), max_size=2),
)


@given(st.data())
def test_both_sides_accept_the_same(data: Any) -> None:
    """What one side refuses, the other refuses too."""
    name = data.draw(st.sampled_from(sorted(TECHNIQUES)))
    options = [item.name for item in fields(TECHNIQUES[name].config_class)]
    drawn = data.draw(st.dictionaries(st.sampled_from(options), values, max_size=4))
    document = {"version": 1, "steps": [{name: drawn}]}
    assert accepts(Recipe.from_dict, document) == accepts(language.from_dict, document), document


def accepts(read: Any, document: dict[str, Any]) -> bool:
    try:
        read(document)
    except (InvalidRecipeError, language.RecipeError):
        return False
    return True
