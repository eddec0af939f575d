"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site

stateless(torch.matmul, "MatMul")
stateless(torch.linalg.det, "Det")


@operator("Gemm")
def gemm(site: Site) -> Function:
    """alpha A' B' + beta C, C broadcast to the product."""
    alpha, beta = site.number("alpha", 1.0), site.number("beta", 1.0)
    trans_a, trans_b = site.flag("transA"), site.flag("transB")

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if trans_a else a
        if alpha == beta == 1.0 and (c is None or c.dim() == 1) and a.dtype.is_floating_point:
            return F.linear(a, b if trans_b else b.t(), c)
        product = a @ (b.t() if trans_b else b)
        product = product if alpha == 1.0 else (alpha * product).to(product.dtype)
        if c is None:
            return product
        return product + (c if beta == 1.0 else (beta * c).to(c.dtype))

    return run


@operator("Einsum")
def einsum(site: Site) -> Function:
    equation = site.string("equation", "").replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)
