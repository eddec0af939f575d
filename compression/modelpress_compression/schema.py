"""What a document may hold, as data, and the one reader that checks documents against it.

    Schema    what a mapping may hold: options, or, where it is a choice, names of which exactly one is given
    Option    one key: its kind, default, range and permitted values, and what it asks of the other keys
    read      document, schema -> values, and every violation of the document with its path

A recipe is such a document. The engine makes its schema from its configuration classes, the API from its messages, and
both read with this module. It stands on the standard library alone, and `protos/generate.py` copies it into the protos.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

MAX_SECTIONS = 64  # in a list
MAX_ITEMS = 1000  # of any other list, and keys of a mapping
MAX_STRING_CHARS = 1024
MAX_VIOLATIONS = 100  # YAML aliases can make a small file a document of a billion mistakes
SHOWN_CHARS = 60  # of a wrong value in a message

Kind: TypeAlias = Literal["bool", "int", "int64", "float", "string"]
_BITS: dict[object, int] = {"int": 32, "int64": 64}
# YAML 1.1 reads `1e-3` (no dot) as a string; a person who writes it means the number.
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Violation(NamedTuple):
    """One wrong value: where it stands (`steps[1].prune.sparsity`) and what is wrong (`1.4 is not in [0, 1)`)."""

    path: str
    description: str

    def __str__(self) -> str:
        return f"{self.path}: {self.description}"


@dataclass(frozen=True)
class Needs:
    """`values` of an option are permitted only where `option`, another one, is `value` or one of `or_values`."""

    values: tuple[str, ...]
    option: str
    value: str
    or_values: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """All that the other option may be."""
        return (self.value, *self.or_values)


@dataclass(frozen=True)
class LessThan:
    """An option must be less than `option`, another one, where a third, `where`, is `value`."""

    option: str
    where: str
    value: str


@dataclass(frozen=True)
class Option:
    """One key of a mapping.

    `number`: of its field in the API. `kind`: of one value; a Schema where that is a mapping of its own. `many`: the
    option holds a list of such values, or a map of names to them. `default`: what holds where it is not set; None: no
    value. The bounds are inclusive (`gte`, `lte`) or exclusive (`gt`, `lt`). `choices`: the permitted strings; empty:
    any. `help`: one sentence for the person who writes the document.
    """

    name: str
    number: int
    kind: Kind | Schema
    help: str
    default: Any = None
    many: Literal["", "list", "map"] = ""
    required: bool = False
    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    min_items: int = 0
    power_of_two: bool = False
    needs: Needs | None = None
    less_than: LessThan | None = None

    @property
    def type_text(self) -> str:
        """Its type in words."""
        if isinstance(self.kind, Schema):
            return "list of names, or {name: number}" if self.kind.is_numbered else "mapping"
        kind = "int" if self.kind == "int64" else self.kind
        return {"": kind, "list": f"list of {kind}", "map": f"map of string to {kind}"}[self.many]

    @property
    def default_text(self) -> str:
        """The default as YAML; empty: there is none."""
        if self.default is None or isinstance(self.default, str):
            return self.default or ""
        return json.dumps({} if self.many == "map" else self.default)

    @property
    def allowed(self) -> tuple[str, ...]:
        """Every word that it takes; empty: any, or none at all."""
        return tuple(self.kind.by_name) if isinstance(self.kind, Schema) else self.choices

    def range_text(self, *, of_type: bool = False) -> str:
        """`[0, 1)`; empty where nothing is said of a range. `of_type`: what the type itself can hold counts too."""
        if not of_type and all(bound is None for bound in (self.gte, self.gt, self.lte, self.lt)):
            return ""
        low, high = self._inclusive(of_type)
        left = f"({_short(self.gt)}" if self.gt is not None else f"[{_short(low)}" if math.isfinite(low) else "(-inf"
        right = f"{_short(self.lt)})" if self.lt is not None else f"{_short(high)}]" if math.isfinite(high) else "inf)"
        return f"{left}, {right}"

    def permits(self, number: float) -> bool:
        """Whether a number is in the range of the option and of its type."""
        low, high = self._inclusive(of_type=True)
        above, below = self.gt is None or number > self.gt, self.lt is None or number < self.lt
        return low <= number <= high and above and below

    def _inclusive(self, of_type: bool) -> tuple[float, float]:
        limit: float = 1 << (_BITS[self.kind] - 1) if of_type and self.kind in _BITS else math.inf
        return -limit if self.gte is None else self.gte, limit - 1 if self.lte is None else self.lte

    def conflicts(self, values: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with the option's value beside the others'; `values` lacks those that are wrong themselves."""
        value = values.get(self.name)
        if self.needs is not None and value in self.needs.values:
            wanted = self.needs.wanted
            if values.get(self.needs.option, wanted[0]) not in wanted:
                yield f"'{value}' needs {self.needs.option} {' or '.join(wanted)}"
        if self.less_than is not None and values.get(self.less_than.where) == self.less_than.value:
            other = values.get(self.less_than.option)
            if value is not None and other is not None and value >= other:
                yield f"{show(value)} is not less than {self.less_than.option} ({show(other)})"


