"""When a result no longer resembles the original: whatever was asked for, it is another model then."""

from __future__ import annotations

from modelpress_compression.measure.accuracy import Accuracy
from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.metric_names import BOUNDED

DAMAGE_DROP, DAMAGE_COSINE = 0.1, 0.9


def damage_of(fidelity: Fidelity | None, accuracy: Accuracy | None, slack: float = 1.0) -> str:
    """By which figure the outputs no longer resemble the original's; empty where they do, or were not measured.
    `slack`: how many times the error that damage begins with this is asked for."""
    if accuracy is not None and accuracy.metric in BOUNDED:
        return accuracy.loss if accuracy.drop > slack * DAMAGE_DROP else ""
    if fidelity is None:
        return ""
    if fidelity.expected_drop is not None and fidelity.expected_drop > slack * DAMAGE_DROP:
        return f"by its own probabilities the original would lose {100 * fidelity.expected_drop:.0f} points of accuracy"
    return f"cosine {fidelity.cosine:.2f}" if 1 - fidelity.cosine > slack * (1 - DAMAGE_COSINE) else ""
