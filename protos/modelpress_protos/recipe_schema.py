"""What the descriptor of the recipe says, in words: rules, ranges, names, hints. `recipe.py` stands on it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf import descriptor as protobuf_descriptor

from modelpress_protos.v1.options_pb2 import FieldRules, rules
from modelpress_protos.v1.recipe_pb2 import Step

if TYPE_CHECKING:
    # The type stubs of protobuf name the C implementation's classes beside the Python ones.
    from google._upb import _message

    Field: TypeAlias = protobuf_descriptor.FieldDescriptor | _message.FieldDescriptor
    MessageType: TypeAlias = protobuf_descriptor.Descriptor | _message.Descriptor

SHOWN_CHARS = 60  # of a wrong value in a message

BOOL = protobuf_descriptor.FieldDescriptor.TYPE_BOOL
STRING = protobuf_descriptor.FieldDescriptor.TYPE_STRING
FLOATS = (protobuf_descriptor.FieldDescriptor.TYPE_DOUBLE, protobuf_descriptor.FieldDescriptor.TYPE_FLOAT)
_INTEGER_BITS = {
    protobuf_descriptor.FieldDescriptor.TYPE_INT32: 32,
    protobuf_descriptor.FieldDescriptor.TYPE_INT64: 64,
}


@dataclass(frozen=True)
class OptionInfo:
    """One option of a technique, as a person writes it; empty strings and tuples: nothing to say."""

    name: str
    type: str
    default_value: str
    allowed: tuple[str, ...]
    range: str
    description: str


@dataclass(frozen=True)
class TechniqueInfo:
    """One technique with its options."""

    name: str
    summary: str
    options: tuple[OptionInfo, ...]


def techniques() -> list[TechniqueInfo]:
    """What a step can be, with every option."""
    return [
        TechniqueInfo(field.name, rules_of(field).description, tuple(map(option_info, message_type(field).fields)))
        for field in Step.DESCRIPTOR.fields
    ]


def option_info(field: Field) -> OptionInfo:
    """One field of a recipe message, described."""
    rule = rules_of(field)
    value = map_value(field) or field
    if value.message_type is not None and is_numbered_choice(value.message_type):
        names = tuple(item.name for item in value.message_type.fields)
        return OptionInfo(field.name, "list of names, or {name: number}", "[]", names, "", rule.description)
    kind = {BOOL: "bool", STRING: "string"}.get(value.type, "float" if value.type in FLOATS else "int")
    is_map = value is not field
    empty = "{}" if is_map else "[]" if field.is_repeated else ""
    return OptionInfo(
        name=field.name,
        type=f"map of string to {kind}" if is_map else f"list of {kind}" if field.is_repeated else kind,
        default_value=rule.default_value or empty,
        allowed=tuple(getattr(rule, "in")),
        range=range_text(field, of_type=False),
        description=rule.description,
    )


@cache
def rules_of(field: Field) -> FieldRules:
    """The `(rules)` option of a field; empty where it has none."""
    return field.GetOptions().Extensions[rules]


def message_type(field: Field) -> MessageType:
    """The message that a field holds. Raises TypeError for scalars."""
    if field.message_type is None:
        raise TypeError(f"{field.full_name} is not a message")
    return field.message_type


def map_value(field: Field) -> Field | None:
    """The value of a map field with texts as keys; None for any other field. The rules of a map are for its values."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


def is_choice(message: MessageType) -> bool:
    """Whether the message is nothing but a oneof: its keys exclude each other."""
    oneofs = [oneof for oneof in message.oneofs if not oneof.name.startswith("_")]
    return len(oneofs) == 1 and len(oneofs[0].fields) == len(message.fields)


def is_numbered_choice(message: MessageType) -> bool:
    """Whether it is a choice among numbers: in YAML `name`, which takes the default, or `{name: number}`."""
    return is_choice(message) and all(field.type in FLOATS for field in message.fields)


def noun_of(message: MessageType) -> str:
    """What the keys of a choice are called: the name of its oneof."""
    return message.oneofs[0].name


def bounds(field: Field) -> tuple[float, float]:
    """Smallest and largest value that the type and the inclusive rules allow."""
    rule = rules_of(field)
    bits = _INTEGER_BITS.get(field.type)
    low, high = (-math.inf, math.inf) if bits is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (rule.gte if rule.HasField("gte") else low), (rule.lte if rule.HasField("lte") else high)


def range_text(field: Field, *, of_type: bool = True) -> str:
    """`[0, 1)`; without `of_type` only what a rule says, so that int32 bounds do not clutter the documentation."""
    rule = rules_of(field)
    low, high = bounds(field)
    has_low, has_high = rule.HasField("gte") or rule.HasField("gt"), rule.HasField("lte") or rule.HasField("lt")
    if not of_type and not has_low and not has_high:
        return ""
    left = f"({_number(rule.gt)}" if rule.HasField("gt") else f"[{_number(low)}" if math.isfinite(low) else "(-inf"
    show_high = math.isfinite(high) and (of_type or has_high)
    right = f"{_number(rule.lt)})" if rule.HasField("lt") else f"{_number(high)}]" if show_high else "inf)"
    return f"{left}, {right}"


def unknown_key(message: MessageType, key: object) -> str:
    """What is wrong with a key that the message does not have, and what there is instead."""
    names = [field.name for field in message.fields]
    if is_choice(message):
        return f"unknown {noun_of(message)}{did_you_mean(key, names)}; there are {names_of(message)}"
    return f"unknown key{did_you_mean(key, names)}; known keys: {', '.join(names)}"


def missing(field: Field) -> str:
    """What is wrong when a required field is not set; says what to write where only one value is permitted."""
    rule = rules_of(field)
    only = rule.HasField("gte") and rule.HasField("lte") and rule.gte == rule.lte
    return f"is required; write '{field.name}: {_number(rule.gte)}'" if only else "is required"


def names_of(message: MessageType) -> str:
    """The keys of a message, as a list for people."""
    return ", ".join(field.name for field in message.fields)


def did_you_mean(key: object, names: list[str]) -> str:
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
    """A wrong value for a message: bounded, whatever it is (YAML aliases can make a list of a billion items)."""
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


def _number(value: float) -> str:
    return f"{int(value)}" if float(value).is_integer() else f"{value:g}"
