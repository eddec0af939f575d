"""What the result of a compression will run on."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option


@dataclass(frozen=True)
class Target(Config):
    """What the result will run on."""

    device: str = option(
        "cpu",
        1,
        "cuda: distill and the criterion taylor compute on a GPU where torch sees one, else on the CPU with a warning; "
        "onnxruntime measures on the CPU all the same.",
        choices=("cpu", "cuda"),
    )
    cpu: str = option(
        "generic",
        2,
        "generic: 8-bit layers give the same answers on CPUs without VNNI, whose products saturate; vnni: such CPUs do "
        "not matter.",
        choices=("generic", "vnni"),
    )
