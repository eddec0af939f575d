"""Options of `distill`, and the augmentations that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from modelpress_compression.options import Checks


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
