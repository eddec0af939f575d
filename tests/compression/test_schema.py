"""The reader of documents."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.schema import (
    MAX_ITEMS,
    MAX_SECTIONS,
    MAX_VIOLATIONS,
    LessThan,
    Needs,
    Option,
    Schema,
    read,
)

NOISE = Schema(
    "Noise",
    (
        Option("rotation", 1, "float", "Turned.", 15, gt=0, lte=180),
        Option("blur", 2, "float", "Blurred.", 0.5, gt=0, lte=1),
    ),
    choice="augmentation",
)
SHRINK = Schema(
    "ShrinkStep",
    (
        Option("share", 1, "float", "How much.", 0.5, gte=0, lt=1),
        Option("method", 2, "string", "How.", "plain", choices=("plain", "n:m", "blocks")),
        Option("n", 3, "int", "Of every m.", 2, gte=1, lte=64, less_than=LessThan("m", "method", "n:m")),
        Option("m", 4, "int", "A group.", 4, gte=2, lte=64),
        Option(
            "bits", 5, "string", "Type.", "int8", choices=("int8", "int4"), needs=Needs(("int4",), "method", "blocks")
        ),
        Option("block", 6, "int", "A block.", 32, gte=16, power_of_two=True),
        Option("exact", 7, "bool", "Exactly.", True),
        Option("exclude", 8, "string", "Not these.", (), many="list"),
        Option("overrides", 9, "float", "Other shares.", (), many="map", gte=0, lt=1),
        Option("augment", 10, NOISE, "Noise.", (), many="list"),
        Option("limit", 11, "int64", "Bytes.", gt=0),
        Option("sizes", 12, "int", "Sizes.", (1,), many="list", gte=1, min_items=1),
    ),
)
STEP = Schema(
    "Step", (Option("shrink", 1, SHRINK, "Shrinks."), Option("fuse", 2, Schema("FuseStep", ()), "Fuses.")), "technique"
)
RECIPE = Schema(
    "Recipe",
    (
        Option("version", 1, "int", "Version.", required=True, gte=1, lte=1),
        Option("steps", 2, STEP, "Steps.", (), many="list"),
    ),
)


def shrunk(**options: Any) -> dict[str, Any]:
    """What is read of these options, which are sound."""
    values, violations = read(options, SHRINK)
    assert not violations
    return values


def complaints(document: object, schema: Schema = SHRINK) -> list[str]:
    return [str(violation) for violation in read(document, schema).violations]


def test_what_is_set_is_read_and_nothing_else() -> None:
    """None means "not set"; no default appears; mappings, lists and scalars come back as they are."""
    document = {
        "version": 1,
        "steps": [
            {"fuse": None},
            {"shrink": {"share": 0.25, "n": None, "exclude": ["*head*"], "overrides": {"a": 0.5}}},
        ],
    }
    assert read(document, RECIPE).values == {
        "version": 1,
        "steps": [{"fuse": {}}, {"shrink": {"share": 0.25, "exclude": ["*head*"], "overrides": {"a": 0.5}}}],
    }
    assert not read(document, RECIPE).violations


@pytest.mark.parametrize("value", [0, 0.25, "1e-3", "0.5", ".5", "-0"])
def test_accepts_numbers_however_yaml_reads_them(value: Any) -> None:
    """Whole numbers and YAML 1.1's string of `1e-3` are floats."""
    share = shrunk(share=value)["share"]
    assert (share, type(share)) == (float(value), float)


