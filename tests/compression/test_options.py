"""Configuration classes, which are the source of the recipe language."""

from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.options import Config, option, schema_of
from modelpress_compression.schema import Option, Schema

SIDES = Schema("Side", (Option("left", 1, "float", "Left.", 0.5), Option("right", 2, "float", "Right.", 1)), "side")


@dataclass(frozen=True)
class Side:
    name: str
    amount: float

    def to_dict(self) -> dict[str, float]:
        return {self.name: self.amount}


@dataclass(frozen=True)
class Limits(Config):
    """A section in a section."""

    low: float = option(0.0, 1, "Low.")
    high: float | None = option(None, 2, "High.", gt=0)


@dataclass(frozen=True)
class Clip(Config):
    """One option of each kind."""

    version: int = option(1, 1, "Version.", required=True, gte=1, lte=1)
    mode: str = option("hard", 2, "How.", choices=("hard", "soft"))
    rounds: int = option(5, 3, "Rounds.", gte=1)
    exact: bool = option(False, 4, "Exactly.")
    size: int | None = option(None, 5, "Size.", kind="int64")
    exclude: tuple[str, ...] = option((), 6, "Not these.")
    shares: tuple[tuple[str, float], ...] = option((), 7, "Shares.", lt=1)
    sides: tuple[Side, ...] = option((), 8, "Sides.", kind=SIDES)
    limits: Limits = option(Limits(), 9, "Limits.")


def test_the_schema_of_a_class() -> None:
    """Name, number, help and rules are those of the field, kind and shape come from its annotation."""
    assert schema_of(Clip) == Schema(
        "Clip",
        (
            Option("version", 1, "int", "Version.", required=True, gte=1, lte=1),
            Option("mode", 2, "string", "How.", "hard", choices=("hard", "soft")),
            Option("rounds", 3, "int", "Rounds.", 5, gte=1),
            Option("exact", 4, "bool", "Exactly.", False),
            Option("size", 5, "int64", "Size."),
            Option("exclude", 6, "string", "Not these.", (), many="list"),
            Option("shares", 7, "float", "Shares.", (), many="map", lt=1),
            Option("sides", 8, SIDES, "Sides.", (), many="list"),
            Option("limits", 9, schema_of(Limits), "Limits."),
        ),
    )


def test_documents_become_configurations_and_back() -> None:
    """Lists are tuples, maps sorted pairs, choices and sections their classes; the way back writes defaults out."""
    document = {
        "version": 1,
        "rounds": "1e1",
        "exclude": ["b", "a"],
        "shares": {"y": 0, "x": 0.5},
        "sides": ["left", {"right": 2}],
        "limits": {"high": 3},
    }
    config = Clip.from_dict(document)
    assert config == Clip(
        rounds=10,
        exclude=("b", "a"),
        shares=(("x", 0.5), ("y", 0.0)),
        sides=(Side("left", 0.5), Side("right", 2.0)),
        limits=Limits(high=3.0),
    )
    assert config.to_dict() == {
        "version": 1,
        "mode": "hard",
        "rounds": 10,
        "exact": False,
        "size": None,
        "exclude": ["b", "a"],
        "shares": {"x": 0.5, "y": 0.0},
        "sides": [{"left": 0.5}, {"right": 2.0}],
        "limits": {"low": 0.0, "high": 3.0},
    }
    assert Clip.from_dict(config.to_dict()) == config


def test_a_configuration_is_checked_when_it_is_made() -> None:
    """In Python as in a recipe: everything that is wrong at once, and 5.0 where 5 is meant."""
    loose: Any = {"rounds": 5.0, "exclude": ["a"]}
    assert Clip(**loose) == Clip(rounds=5, exclude=("a",))
    assert type(Clip(**loose).rounds) is int
    with pytest.raises(InvalidRecipeError) as caught:
        Clip(mode="sofd", rounds=0, exclude="a")  # type: ignore[arg-type]
    assert [str(violation) for violation in caught.value.violations] == [
        "mode: 'sofd' is not one of hard, soft (did you mean 'soft'?)",
        "rounds: 0 is not in [1, 2147483647]",
        "exclude: expected a list, got 'a'",
    ]
    with pytest.raises(InvalidRecipeError):
        replace(Clip(), rounds=-1)


def test_a_configuration_can_be_a_key_and_cannot_change() -> None:
    """Equal ones have one hash."""
    assert len({Clip(shares=(("a", 0.5),)), Clip(shares=(("a", 0.5),)), Clip()}) == 2
    with pytest.raises(FrozenInstanceError):
        Clip().rounds = 3  # type: ignore[misc]


def test_a_rule_that_does_not_exist_is_refused() -> None:
    """A misspelt rule does not go unnoticed."""

    @dataclass(frozen=True)
    class Misspelt(Config):
        limit: float = option(0.0, 1, "Limit.", atleast=0)

    with pytest.raises(TypeError, match="atleast"):
        schema_of(Misspelt)
