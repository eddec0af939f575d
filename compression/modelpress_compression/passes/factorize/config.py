"""Options of `factorize`."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option


@dataclass(frozen=True)
class FactorizeConfig(Config):
    """Low-rank and depthwise-separable factorization. `budget` counts before `energy`, `energy` before `rank_ratio`."""

    method: str = option(
        "auto",
        1,
        "svd: two products of a lower rank. For convolutions with a kernel also tucker (1x1, kernel, 1x1), spatial (a "
        "column, then a row) and depthwise (depthwise, then pointwise); auto takes for each layer what errs least.",
        choices=("auto", "svd", "tucker", "spatial", "depthwise"),
    )
    rank_ratio: float = option(
        0.5,
        2,
        "What the factors of a layer may cost, as a share of the layer's multiplications and of its parameters (of an "
        "embedding its parameters alone): ranks are as high as that permits.",
        gt=0,
        lt=1,
    )
    energy: float | None = option(
        None,
        3,
        "In place of rank_ratio: each layer gets the cheapest factors that keep this share of the energy of its "
        "answers, or of its weight where there is no data.",
        gt=0,
        lt=1,
    )
    budget: float | None = option(
        None,
        4,
        "In place of both: the share of the whole model's cost that may remain; layers are factorized where that "
        "errs least for what it saves.",
        gt=0,
        lt=1,
    )
    budget_of: str = option(
        "macs",
        5,
        "What budget counts: multiply-accumulates, parameters, or latency: the time of layers and of their factors, "
        "measured on this machine. Under latency no layer is factorized that is not faster, with a budget or without.",
        choices=("macs", "parameters", "latency"),
    )
    round_to: int = option(
        8, 6, "Ranks are a multiple of this where they are that large; odd numbers are slow.", gte=1, lte=1024
    )
    max_error: float | None = option(
        None,
        7,
        "A layer stays as it is where its factors would lose more than this share of the energy of its answers.",
        gt=0,
        lt=1,
    )
    repair: str = option(
        "auto",
        8,
        "least_squares fits the last factor of each layer to the original's answers on the data; auto does so where "
        "data is given.",
        choices=("auto", "none", "least_squares"),
    )
    exclude: tuple[str, ...] = option((), 9, "Names of nodes or weights to leave alone, with * and ?.")
    embeddings: str = option(
        "auto",
        10,
        "Embedding tables: a narrower table and one product with what its rows share. They make a model smaller, not "
        "faster. auto takes them where they lose at most 2 % of the energy, or max_error; always wherever they are "
        "smaller.",
        choices=("auto", "none", "always"),
    )
