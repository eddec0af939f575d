"""Random numbers. With a seed: the same in every run; without one, those of torch's own generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


def _generator(site: Site, device: torch.device) -> torch.Generator | None:
    if "seed" not in site.node.attributes:
        return None
    return torch.Generator(device).manual_seed(int(site.node.attributes["seed"].value))


@operator("RandomNormal", "RandomUniform", deterministic=False)
def random(site: Site) -> Function:
    shape, dtype = site.ints("shape", ()) or (), site.torch_type("dtype", torch.float32)
    fill = _filler(site)
    return lambda: fill(torch.empty(shape, dtype=dtype, device=site.device))


@operator("RandomNormalLike", "RandomUniformLike", deterministic=False)
def random_like(site: Site) -> Function:
    dtype, fill = site.torch_type("dtype"), _filler(site)
    return lambda x: fill(torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device))


def _filler(site: Site) -> Function:
    def fill(empty: Tensor) -> Tensor:
        generator = _generator(site, empty.device)
        if "Normal" in site.node.op_type:
            return empty.normal_(site.number("mean", 0.0), site.number("scale", 1.0), generator=generator)
        return empty.uniform_(site.number("low", 0.0), site.number("high", 1.0), generator=generator)

    return fill


@operator("Bernoulli", deterministic=False)
def bernoulli(site: Site) -> Function:
    dtype = site.torch_type("dtype")
    return lambda p: torch.bernoulli(p.detach(), generator=_generator(site, p.device)).to(dtype or p.dtype)


@operator("Multinomial", deterministic=False)
def multinomial(site: Site) -> Function:
    """From unnormalized log-probabilities [batch, classes]."""
    count, dtype = site.integer("sample_size", 1), site.torch_type("dtype", torch.int32)

    def run(logits: Tensor) -> Tensor:
        chances = torch.softmax(logits.detach().float(), -1)
        return torch.multinomial(chances, count, replacement=True, generator=_generator(site, logits.device)).to(dtype)

    return run


@operator("Dropout", deterministic=False)
def dropout(site: Site) -> Function:
    """Does nothing, unless the graph itself asks for training mode (opset 12 on)."""
    fixed_ratio, seeded, outputs = site.number("ratio", 0.5), site, site.outputs

    def run(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
        chance = fixed_ratio if ratio is None else float(ratio)
        active = training is not None and bool(training) and chance > 0
        if not active:
            return (x, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else x
        generator = _generator(seeded, x.device)
        mask = torch.rand(x.shape, device=x.device, generator=generator) >= chance
        y = torch.where(mask, x / (1 - chance), torch.zeros_like(x)) if chance < 1 else torch.zeros_like(x)
        return (y, mask) if outputs > 1 else y

    return run
