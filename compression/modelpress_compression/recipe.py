"""The recipe: which techniques, in which order, and what the result must hold. docs/recipes.md describes its YAML.

This module imports neither torch nor onnx, since the server process reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import yaml

from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.measure.metric_names import METRICS
from modelpress_compression.options import Config, option
from modelpress_compression.schema import Violation, did_you_mean
from modelpress_compression.target import Target
from modelpress_compression.techniques import TECHNIQUES, step_schema

VERSION = 1
OBJECTIVES = BALANCED, SMALLEST, FASTEST, ACCURATE = "balanced", "smallest", "fastest", "accurate"


@dataclass(frozen=True)
class Constraints(Config):
    """What the result must hold; None: no demand."""

    metric: str | None = option(
        None,
        1,
        "Metric of the task; without it, top1 for class labels and mse for others. docs/metrics.md says how labels are "
        "laid out for each. Without labels, cosine holds the outputs against the original's, classes or not.",
        choices=METRICS,
    )
    max_drop: float | None = option(
        None, 2, "Largest permitted fall of the metric; without labels, of the agreement with the original.", gte=0
    )
    max_size_bytes: int | None = option(
        None,
        3,
        "Largest permitted size of the result in bytes, external data included.",
        kind="int64",
        gt=0,
    )
    max_latency_ms: float | None = option(
        None, 4, "Largest permitted median latency of the first benchmark row, in milliseconds.", gt=0
    )
    min_speedup: float | None = option(
        None, 5, "Least median speed-up of the first benchmark row over the original.", gt=0
    )
    min_ratio: float | None = option(
        None, 6, "How many times smaller than the original, as ONNX, the result must be at least.", gt=0
    )
    allow_damage: bool = option(
        False, 7, "Whether a result may be taken for good whose outputs no longer resemble the original's."
    )


@dataclass(frozen=True)
class ClientMetric(Config):
    """A metric that the client computes: the server offers candidates, and learns here what they scored."""

    name: str = option("metric", 1, "What reports call it.")
    lower_is_better: bool = option(False, 2, "Whether a smaller number is better.")
    scores: tuple[tuple[str, float], ...] = option(
        (), 3, "What it said so far, by `sha256` of the report's candidates. Others wait to be scored."
    )


@dataclass(frozen=True)
class Goal(Config):
    """What to aim for, in place of steps: candidates are built and measured, and the best is taken."""

    objective: str = option(
        BALANCED,
        1,
        "balanced: the least product of size and time, never over 5 % slower than the original; smallest; fastest; "
        "accurate: the least error. Whatever the objective, the answers are kept.",
        choices=OBJECTIVES,
    )
    max_drop: float | None = option(
        None, 2, "Largest permitted fall of the metric; without labels, of the agreement with the original.", gte=0
    )
    max_size_bytes: int | None = option(
        None, 3, "Largest permitted size of the result in bytes, external data included.", kind="int64", gt=0
    )
    min_ratio: float | None = option(
        None, 4, "How many times smaller than the original, as ONNX, the result must be at least.", gt=0
    )
    max_latency_ms: float | None = option(
        None, 5, "Largest permitted median latency of the first benchmark row, in milliseconds.", gt=0
    )
    min_speedup: float | None = option(
        None, 6, "Least median speed-up of the first benchmark row over the original.", gt=0
    )
    search_time_s: float | None = option(
        None,
        7,
        "Seconds after which the search ends, whatever is being built then. Not set: a search that goes far ends after "
        "240, or 30 times what its first candidate took, where that is longer.",
        gt=0,
    )
    techniques: tuple[str, ...] = option(
        ("fuse", "prune", "factorize", "distill", "quantize"),
        8,
        "Techniques that candidates may use.",
        choices=tuple(TECHNIQUES),
        min_items=1,
    )
    client_metric: ClientMetric | None = option(
        None, 9, "Decides in place of labels. Candidates that it has not scored yet are offered, and not taken."
    )


@dataclass(frozen=True)
class Benchmark(Config):
    """How latency is measured."""

    threads: tuple[int, ...] = option(
        (1,), 1, "onnxruntime intra-op threads; one row of the report for each.", gte=1, lte=1024, min_items=1
    )
    batch_sizes: tuple[int, ...] = option(
        (1,), 2, "Batch sizes; one row of the report for each.", gte=1, lte=65536, min_items=1
    )
    rounds: int = option(50, 3, "Timed rounds of each model.", gte=5, lte=100_000)


@dataclass(frozen=True)
class Step:
    """One technique with its configuration, which may be given as a mapping."""

    technique: str
    config: Any

    def __post_init__(self) -> None:
        if isinstance(self.config, Mapping):
            object.__setattr__(self, "config", TECHNIQUES[self.technique].config_class(**self.config))

    def to_dict(self) -> dict[str, Any]:
        return {self.technique: self.config.to_dict()}


@dataclass(frozen=True)
class Recipe(Config):
    """What to do with a model; `Recipe.from_dict` reads the shape of the YAML."""

    version: int = option(VERSION, 1, "Version of the recipe language.", required=True, gte=VERSION, lte=VERSION)
    steps: tuple[Step, ...] = option((), 2, "The techniques, run in order.", kind=step_schema(TECHNIQUES.values()))
    target: Target = option(Target(), 3, "What the result will run on.")
    constraints: Constraints = option(Constraints(), 4, "What the result must hold.")
    benchmark: Benchmark = option(Benchmark(), 5, "How latency is measured.")
    goal: Goal | None = option(
        None, 6, "What to aim for, in place of steps. Beside steps only its limits count, as constraints do."
    )

    @property
    def limits(self) -> Constraints:
        """The constraints, and those of the goal where it has any."""
        if self.goal is None:
            return self.constraints
        names = ("max_drop", "max_size_bytes", "min_ratio", "max_latency_ms", "min_speedup")
        stated = {name: value for name in names if (value := getattr(self.goal, name)) is not None}
        return replace(self.constraints, **stated)

    @property
    def searches_far(self) -> bool:
        """Whether the goal asks for more than a balance, so that its search goes as far as it can: minutes, not
        seconds."""
        return self.goal is not None and (self.size_first or self.time_first or self.goal.search_time_s is not None)

    @property
    def size_first(self) -> bool:
        """Whether the file is what the goal is about."""
        asked = (self.limits.max_size_bytes, self.limits.min_ratio)
        return self.goal is not None and (self.goal.objective == SMALLEST or any(limit is not None for limit in asked))

    @property
    def time_first(self) -> bool:
        """Whether time is what the goal is about, and size is not."""
        if self.goal is None or self.size_first:
            return False
        asked = (self.limits.max_latency_ms, self.limits.min_speedup)
        return self.goal.objective == FASTEST or any(limit is not None for limit in asked)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A ready-made recipe; `presets()` lists them. Raises InvalidRecipeError for an unknown name."""
        names = tuple(presets())
        if name not in names:
            description = f"no preset {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}"
            raise InvalidRecipeError([Violation("recipe", description)])
        return cls.from_dict(yaml.safe_load(_preset_text(name)))


def presets() -> dict[str, str]:
    """Names of the presets, each with one sentence on what it is good for; `default` first."""
    folder = files("modelpress_compression") / "presets"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    names.sort(key=lambda name: name != "default")
    return {name: _preset_text(name).splitlines()[0].removeprefix("# ") for name in names}


def _preset_text(name: str) -> str:
    return (files("modelpress_compression") / "presets" / f"{name}.yaml").read_text("utf-8")
