"""The factorizations of a weight W [K, O]: features T [K, F] that depend on the rank, and mixing P [F, O] of them.

    W ~ T P,    error = tr (W - TP)^T H (W - TP) / tr W^T H W

H is the second moment of the layer's inputs, X^T X, so that the error is that of the answers; the identity without
data. In each the mixing is a 1x1 product (of `spatial` a row of the kernel), and T is made of:

    svd         any K -> r. Exactly the best of its rank: T = W U, P = U^T with the leading eigenvectors U of W^T H W,
                or, where K < O, T = S^-T V, P = V^T S^T W with those of S^T W W^T S, S S^T = H: what ASVD
                (arXiv:2312.05821) and SVD-LLM (arXiv:2403.07378) do. Of a convolution with a kernel the first of the
                pair keeps the kernel (Zhang et al., arXiv:1505.06798); groups stay groups.
    tucker      1x1 C -> r1, kernel r1 -> r2, 1x1 r2 -> O: Tucker-2 (Kim et al., arXiv:1511.06530) from a higher-order
                SVD and a few rounds of orthogonal iteration, channels whitened by their second moments.
    spatial     kh x 1 C -> r, then 1 x kw r -> O (Jaderberg et al., arXiv:1405.3866; Tai et al., arXiv:1511.06067).
    depthwise   t depthwise filters for each channel, then 1x1: a sum of t depthwise-separable convolutions, from an
                SVD of rank t of every channel's part (Guo et al., arXiv:1808.05517).

Where there is data, P is fitted once more with T fixed: P = (T^T H T)^-1 T^T H W, which has a closed form for all.
`problem` holds W, H and what all ranks share, `base` says what a method is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from modelpress_compression.passes.factorize.methods.base import Factors, Method, Ranks, Stage, rounded
from modelpress_compression.passes.factorize.methods.depthwise import Depthwise
from modelpress_compression.passes.factorize.methods.problem import Problem, damped
from modelpress_compression.passes.factorize.methods.spatial import Spatial
from modelpress_compression.passes.factorize.methods.svd import Svd
from modelpress_compression.passes.factorize.methods.tucker import Tucker

METHODS: Mapping[str, Method] = MappingProxyType(
    {"svd": Svd(), "tucker": Tucker(), "spatial": Spatial(), "depthwise": Depthwise()}
)

__all__ = ["METHODS", "Factors", "Method", "Problem", "Ranks", "Stage", "damped", "rounded"]
