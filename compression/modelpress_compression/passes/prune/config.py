"""Options of `prune`."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpress_compression.options import Checks


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
