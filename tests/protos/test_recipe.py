"""The recipe language: documents to messages and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from modelpress_protos.errors import InvalidRecipeError
from modelpress_protos.recipe import STEP, apply_overrides, from_dict, schema_of, to_dict, validate
from modelpress_protos.schema import MAX_SECTIONS, LessThan, Needs, Schema, Violation
from modelpress_protos.v1.recipe_pb2 import PruneStep, Recipe

DOCUMENT = yaml.safe_load("""
version: 1
steps:
  - fuse: {}
  - prune: {structure: "n:m", n: 2, m: 4, exclude: ["*head*"]}
  - quantize: {scheme: static, weights: int8, activations: uint8, per_channel: true, calibration: entropy, exclude: []}
target: {device: cpu}
constraints: {metric: top1, max_drop: 1e-2, max_size_bytes: null, max_latency_ms: null}
benchmark: {threads: [1, 2], batch_sizes: [1], rounds: 50}
""")


def violations_of(document: object) -> list[str]:
    with pytest.raises(InvalidRecipeError) as caught:
        from_dict(document)
    return [str(violation) for violation in caught.value.violations]


def step(**techniques_: Any) -> dict[str, Any]:
    return {"version": 1, "steps": [techniques_]}


def test_reads_the_whole_yaml_shape() -> None:
    """Every construct of the documented YAML becomes the field that it names; null means "not set"."""
    recipe = from_dict(DOCUMENT)
    assert [item.WhichOneof("technique") for item in recipe.steps] == ["fuse", "prune", "quantize"]
    assert recipe.steps[1].prune.structure == "n:m"
    assert list(recipe.steps[1].prune.exclude) == ["*head*"]
    assert recipe.constraints.max_drop == 0.01  # YAML 1.1 reads 1e-2 as a string
    assert not recipe.constraints.HasField("max_size_bytes")
    assert list(recipe.benchmark.threads) == [1, 2]
    assert validate(recipe) == []


def test_writes_only_what_is_set() -> None:
    """A default that the person did not write does not appear in the document."""
    assert to_dict(from_dict(step(prune={"sparsity": 0.5}))) == step(prune={"sparsity": 0.5})
    assert to_dict(from_dict(step(fuse=None))) == step(fuse={})


def test_all_violations_at_once_with_their_paths() -> None:
    """One look shows everything that is wrong, each with its path."""
    document = {
        "version": 1,
        "steps": [
            {"fuse": {}},
            {"prune": {"sparsity": 1.4, "structur": "n:m"}},
            {"prun": {}},
            {},
            {"fuse": {}, "quantize": {}},
        ],
        "benchmark": {"rounds": True, "threads": [0, "x"]},
        "constrains": {},
    }
    assert violations_of(document) == [
        "steps[1].prune.sparsity: 1.4 is not in [0, 1)",
        "steps[1].prune.structur: unknown key (did you mean 'structure'?); known keys: structure, sparsity, criterion, "
        "scope, n, m, exclude, seed, "
        "round_to, min_channels, normalize, repair, overrides, sparsity_of, rounds, epochs, min_cosine",
        f"steps[2].prun: unknown technique (did you mean 'prune'?); there are {STEP.names}",
        f"steps[3]: names no technique; there are {STEP.names}",
        "steps[4]: names 2 techniques (fuse, quantize); write one step for each",
        "benchmark.rounds: expected a whole number, got true",
        "benchmark.threads[0]: 0 is not in [1, 1024]",
        "benchmark.threads[1]: expected a whole number, got 'x'",
        "constrains: unknown key (did you mean 'constraints'?); known keys: version, steps, target, constraints, "
        "benchmark, goal",
    ]


def test_maps() -> None:
    """A map comes back as it went in."""
    document = step(prune={"structure": "channel", "overrides": {"layer4*": 0.25, "head": 0.0}})
    assert to_dict(from_dict(document)) == document
    assert validate(from_dict(document)) == []
    overridden = apply_overrides(document, ['prune.overrides={"x*": 0.5}'])
    assert from_dict(overridden).steps[0].prune.overrides == {"x*": 0.5}


def test_validate_speaks_the_same_language_on_messages() -> None:
    """A message that a client built past from_dict gets the same violations."""
    recipe = Recipe(version=1)
    recipe.steps.add().prune.sparsity = 1.4
    recipe.steps.add()
    recipe.constraints.max_drop = math.nan
    assert [str(violation) for violation in validate(recipe)] == [
        "steps[0].prune.sparsity: 1.4 is not in [0, 1)",
        f"steps[1]: names no technique; there are {STEP.names}",
        "constraints.max_drop: expected a finite number, got nan",
    ]


def test_validate_bounds_the_steps_before_anything_else() -> None:
    """A megabyte of empty steps costs one violation, not a million."""
    recipe = Recipe.FromString(b"\x12\x00" * 100_000)
    assert validate(recipe) == [Violation("steps", f"has 100000 items; at most {MAX_SECTIONS} are allowed")]


def test_validate_refuses_fields_of_a_newer_language() -> None:
    """An option that this server does not know must not be dropped silently."""
    recipe = from_dict(step(fuse={}))
    recipe.steps[0].fuse.MergeFromString(b"\x9a\x06\x01x")  # field 99
    assert validate(recipe) == [
        Violation("steps[0].fuse", "has fields that this server does not know; update the server")
    ]


def test_overrides() -> None:
    """Paths as in violations; a technique's name alone finds its only step; the original stays as it was."""
    before = yaml.safe_dump(DOCUMENT)
    result = apply_overrides(
        DOCUMENT,
        [
            "steps[1].prune.sparsity=0.3",
            "constraints.max_drop=2e-2",
            "quantize.scheme=dynamic",
            "benchmark.threads=[4]",
        ],
    )
    recipe = from_dict(result)
    assert recipe.steps[1].prune.sparsity == 0.3
    assert recipe.constraints.max_drop == 0.02
    assert recipe.steps[2].quantize.scheme == "dynamic"
    assert list(recipe.benchmark.threads) == [4]
    assert yaml.safe_dump(DOCUMENT) == before