@dataclass(frozen=True)
class Schema:
    """What a mapping may hold. `name`: of its message in the API.

    `choice`: what its names are called, such as technique, where exactly one is given; empty: any of them may be.
    """

    name: str
    options: tuple[Option, ...]
    choice: str = ""

    @cached_property
    def by_name(self) -> dict[str, Option]:
        return {option.name: option for option in self.options}

    @property
    def is_numbered(self) -> bool:
        """Whether it is a choice among numbers: a name, which takes its default, or `{name: number}`."""
        return bool(self.choice) and all(option.kind == "float" for option in self.options)

    @property
    def names(self) -> str:
        """Its keys, as a list for people."""
        return ", ".join(self.by_name)


class Reading(NamedTuple):
    """What was read. `values`: only what is set and sound, with whole numbers as int and defaults of bare names."""

    values: dict[str, Any]
    violations: tuple[Violation, ...]


def read(document: object, schema: Schema) -> Reading:
    """Checks a document of mappings, lists and scalars, as YAML gives it; None means "not set".

    Nothing is raised, whatever the document is, and no message grows with it.
    """
    reader = _Reader()
    values: dict[str, Any] = {}
    try:
        values = reader.section(document, schema, "")
    except _TooManyError:
        reader.violations.append(Violation("recipe", f"has more than {MAX_VIOLATIONS} mistakes; these are the first"))
    return Reading(values, tuple(reader.violations))


class _TooManyError(Exception):
    """The list of violations is full."""


class _Reader:
    """One pass over a document, which collects the violations."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def complain(self, path: str, description: str) -> None:
        if len(self.violations) == MAX_VIOLATIONS:
            raise _TooManyError
        self.violations.append(Violation(path, description))

    def section(self, value: object, schema: Schema, path: str) -> dict[str, Any]:
        """A mapping. What it holds that is unknown or wrong is left out."""
        if isinstance(value, str) and schema.is_numbered:
            value = {value: None}
        if not isinstance(value, Mapping):
            hint = "; write 'NAME: {}'" if schema.choice else ""
            self.complain(path or "recipe", f"expected a mapping of keys to values, got {show(value)}{hint}")
            return {}
        values: dict[str, Any] = {}
        wrong: set[str] = set()
        before = len(self.violations)
        for key, item in value.items():
            option = schema.by_name.get(key) if isinstance(key, str) else None
            if option is None:
                self.complain(join(path, show_key(key)), _unknown_key(schema, key))
                continue
            given = item
            if item is None and schema.choice:
                # `- fuse:` reads as {fuse: None}; naming the technique is enough.
                given = {} if isinstance(option.kind, Schema) else option.default
            if given is not None or schema.choice:
                complaints = len(self.violations)
                values[option.name] = self.option(given, option, join(path, option.name))
                if len(self.violations) > complaints:
                    wrong.add(option.name)
        if schema.choice:
            self._one_choice(value, schema, path, complained=len(self.violations) > before)
        for option in schema.options:
            if option.required and value.get(option.name) is None:
                self.complain(join(path, option.name), _missing(option))
        self._conflicts(values, wrong, schema, path)
        return {name: item for name, item in values.items() if name not in wrong}

    def option(self, value: object, option: Option, path: str) -> Any:
        """The value of one key; whatever, with a complaint, where it is wrong."""
        if option.many == "list":
            return self._list(value, option, path)
        return self._map(value, option, path) if option.many == "map" else self._one(value, option, path)

    def _one(self, value: object, option: Option, path: str) -> Any:
        if isinstance(option.kind, Schema):
            return self.section(value, option.kind, path)
        try:
            return _scalar(value, option)
        except ValueError as error:
            self.complain(path, str(error))
            return None

    def _list(self, value: object, option: Option, path: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            self.complain(path, f"expected a list, got {show(value)}")
            return []
        if not self._fits(len(value), MAX_SECTIONS if isinstance(option.kind, Schema) else MAX_ITEMS, path):
            return []
        if len(value) < option.min_items:
            self.complain(path, f"has {len(value)} items; it needs at least {option.min_items}")
        return [self._one(item, option, f"{path}[{index}]") for index, item in enumerate(value)]

    def _map(self, value: object, option: Option, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.complain(path, f"expected a mapping of names to values, got {show(value)}")
            return {}
        if not self._fits(len(value), MAX_ITEMS, path):
            return {}
        read_items = {}
        for key, item in value.items():
            try:
                read_items[_text(key)] = _scalar(item, option)
            except ValueError as error:
                self.complain(join(path, show_key(key)), str(error))
        return read_items

    def _fits(self, items: int, limit: int, path: str) -> bool:
        if items > limit:
            self.complain(path, f"has {items} items; at most {limit} are allowed")
        return items <= limit

    def _one_choice(self, value: Mapping[Any, Any], schema: Schema, path: str, *, complained: bool) -> None:
        """A step names exactly one technique, an item of a list of augmentations exactly one of these."""
        named = [key for key in value if isinstance(key, str) and key in schema.by_name]
        if len(named) > 1:
            item = "item" if schema.is_numbered else "step"
            self.complain(path, f"names {len(named)} {schema.choice}s ({', '.join(named)}); write one {item} for each")
        elif not named and not complained:
            self.complain(path, f"names no {schema.choice}; there are {schema.names}")

    def _conflicts(self, values: Mapping[str, Any], wrong: set[str], schema: Schema, path: str) -> None:
        """Rules that tie two keys together; defaults stand in for what is not set, and what is wrong ties nothing."""
        held = {
            option.name: values.get(option.name, option.default)
            for option in schema.options
            if option.name not in wrong
        }
        for name in held:
            for description in schema.by_name[name].conflicts(held):
                self.complain(join(path, name), description)


def _scalar(value: object, option: Option) -> bool | int | float | str:
    """The value as the option's kind. Raises ValueError with the description of the violation."""
    if option.kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {show(value)}")
        return value
    if option.kind == "string":
        text = _text(value)
        if option.choices and text not in option.choices:
            hint = did_you_mean(text, option.choices)
            raise ValueError(f"{show(text)} is not one of {', '.join(option.choices)}{hint}")
        return text
    return _number(value, option)


