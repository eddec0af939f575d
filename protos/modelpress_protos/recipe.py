"""The recipe language: YAML-shaped documents to `Recipe` messages and back, driven by the descriptor.

The messages of `recipe.proto` are the schema; their `(rules)` field options carry ranges, permitted values, defaults
and descriptions. Nothing here names a technique or an option, but for the rules that tie two fields together
(`_cross_field_rules`).

    document -> from_dict -> Recipe          raises RecipeError with every violation at once
    Recipe   -> to_dict   -> document        only what is set; from_dict(to_dict(r)) == r
    Recipe   -> validate  -> [Violation]     what a server checks on a message that it received
    document -> apply_overrides -> document  `--set steps[1].prune.sparsity=0.3`
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from modelpress_protos import recipe_schema as schema
from modelpress_protos.recipe_schema import OptionInfo, TechniqueInfo, join, show, techniques
from modelpress_protos.v1.recipe_pb2 import PruneStep, QuantizeStep, Recipe, Step

if TYPE_CHECKING:
    from modelpress_protos.recipe_schema import Field, MessageType

__all__ = [
    "OptionInfo",
    "RecipeError",
    "TechniqueInfo",
    "Violation",
    "apply_overrides",
    "from_dict",
    "techniques",
    "to_dict",
    "validate",
]

MAX_STEPS = 64
MAX_ITEMS = 1000  # of any other list
MAX_STRING_CHARS = 1024
_OF_CHANNELS = ("l2", "activation", "taylor")  # criteria that judge whole channels alone

# YAML 1.1 reads `1e-3` (no dot) as a string; a person who writes it means the number.
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_PATH_SEGMENT = re.compile(r"([a-z][a-z0-9_]*)(?:\[([0-9]{1,6})\])?")


@dataclass(frozen=True)
class Violation:
    """One wrong value: where it stands (`steps[1].prune.sparsity`) and what is wrong (`1.4 is not in [0, 1)`)."""

    path: str
    description: str

    def __str__(self) -> str:
        return f"{self.path}: {self.description}"


class RecipeError(ValueError):
    """A recipe that breaks the rules; `violations` has all of them, in the order of the document."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(map(str, self.violations)))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Violation, ...]]]:
        return type(self), (self.violations,)


