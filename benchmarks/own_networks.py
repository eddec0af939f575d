"""Networks of kinds that the model libraries do not have: segmentation, taggers, super-resolution, decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Three levels with skip connections by Concat and upsampling by ConvTranspose (Ronneberger, arXiv:1505.04597)."""

    def __init__(self, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.down1 = _double_conv(3, width)
        self.down2 = _double_conv(width, 2 * width)
        self.down3 = _double_conv(2 * width, 4 * width)
        self.middle = _double_conv(4 * width, 8 * width)
        self.up3 = nn.ConvTranspose2d(8 * width, 4 * width, 2, stride=2)
        self.merge3 = _double_conv(8 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = _double_conv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = _double_conv(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.down1(image)
        two = self.down2(functional.max_pool2d(one, 2))
        three = self.down3(functional.max_pool2d(two, 2))
        middle = self.middle(functional.max_pool2d(three, 2))
        three = self.merge3(torch.cat([self.up3(middle), three], 1))
        two = self.merge2(torch.cat([self.up2(three), two], 1))
        one = self.merge1(torch.cat([self.up1(two), one], 1))
        head: Tensor = self.head(one)
        return head


class LstmTagger(nn.Module):
    """Words to labels: embedding, two bidirectional LSTM layers, a classifier for each word."""

    def __init__(self, words: int = 500, width: int = 64, hidden: int = 128, labels: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, labels)

    def forward(self, ids: Tensor) -> Tensor:
        head: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return head


class GruTagger(nn.Module):
    """Frames to labels: two GRU layers and a hidden layer for each frame."""

    def __init__(self, features: int = 40, hidden: int = 128, labels: int = 10) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, num_layers=2, batch_first=True)
        self.middle = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, labels)

    def forward(self, frames: Tensor) -> Tensor:
        head: Tensor = self.head(functional.relu(self.middle(self.gru(frames)[0])))
        return head


class PixelShuffleNet(nn.Module):
    """Super-resolution by sub-pixel convolution, twice: channels become pixels (Shi et al., arXiv:1609.05158)."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.up = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(width),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(width),
        )
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        for block in self.blocks:
            features = features + block(features)
        head: Tensor = self.head(self.up(features))
        return head


class RmsNorm(nn.Module):
    """Written out, as language models write it: both exporters leave Pow, ReduceMean, Sqrt, Div."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GqaDecoder(nn.Module):
    """Decoder blocks whose query heads share key and value heads (Ainslie et al., arXiv:2305.13245)."""

    def __init__(self, width: int = 128, heads: int = 8, kv_heads: int = 4, layers: int = 2, vocabulary: int = 300):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(GqaBlock(width, heads, kv_heads) for _ in range(layers))
        self.norm = RmsNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        head: Tensor = self.head(self.norm(x))
        return head


class GqaBlock(nn.Module):
    """Grouped-query attention and a gated feed-forward layer, each behind a RmsNorm."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q = nn.Linear(width, heads * self.size, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o = nn.Linear(heads * self.size, width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        added: Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return added

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, self.size).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, -1e9).softmax(-1)
        out: Tensor = self.o((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))
        return out


class GroupNormAutoencoder(nn.Module):
    """1-d convolutions with GroupNorm, as audio models have them; channels are divided among groups."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, width, 5, stride=2, padding=2),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv1d(width, 2 * width, 5, stride=2, padding=2),
            nn.GroupNorm(8, 2 * width),
            nn.GELU(),
            nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.ConvTranspose1d(width, 2, 4, stride=2, padding=1),
        )

    def forward(self, signal: Tensor) -> Tensor:
        out: Tensor = self.layers(signal)
        return out


def _scan(decay: Tensor, drive: Tensor, reads: Tensor) -> Tensor:
    """Token by token: state = decay * state + drive, each [N, T, C, S]; what `reads` [N, T, S] take of it [N, T, C]."""
    state = torch.zeros_like(drive[:, 0])
    outputs = torch.zeros([0, drive.shape[0], drive.shape[2]], dtype=drive.dtype)
    for token in range(drive.shape[1]):
        state = decay[:, token] * state + drive[:, token]
        outputs = torch.cat([outputs, (state * reads[:, token].unsqueeze(1)).sum(-1).unsqueeze(0)])
    return outputs.permute(1, 0, 2)


# A loop over any number of tokens, whoever exports it: a trace would unroll it for one.
_scripted_scan = torch.jit.script(_scan)


class SelectiveStateBlock(nn.Module):
    """As in Mamba (arXiv:2312.00752): decay, input and readout of a state are chosen by each token."""

    def __init__(self, width: int, states: int = 8, rank: int = 4) -> None:
        super().__init__()
        inner = 2 * width
        self.parts = [rank, states, states]
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.select = nn.Linear(inner, sum(self.parts), bias=False)
        self.step = nn.Linear(rank, inner)
        self.logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.enter(self.norm(x)).chunk(2, -1)
        h = functional.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        rank, writes, reads = self.select(h).split(self.parts, -1)
        step = functional.softplus(self.step(rank)).unsqueeze(-1)
        states = _scripted_scan(torch.exp(-step * self.logs.exp()), step * writes.unsqueeze(2) * h.unsqueeze(-1), reads)
        added: Tensor = x + self.leave((states + self.skip * h) * functional.silu(gate))
        return added


class SelectiveStateDecoder(nn.Module):
    """Two such blocks between an embedding and a head, for any number of tokens."""

    def __init__(self, width: int = 32, vocabulary: int = 100) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(SelectiveStateBlock(width), SelectiveStateBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.blocks(self.table(ids))))
        return scores