def test_overrides_create_what_is_not_there() -> None:
    """Missing sections, null sections and the next item of a list are made."""
    document = {"version": 1, "steps": [{"quantize": None}], "benchmark": None}
    result = apply_overrides(document, ["quantize.scheme=static", "benchmark.threads[0]=2", "steps[1]={fuse: {}}"])
    assert result == {
        "version": 1,
        "steps": [{"quantize": {"scheme": "static"}}, {"fuse": {}}],
        "benchmark": {"threads": [2]},
    }


def test_overrides_that_do_not_apply() -> None:
    """Each says why, all at once."""
    document = {"version": 1, "steps": [{"fuse": {}}, {"fuse": {}}]}
    with pytest.raises(InvalidRecipeError) as caught:
        apply_overrides(
            document,
            [
                "foo",
                "quantise.scheme=auto",
                "fuse.activations=no",
                "prune.n=1",
                "steps[7].fuse=1",
                "version.x=1",
                "steps[x]=1",
                "version={",
            ],
        )
    assert [str(violation) for violation in caught.value.violations] == [
        "foo: write PATH=VALUE, for example quantize.scheme=static",
        "quantise.scheme: starts with neither a key of a recipe nor a technique (did you mean 'quantize'?)",
        "fuse.activations: the recipe has 2 fuse steps; name one: steps[0].fuse, steps[1].fuse",
        "prune.n: the recipe has no prune step; add one to its steps",
        "steps[7].fuse: there is no item [7]; the list has 2, counted from 0",
        "version.x: 'x' does not apply: there is 1, not a mapping",
        "steps[x]: is not a path; write it as in steps[1].prune.sparsity",
        "version: '{' is not a YAML value",
    ]


def test_the_descriptor_describes_itself() -> None:
    """Every technique and every option has a sentence; ranges and rules come from the options of the fields."""
    assert set(STEP.by_name) >= {"fuse", "prune", "quantize"}
    for technique in STEP.options:
        assert isinstance(technique.kind, Schema)
        assert technique.help
        assert all(option.help for option in technique.kind.options)
    options = schema_of(PruneStep.DESCRIPTOR).by_name
    assert (options["sparsity"].type_text, options["sparsity"].default, options["sparsity"].range_text()) == (
        "float",
        0.5,
        "[0, 1)",
    )
    assert options["criterion"].needs == Needs(("l2", "activation", "taylor"), "structure", "channel")
    assert options["n"].less_than == LessThan("m", "structure", "n:m")
    assert options["exclude"].many == "list"
    assert options["overrides"].many == "map"


