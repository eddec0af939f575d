"""The recipe language: YAML-shaped documents to `Recipe` messages and back.

    document -> from_dict -> Recipe          raises InvalidRecipeError with every violation at once
    Recipe   -> to_dict   -> document        only what is set; from_dict(to_dict(r)) == r
    Recipe   -> validate  -> [Violation]     what a server checks on a message that it received
    document -> apply_overrides -> document  `--set steps[1].prune.sparsity=0.3`

The messages of `recipe.proto` say what a recipe may hold, their `(rules)` options included; `schema_of` reads that from
the descriptor, and `schema.read` checks a document against it. No technique or option is named here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from google.protobuf import descriptor as protobuf_descriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from modelpress_protos.errors import InvalidRecipeError
from modelpress_protos.schema import (
    MAX_SECTIONS,
    Kind,
    LessThan,
    Needs,
    Option,
    Schema,
    Violation,
    did_you_mean,
    join,
    read,
    show,
)
from modelpress_protos.v1.options_pb2 import FieldRules, rules
from modelpress_protos.v1.options_pb2 import Needs as NeedsRule
from modelpress_protos.v1.recipe_pb2 import Recipe, Step

if TYPE_CHECKING:
    # The type stubs of protobuf name the C implementation's classes beside the Python ones.
    from google._upb import _message

    Field: TypeAlias = protobuf_descriptor.FieldDescriptor | _message.FieldDescriptor
    MessageType: TypeAlias = protobuf_descriptor.Descriptor | _message.Descriptor

_KINDS: Mapping[int, Kind] = {
    protobuf_descriptor.FieldDescriptor.TYPE_BOOL: "bool",
    protobuf_descriptor.FieldDescriptor.TYPE_INT32: "int",
    protobuf_descriptor.FieldDescriptor.TYPE_INT64: "int64",
    protobuf_descriptor.FieldDescriptor.TYPE_DOUBLE: "float",
    protobuf_descriptor.FieldDescriptor.TYPE_STRING: "string",
}


# --- the schema --------------------------------------------------------------------------------------------------


def schema_of(message: MessageType) -> Schema:
    """What a document for this message may hold. A message that is nothing but a oneof is a choice."""
    oneofs = [oneof for oneof in message.oneofs if not oneof.name.startswith("_")]
    choice = oneofs[0].name if oneofs and len(oneofs[0].fields) == len(message.fields) else ""
    return Schema(message.name, tuple(map(_option, message.fields)), choice)


def _option(field: Field) -> Option:
    many: Literal["", "list", "map"] = "map" if _is_map(field) else "list" if field.is_repeated else ""
    value = field.message_type.fields_by_name["value"] if field.message_type and many == "map" else field
    kind = schema_of(value.message_type) if value.message_type else _KINDS[value.type]
    rule = field.GetOptions().Extensions[rules]
    bounds = {name: getattr(rule, name) for name in ("gte", "gt", "lte", "lt") if rule.HasField(cast(Any, name))}
    less = rule.less_than
    return Option(
        name=field.name,
        number=field.number,
        kind=kind,
        help=rule.description,
        default=_default(rule, kind, many),
        many=many,
        required=rule.required,
        choices=tuple(getattr(rule, "in")),
        min_items=rule.min_items,
        power_of_two=rule.power_of_two,
        needs=_needs(rule.needs) if rule.HasField("needs") else None,
        less_than=LessThan(less.field, less.where, less.value) if rule.HasField("less_than") else None,
        **bounds,
    )


def _needs(rule: NeedsRule) -> Needs:
    return Needs(tuple(rule.values), rule.field, rule.value, tuple(rule.or_values))


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _default(rule: FieldRules, kind: Kind | Schema, many: str) -> Any:
    if not rule.default_value:
        return () if many else None
    if kind == "string" and not many:
        return rule.default_value
    default = json.loads(rule.default_value)
    return tuple(default) if many else default


SCHEMA = schema_of(Recipe.DESCRIPTOR)
STEP = schema_of(Step.DESCRIPTOR)


# --- documents and messages --------------------------------------------------------------------------------------


def from_dict(document: object) -> Recipe:
    """Builds the message from a YAML-shaped document (mappings, lists, scalars; `None` means "not set").

    Raises InvalidRecipeError with every violation of the whole document.
    """
    values, violations = read(document, SCHEMA)
    if violations:
        raise InvalidRecipeError(violations)
    return ParseDict(values, Recipe())


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The document of a recipe: only what is set, in the order of the schema."""
    return _document(recipe)


def validate(recipe: Recipe) -> list[Violation]:
    """Every violation of a message that came over the wire; empty: it is sound."""
    if len(recipe.steps) > MAX_SECTIONS:
        # Before anything is built from it: an empty step is two bytes on the wire.
        return [Violation("steps", f"has {len(recipe.steps)} items; at most {MAX_SECTIONS} are allowed")]
    return [*_unknown_fields(recipe, ""), *read(to_dict(recipe), SCHEMA).violations]


