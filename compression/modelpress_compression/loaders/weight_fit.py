"""Whether weights fit a network, name by name and shape by shape, and what is to be said where they do not.

A network that got a part of its weights runs all the same and answers nonsense. So every weight of the network comes
from the file, and every weight of the file goes into the network; the exceptions are few, and each is told.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from modelpress_compression.loaders.weight_names import Weights, common_prefix, prefixes, renamed

_LISTED = 5
_MAX_ROOT_CHARS = 100
# Buffers that the network's constructor computes, whatever was trained.
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:num_batches_tracked|position_ids|token_type_ids|relative_position_index|relative_coords_table|"
    r"attn_mask|inv_freq|original_inv_freq|masked_bias|causal_mask|total_ops|total_params|n_averaged)"
)
# Causal masks that older files of GPT-2 and its kin hold in every layer.
_STORED_MASK = re.compile(r"(?:.*\.)?(?:attn|attention|self_attention)\.bias")
# Branches beside the network in a training script, and heads of a task that the network was not built for.
_BESIDE = re.compile(
    r"(?:\w*_)?(?:loss(?:es|_fn|_func)?|criterion|criteria|metrics?|acc|accuracy|auroc|f1|heads?|classifiers?|fc|cls|"
    r"lm_head|projector|predictor|discriminator|aux\w*|qa_outputs|lpips|perceptual\w*)(?:_\w+)?",
    re.IGNORECASE,
)
_QUANTIZED = re.compile(
    r".*\.(?:SCB|absmax|quant_map|quant_state\.\S+|qweight|qzeros|scales|g_idx|weight_scale(?:_inv)?)"
)


@dataclass(frozen=True)
class Fit:
    """`weights`: by the network's names. `prefix`: what stood before them. The rest are names, or lines about names."""

    prefix: str
    weights: Weights
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the network would be whole, and the one that was trained."""
        return not (self.missing or self.unexpected or self.misshapen or self.untied)

    @property
    def matched(self) -> int:
        """How many weights find their place."""
        return len(self.weights) - len(self.unexpected) - len(self.misshapen)

    def notes(self, *others: str) -> list[str]:
        """What a user should know of weights that were read. `others`: prefixes of other sets of the same weights."""
        said = []
        left_out = [name for name in self.left_out if not name.startswith(others)]
        if left_out:
            said.append(f"Left out, for the network has no such part: {listed(left_out)}.")
        told = [name for name in self.computed if not name.endswith("num_batches_tracked")]
        if told:
            said.append(f"Not in the file, computed by the network's own code: {listed(told)}.")
        return said

    def misfits(self) -> str:
        """What does not fit, grouped, a few names of each group."""
        groups = (
            ("missing in the file", self.missing),
            ("not in the module", self.unexpected),
            ("of another shape", self.misshapen),
            ("shared in the module but two in the file", self.untied),
        )
        return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in groups if names)


def fits(module: torch.nn.Module, weights: Weights, ignored: Sequence[str] = ()) -> list[Fit]:
    """The weights under every prefix that the network's names have in the file, the best fits first.

    `weights`: without the parts of names that wrappers put in. `ignored`: patterns of names that are left out.
    """
    wanted = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {name: value for name, value in weights.items() if not _matches(name, ignored)}
    found = [_fit(module, wanted, kept, prefix, ignored) for prefix in prefixes(kept, wanted)]
    added = common_prefix(wanted)
    if added:
        found.append(_fit(module, wanted, {f"{added}{name}": value for name, value in kept.items()}, "", ignored))
    return sorted(found, key=lambda fit: (not fit.fits, -fit.matched, len(fit.missing) + len(fit.unexpected)))


def fit_report(
    module: torch.nn.Module,
    weights: Weights,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[str],
    ignored: Sequence[str] = (),
) -> Fit:
    """The same from what another loader reports, which has given the weights their names."""
    none = torch.empty(0)
    left_out = [
        name
        for name in sorted(unexpected)
        if _matches(name, ignored) or _may_be_left_out(module, name, weights.get(name, none))
    ]
    return Fit(
        "",
        weights,
        missing=tuple(name for name in sorted(missing) if not _COMPUTED.fullmatch(name)),
        unexpected=tuple(name for name in sorted(unexpected) if name not in left_out),
        misshapen=tuple(sorted(misshapen)),
        left_out=tuple(name for name in left_out if not _COMPUTED.fullmatch(name)),
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fit(module: torch.nn.Module, wanted: Weights, weights: Weights, prefix: str, ignored: Sequence[str]) -> Fit:
    inside = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    outside = [name for name in weights if not name.startswith(prefix)]
    inside = dict(renamed({name: value for name, value in inside.items() if not _matches(name, ignored)}, wanted))
    found = {name: _scalar_like(value, wanted.get(name)) for name, value in inside.items()}
    tied = _tied(module, found)
    extra = [name for name in found if name not in wanted]
    left_out = [name for name in extra if _may_be_left_out(module, name, found[name])]
    missing = [name for name in wanted if name not in found and name not in tied]
    computed = [name for name in missing if _COMPUTED.fullmatch(name)]
    return Fit(
        prefix,
        {name: value for name, value in found.items() if name not in left_out},
        missing=tuple(name for name in missing if name not in computed),
        unexpected=tuple(name for name in extra if name not in left_out),
        misshapen=tuple(_misshapen(found, wanted)),
        untied=tuple(_untied(module, found)),
        computed=tuple(computed),
        left_out=tuple(name for name in (*outside, *left_out) if not _COMPUTED.fullmatch(name)),
    )


def _scalar_like(value: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """A single number with the axes that the network gives it."""
    return value.reshape(target.shape) if target is not None and value.numel() == target.numel() == 1 else value


def _misshapen(found: Weights, wanted: Weights) -> list[str]:
    lines = []
    for name, target in wanted.items():
        value = found.get(name)
        if value is None:
            continue
        if value.shape != target.shape:
            lines.append(f"{name} is {list(value.shape)} in the file and {list(target.shape)} in the module")
        elif _kind(value) != _kind(target) and target.is_floating_point():
            lines.append(f"{name} is {_dtype(value)} in the file and {_dtype(target)} in the module")
    return lines


def _kind(value: torch.Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _groups(module: torch.nn.Module) -> list[list[str]]:
    """Names of one and the same parameter or buffer, where it has several."""
    names: dict[int, list[str]] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    for name, value in itertools.chain(parameters, module.named_buffers(remove_duplicate=False)):
        names.setdefault(id(value), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tied(module: torch.nn.Module, found: Collection[str]) -> set[str]:
    """Names that need no weight of their own: they are another name of one that the file has."""
    return {name for group in _groups(module) if any(other in found for other in group) for name in group}


def _untied(module: torch.nn.Module, found: Weights) -> list[str]:
    """Names that share one weight in the network, and have different ones in the file."""
    differing = []
    for group in _groups(module):
        first, *others = [name for name in group if name in found] or [""]
        differing += [f"{name} and {first}" for name in others if not _same(found[name], found[first])]
    return differing


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _may_be_left_out(module: torch.nn.Module, name: str, value: torch.Tensor) -> bool:
    """Whether a weight that the network has no place for says nothing about the network.

    It may be what constructors compute, or a branch at the root. Within a layer that the network has, or a further
    layer of a stack, it says that the network is another one.
    """
    if _COMPUTED.fullmatch(name):
        return True
    if _STORED_MASK.fullmatch(name) and value.ndim == 4 and value.shape[-1] == value.shape[-2]:
        return True
    root, dot, _ = name.partition(".")
    branch = getattr(module, root, None)
    has_weights = isinstance(branch, torch.nn.Module) and bool(branch.state_dict())
    return bool(dot) and not has_weights and len(root) <= _MAX_ROOT_CHARS and bool(_BESIDE.fullmatch(root))


def advice(fit: Fit) -> str:
    """What to do about weights that do not fit, by what their names and shapes tell."""
    names = [*fit.weights, *fit.left_out]
    if any(_QUANTIZED.fullmatch(name) for name in names):
        return (
            "The weights are quantized already (bitsandbytes, GPTQ, AWQ or the like), and only the library that did it "
            "reads them. Give the model as it was before."
        )
    if any(".lora_A" in name or ".lora_B" in name for name in names):
        return (
            "The file holds an adapter (PEFT, LoRA), which is no model without its base. Merge it with "
            "merge_and_unload(), and give the state dict of the result."
        )
    if any("flat_param" in name.rpartition(".")[2] for name in names):
        return (
            "The file holds flat parameters of FSDP, cut into shards. Save it with StateDictType.FULL_STATE_DICT, "
            "which writes the full weights."
        )
    if fit.weights and all(not value.numel() for value in fit.weights.values()):
        return (
            "The weights are empty, for DeepSpeed ZeRO stage 3 keeps them in shards. Run the zero_to_fp32.py that lies "
            "beside the checkpoint, and give the file that it writes."
        )
    told = "Give the factory (and its arguments) with which the model was trained"
    roots = {name.partition(".")[0] for name in fit.unexpected}
    known = {name.partition(".")[0] for name in fit.weights if name not in fit.unexpected}
    if fit.missing or fit.misshapen or fit.untied or roots & known or not roots:
        return f"{told}."
    patterns = dict.fromkeys(
        f"{root}.*" if dot else root for root, dot, _ in (n.partition(".") for n in fit.unexpected)
    )
    options = " ".join(f"--ignore-weights '{pattern}'" for pattern in [*patterns][:_LISTED])
    return (
        f"{told}; or, where the network does without them, leave them out with {options} (in Python: ignore_weights=)."
    )


def listed(names: Sequence[str]) -> str:
    """The first few."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(name[:120] for name in names[:_LISTED])}{more}"
