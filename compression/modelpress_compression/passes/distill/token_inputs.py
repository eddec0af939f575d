"""Token sequences for training where no data is given: drawn, and then changed by what the model makes of them.

    scores of the next token   sequences are drawn from the model itself, token after token (as in LLM-QAT, Liu et al.,
                               arXiv:2305.17888)
    class scores               tokens are exchanged until each sequence shows the class that was drawn for it
    embeddings, hidden states  tokens are exchanged until the outputs of different sequences point apart, as those of
                               different texts do: training spreads them over the sphere (Wang and Isola,
                               arXiv:2005.10242), while those of random tokens lie close together

Tokens are exchanged by first-order estimates (HotFlip, Ebrahimi et al., arXiv:1712.06751): with g the gradient of the
loss at a position's embedding e_t, the token v that promises the least of (e_v - e_t) g takes its place. What the next
run finds worse is taken back. Sequences get different lengths where the model takes a mask, and all of their tokens
belong to the first segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor import Executor
from modelpress_compression.graph.outputs import classification_outputs, score_form
from modelpress_compression.graph.padding import counted_positions, is_attention_mask
from modelpress_compression.graph.read import constant_array, int_attribute, is_op
from modelpress_compression.graph.watch import observable
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.augmentation.kinds import TOKENS, input_kinds
from modelpress_compression.passes.distill.losses import log_probabilities

STEPS = 8
CANDIDATES = 512  # tokens that may take the place of others, drawn anew in each step
EXCHANGED = 0.3  # of the tokens, at most, in each step
LEAST_LENGTH = 4
_SEGMENTS = ("token_type", "segment")

Feed = dict[str, Tensor]
Losses = Callable[[Mapping[str, Tensor], Feed], Tensor]  # [N]


@dataclass(frozen=True)
class TokenInput:
    """`ids`: the input of tokens [N, T]. `embedded`: the value that a table [V, D] gives for them, [N, T, D]."""

    ids: str
    embedded: str
    table: Tensor


def find_token_input(model: Model, data: InputData) -> TokenInput | None:
    """The only input of tokens, looked up in one float table of the main graph; None where it is not so."""
    names = [kind.name for kind in input_kinds(model, data) if kind.kind == TOKENS]
    if len(names) != 1 or data.whole_feeds:
        return None
    value = next(value for value in model.graph.inputs if value.name == names[0])
    looked_up = [node for node, position in value.uses() if is_op(node, "Gather") and position == 1]
    table = constant_array(looked_up[0].inputs[0]) if len(looked_up) == 1 else None
    if table is None or table.ndim != 2 or table.dtype.kind != "f" or int_attribute(looked_up[0], "axis", 0) != 0:
        return None
    embedded = looked_up[0].outputs[0]
    if not observable(embedded, model) or looked_up[0].graph is not model.graph:
        return None
    return TokenInput(names[0], embedded.name or "", torch.from_numpy(np.array(table, np.float32)))


def with_lengths(data: InputData, seed: int) -> InputData:
    """The same samples in one segment, and of lengths from `LEAST_LENGTH` on where a mask of attention tells them."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = dict(data.arrays)
    for name, array in data.arrays.items():
        if array.ndim != 2 or array.dtype.kind not in "iu":
            continue
        if any(word in name.lower() for word in _SEGMENTS):
            arrays[name] = np.zeros_like(array)
        elif is_attention_mask(name) and array.shape[1] > LEAST_LENGTH:
            lengths = rng.integers(LEAST_LENGTH, array.shape[1] + 1, len(array))
            arrays[name] = (np.arange(array.shape[1]) < lengths[:, None]).astype(array.dtype)
    return replace(data, arrays=arrays)