def _document(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for field, value in message.ListFields():
        nested = field.message_type is not None
        if _is_map(field):
            # The order of a map on the wire means nothing.
            document[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            document[field.name] = [_document(item) if nested else item for item in value]
        else:
            document[field.name] = _document(value) if nested else value
    return document


def _unknown_fields(message: Message, path: str) -> list[Violation]:
    """Fields of a newer recipe language: ignoring one silently would run another recipe than the one asked for."""
    found = []
    # The type stubs of protobuf have no constructor for UnknownFieldSet.
    if len(cast(Any, UnknownFieldSet)(message)):
        found.append(Violation(path or "recipe", "has fields that this server does not know; update the server"))
    for field, value in message.ListFields():
        if field.message_type is None or _is_map(field):
            continue
        if field.is_repeated:
            for index, item in enumerate(value):
                found.extend(_unknown_fields(item, f"{join(path, field.name)}[{index}]"))
        else:
            found.extend(_unknown_fields(value, join(path, field.name)))
    return found


# --- overrides ---------------------------------------------------------------------------------------------------

_PATH_SEGMENT = re.compile(r"([a-z][a-z0-9_]*)(?:\[([0-9]{1,6})\])?")


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with `path=value` applied in order; values are written as in YAML.

    A path is spelled as in violations (`steps[1].prune.sparsity`, `constraints.max_drop`). A technique's name as the
    first word (`quantize.scheme`) means the only step of that technique. Raises InvalidRecipeError with every override
    that does not apply; whether the values are right, from_dict says.
    """
    result = copy.deepcopy(dict(document))
    violations = []
    for override in overrides:
        path, separator, text = override.partition("=")
        try:
            if not separator:
                raise ValueError("write PATH=VALUE, for example quantize.scheme=static")
            _set_path(result, path.strip(), _yaml_value(text))
        except ValueError as error:
            violations.append(Violation(path.strip(), str(error)))
    if violations:
        raise InvalidRecipeError(violations)
    return result


def _yaml_value(text: str) -> object:
    import yaml  # only `--set` needs it

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: PyYAML builds timestamps such as 2024-99-99 without checking them first.
        raise ValueError(f"{show(text)} is not a YAML value") from error


def _set_path(document: dict[str, Any], path: str, value: object) -> None:
    keys = _split_path(path)
    if keys[0] in STEP.by_name:
        keys = ["steps", _only_step(document, str(keys[0])), *keys]
    elif keys[0] not in SCHEMA.by_name:
        hint = did_you_mean(keys[0], (*SCHEMA.by_name, *STEP.by_name))
        raise ValueError(f"starts with neither a key of a recipe nor a technique{hint}")
    holder: Any = document
    for key, following in pairwise(keys):
        child = _get(holder, key)
        if child is None:
            child = [] if isinstance(following, int) else {}
            holder[key] = child
        holder = child
    if isinstance(holder, list) and keys[-1] == len(holder):
        holder.append(value)
        return
    _get(holder, keys[-1])
    holder[keys[-1]] = value


def _split_path(path: str) -> list[str | int]:
    keys: list[str | int] = []
    for segment in path.split("."):
        match = _PATH_SEGMENT.fullmatch(segment)
        if match is None:
            raise ValueError("is not a path; write it as in steps[1].prune.sparsity")
        keys.append(match[1])
        if match[2] is not None:
            keys.append(int(match[2]))
    return keys


def _only_step(document: dict[str, Any], technique: str) -> int:
    steps = document.get("steps")
    items = steps if isinstance(steps, list) else []
    found = [index for index, step in enumerate(items) if isinstance(step, Mapping) and technique in step]
    if not found:
        raise ValueError(f"the recipe has no {technique} step; add one to its steps")
    if len(found) > 1:
        options = ", ".join(f"steps[{index}].{technique}" for index in found)
        raise ValueError(f"the recipe has {len(found)} {technique} steps; name one: {options}")
    return found[0]


def _get(holder: object, key: str | int) -> object:
    """The child of a mapping or list, None where the key is free. Raises ValueError where the path does not fit."""
    if isinstance(key, int):
        if not isinstance(holder, list):
            raise ValueError(f"[{key}] does not apply: there is {show(holder)}, not a list")
        if key >= len(holder):
            raise ValueError(f"there is no item [{key}]; the list has {len(holder)}, counted from 0")
        return holder[key]
    if not isinstance(holder, dict):
        raise ValueError(f"'{key}' does not apply: there is {show(holder)}, not a mapping")
    return holder.get(key)
