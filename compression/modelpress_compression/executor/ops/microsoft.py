"""Fused operators of onnxruntime (domain com.microsoft): convolutions, products, activations, normalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.ops.attention import rotate
from modelpress_compression.executor.ops.convolution import convolution
from modelpress_compression.executor.ops.matmul import gemm
from modelpress_compression.executor.ops.normalization import layer_norm, rms_norm
from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


stateless(F.gelu, "Gelu", domain=MICROSOFT)
stateless(lambda x, bias: F.gelu(x + bias), "BiasGelu", domain=MICROSOFT)
stateless(fast_gelu, "FastGelu", domain=MICROSOFT)


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(site: Site) -> Function:
    alpha = site.number("alpha", 1.702)
    return lambda x: x * torch.sigmoid(alpha * x)


def _activation(site: Site, name: str, parameters: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    first, second = (*parameters, None, None)[:2]
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "Relu": torch.relu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "LeakyRelu": lambda x: F.leaky_relu(x, 0.01 if first is None else first),
        "Clip": lambda x: torch.clamp(x, first, second),
        "HardSigmoid": lambda x: ((0.2 if first is None else first) * x + (0.5 if second is None else second)).clamp(
            0, 1
        ),
    }
    if name not in table:
        site.refuse(f"activation {name!r}")
    return table[name]


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(site: Site) -> Function:
    """A convolution, a residual to add, and an activation."""
    conv = convolution(site)
    activation = _activation(site, site.string("activation", ""), site.floats("activation_params") or ())

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = conv(x, weight, bias)
        return activation(y if residual is None else y + residual)

    return run


@operator("FusedGemm", domain=MICROSOFT)
def fused_gemm(site: Site) -> Function:
    product = gemm(site)
    names = ("activation_alpha", "activation_beta")
    parameters = tuple(site.number(name, 0.0) for name in names if name in site.node.attributes)
    activation = _activation(site, site.string("activation", ""), parameters)
    return lambda *inputs: activation(product(*inputs))


@operator("FusedMatMul", domain=MICROSOFT)
def fused_matmul(site: Site) -> Function:
    """alpha A' B'; `transBatch` moves the first axis before the last but one."""
    alpha = site.number("alpha", 1.0)
    sides = [(site.flag(f"trans{side}"), site.flag(f"transBatch{side}")) for side in "AB"]

    def run(a: Tensor, b: Tensor) -> Tensor:
        a, b = (_turned(value, *flags) for value, flags in zip((a, b), sides, strict=True))
        product = a @ b
        return product if alpha == 1.0 else alpha * product

    return run


def _turned(x: Tensor, transposed: bool, batch: bool) -> Tensor:
    x = x.movedim(0, -2) if batch else x
    return x.transpose(-1, -2) if transposed and x.dim() > 1 else x


@operator("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(site: Site) -> Function:
    """Normalizes a sum; outputs y, (mean, inverse deviation: not wanted in inference), the sum."""
    epsilon, outputs = site.number("epsilon", 1e-12), site.outputs
    simplified = site.node.op_type.startswith("SkipSimplified")

    def run(x: Tensor, skip: Tensor, gamma: Tensor, *rest: Tensor | None) -> Any:
        beta, bias = (None, *rest, None)[:2] if simplified else (*rest, None, None)[:2]
        total = x + skip if bias is None else x + skip + bias
        y = rms_norm(total, gamma, -1, epsilon) if simplified else layer_norm(total, gamma, beta, -1, epsilon)
        return (y, None, None, total) if outputs > 1 else y

    return run


@operator("SimplifiedLayerNormalization", domain=MICROSOFT)
def simplified_layer_normalization(site: Site) -> Function:
    axis, epsilon = site.integer("axis", -1), site.number("epsilon", 1e-5)
    return lambda x, scale: rms_norm(x, scale, axis, epsilon)


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(site: Site) -> Function:
    """Outputs the normalized sum of embeddings, how many tokens the mask leaves, the sum."""
    epsilon, outputs = site.number("epsilon", 1e-12), site.outputs

    def run(
        ids: Tensor, segments: Tensor | None, words: Tensor, places: Tensor, kinds: Tensor | None, gamma: Tensor,
        beta: Tensor, mask: Tensor | None = None, positions: Tensor | None = None,
    ) -> Any:  # fmt: skip
        where = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        total = F.embedding(ids.to(torch.int64), words) + F.embedding(where.to(torch.int64), places)
        if segments is not None and kinds is not None:
            total = total + F.embedding(segments.to(torch.int64), kinds)
        y = layer_norm(total, gamma, beta, -1, epsilon)
        if outputs == 1:
            return y
        lengths = ids.new_zeros(ids.shape[0]) if mask is None else mask.sum(1)
        return y, lengths.to(torch.int32), total

    return run


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(site: Site) -> Function:
    """Position ids are one offset for all, or a position for each token."""
    interleaved, heads, part = (
        site.flag("interleaved"),
        site.integer("num_heads", 0),
        site.integer("rotary_embedding_dim", 0),
    )
    scale = site.number("scale", 1.0)
    if scale != 1.0:
        site.refuse(f"scale {scale}")

    def run(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = x.shape[-1] if x.dim() == 4 else (x.shape[-1] // heads if heads else 2 * cos.shape[-1])
        value = x.transpose(1, 2) if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], -1, size)
        if positions.numel() == 1:
            places = positions.reshape(()) + torch.arange(value.shape[1], device=x.device)
            positions = places.expand(value.shape[0], -1)
        y = rotate(value, cos[positions], sin[positions], part or size, interleaved)
        return y.transpose(1, 2) if x.dim() == 4 else y.reshape(x.shape)

    return run
