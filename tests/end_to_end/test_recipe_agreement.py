"""The API reads recipes by its messages, the engine by its configuration classes: the two give the same verdicts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.options import schema_of
from modelpress_compression.recipe import Recipe, presets
from modelpress_compression.schema import Option, Schema
from modelpress_protos import errors
from modelpress_protos import recipe as language

SCHEMA = schema_of(Recipe)


def test_the_schema_of_the_messages_is_that_of_the_classes() -> None:
    """Names, numbers, kinds, defaults, ranges, choices, descriptions and rules of every option are the same."""
    assert asdict(language.SCHEMA) == asdict(SCHEMA)


@pytest.mark.parametrize("preset", list(presets()))
def test_presets_survive_the_api(preset: str) -> None:
    """A preset sent as a message arrives as the same recipe."""
    recipe = Recipe.preset(preset)
    assert Recipe.from_dict(language.to_dict(language.from_dict(recipe.to_dict()))) == recipe


def number_of(option: Option) -> st.SearchStrategy[Any]:
    """A number in its range, as YAML may spell it."""
    bounds = [bound for bound in (option.gte, option.gt, option.lte, option.lt) if bound is not None]
    near = [value for bound in bounds for value in (bound, bound - 1, bound + 1)]
    whole = option.kind != "float"
    numbers = [int(value) if whole else value for value in (*near, 0.5, 16, 32)]
    fitting = [value for value in numbers if not (option.power_of_two and int(value) & (int(value) - 1))]
    number = st.sampled_from([value for value in fitting if option.permits(value)])
    return number | number.map(float) | number.map(str) | number.map(lambda value: f"{value:.9e}")


def value_of(option: Option) -> st.SearchStrategy[Any]:
    """A sound value of an option."""
    if isinstance(option.kind, Schema):
        one = document_of(option.kind)
        one = one | st.sampled_from(sorted(option.kind.by_name)) if option.kind.is_numbered else one
    elif option.kind == "bool":
        one = st.booleans()
    elif option.kind == "string":
        one = st.sampled_from(option.choices) if option.choices else st.text("ab*é", max_size=4)
    else:
        one = number_of(option)
    if option.many == "map":
        return st.dictionaries(st.text("ab*", max_size=3), one, max_size=3)
    return st.lists(one, min_size=option.min_items, max_size=3) if option.many == "list" else one


@st.composite
def document_of(draw: st.DrawFn, schema: Schema) -> dict[str, Any]:
    """A section that is sound but for the rules that tie options together."""
    names = st.sampled_from(sorted(schema.by_name))
    drawn = [draw(names)] if schema.choice else draw(st.lists(names, max_size=4, unique=True))
    required = [option.name for option in schema.options if option.required]
    return {name: draw(value_of(schema.by_name[name])) for name in [*required, *drawn]}


junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "1e-3"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A document of which one value, key or item is something else, or one is added."""
    root = {"document": draw(document_of(SCHEMA))}
    holder: Any = root
    key: Any = "document"
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
        holder = holder[key]
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    if isinstance(holder[key], dict) and draw(st.booleans()):
        holder[key][draw(st.sampled_from(["x", "n", "fuse", "sparsity"]) | st.integers())] = draw(junk)
    else:
        holder[key] = draw(junk)
    return root["document"]


def violations_of(document: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the engine and the API find."""
    found: list[list[tuple[str, str]]] = []
    for reader, error in ((Recipe.from_dict, InvalidRecipeError), (language.from_dict, errors.InvalidRecipeError)):
        try:
            reader(document)
            found.append([])
        except error as caught:
            found.append([(item.path, item.description) for item in caught.violations])
    return found[0], found[1]


@given(document_of(SCHEMA) | mutated())
def test_both_sides_say_the_same(document: Any) -> None:
    """Any document has the same violations on both sides, and one without any means the same recipe over the wire."""
    engine, api = violations_of(document)
    assert engine == api
    if not engine:
        message = language.from_dict(document)
        assert language.validate(message) == []
        assert Recipe.from_dict(language.to_dict(message)) == Recipe.from_dict(document)


@pytest.mark.parametrize(
    ("path", "value"), [("epochs", 5.0), ("round_to", 8.0), ("max_drop", "1e-3"), ("max_size_bytes", "5e6")]
)
def test_numbers_that_one_side_refused(path: str, value: float | str) -> None:
    """Whole floats and numbers that YAML 1.1 reads as strings are taken by both sides."""
    documents: dict[str, dict[str, Any]] = {
        "epochs": {"steps": [{"distill": {"epochs": value}}]},
        "round_to": {"steps": [{"prune": {"round_to": value}}]},
        "max_drop": {"constraints": {"max_drop": value}},
        "max_size_bytes": {"constraints": {"max_size_bytes": value}},
    }
    assert violations_of({"version": 1, **documents[path]}) == ([], [])


# Field numbers are for ever: messages that were stored or sent with them must keep their meaning.
NUMBERS = {
    "Recipe": "version steps target constraints benchmark goal",
    "Step": "fuse prune quantize distill factorize",
    "FuseStep": "activations transformers exclude",
    "PruneStep": "structure sparsity criterion scope n m exclude seed round_to min_channels normalize repair overrides",
    "QuantizeStep": "scheme weights activations per_channel calibration exclude block_size smooth_quant equalize "
    "bias_correction rounding",
    "DistillStep": "method loss epochs batch_size optimizer learning_rate weight_decay warmup temperature "
    "feature_weight label_weight hold_out patience seed augment exclude",
    "FactorizeStep": "method rank_ratio energy budget budget_of round_to max_error repair exclude",
    "Augmentation": "horizontal_flip vertical_flip rotation random_resized_crop color_jitter noise mixup time_masking "
    "token_masking",
    "Target": "device cpu",
    "Constraints": "metric max_drop max_size_bytes max_latency_ms min_speedup min_ratio allow_damage",
    "Goal": "objective max_drop max_size_bytes min_ratio max_latency_ms min_speedup search_time_s techniques",
    "Benchmark": "threads batch_sizes rounds",
}


def test_field_numbers_never_change() -> None:
    """Each field of version 0.1 has the number that it had then."""
    found: dict[str, dict[str, int]] = {}

    def walk(schema: Schema) -> None:
        found[schema.name] = {option.name: option.number for option in schema.options}
        for option in schema.options:
            if isinstance(option.kind, Schema):
                walk(option.kind)

    walk(SCHEMA)
    for message, names in NUMBERS.items():
        expected = {name: number for number, name in enumerate(names.split(), start=1)}
        assert found[message].items() >= expected.items(), message
