"""The recipe as the engine sees it: frozen dataclasses, built from the YAML shape that `docs/recipes.md` describes.

The gRPC API has the same language as a protobuf message; a test holds the two together. This module imports neither
torch nor onnx, since the server process reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any, TypeVar, get_type_hints

import yaml

from modelpress_compression.errors import InvalidRecipeError, Violation
from modelpress_compression.options import Checks, ConfigError, config_to_dict
from modelpress_compression.passes.distill.config import AUGMENTATIONS, Augmentation
from modelpress_compression.target import Target
from modelpress_compression.techniques import TECHNIQUES

VERSION = 1
METRICS = ("top1", "top5", "mse", "mae", "cosine")
Section = TypeVar("Section")
# YAML 1.1 reads 1e-3 (no dot) as a string; a person who writes it means the number.
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Constraints:
    """What the result must hold; None: no demand. `max_drop` is in units of the metric (0.01 = one point of top1)."""

    metric: str | None = None
    max_drop: float | None = None
    max_size_bytes: int | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        checks = Checks(self)
        if self.metric is not None:
            checks.one_of("metric", METRICS)
        checks.within("max_drop", self.max_drop is None or self.max_drop >= 0, "[0, ...)")
        checks.within("max_size_bytes", self.max_size_bytes is None or self.max_size_bytes > 0, "(0, ...)")
        checks.within("max_latency_ms", self.max_latency_ms is None or self.max_latency_ms > 0, "(0, ...)")
        checks.finish()


@dataclass(frozen=True)
class Benchmark:
    """How latency is measured: one row of the report for each number of threads and each batch size."""

    threads: tuple[int, ...] = (1,)
    batch_sizes: tuple[int, ...] = (1,)
    rounds: int = 50

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.within("threads", all(1 <= value <= 1024 for value in self.threads), "[1, 1024]")
        checks.within("batch_sizes", all(1 <= value <= 65536 for value in self.batch_sizes), "[1, 65536]")
        checks.within("rounds", 5 <= self.rounds <= 100_000, "[5, 100000]")
        checks.finish()


@dataclass(frozen=True)
class Step:
    """One technique with its configuration."""

    technique: str
    config: Any

    def to_dict(self) -> dict[str, Any]:
        return {self.technique: config_to_dict(self.config)}


@dataclass(frozen=True)
class Recipe:
    """What to do with a model."""

    steps: tuple[Step, ...] = ()
    target: Target = field(default_factory=Target)
    constraints: Constraints = field(default_factory=Constraints)
    benchmark: Benchmark = field(default_factory=Benchmark)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from the YAML shape. Raises InvalidRecipeError with every violation and its path."""
        violations: list[Violation] = []
        if document.get("version") != VERSION:
            violations.append(Violation("version", f"must be {VERSION}"))
        known = {"version", "steps", "target", "constraints", "benchmark"}
        violations += [Violation(str(key), "unknown key") for key in document.keys() - known]
        entries = document.get("steps") or []
        if not isinstance(entries, list | tuple):
            violations.append(Violation("steps", "must be a list of techniques"))
            entries = []
        steps = tuple(
            step
            for index, entry in enumerate(entries)
            if (step := _read_step(entry, f"steps[{index}]", violations)) is not None
        )
        sections = {
            name: _read_section(section, document.get(name), name, violations)
            for name, section in (("target", Target), ("constraints", Constraints), ("benchmark", Benchmark))
        }
        if violations:
            raise InvalidRecipeError(violations)
        return cls(steps=steps, **sections)  # type: ignore[arg-type]  # each is its section: there were no violations

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A ready-made recipe; `presets()` lists them. Raises InvalidRecipeError for an unknown name."""
        available = presets()
        if name not in available:
            raise InvalidRecipeError([Violation("recipe", f"no preset {name!r}; there are {', '.join(available)}")])
        return cls.from_dict(_preset_document(name))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in the YAML shape, defaults written out."""
        return {
            "version": VERSION,
            "steps": [step.to_dict() for step in self.steps],
            "target": config_to_dict(self.target),
            "constraints": config_to_dict(self.constraints),
            "benchmark": config_to_dict(self.benchmark),
        }


def presets() -> dict[str, str]:
    """Names of the presets, each with one sentence on what it is good for; `default` first."""
    folder = files("modelpress_compression") / "presets"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    names.sort(key=lambda name: name != "default")
    return {name: _preset_text(name).splitlines()[0].removeprefix("# ") for name in names}


def _preset_text(name: str) -> str:
    return (files("modelpress_compression") / "presets" / f"{name}.yaml").read_text("utf-8")


def _preset_document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(_preset_text(name))
    return document


def _read_step(entry: Any, path: str, violations: list[Violation]) -> Step | None:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        violations.append(Violation(path, "must be one technique with its options, such as 'fuse: {}'"))
        return None
    ((name, options),) = entry.items()
    if name not in TECHNIQUES:
        violations.append(Violation(f"{path}.{name}", f"unknown technique; there are {', '.join(TECHNIQUES)}"))
        return None
    config = _read_section(TECHNIQUES[name].config_class, options, f"{path}.{name}", violations)
    return Step(name, config) if config is not None else None


def _read_section(section: type[Section], options: Any, path: str, violations: list[Violation]) -> Section | None:
    """A config object from its mapping, or None with its violations noted."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        violations.append(Violation(path, "must be a mapping"))
        return None
    readers = _readers(section)
    found: list[Violation] = [Violation(f"{path}.{key}", "unknown key") for key in options.keys() - readers.keys()]
    values: dict[str, Any] = {}
    for name in readers.keys() & options.keys():
        if options[name] is None:
            continue
        try:
            values[name] = readers[name](options[name])
        except (TypeError, ValueError) as error:
            found.append(Violation(f"{path}.{name}", str(error)))
    try:
        made = section(**values)
    except ConfigError as error:
        found += [Violation(f"{path}.{item.path}", item.description) for item in error.violations]
        made = None
    violations += found
    return None if found else made


def _readers(section: type[Any]) -> dict[str, Callable[[Any], Any]]:
    hints = get_type_hints(section)
    return {item.name: _READERS[hints[item.name]] for item in fields(section)}


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise TypeError(f"{value!r} is not a whole number")
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not float("-inf") < value < float("inf"):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _tuple_of(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_tuple(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise TypeError(f"{value!r} is not a list")
        return tuple(read(item) for item in value)

    return read_tuple


def _read_numbers_by_name(value: Any) -> tuple[tuple[str, float], ...]:
    """A mapping as pairs, which can be frozen; sorted, since the order of a mapping means nothing."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is not a mapping of names to numbers")
    return tuple(sorted((_read_str(name), _read_float(number)) for name, number in value.items()))


def _read_augmentation(value: Any) -> Augmentation:
    """A name, or a mapping of one name to its number."""
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise TypeError(f"{value!r} is not an augmentation, such as rotation or {{rotation: 30}}")
    ((name, amount),) = value.items()
    if name not in AUGMENTATIONS:
        raise ValueError(f"{name!r} is not one of {', '.join(AUGMENTATIONS)}")
    return Augmentation(name, AUGMENTATIONS[name].default if amount is None else _read_float(amount))


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    int | None: _read_int,
    float | None: _read_float,
    str | None: _read_str,
    tuple[str, ...]: _tuple_of(_read_str),
    tuple[int, ...]: _tuple_of(_read_int),
    tuple[tuple[str, float], ...]: _read_numbers_by_name,
    tuple[Augmentation, ...]: _tuple_of(_read_augmentation),
}
