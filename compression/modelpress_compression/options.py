"""The configuration of a technique: its checks, and its shape in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from modelpress_compression.errors import Violation


class ConfigError(ValueError):
    """A configuration holds values outside their range; `violations` names each field."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(str(violation) for violation in violations))
        self.violations = tuple(violations)


class Checks:
    """Collects violations, so that all are reported at once."""

    def __init__(self, config: object) -> None:
        self._config = config
        self._violations: list[Violation] = []

    def one_of(self, name: str, permitted: tuple[str, ...]) -> None:
        value = getattr(self._config, name)
        if value not in permitted:
            self._violations.append(Violation(name, f"{value!r} is not one of {', '.join(permitted)}"))

    def within(self, name: str, condition: bool, permitted: str) -> None:
        if not condition:
            self._violations.append(Violation(name, f"{getattr(self._config, name)} is not in {permitted}"))

    def refuse(self, path: str, description: str) -> None:
        self._violations.append(Violation(path, description))

    def finish(self) -> None:
        if self._violations:
            raise ConfigError(self._violations)


def config_to_dict(config: Any) -> dict[str, Any]:
    """All fields of a config in the shape of the recipe's YAML."""
    return {item.name: _in_yaml(getattr(config, item.name), item.metadata) for item in fields(config)}


def _in_yaml(value: Any, metadata: Mapping[str, Any]) -> Any:
    if metadata.get("mapping"):
        return dict(value)
    if isinstance(value, tuple):
        return [item.to_dict() if hasattr(item, "to_dict") else item for item in value]
    return value
