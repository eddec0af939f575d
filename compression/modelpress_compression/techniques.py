"""The techniques: the frozen configuration of each, and the registry that ties it to its pass.

Adding one is a config class and a registry row here, a package under `passes`, and a message in recipe.proto;
docs/writing_a_pass.md walks through it. This module imports neither torch nor onnx: the server reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from modelpress_compression.errors import Violation

if TYPE_CHECKING:
    from modelpress_compression.passes.base import Pass


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


@dataclass(frozen=True)
class FuseConfig:
    """Lossless rewriting: `activations` into Conv and Gemm, `transformers` for attention, LayerNorm, GELU and skips."""

    activations: bool = True
    transformers: bool = True
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneConfig:
    """Zeroing of weights, or removal of channels. `sparsity`, in [0, 1): share of the weights or channels removed.

    `n:m` zeroes n of every m weights along the input axis. `channel` alone: `round_to`, `min_channels`, `normalize`,
    `repair`, and `overrides`: (glob, sparsity) for layers by the name of a node or weight, the longest match counts.
    """

    structure: str = "unstructured"
    sparsity: float = 0.5
    criterion: str = "l1"
    scope: str = "layer"
    n: int = 2
    m: int = 4
    exclude: tuple[str, ...] = ()
    seed: int = 0
    round_to: int = 8
    min_channels: int = 4
    normalize: str = "parameters"
    repair: str = "auto"
    overrides: tuple[tuple[str, float], ...] = field(default=(), metadata={"mapping": True})

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("structure", ("unstructured", "n:m", "channel"))
        checks.one_of("criterion", ("l1", "l2", "activation", "taylor", "random"))
        if self.structure != "channel" and self.criterion in ("l2", "activation", "taylor"):
            checks.refuse("criterion", f"{self.criterion!r} needs structure channel")
        checks.one_of("scope", ("layer", "global"))
        checks.within("sparsity", 0 <= self.sparsity < 1, "[0, 1)")
        checks.within("m", 2 <= self.m <= 64, "[2, 64]")
        checks.within("n", 1 <= self.n <= 64, "[1, 64]")
        if self.structure == "n:m":
            checks.within("n", self.n < self.m, f"[1, m) with m = {self.m}")
        checks.within("seed", self.seed >= 0, "[0, ...)")
        checks.within("round_to", 1 <= self.round_to <= 1024, "[1, 1024]")
        checks.within("min_channels", 1 <= self.min_channels <= 65536, "[1, 65536]")
        checks.one_of("normalize", ("none", "parameters", "macs", "latency"))
        checks.one_of("repair", ("auto", "none", "least_squares"))
        for pattern, sparsity in self.overrides:
            if not 0 <= sparsity < 1:
                checks.refuse(f"overrides.{pattern}", f"{sparsity} is not in [0, 1)")
        checks.finish()


@dataclass(frozen=True)
class QuantizeConfig:
    """Fewer bits. `scheme` auto tries none, dynamic and static and keeps the fastest that agrees with the original.

    `block_size`: weight_only, how many weights share a scale at most. `smooth_quant`, `equalize`, `bias_correction`:
    static alone. `rounding`: how the weights of Conv, MatMul and Gemm are rounded.
    """

    scheme: str = "auto"
    weights: str = "int8"
    activations: str = "uint8"
    per_channel: bool = True
    calibration: str = "auto"
    exclude: tuple[str, ...] = ()
    block_size: int = 32
    smooth_quant: bool = True
    equalize: bool = False
    bias_correction: bool = True
    rounding: str = "auto"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("scheme", ("auto", "dynamic", "static", "weight_only", "float16"))
        checks.one_of("weights", ("int8", "uint8", "int4"))
        if self.weights == "int4" and self.scheme != "weight_only":
            checks.refuse("weights", "'int4' needs scheme weight_only")
        checks.one_of("activations", ("uint8", "int8"))
        checks.one_of("calibration", ("auto", "minmax", "moving_average", "percentile", "entropy", "mse"))
        checks.within("block_size", 16 <= self.block_size <= 256, "[16, 256]")
        if self.block_size & (self.block_size - 1):
            checks.refuse("block_size", f"{self.block_size} is no power of two")
        checks.one_of("rounding", ("auto", "nearest", "gptq"))
        checks.finish()


class Amount(NamedTuple):
    """What the number of an augmentation may be: in (0, `largest`], `default` where none is given."""

    default: float
    largest: float


# Names and numbers as in torchvision and torchaudio where these have them; the passes say what each does.
AUGMENTATIONS: Mapping[str, Amount] = MappingProxyType(
    {
        "horizontal_flip": Amount(0.5, 1),
        "vertical_flip": Amount(0.5, 1),
        "rotation": Amount(15, 180),
        "random_resized_crop": Amount(0.7, 1),
        "color_jitter": Amount(0.2, 1),
        "noise": Amount(0.05, 1),
        "mixup": Amount(0.2, 10),
        "time_masking": Amount(0.1, 1),
        "token_masking": Amount(0.15, 1),
    }
)


@dataclass(frozen=True)
class Augmentation:
    """One random change of training inputs and its number: a probability, an angle, ... as `AUGMENTATIONS` bounds it.

    In YAML a name, or a name with its number: `rotation`, `{rotation: 30}`.
    """

    name: str
    amount: float

    def to_dict(self) -> dict[str, float]:
        return {self.name: self.amount}


@dataclass(frozen=True)
class DistillConfig:
    """Training of the model as it stands towards the answers of the model as it was uploaded.

    `hold_out`: share of the samples that judges and is not trained on; `patience`: epochs without a gain until the
    end; `label_weight`: share of the labels' loss, None: 0.5 where the data has labels; `warmup`: share of the steps.
    """

    method: str = "end_to_end"
    loss: str = "auto"
    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    temperature: float = 4.0
    feature_weight: float = 1.0
    label_weight: float | None = None
    hold_out: float = 0.1
    patience: int = 5
    seed: int = 0
    augment: tuple[Augmentation, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("method", ("end_to_end", "layerwise"))
        checks.one_of("loss", ("auto", "kl", "cosine", "mse"))
        checks.within("epochs", 1 <= self.epochs <= 10_000, "[1, 10000]")
        checks.within("batch_size", 1 <= self.batch_size <= 65536, "[1, 65536]")
        checks.one_of("optimizer", ("adamw", "sgd"))
        checks.within("learning_rate", self.learning_rate > 0, "(0, ...)")
        checks.within("weight_decay", self.weight_decay >= 0, "[0, ...)")
        checks.within("warmup", 0 <= self.warmup < 1, "[0, 1)")
        checks.within("temperature", 0.1 <= self.temperature <= 100, "[0.1, 100]")
        checks.within("feature_weight", self.feature_weight >= 0, "[0, ...)")
        checks.within("label_weight", self.label_weight is None or 0 <= self.label_weight <= 1, "[0, 1]")
        checks.within("hold_out", 0 < self.hold_out <= 0.5, "(0, 0.5]")
        checks.within("patience", self.patience >= 1, "[1, ...)")
        checks.within("seed", self.seed >= 0, "[0, ...)")
        for index, item in enumerate(self.augment):
            limits = AUGMENTATIONS.get(item.name)
            if limits is None:
                checks.refuse(f"augment[{index}]", f"{item.name!r} is not one of {', '.join(AUGMENTATIONS)}")
            elif not 0 < item.amount <= limits.largest:
                checks.refuse(f"augment[{index}].{item.name}", f"{item.amount} is not in (0, {limits.largest:g}]")
        checks.finish()


@dataclass(frozen=True)
class Technique:
    """One registry row: the name in a recipe, its config class, and where its pass is (imported when first used)."""

    name: str
    summary: str
    config_class: type[Any]
    pass_class: str = field(repr=False)

    def make_pass(self, config: Any) -> Pass:
        """Imports the pass and gives it its configuration."""
        module, _, name = self.pass_class.partition(":")
        made: Pass = getattr(import_module(module), name)(config)
        return made


TECHNIQUES = MappingProxyType(
    {
        technique.name: technique
        for technique in (
            Technique(
                "fuse",
                "Folds constants, removes dead code and merges operators; lossless up to float rounding.",
                FuseConfig,
                "modelpress_compression.passes.fuse:Fuse",
            ),
            Technique(
                "prune",
                "Removes weights or whole channels by importance.",
                PruneConfig,
                "modelpress_compression.passes.prune:Prune",
            ),
            Technique(
                "quantize",
                "Stores weights, and computes where it pays, in fewer bits.",
                QuantizeConfig,
                "modelpress_compression.passes.quantize:Quantize",
            ),
            Technique(
                "distill",
                "Trains the model as it stands towards the answers of the model as it was uploaded.",
                DistillConfig,
                "modelpress_compression.passes.distill:Distill",
            ),
        )
    }
)


def config_to_dict(config: Any) -> dict[str, Any]:
    """All fields of a config in the shape of the recipe's YAML."""
    return {item.name: _in_yaml(getattr(config, item.name), item.metadata) for item in fields(config)}


def _in_yaml(value: Any, metadata: Mapping[str, Any]) -> Any:
    if metadata.get("mapping"):
        return dict(value)
    if isinstance(value, tuple):
        return [item.to_dict() if isinstance(item, Augmentation) else item for item in value]
    return value
