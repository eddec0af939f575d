"""What the project aims at, model by model, and the best of ten tools that was seen when the aims were set.

Latency is time over that of the float model at batch 1 and 8, one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantization_contenders import OURS
from quantization_verdict import drop

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Aim:
    """`fidelity`: what to read of our figures, its least value (largest for `max_abs_error` and `drop`) and unit."""

    model: str
    others: str
    size: float
    latency: tuple[float, ...]
    fidelity: str
    bound: float

    def cells(self, model: Row | None) -> list[str]:
        """Aim and ours: size, latency, fidelity."""
        aimed = [f"{self.size:.3f}", " / ".join(f"{value:.2f}" for value in self.latency), self._text(self.bound)]
        return [self.model, self.others, *aimed, *(self._ours(model) if model else ["", "", "", ""])]

    def _ours(self, model: Row) -> list[str]:
        row = model["contenders"].get(OURS)
        if row is None or row["outcome"] != "ok":
            return ["", "", "", "no result"]
        size = row["size_ratio"]
        ratios = [
            (model["latency"].get(size_key) or {}).get("contenders", {}).get(OURS, {}).get("ratio", {}).get("median")
            for size_key in ("1", "8")
        ]
        times = [ratio for ratio in ratios if ratio is not None]
        value = drop(model, OURS) if self.fidelity == "drop" else row["fidelity"].get(self.fidelity)
        missed = ["size"] if size > self.size + 0.005 else []
        missed += ["latency"] if any(t > aim + 0.005 for t, aim in zip(times, self.latency, strict=False)) else []
        missed += ["fidelity"] if value is None or not self._holds(value) else []
        return [
            f"{size:.3f}",
            " / ".join(f"{ratio:.2f}" for ratio in times),
            "" if value is None else self._text(value),
            "yes" if not missed else f"no: {', '.join(missed)}",
        ]

    def _holds(self, value: float) -> bool:
        return value <= self.bound if self.fidelity in ("max_abs_error", "drop") else value >= self.bound

    def _text(self, value: float) -> str:
        if self.fidelity == "sqnr_db":
            return f"{value:.1f} dB"
        return f"{_NAMES[self.fidelity]} {value:.3f}"


_NAMES = {"iou": "IoU", "top1_agreement": "agreement", "max_abs_error": "difference", "drop": "drop"}
AIMS = (
    Aim("minilm", "dynamic S8 per channel: .253, .43/.44, 16.9 dB", 0.255, (0.42,), "sqnr_db", 22.0),
    Aim("ppocr_rec", "static percentile U8S8: .292, .69/.56, 11.8 dB", 0.29, (0.50, 0.48), "sqnr_db", 20.0),
    Aim("ppocr_det", "static percentile U8S8: .327, .62, IoU .952", 0.33, (0.55,), "iou", 0.97),
    Aim("ppocr_cls", "onnxsim: .93, .94; every int8 slower", 0.70, (0.95,), "top1_agreement", 1.0),
    Aim("magika", "Intel static: .264, .40, agreement .98", 0.27, (0.40,), "top1_agreement", 0.99),
    Aim("silero_vad", "fp16: .55, 1.29; no int8 compresses", 0.55, (1.0,), "max_abs_error", 0.01),
    Aim("resnet18", "U8S8 by any: .253, .30/.28, 24-30 dB", 0.253, (0.29, 0.29), "sqnr_db", 30.0),
    Aim("mobilenetv2_100", "static percentile: .277, .45/.42, 15.6 dB", 0.26, (0.42, 0.42), "sqnr_db", 18.0),
)
