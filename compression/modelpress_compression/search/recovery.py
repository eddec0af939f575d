"""Training that brings back what cuts cost: towards the original, on the data as it is and changed at random.

The teacher answers whatever it is shown, so that each change of an input is one more sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.config import Augmentation, DistillConfig
from modelpress_compression.recipe import Step

AUGMENTATIONS: Mapping[str, float] = MappingProxyType(
    {"mixup": 1.0, "random_resized_crop": 0.8, "noise": 0.05, "time_masking": 0.1, "token_masking": 0.1}
)


def recovery(model: Model, data: InputData, epochs: int, patience: int) -> Step:
    """The step that trains a cut `model` on `data`, with the augmentations that its inputs permit."""
    from modelpress_compression.passes.distill.augmentation import fitting  # torch: only who trains needs it

    names = fitting(model, data)
    augment = tuple(Augmentation(name, amount) for name, amount in AUGMENTATIONS.items() if name in names)
    return Step("distill", DistillConfig(epochs=epochs, patience=patience, augment=augment))
