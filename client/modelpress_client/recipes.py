"""Where a recipe comes from: a YAML file, a preset of the server, or a mapping."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from modelpress_protos import errors
from modelpress_protos import recipe as language
from modelpress_protos.schema import Violation
from modelpress_protos.v1.recipe_pb2 import Recipe
from modelpress_protos.v1.server_service_pb2 import Preset

from modelpress_client.errors import InvalidRecipeError, NotFoundError, UsageError

MAX_YAML_BYTES = 256 * 1024  # 256 KiB: far more than any recipe
MAX_YAML_DEPTH = 50
STEPS_PRESET = "auto"  # the preset whose steps are meant to be overridden, where the server has it


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, instead of taking the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The document of a recipe file. Raises UsageError or InvalidRecipeError, with the line where there is one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    if len(content) > MAX_YAML_BYTES:
        raise UsageError(f"{path} has more than {MAX_YAML_BYTES // 1024} KiB; that is no recipe.")
    try:
        depth = deepest = 0
        for event in yaml.parse(content, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            deepest = max(deepest, depth)
            if deepest > MAX_YAML_DEPTH:
                raise InvalidRecipeError(f"The recipe {path} is nested too deeply.")
        document = yaml.load(content, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    # ValueError: PyYAML builds timestamps such as 2024-99-99 without checking them first.
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidRecipeError(f"The recipe {path} is not YAML: {_yaml_problem(error)}.") from error
    if not isinstance(document, dict):
        raise InvalidRecipeError(f"The recipe {path} is not a mapping; it starts with 'version: 1'.")
    return document


def is_file_name(recipe: str) -> bool:
    """Whether `--recipe` names a file rather than a preset."""
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def local_document(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any] | None:
    """The document of a recipe that is not a preset; None for a preset."""
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if isinstance(recipe, Path) or is_file_name(recipe):
        return load_yaml(Path(recipe))
    return None


def preset_document(name: str, presets: Iterable[Preset]) -> dict[str, Any]:
    """The document of a preset. Raises NotFoundError that lists what there is."""
    known = {preset.name: preset for preset in presets}
    if name in known:
        return language.to_dict(known[name].recipe)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise NotFoundError(
        f"The server has no preset '{name}'; it has {', '.join(sorted(known)) or 'none'}.{hint} A recipe of your own "
        "is a file whose name ends in .yaml."
    )


def build(
    document: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    metric: str | None = None,
    max_drop: float | None = None,
    presets: Iterable[Preset] = (),
) -> Recipe:
    """The message: the document, then `overrides`, then the constraints.

    Raises InvalidRecipeError; where a step to override is missing, it names those of `presets` that have one.
    """
    try:
        changed = language.apply_overrides(document, overrides)
        constraints = {"metric": metric, "max_drop": max_drop}
        given = {key: value for key, value in constraints.items() if value is not None}
        before = changed.get("constraints") or {}
        if given and isinstance(before, Mapping):
            changed["constraints"] = {**before, **given}
        # A goal's own limits count before the constraints: what is asked for now takes their place.
        paths = {text.partition("=")[0].strip() for text in overrides} | {f"constraints.{name}" for name in given}
        if isinstance(goal := changed.get("goal"), Mapping):
            changed["goal"] = {name: value for name, value in goal.items() if f"constraints.{name}" not in paths}
        return language.from_dict(changed)
    except errors.InvalidRecipeError as error:
        violations = [_with_hint(violation, document, presets) for violation in error.violations]
        lines = "\n".join(f"  {violation}" for violation in violations)
        raise InvalidRecipeError(f"The recipe is not valid:\n{lines}", violations) from error


def _with_hint(violation: Violation, document: Mapping[str, Any], presets: Iterable[Preset]) -> Violation:
    """Where a goal decides what is done, there is no step to override: presets with steps have one."""
    technique = violation.path.partition(".")[0]
    if technique not in language.STEP.by_name or document.get("steps") or not document.get("goal"):
        return violation
    having = [
        preset.name
        for preset in presets
        if [step.WhichOneof("technique") for step in preset.recipe.steps].count(technique) == 1  # type: ignore[arg-type]
    ]
    having.sort(key=lambda name: (name != STEPS_PRESET, name))
    asked = f"; with --recipe {having[0]} there is one" if having else ""
    others = f" (also with {', '.join(having[1:])})" if having[1:] else ""
    return Violation(
        violation.path, f"the recipe has a goal, which decides by itself, and no {technique} step{asked}{others}"
    )


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `--recipe` takes."""
    return yaml.safe_dump(language.to_dict(recipe), sort_keys=False, default_flow_style=None, width=110)


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem
