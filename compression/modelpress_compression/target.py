"""What the result of a compression will run on."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Checks


@dataclass(frozen=True)
class Target:
    """What the result will run on. `device`: cuda: gradients are computed on a GPU where there is one; `cpu`: whether
    8-bit layers may rely on products that do not saturate (VNNI)."""

    device: str = "cpu"
    cpu: str = "generic"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("device", ("cpu", "cuda"))
        checks.one_of("cpu", ("generic", "vnni"))
        checks.finish()
