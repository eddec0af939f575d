"""The names of the metrics of tasks. A recipe may name one, so that this module imports nothing."""

from __future__ import annotations

SHARES = ("top1", "top5", "f1", "retrieval", "iou", "cer", "wer", "map", "map50")  # of 1, and shown in percent
METRICS = ("top1", "top5", "mse", "mae", "cosine", "f1", "spearman", "retrieval", "iou", "cer", "wer", "map", "map50")
# A fall by a tenth says the same of any model.
BOUNDED = (*SHARES, "spearman")
LOWER_IS_BETTER = ("mse", "mae", "cer", "wer")
