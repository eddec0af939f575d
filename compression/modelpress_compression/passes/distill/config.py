"""Options of `distill`, and the augmentations that it knows."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option
from modelpress_compression.schema import Option, Schema


def _amount(name: str, number: int, default: float, largest: float, help: str) -> Option:
    return Option(name, number, "float", help, default, gt=0, lte=largest)


# Names and numbers as in torchvision and torchaudio where these have them.
AUGMENTATIONS = Schema(
    "Augmentation",
    (
        _amount("horizontal_flip", 1, 0.5, 1, "Images: mirrored left to right with this probability."),
        _amount("vertical_flip", 2, 0.5, 1, "Images: mirrored top to bottom with this probability."),
        _amount("rotation", 3, 15, 180, "Images: turned by up to so many degrees either way."),
        _amount(
            "random_resized_crop",
            4,
            0.7,
            1,
            "Images: a random part of at least this share of the area, resized to the whole.",
        ),
        _amount("color_jitter", 5, 0.2, 1, "Images: brightness, contrast and saturation changed by up to this share."),
        _amount(
            "noise", 6, 0.05, 1, "Images and signals: Gaussian noise of this share of the batch's standard deviation."
        ),
        _amount(
            "mixup",
            7,
            0.2,
            10,
            "Images: pairs blended in shares drawn from Beta(a, a) with this a; labels are left out then.",
        ),
        _amount("time_masking", 8, 0.1, 1, "Signals: a random stretch of up to this share of the time is silenced."),
        _amount(
            "token_masking", 9, 0.15, 1, "Token indices: this share of the tokens is replaced by others of the batch."
        ),
    ),
    choice="augmentation",
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
class DistillConfig(Config):
    """Training of the model as it stands towards the answers of the model as it was uploaded."""

    method: str = option(
        "end_to_end",
        1,
        "end_to_end trains all weights towards the original's outputs; layerwise fits block after block to the "
        "original's activations, which is cheaper.",
        choices=("end_to_end", "layerwise"),
    )
    loss: str = option(
        "auto",
        2,
        "Distance to the original's outputs; auto takes kl for class scores, cosine and mse for embeddings, mse for "
        "the rest.",
        choices=("auto", "kl", "cosine", "mse"),
    )
    epochs: int = option(10, 3, "Passes over the data, at most.", gte=1, lte=10_000)
    batch_size: int = option(
        32, 4, "Samples a step; models with a batch size of their own are run as often as it takes.", gte=1, lte=65536
    )
    optimizer: str = option("adamw", 5, "AdamW, or SGD with Nesterov momentum 0.9.", choices=("adamw", "sgd"))
    learning_rate: float | None = option(
        None,
        6,
        "Learning rate after the warm-up; it falls to zero along a cosine. Not set: it is found, from 1e-3 (sgd: 1e-2) "
        "down, by what the samples held out say.",
        gt=0,
    )
    weight_decay: float = option(0.0, 7, "Decay of the weights, not of biases and scales.", gte=0)
    warmup: float = option(
        0.05, 8, "Share of the steps in which the learning rate rises to its full value.", gte=0, lt=1
    )
    temperature: float = option(
        4.0,
        9,
        "kl: divides class scores before they are compared; higher values look at the order of the unlikely classes "
        "too.",
        gte=0.1,
        lte=100,
    )
    feature_weight: float = option(
        1.0,
        10,
        "end_to_end: weight of the loss at intermediate tensors that both models have in the same shape; 0: outputs "
        "alone.",
        gte=0,
    )
    label_weight: float | None = option(
        None,
        11,
        "Share of the loss against the labels of the data; not set: 0.5 where the data has labels.",
        gte=0,
        lte=1,
    )
    hold_out: float = option(
        0.1,
        12,
        "Share of the samples that is not trained on: it says which epoch was the best, and when to stop.",
        gt=0,
        lte=0.5,
    )
    patience: int = option(5, 13, "Training ends after so many epochs without a gain on the samples held out.", gte=1)
    seed: int = option(0, 14, "Seed of the order of samples, the share held out, and augmentation.", gte=0)
    augment: tuple[Augmentation, ...] = option(
        (),
        15,
        "Random changes of the inputs, which both models see: names, or names with a number, as in "
        "[horizontal_flip, {rotation: 30}].",
        kind=AUGMENTATIONS,
    )
    exclude: tuple[str, ...] = option((), 16, "Names of nodes or weights that are not trained, with * and ?.")
    scales: bool = option(
        False,
        17,
        "end_to_end: of a model in 8 bits, the scales of activations and weights are trained too (LSQ).",
    )