@pytest.mark.parametrize(("value", "meant"), [(8, 8), (8.0, 8), ("8", 8), ("1e1", 10), ("5.", 5)])
def test_accepts_whole_numbers_however_they_are_written(value: Any, meant: int) -> None:
    """A person who writes 5.0 or 1e1 means the whole number."""
    read_value = shrunk(method="plain", n=value)["n"]
    assert (read_value, type(read_value)) == (meant, int)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"share": 1}, "share: 1 is not in [0, 1)"),
        ({"share": -0.1}, "share: -0.1 is not in [0, 1)"),
        ({"share": True}, "share: expected a number, got true"),
        ({"share": "much"}, "share: expected a number, got 'much'"),
        ({"share": math.nan}, "share: expected a finite number, got nan"),
        ({"share": math.inf}, "share: expected a finite number, got inf"),
        ({"share": "nan"}, "share: expected a number, got 'nan'"),
        ({"share": "1e999"}, "share: expected a finite number, got inf"),
        ({"share": 10**400}, "share: expected a finite number, got a huge number"),
        ({"share": [0.5]}, "share: expected a number, got a list"),
        ({"share": {}}, "share: expected a number, got a mapping"),
        ({"n": 1.5}, "n: expected a whole number, got 1.5"),
        ({"n": math.nan}, "n: expected a whole number, got nan"),
        ({"n": "1.5"}, "n: expected a whole number, got '1.5'"),
        ({"n": True}, "n: expected a whole number, got true"),
        ({"n": 10**400}, "n: a huge number is not in [1, 64]"),
        ({"limit": 2**63}, "limit: 9223372036854775808 is not in (0, 9223372036854775807]"),
        ({"block": 2**31}, "block: 2147483648 is not in [16, 2147483647]"),
        ({"block": 48}, "block: 48 is no power of two"),
        ({"exact": 1}, "exact: expected true or false, got 1"),
        ({"method": "plane"}, "method: 'plane' is not one of plain, n:m, blocks (did you mean 'plain'?)"),
        ({"method": 3}, "method: expected a text, got 3"),
        ({"exclude": "head"}, "exclude: expected a list, got 'head'"),
        ({"exclude": ["a", None]}, "exclude[1]: expected a text, got null"),
        ({"overrides": [0.5]}, "overrides: expected a mapping of names to values, got a list"),
        ({"overrides": {"a": 1}}, "overrides.a: 1 is not in [0, 1)"),
        ({"overrides": {3: 0.5}}, "overrides.3: expected a text, got 3"),
        ({"overrides": {"c": None}}, "overrides.c: expected a number, got null"),
        ({"sizes": []}, "sizes: has 0 items; it needs at least 1"),
        ({"sizes": [1, 0]}, "sizes[1]: 0 is not in [1, 2147483647]"),
    ],
)
def test_refuses_what_is_wrong(options: Mapping[Any, Any], complaint: str) -> None:
    """Each wrong value is named by its path, with what was expected and what was given."""
    assert complaints(options) == [complaint]
    assert not read(options, SHRINK).values


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "n:m", "n": 4, "m": 4}, ["n: 4 is not less than m (4)"]),
        ({"method": "n:m", "n": 4}, ["n: 4 is not less than m (4)"]),
        ({"method": "n:m", "m": 2}, ["n: 2 is not less than m (2)"]),
        ({"n": 4}, []),  # other methods do not use n and m
        ({"method": "n:m", "n": 4, "m": 0}, ["m: 0 is not in [2, 64]"]),  # what is wrong itself ties nothing
        ({"bits": "int4"}, ["bits: 'int4' needs method blocks"]),
        ({"bits": "int4", "method": "blocks"}, []),
        ({"bits": "int4", "method": 3}, ["method: expected a text, got 3"]),
    ],
)
def test_rules_that_tie_two_keys(options: dict[str, Any], expected: list[str]) -> None:
    """Defaults stand in for what is not written."""
    assert complaints(options) == expected


def test_unknown_keys() -> None:
    """The message says what there is, and what may have been meant."""
    assert complaints({"version": 1, "stps": [], 3: None}, RECIPE) == [
        "stps: unknown key (did you mean 'steps'?); known keys: version, steps",
        "3: unknown key; known keys: version, steps",
    ]


def test_a_choice_names_exactly_one() -> None:
    """An unknown name, none, and several are refused; a name without options is enough."""
    document = {"version": 1, "steps": [{"shrnk": {}}, {}, {"fuse": {}, "shrink": {}}, "fuse", {"fuse": 1}]}
    assert complaints(document, RECIPE) == [
        "steps[0].shrnk: unknown technique (did you mean 'shrink'?); there are shrink, fuse",
        "steps[1]: names no technique; there are shrink, fuse",
        "steps[2]: names 2 techniques (fuse, shrink); write one step for each",
        "steps[3]: expected a mapping of keys to values, got 'fuse'; write 'NAME: {}'",
        "steps[4].fuse: expected a mapping of keys to values, got 1",
    ]


def test_a_choice_among_numbers_may_be_a_name_alone() -> None:
    """`rotation` and `{rotation: null}` take the default."""
    items = ["rotation", {"rotation": None}, {"rotation": "3e1"}, {"blur": 1}]
    assert shrunk(augment=items)["augment"] == [
        {"rotation": 15.0},
        {"rotation": 15.0},
        {"rotation": 30.0},
        {"blur": 1.0},
    ]
    assert complaints({"augment": [{"rotation": 0}, "turn", {"rotation": 1, "blur": 1}, 3]}) == [
        "augment[0].rotation: 0 is not in (0, 180]",
        "augment[1].turn: unknown augmentation; there are rotation, blur",
        "augment[2]: names 2 augmentations (rotation, blur); write one item for each",
        "augment[3]: expected a mapping of keys to values, got 3; write 'NAME: {}'",
    ]


