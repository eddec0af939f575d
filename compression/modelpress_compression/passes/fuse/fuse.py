"""Lossless rewriting: fewer, faster operators that compute the same.

Three groups, each verified on representative inputs and undone as a whole when outputs differ:

    standard       folding, no-ops, duplicates, and constants merged into weights; ONNX operators only
    activations    hard swish and hard sigmoid in the form that onnxruntime fuses into its convolutions
    transformers   attention, GELU, normalization by mean and root

What exporters leave behind for debugging (stack traces, module paths) goes as well.

What is *not* written, by measurement (onnxruntime 1.31, one thread; time with the fused node over time without):

    FusedConv with Relu, Clip, Sigmoid, Tanh, HardSigmoid, LeakyRelu   0.995 - 1.001
    FusedConv with a summand (Conv, Add, Relu)                         1.25: it keeps onnxruntime from its NCHWc layout
    FusedGemm with Relu, Sigmoid, Tanh                                 0.96 - 1.00
    BiasGelu, QuickGelu, FusedMatMul                                   0.997, 1.002, 1.008 (same file twice: 1.005)
    SkipLayerNormalization                                             1.08, by disabling the load-time fusion on a
                                                                       sentence encoder (see `normalization`)

onnxruntime makes all of these itself when it loads a model. Written into the file they would gain nothing, bind it to
onnxruntime, and hide Conv and Gemm from quantization. `activations` therefore brings activations into the standard
forms that this load-time fusion recognizes, and com.microsoft operators are written only for what it misses:
attention, and GELU below opset 20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir
from onnx_ir.passes import common as ir_passes

from modelpress_compression.agreement import why_different
from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.metadata import clear_debug_metadata
from modelpress_compression.graph.read import MICROSOFT, label
from modelpress_compression.graph.shapes import infer_shapes
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip
from modelpress_compression.passes.fuse.affine_conv import FuseAffineConv
from modelpress_compression.passes.fuse.attention import FuseAttention
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.constant_folding import fold_constants
from modelpress_compression.passes.fuse.conv_affine import FuseConvAffine
from modelpress_compression.passes.fuse.conv_batchnorm import FuseConvBatchNorm
from modelpress_compression.passes.fuse.duplicates import merge_common_subexpressions, merge_initializers
from modelpress_compression.passes.fuse.gelu import FuseGelu
from modelpress_compression.passes.fuse.hard_swish import FuseHardSwish
from modelpress_compression.passes.fuse.matmul_affine import FuseMatMulAffine
from modelpress_compression.passes.fuse.no_ops import MergeTransposes, RemoveNoOps
from modelpress_compression.passes.fuse.normalization import (
    DivideByRoot,
    FuseLayerNormalization,
    forget_residual_shapes,
)
from modelpress_compression.passes.fuse.pad_conv import FusePadConv
from modelpress_compression.passes.fuse.rewriting import Rewrite, Scope, Tally, apply
from modelpress_compression.passes.fuse.transposes import CancelTransposes, MoveTransposes
from modelpress_compression.runtime import run, session_of

# Each round can uncover work for the next one (a folded constant becomes a weight); three reach the end in practice.
_MAX_ROUNDS = 3
_VERIFIED_SAMPLES = 2

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class _Group:
    """Rewrites that are verified, and if need be undone, together."""

    name: str
    rewrites: Sequence[Rewrite]
    clean_up: bool = False


class Fuse:
    """The pass of `fuse`. Raises ModelNotRunnableError when the model does not run as it is."""

    def __init__(self, config: FuseConfig) -> None:
        self._config = config

    def __call__(self, model: Model, context: Context) -> PassResult:
        verification = Verification(model, context.data)
        current, tally = model, Tally()
        groups = self._groups()
        for number, group in enumerate(groups):
            context.check_time()
            context.progress(number / len(groups), f"fusing: {group.name}")
            if not _concerns(group, current):
                continue
            candidate, made = _run(group, current, self._config.exclude, context.check_time)
            tally.skipped += made.skipped
            if not made.fired.total():
                continue
            reason = verification.why_different(candidate)
            if reason is not None:
                tally.skipped.append(Skip(group.name, f"The rewrites of this group were undone: {reason}."))
                context.log(f"fuse: undid the group {group.name}: {reason}")
                continue
            current = candidate
            tally.fired += made.fired
        current, cleared = _without_debug_metadata(current)
        _count(tally, "debug_metadata", cleared)
        if self._config.transformers and current is not model:
            forget_residual_shapes(current.ir)
        context.progress(1.0, "fused")
        return PassResult(current, dict(tally.fired), _still_there(tally.skipped, current, groups))

    def _groups(self) -> list[_Group]:
        merging: list[Rewrite] = [FuseConvAffine(), FuseAffineConv()]
        standard: list[Rewrite] = [
            RemoveNoOps(),
            MergeTransposes(),
            CancelTransposes(),
            MoveTransposes(),
            FusePadConv(),
            FuseConvBatchNorm(),
            FuseMatMulAffine(),
            *merging,
        ]
        groups = [_Group("standard", standard, clean_up=True)]
        if self._config.activations:
            groups.append(_Group("activations", [FuseHardSwish(), *merging]))
        if self._config.transformers:
            rewrites: list[Rewrite] = [DivideByRoot(), FuseLayerNormalization(), FuseGelu(), FuseAttention()]
            groups.append(_Group("transformers", rewrites))
        return groups


def _without_debug_metadata(model: Model) -> tuple[Model, int]:
    candidate = model.clone()
    cleared = clear_debug_metadata(candidate.ir)
    return (candidate, cleared) if cleared else (model, 0)


def _run(group: _Group, model: Model, exclude: tuple[str, ...], check_time: Callable[[], None]) -> tuple[Model, Tally]:
    """The group's rewrites on a clone, round by round until nothing fires."""
    candidate, tally = model.clone(), Tally()
    for _ in range(_MAX_ROUNDS):
        check_time()
        infer_shapes(candidate.ir)
        scope, made = Scope(candidate, exclude), Tally()
        if group.clean_up:
            # Folding would take no-ops along, and count them as its own.
            apply([RemoveNoOps()], scope, made)
            _count(made, "constant_folding", fold_constants(scope))
            infer_shapes(candidate.ir)
            scope = Scope(candidate, exclude)
        changed = apply(group.rewrites, scope, made)
        _count(made, "common_subexpression", merge_common_subexpressions(scope))
        ir_passes.RemoveUnusedNodesPass()(candidate.ir)
        tally.fired += made.fired
        tally.skipped = made.skipped
        if not changed:
            break
    if group.clean_up:
        _count(tally, "duplicate_initializer", merge_initializers(Scope(candidate, exclude)))
    _drop_unused_opset(candidate.ir)
    _keep_outputs(candidate.ir, model.ir)
    return candidate, tally