def test_defaults_are_valid() -> None:
    """A document that writes out every documented default is sound."""
    steps = []
    for technique in STEP.options:
        assert isinstance(technique.kind, Schema)
        defaults = {item.name: yaml.safe_load(item.default_text) for item in technique.kind.options}
        steps.append({technique.name: defaults})
    assert len(from_dict({"version": 1, "steps": steps}).steps) == len(steps)


# --- properties --------------------------------------------------------------------------------------------------

names = st.lists(st.text(st.characters(categories=("L", "N", "P")), max_size=8), max_size=3)
steps_ = st.one_of(
    st.fixed_dictionaries(
        {"fuse": st.fixed_dictionaries({}, optional={"activations": st.booleans(), "exclude": names})}
    ),
    st.fixed_dictionaries(
        {
            "prune": st.fixed_dictionaries(
                {},
                optional={
                    "structure": st.just("unstructured"),
                    "sparsity": st.floats(0, 1, exclude_max=True),
                    "n": st.integers(1, 64),
                    "seed": st.integers(0, 2**31 - 1),
                    "overrides": st.dictionaries(names.map("".join), st.floats(0, 1, exclude_max=True), max_size=3),
                },
            )
        }
    ),
    st.fixed_dictionaries({"quantize": st.fixed_dictionaries({}, optional={"per_channel": st.none() | st.booleans()})}),
)
documents = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "steps": st.lists(steps_, max_size=4),
        "constraints": st.fixed_dictionaries(
            {}, optional={"max_drop": st.floats(0, 1e300), "max_latency_ms": st.none()}
        ),
        "benchmark": st.fixed_dictionaries(
            {}, optional={"threads": st.lists(st.integers(1, 1024), min_size=1, max_size=3)}
        ),
    },
)
keys = st.one_of(
    st.sampled_from(["version", "steps", "fuse", "prune", "quantize", "sparsity", "benchmark", "threads", "n", "m"]),
    st.text(max_size=5),
    st.integers(),
    st.none(),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=10), st.binary(), st.dates()
)
garbage = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4))
)


@given(documents)
def test_round_trip(document: dict[str, Any]) -> None:
    """from_dict(to_dict(r)) == r, over the wire and through YAML text as well."""
    recipe = from_dict(document)
    assert from_dict(to_dict(recipe)) == recipe
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe
    assert Recipe.FromString(recipe.SerializeToString()) == recipe
    assert validate(recipe) == []


def complaints_of(call: Callable[[], object]) -> list[str]:
    """What a call complains about; any other exception than InvalidRecipeError gets through."""
    try:
        call()
    except InvalidRecipeError as error:
        return [str(violation) for violation in error.violations] or ["raised without a violation"]
    return []


@given(garbage)
def test_garbage_is_refused_in_words(document: object) -> None:
    """Whatever the document, the outcome is a sound recipe or bounded violations that can be printed."""
    complaints = complaints_of(lambda: from_dict(document))
    assert all(0 < len(complaint.encode()) < 600 for complaint in complaints)
    assert complaints or validate(from_dict(document)) == []


@given(documents, st.lists(st.text(max_size=30) | st.builds("{}={}".format, keys, scalars), max_size=3))
def test_garbage_overrides_are_refused_in_words(document: dict[str, Any], overrides: list[str]) -> None:
    """Whatever the overrides, nothing but InvalidRecipeError is raised."""
    complaints = complaints_of(lambda: apply_overrides(document, overrides))
    assert "raised without a violation" not in complaints


@given(st.binary(max_size=60))
def test_validate_survives_any_message(data: bytes) -> None:
    """Whatever parses as a Recipe gets a verdict."""
    from google.protobuf.message import DecodeError

    try:
        recipe = Recipe.FromString(data)
    except DecodeError:
        return
    if not validate(recipe):
        assert from_dict(to_dict(recipe)) == recipe