def test_a_name_alone_needs_a_default() -> None:
    """Where a choice among numbers has none, the number is missed."""
    schema = Schema("Shift", (Option("pixels", 1, "float", "How far."),), choice="shift")
    assert complaints("pixels", schema) == ["pixels: expected a number, got null"]
    assert read({"pixels": 2}, schema).values == {"pixels": 2.0}


def test_what_must_be_set() -> None:
    """A key that is required is missed, and where it has one value only the message says which."""
    assert complaints({"steps": []}, RECIPE) == ["version: is required; write 'version: 1'"]
    assert complaints({"version": None}, RECIPE) == ["version: is required; write 'version: 1'"]
    assert complaints({"version": 2}, RECIPE) == ["version: 2 is not in [1, 1]"]


@pytest.mark.parametrize("document", [None, "text", 3, [], [{"version": 1}], math.nan])
def test_refuses_what_is_no_mapping(document: object) -> None:
    """The document itself must be a mapping."""
    (complaint,) = complaints(document, RECIPE)
    assert complaint.startswith("recipe: expected a mapping of keys to values, got ")


def test_bounds_what_a_document_may_hold() -> None:
    """Too many items, long texts and unprintable ones are refused; no message repeats them whole."""
    assert complaints({"version": 1, "steps": [{}] * 65}, RECIPE) == [
        f"steps: has 65 items; at most {MAX_SECTIONS} are allowed"
    ]
    assert complaints({"exclude": ["x"] * 1001}) == [f"exclude: has 1001 items; at most {MAX_ITEMS} are allowed"]
    overrides = {str(number): 0.5 for number in range(1001)}
    assert complaints({"overrides": overrides}) == [f"overrides: has 1001 items; at most {MAX_ITEMS} are allowed"]
    for text in ("x" * 5000, "a\x00b", "\ud800"):
        for document in ({"exclude": [text]}, {"overrides": {text: 0.5}}, {"method": text}, {text: 1}):
            (complaint,) = complaints(document)
            assert len(complaint.encode()) < 300


def test_a_bomb_of_aliases_is_refused_in_few_words() -> None:
    """A small file whose aliases make it a document of 64,000 mistakes gets a hundred messages and a last one."""
    wrong = {f"key{number}": None for number in range(1000)}
    found = read({"version": 1, "steps": [{"shrink": wrong}] * 64}, RECIPE).violations
    assert len(found) == MAX_VIOLATIONS + 1
    assert str(found[-1]) == "recipe: has more than 100 mistakes; these are the first"


@pytest.mark.parametrize(
    ("name", "type_text", "default", "allowed", "range_text"),
    [
        ("share", "float", "0.5", (), "[0, 1)"),
        ("method", "string", "plain", ("plain", "n:m", "blocks"), ""),
        ("block", "int", "32", (), "[16, inf)"),
        ("exact", "bool", "true", (), ""),
        ("exclude", "list of string", "[]", (), ""),
        ("overrides", "map of string to float", "{}", (), "[0, 1)"),
        ("augment", "list of names, or {name: number}", "[]", ("rotation", "blur"), ""),
        ("limit", "int", "", (), "(0, inf)"),
        ("sizes", "list of int", "[1]", (), "[1, inf)"),
    ],
)
def test_options_in_words(name: str, type_text: str, default: str, allowed: tuple[str, ...], range_text: str) -> None:
    """What the documentation and `info` say of an option."""
    option = SHRINK.by_name[name]
    assert (option.type_text, option.default_text, option.allowed, option.range_text()) == (
        type_text,
        default,
        allowed,
        range_text,
    )


keys = (
    st.sampled_from(["version", "steps", "shrink", "share", "augment", "overrides"])
    | st.text(max_size=5)
    | st.integers()
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.binary() | st.dates()
garbage = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@given(garbage)
def test_garbage_is_refused_in_words(document: object) -> None:
    """Whatever the document, the outcome is values or bounded messages that can be printed."""
    values, violations = read(document, RECIPE)
    assert all(0 < len(str(violation).encode()) < 400 for violation in violations)
    assert violations or values["version"] == 1