def _number(value: object, option: Option) -> int | float:
    number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    whole = option.kind != "float"
    noun = "whole number" if whole else "number"
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"expected a {noun}, got {show(value)}")
    if whole:
        if isinstance(number, float) and not number.is_integer():  # NaN and infinity are none either
            raise ValueError(f"expected a {noun}, got {show(value)}")
        exact: int | float = int(number)
    else:
        exact = _finite(number)
    if not option.permits(exact):
        raise ValueError(f"{show(number)} is not in {option.range_text(of_type=True)}")
    if option.power_of_two and int(exact) & (int(exact) - 1):
        raise ValueError(f"{show(number)} is no power of two")
    return exact


def _finite(value: int | float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {show(value)}")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {show(value)}")
    if len(value) > MAX_STRING_CHARS:
        raise ValueError(f"has {len(value)} characters; at most {MAX_STRING_CHARS} are allowed")
    if not value.isprintable():
        # Lone surrogates, which no protobuf string can hold, are not printable either.
        raise ValueError(f"{show(value)} has characters that cannot be printed")
    return value


def _unknown_key(schema: Schema, key: object) -> str:
    hint = did_you_mean(key, tuple(schema.by_name))
    if schema.choice:
        return f"unknown {schema.choice}{hint}; there are {schema.names}"
    return f"unknown key{hint}; known keys: {schema.names}"


def _missing(option: Option) -> str:
    """What is wrong when a required option is not set; says what to write where only one value is permitted."""
    only = option.gte is not None and option.gte == option.lte
    return f"is required; write '{option.name}: {_short(option.gte or 0)}'" if only else "is required"


def did_you_mean(key: object, names: tuple[str, ...]) -> str:
    """` (did you mean 'prune'?)`, or nothing when no name is close."""
    close = difflib.get_close_matches(key[:SHOWN_CHARS], names, n=1) if isinstance(key, str) else []
    return f" (did you mean '{close[0]}'?)" if close else ""


def join(path: str, name: str) -> str:
    """The path of a key below `path`."""
    return f"{path}.{name}" if path else name


def show_key(key: object) -> str:
    """A wrong key for a path: bounded, whatever it is."""
    return key[:SHOWN_CHARS] if isinstance(key, str) and key.isprintable() else show(key)


def show(value: object) -> str:
    """A wrong value for a message: bounded, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        # ascii() rather than repr(): a lone surrogate in a message could not be printed.
        shown = value if len(value) <= SHOWN_CHARS else value[: SHOWN_CHARS - 3] + "..."
        return repr(shown) if shown.isprintable() else ascii(shown)
    names: tuple[tuple[type, str], ...] = ((Mapping, "a mapping"), (list, "a list"), (tuple, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def _short(value: float) -> str:
    return f"{int(value)}" if float(value).is_integer() else f"{value:g}"