def from_dict(document: object) -> Recipe:
    """Builds the message from a YAML-shaped document (mappings, lists, scalars; `None` means "not set").

    Raises RecipeError with every violation of the whole document.
    """
    recipe = Recipe()
    violations: list[Violation] = []
    _read_message(document, recipe, "", violations)
    if violations:
        raise RecipeError(violations)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The document of a recipe: only what is set, in the order of the schema."""
    return _write_message(recipe)


def validate(recipe: Recipe) -> list[Violation]:
    """Every violation of a message that came over the wire; empty: it is sound."""
    if len(recipe.steps) > MAX_STEPS:
        # Before anything is built from it: an empty step is two bytes on the wire.
        return [Violation("steps", f"has {len(recipe.steps)} items; at most {MAX_STEPS} are allowed")]
    violations = _unknown_fields(recipe, "")
    try:
        from_dict(to_dict(recipe))
    except RecipeError as error:
        violations.extend(error.violations)
    return violations


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with `path=value` applied in order; values are written as in YAML.

    A path is spelled as in violations (`steps[1].prune.sparsity`, `constraints.max_drop`). A technique's name as the
    first word (`quantize.scheme`) means the only step of that technique. Raises RecipeError with every override that
    does not apply; whether the values are right, from_dict says.
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
        raise RecipeError(violations)
    return result


# --- reading -----------------------------------------------------------------------------------------------------


def _read_message(value: object, message: Message, path: str, violations: list[Violation]) -> None:
    choice = schema.is_choice(message.DESCRIPTOR)
    if isinstance(value, str) and schema.is_numbered_choice(message.DESCRIPTOR):
        value = {value: None}  # a name alone takes its default
    if not isinstance(value, Mapping):
        hint = "; write 'NAME: {}'" if choice else ""
        description = f"expected a mapping of keys to values, got {show(value)}{hint}"
        violations.append(Violation(path or "recipe", description))
        return
    fields = message.DESCRIPTOR.fields_by_name
    before = len(violations)
    for key, item in value.items():
        field = fields.get(key) if isinstance(key, str) else None
        if field is None:
            description = schema.unknown_key(message.DESCRIPTOR, key)
            violations.append(Violation(join(path, schema.show_key(key)), description))
        elif item is not None:
            _read_field(field, item, message, join(path, field.name), violations)
        elif choice:
            # `- fuse:` reads as {fuse: None}; naming the technique is enough.
            _choose(field, message)
    if choice:
        complained = len(violations) > before
        violations.extend(_choice_violations(value, message.DESCRIPTOR, path, complained=complained))
    for field in message.DESCRIPTOR.fields:
        if schema.rules_of(field).required and value.get(field.name) is None:
            violations.append(Violation(join(path, field.name), schema.missing(field)))
    violations.extend(_cross_field_rules(message, path))


def _choose(field: Field, message: Message) -> None:
    """Names one of a choice, with its defaults."""
    if field.message_type is not None:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, float(schema.rules_of(field).default_value))


def _read_field(field: Field, value: object, message: Message, path: str, violations: list[Violation]) -> None:
    if schema.map_value(field) is not None:
        _read_map(field, value, message, path, violations)
    elif field.is_repeated:
        _read_list(field, value, message, path, violations)
    elif field.message_type is not None:
        child = getattr(message, field.name)
        child.SetInParent()
        _read_message(value, child, path, violations)
    else:
        try:
            setattr(message, field.name, _scalar(field, value))
        except ValueError as error:
            violations.append(Violation(path, str(error)))


def _read_list(field: Field, value: object, message: Message, path: str, violations: list[Violation]) -> None:
    if not isinstance(value, (list, tuple)):
        violations.append(Violation(path, f"expected a list, got {show(value)}"))
        return
    limit, least = (MAX_ITEMS if field.message_type is None else MAX_STEPS), schema.rules_of(field).min_items
    if len(value) > limit:
        violations.append(Violation(path, f"has {len(value)} items; at most {limit} are allowed"))
        return
    if len(value) < least:
        violations.append(Violation(path, f"has {len(value)} items; at least {least} are needed"))
    target = getattr(message, field.name)
    for index, item in enumerate(value):
        if field.message_type is not None:
            _read_message(item, target.add(), f"{path}[{index}]", violations)
            continue
        try:
            target.append(_scalar(field, item))
        except ValueError as error:
            violations.append(Violation(f"{path}[{index}]", str(error)))


def _read_map(field: Field, value: object, message: Message, path: str, violations: list[Violation]) -> None:
    if not isinstance(value, Mapping):
        violations.append(Violation(path, f"expected a mapping of names to values, got {show(value)}"))
        return
    if len(value) > MAX_ITEMS:
        violations.append(Violation(path, f"has {len(value)} items; at most {MAX_ITEMS} are allowed"))
        return
    entry = schema.message_type(field)
    target = getattr(message, field.name)
    for key, item in value.items():
        try:
            name = _string(entry.fields_by_name["key"], key)
            target[name] = _scalar(entry.fields_by_name["value"], item, field)
        except ValueError as error:
            violations.append(Violation(join(path, schema.show_key(key)), str(error)))


def _scalar(field: Field, value: object, rule_holder: Field | None = None) -> bool | int | float | str:
    """The value as the field's type; the rules are `rule_holder`'s where that is another field, as with maps.

    Raises ValueError with the description of the violation.
    """
    holder = field if rule_holder is None else rule_holder
    if field.type == schema.BOOL:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {show(value)}")
        return value
    if field.type == schema.STRING:
        return _string(field, value)
    number = _float(value) if field.type in schema.FLOATS else _integer(value)
    low, high = schema.bounds(holder)
    rule = schema.rules_of(holder)
    outside = (
        number < low
        or number > high
        or (rule.HasField("gt") and number <= rule.gt)
        or (rule.HasField("lt") and number >= rule.lt)
    )
    if outside:
        raise ValueError(f"{show(number if isinstance(value, str) else value)} is not in {schema.range_text(holder)}")
    return number


def _float(value: object) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {show(value)}")
    return number


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {show(value)}")
    return value


def _string(field: Field, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {show(value)}")
    allowed = list(getattr(schema.rules_of(field), "in"))
    if allowed and value not in allowed:
        hint = schema.did_you_mean(value, allowed)
        raise ValueError(f"{show(value)} is not one of {', '.join(allowed)}{hint}")
    if len(value) > MAX_STRING_CHARS:
        raise ValueError(f"has {len(value)} characters; at most {MAX_STRING_CHARS} are allowed")
    if not value.isprintable():
        # Lone surrogates, which no protobuf string can hold, are not printable either.
        raise ValueError(f"{show(value)} has characters that cannot be printed")
    return value


def _choice_violations(
    value: Mapping[Any, Any], message: MessageType, path: str, *, complained: bool
) -> list[Violation]:
    """A step names exactly one technique, an item of a list of augmentations exactly one of these."""
    named = [key for key in value if isinstance(key, str) and key in message.fields_by_name]
    noun = schema.noun_of(message)
    if len(named) > 1:
        one = "step" if noun == "technique" else "item"
        description = f"names {len(named)} {noun}s ({', '.join(named)}); write one {one} for each"
        return [Violation(path, description)]
    if not named and not complained:
        return [Violation(path, f"names no {noun}; there are {schema.names_of(message)}")]
    return []


def _cross_field_rules(message: Message, path: str) -> list[Violation]:
    """Rules that tie two fields together, and those that no range says; defaults stand in for what is not set."""
    if isinstance(message, PruneStep):
        return _prune_rules(message, path)
    return _quantize_rules(message, path) if isinstance(message, QuantizeStep) else []


def _prune_rules(message: PruneStep, path: str) -> list[Violation]:
    found = []
    if message.structure == "n:m":
        removed, group = _set_or_default(message, "n"), _set_or_default(message, "m")
        if removed >= group:
            found.append(Violation(join(path, "n"), f"{removed} is not less than m ({group})"))
    if message.structure != "channel" and message.criterion in _OF_CHANNELS:
        found.append(Violation(join(path, "criterion"), f"'{message.criterion}' needs structure channel"))
    return found


def _quantize_rules(message: QuantizeStep, path: str) -> list[Violation]:
    found = []
    if message.weights == "int4" and message.scheme != "weight_only":
        found.append(Violation(join(path, "weights"), "'int4' needs scheme weight_only"))
    if message.block_size & (message.block_size - 1):
        found.append(Violation(join(path, "block_size"), f"{message.block_size} is no power of two"))
    return found


def _set_or_default(message: Message, name: str) -> int:
    if message.HasField(name):
        return int(getattr(message, name))
    return int(schema.rules_of(message.DESCRIPTOR.fields_by_name[name]).default_value)


# --- writing -----------------------------------------------------------------------------------------------------


def _write_message(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for field, value in message.ListFields():
        nested = field.message_type is not None
        if schema.map_value(field) is not None:
            # The order of a map on the wire means nothing.
            document[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            document[field.name] = [_write_message(item) if nested else item for item in value]
        else:
            document[field.name] = _write_message(value) if nested else value
    return document


def _unknown_fields(message: Message, path: str) -> list[Violation]:
    """Fields of a newer recipe language: ignoring one silently would run another recipe than the one asked for."""
    found = []
    # The type stubs of protobuf have no constructor for UnknownFieldSet.
    if len(cast(Any, UnknownFieldSet)(message)):
        found.append(Violation(path or "recipe", "has fields that this server does not know; update the server"))
    for field, value in message.ListFields():
        if field.message_type is None or schema.map_value(field) is not None:
            continue
        if field.is_repeated:
            for index, item in enumerate(value):
                found.extend(_unknown_fields(item, f"{join(path, field.name)}[{index}]"))
        else:
            found.extend(_unknown_fields(value, join(path, field.name)))
    return found


# --- overrides ---------------------------------------------------------------------------------------------------


def _yaml_value(text: str) -> object:
    import yaml  # only `--set` needs it

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: PyYAML builds timestamps such as 2024-99-99 without checking them first.
        raise ValueError(f"{show(text)} is not a YAML value") from error


def _set_path(document: dict[str, Any], path: str, value: object) -> None:
    keys = _split_path(path)
    if keys[0] in Step.DESCRIPTOR.fields_by_name:
        keys = ["steps", _only_step(document, str(keys[0])), *keys]
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
