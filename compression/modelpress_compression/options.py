"""Configuration as frozen dataclasses whose fields say what a recipe may write: the source of the recipe language.

    @dataclass(frozen=True)
    class ClipConfig(Config):
        limit: float = option(6.0, 1, "Largest magnitude, in standard deviations of each weight tensor.", gt=0)

The API's messages, the documentation and all checks are made from these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.schema import Kind, Option, Schema, read

_KINDS: Mapping[object, Kind] = {bool: "bool", int: "int", float: "float", str: "string"}


def option(default: Any, number: int, help: str, *, kind: Kind | Schema | None = None, **rules: Any) -> Any:
    """A field of a Config. `number`: of the field in the API, never used for another; `help`: one sentence for people.

    `rules`: the further attributes of `schema.Option`: `gte`, `choices`, `needs` and so on. `kind`: only where the
    annotation does not say it, `int64` or the schema of a choice, whose items are made as `Class(name, value)`.
    """
    stated = {"number": number, "kind": kind, "help": help, **rules}
    return field(default=default, metadata={"option": stated})


@dataclass(frozen=True)
class Config:
    """Base of what a recipe configures. Lists are tuples and maps are sorted tuples of pairs, so that it is hashable.

    Making one checks it: raises InvalidRecipeError with everything that is wrong. 5.0 becomes 5 where that is meant.
    """

    def __post_init__(self) -> None:
        values = _checked(self.to_dict(), type(self))
        for entry in _entries(type(self)):
            if entry.option.name in values:
                object.__setattr__(self, entry.option.name, _made(entry, values[entry.option.name]))

    @classmethod
    def from_dict(cls, document: object) -> Self:
        """From the shape that it has in YAML. Raises InvalidRecipeError with every violation and its path."""
        return cls(**_checked(document, cls))

    def to_dict(self) -> dict[str, Any]:
        """In the shape of the recipe's YAML, defaults written out."""
        return {option.name: _plain(option, getattr(self, option.name)) for option, _ in _entries(type(self))}


def schema_of(config: type[Config], name: str = "") -> Schema:
    """What a mapping for this Config class may hold. `name`: of its message in the API, where it is not the class's."""
    return Schema(name or config.__name__, tuple(entry.option for entry in _entries(config)))


class _Entry(NamedTuple):
    """An option, and the class of one of its values."""

    option: Option
    item_class: type[Any]


_ENTRIES: dict[type[Config], tuple[_Entry, ...]] = {}


def _entries(config: type[Config]) -> tuple[_Entry, ...]:
    """The options of a class, in order; looked up once."""
    if config not in _ENTRIES:
        hints = get_type_hints(config)
        _ENTRIES[config] = tuple(_entry(item, hints[item.name]) for item in fields(config))
    return _ENTRIES[config]


def _entry(item: Field[Any], hint: Any) -> _Entry:
    """What the field states, completed by its annotation: a scalar, one or None, a tuple, or a tuple of pairs."""
    many: Literal["", "list", "map"] = ""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is tuple:
        hint, many = get_args(hint)[0], "list"
        if get_origin(hint) is tuple:
            hint, many = get_args(hint)[1], "map"
    stated = dict(item.metadata["option"])
    section = schema_of(hint) if issubclass(hint, Config) else None
    kind = stated.pop("kind") or section or _KINDS[hint]
    # Nothing stands in for what must be written; a section's defaults are those of its own options.
    default = None if section is not None or stated.get("required") else item.default
    return _Entry(Option(name=item.name, kind=kind, default=default, many=many, **stated), hint)


def _checked(document: object, config: type[Config]) -> dict[str, Any]:
    values, violations = read(document, schema_of(config))
    if violations:
        raise InvalidRecipeError(violations)
    return values


def _made(entry: _Entry, value: Any) -> Any:
    """A value as the configuration holds it."""
    if entry.option.many == "map":
        return tuple(sorted(value.items()))
    if entry.option.many == "list":
        return tuple(_item(entry, item) for item in value)
    return _item(entry, value)


def _item(entry: _Entry, value: Any) -> Any:
    if not isinstance(entry.option.kind, Schema):
        return value
    return entry.item_class(*next(iter(value.items()))) if entry.option.kind.choice else entry.item_class(**value)


def _plain(option: Option, value: Any) -> Any:
    """A value in the shape of YAML."""
    if option.many == "map":
        return dict(value)
    if isinstance(value, list | tuple):
        return [_plain(option, item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
