"""Options of `prune`."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.options import Config, option
from modelpress_compression.schema import LessThan, Needs


@dataclass(frozen=True)
class PruneConfig(Config):
    """Zeroing of weights, or removal of channels or blocks. `overrides`: pairs of a glob and the sparsity of what
    matches it."""

    @property
    def in_rounds(self) -> bool:
        """Whether the step is more than one run of the pass."""
        return self.structure == "channel" and self.rounds > 1

    structure: str = option(
        "unstructured",
        1,
        "What is removed: single weights, n of every m neighbouring ones, whole channels, heads and hidden units, or "
        "block: whole branches beside a skip connection; only channel and block make the model faster.",
        choices=("unstructured", "n:m", "channel", "block"),
    )
    sparsity: float = option(
        0.5,
        2,
        "Share of the weights that become zero, or of the channels or blocks that go; not used by n:m.",
        gte=0,
        lt=1,
    )
    criterion: str = option(
        "auto",
        3,
        "How importance is judged: magnitude (l1; channel also l2), channel also magnitude times activation or by "
        "gradients of the answers (taylor; both need data), or random as a control. auto: activation for channels "
        "where data is given, l2 for them where not, and l1 for single weights.",
        choices=("auto", "l1", "l2", "activation", "taylor", "random"),
        needs=Needs(("l2", "activation", "taylor"), "structure", "channel"),
    )
    scope: str = option(
        "layer",
        4,
        "Whether each layer loses the same share, or the least important of the whole model go.",
        choices=("layer", "global"),
    )
    n: int = option(
        2,
        5,
        "n:m only: how many weights of every group are removed.",
        gte=1,
        lte=64,
        less_than=LessThan("m", "structure", "n:m"),
    )
    m: int = option(4, 6, "n:m only: size of a group of neighbours along the input axis.", gte=2, lte=64)
    exclude: tuple[str, ...] = option((), 7, "Names of nodes or weights to leave alone, with * and ?.")
    seed: int = option(0, 8, "Seed of the criteria random and taylor.", gte=0)
    round_to: int = option(
        8,
        9,
        "channel only: the channels that stay in a layer are a multiple of this; odd numbers are slow. 16 before int8.",
        gte=1,
        lte=1024,
    )
    min_channels: int = option(4, 10, "channel only: fewest channels that stay in a layer.", gte=1, lte=65536)
    normalize: str = option(
        "parameters",
        11,
        "channel with scope global, and block: importance counts by what a channel or block costs in parameters, MACs "
        "or time on this machine.",
        choices=("none", "parameters", "macs", "latency"),
    )
    repair: str = option(
        "auto",
        12,
        "channel and block: least_squares fits the layers behind a cut to the uncut model's answers on the data; auto "
        "does so where data is given.",
        choices=("auto", "none", "least_squares"),
    )
    overrides: tuple[tuple[str, float], ...] = option(
        (),
        13,
        "channel: sparsity of the layers whose node or weight matches a name with * and ?, as in "
        '{"layer4*": 0.3}; the longest match counts. block: the branch before an Add of this name goes from 0.5 on.',
        gte=0,
        lt=1,
    )
    sparsity_of: str = option(
        "channels",
        14,
        "channel only: what sparsity is a share of: the channels, or the parameters or MACs of the whole model, for "
        "which the share of channels is found that takes them away.",
        choices=("channels", "parameters", "macs"),
        needs=Needs(("parameters", "macs"), "structure", "channel"),
    )
    rounds: int = option(
        1,
        15,
        "channel only: rounds in which the share goes. From two on, each ends with training towards the original.",
        gte=1,
        lte=32,
    )
    epochs: int = option(
        20,
        16,
        "Passes over the data, at most, of the training that ends each of several rounds; 0: none.",
        gte=0,
        lte=10_000,
    )
    min_cosine: float = option(
        0.0,
        17,
        "channel only: least cosine of each output with the uncut model's and, where outputs hold classes, least share "
        "of real inputs that keep theirs. Where the channels asked for would leave less, fewer go, from those layers "
        "that bear it; 0: all go.",
        gte=0,
        lt=1,
    )