class TokenMaker:
    """Changes batches of one model's token sequences. `how`: in words."""

    def __init__(
        self, executor: Executor, tokens: TokenInput, output: onnx_ir.Value, is_scores: bool, seed: int
    ) -> None:
        self._executor, self._output, self._is_scores = executor, output, is_scores
        self._tokens = replace(tokens, table=tokens.table.to(executor.device))
        self._generator = torch.Generator().manual_seed(seed)
        self.how = "plausible random ones"

    @classmethod
    def of(cls, model: Model, tokens: TokenInput, device: torch.device, seed: int) -> TokenMaker | None:
        """None where no output tells one text from another. Raises NotExecutableError."""
        output = _judged_output(model)
        if output is None:
            return None
        others = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
        names = [tokens.embedded, *(name for name in others if name)]
        executor = Executor(model, inputs=names, outputs=[output.name or ""], device=device)
        return cls(executor, tokens, output, output.name in classification_outputs(model.graph), seed)

    @property
    def device(self) -> torch.device:
        return self._executor.device

    def make(self, feed: Feed, until: float) -> Feed:
        """The batch with other tokens; as it is when the time is up."""
        with torch.no_grad():
            answers = self._answers(feed, feed[self._tokens.ids])
        if self._is_scores and answers.dim() == 3 and self._names_tokens(feed, answers):
            self.how = "drawn from the model's own scores of the next token"
            return self._drawn(feed, until)
        if self._is_scores:
            classes = self._random(answers.shape[-1], answers.shape[:-1])
            self.how = "exchanged token by token until they show each class"
            return self._exchanged(feed, until, lambda values, given: self._towards(values, classes, given))
        self.how = "exchanged token by token until the outputs of different ones point apart"
        return self._exchanged(feed, until, self._nearness)

    def _answers(self, feed: Feed, ids: Tensor, embedded: Tensor | None = None) -> Tensor:
        tokens = self._tokens
        rows = tokens.table[ids.long()] if embedded is None else embedded
        found: Tensor = self._executor({**feed, tokens.ids: ids, tokens.embedded: rows})[self._output.name or ""]
        return found.float()

    def _random(self, high: int, shape: torch.Size) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self._generator).to(self.device)

    def _names_tokens(self, feed: Feed, answers: Tensor) -> bool:
        """Whether each position scores every token, and knows nothing of those behind it."""
        ids = feed[self._tokens.ids]
        if answers.shape[:2] != ids.shape or answers.shape[-1] != len(self._tokens.table) or ids.shape[1] < 2:
            return False
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % len(self._tokens.table)
        with torch.no_grad():
            again = self._answers(feed, changed)
        return bool(torch.allclose(again[:, :-1], answers[:, :-1], rtol=1e-4, atol=1e-4))

    def _drawn(self, feed: Feed, until: float) -> Feed:
        ids = feed[self._tokens.ids].clone()
        with torch.no_grad():
            for position in range(1, ids.shape[1]):
                if time.monotonic() > until:
                    break
                scores = log_probabilities(self._answers(feed, ids)[:, position - 1], self._form)
                drawn = torch.multinomial(scores.exp().cpu(), 1, generator=self._generator)[:, 0]
                ids[:, position] = drawn.to(ids)
        return {**feed, self._tokens.ids: ids}

    @property
    def _form(self) -> str:
        return score_form(self._output)

    def _towards(self, answers: Tensor, classes: Tensor, feed: Feed) -> Tensor:
        """Cross-entropy with the class of each sequence, or the mean over its positions."""
        logs = log_probabilities(answers, self._form)
        each = -logs.gather(-1, classes[..., None])[..., 0]
        return each.reshape(len(each), -1).mean(1)

    def _nearness(self, answers: Tensor, feed: Feed) -> Tensor:
        """Mean cosine of a sequence's output with those of the others; hidden states are averaged over positions."""
        if answers.dim() == 3:
            weight = self._counted(feed, answers)
            answers = (answers * weight).sum(1) / weight.sum(1)
        points = F.normalize(answers.reshape(len(answers), -1), dim=-1)
        return ((points @ points.t()).sum(1) - 1) / max(1, len(points) - 1)

    def _counted(self, feed: Feed, answers: Tensor) -> Tensor:
        mask = counted_positions({name: value.cpu().numpy() for name, value in feed.items()})
        if mask is None or mask.shape != tuple(answers.shape[:2]):
            return torch.ones_like(answers[..., :1])
        return torch.from_numpy(mask).to(answers)[..., None]

    def _exchanged(self, feed: Feed, until: float, losses: Callable[[Tensor, Feed], Tensor]) -> Feed:
        ids = feed[self._tokens.ids]
        best, least = ids, torch.full((len(ids),), torch.inf, device=self.device)
        for step in range(STEPS + 1):
            embedded = self._tokens.table[ids.long()].requires_grad_()
            each = losses(self._answers(feed, ids, embedded), feed)
            better = each.detach() < least
            best, least = torch.where(better[:, None], ids, best), torch.where(better, each.detach(), least)
            if step == STEPS or time.monotonic() > until or not bool(torch.isfinite(each).all()):
                break
            (gradient,) = torch.autograd.grad(each.sum(), embedded)
            ids = self._proposed(best, gradient)
        return {**feed, self._tokens.ids: best}

    def _proposed(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """The sequences with some tokens exchanged. `gradient` [N, T, D]: at these or at the last proposed ones."""
        table = self._tokens.table
        candidates = self._random(len(table), torch.Size([CANDIDATES]))
        change = gradient @ table[candidates].t() - (gradient * table[ids.long()]).sum(-1, keepdim=True)
        least, place = change.min(-1)
        chosen = (torch.rand(ids.shape, generator=self._generator) < EXCHANGED).to(self.device)
        return torch.where(chosen & (least < 0), candidates[place].to(ids), ids)


def _judged_output(model: Model) -> onnx_ir.Value | None:
    """Class scores if there are any, else the first float output of two or three axes."""
    fitting = [
        value
        for value in model.graph.outputs
        if value.producer() is not None
        and value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) in (2, 3)
    ]
    scores = classification_outputs(model.graph)
    return next((value for value in fitting if value.name in scores), fitting[0] if fitting else None)