def _keep_outputs(ir: onnx_ir.Model, given: onnx_ir.Model) -> None:
    """What a file says of its outputs stays: inference may know more, and callers rely on what was written."""
    for mine, theirs in zip(ir.graph.outputs, given.graph.outputs, strict=True):
        mine.type = theirs.type
        mine.shape = None if theirs.shape is None else theirs.shape.copy()


def _concerns(group: _Group, model: Model) -> bool:
    """Whether there is anything that the rewrites anchor on; copying a large graph for nothing takes seconds."""
    wanted = frozenset[str]().union(*(rewrite.op_types for rewrite in group.rewrites))
    return group.clean_up or any(node.op_type in wanted for node in model.nodes())


def _still_there(skipped: Sequence[Skip], model: Model, groups: Sequence[_Group]) -> tuple[Skip, ...]:
    """Each reason once, without those of nodes that a later rewrite took."""
    present = {label(node) for node in model.nodes()} | {group.name for group in groups}
    return tuple(skip for skip in dict.fromkeys(skipped) if skip.node in present)


def _count(tally: Tally, name: str, number: int) -> None:
    if number > 0:
        tally.fired[name] += number


def _drop_unused_opset(ir: onnx_ir.Model) -> None:
    """com.microsoft is imported only where it is used."""
    if MICROSOFT in ir.graph.opset_imports and not any(node.domain == MICROSOFT for node in ir.graph.all_nodes()):
        del ir.graph.opset_imports[MICROSOFT]


class Verification:
    """The original's outputs on representative inputs, to hold rewritten models against.

    Samples go through one by one, and once as a batch of two where the original can: a rewrite that mixes up the batch
    axis shows there only. Raises ModelNotRunnableError when the original does not run.
    """

    def __init__(self, original: Model, data: InputData) -> None:
        singles: list[Feeds] = list(data.feeds(limit=_VERIFIED_SAMPLES)) or [{}]
        pairs = list(data.feeds(batch_size=_VERIFIED_SAMPLES, limit=_VERIFIED_SAMPLES))
        self._feeds: list[Feeds] = []
        self._outputs: list[Outputs] = []
        with session_of(original) as session:
            for feed in singles:
                self._feeds.append(feed)
                self._outputs.append(run(session, feed))
            for feed in pairs if len(singles) > 1 and len(pairs) < len(singles) else []:
                try:
                    outputs = run(session, feed)
                except CompressionError:
                    continue  # the model takes one sample at a time
                self._feeds.append(feed)
                self._outputs.append(outputs)

    def why_different(self, model: Model) -> str | None:
        """What is wrong with the rewritten model; None when it computes the same."""
        try:
            with session_of(model) as session:
                got = [run(session, feed) for feed in self._feeds]
        except CompressionError as error:
            return f"the result does not run ({error.message})"
        return _difference(self._outputs, got)


def _difference(expected: Sequence[Outputs], got: Sequence[Outputs]) -> str | None:
    for before, after in zip(expected, got, strict=True):
        if list(before) != list(after):
            return "the names of the outputs changed"
        for name, array in before.items():
            if (reason := why_different(array, after[name])) is not None:
                return f"output {name!r} {reason}"
    return None
