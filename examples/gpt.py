"""A small GPT in ordinary PyTorch: RMSNorm, rotary positions, causal attention, GELU feed-forward.

Nothing here knows about structfly.  Dimensions: B sequences of T tokens, D = ``width``, H heads, V words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT.

    Attributes:
        vocabulary: number of tokens V.
        context: longest sequence T.
        width: features D of the residual stream.
        layers: number of blocks.
        heads: attention heads H; ``width / heads`` must be even.
        tied: let the head and the embedding share one weight [V, D].
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int
    tied: bool = True

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} with {self.heads} heads: the width must be a multiple of 2 * heads, "
                f"because rotary positions turn pairs of features; try width {2 * self.heads}"
            )


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]; cos and sin are [T, D / H / 2]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.attention(self.norm_attention(x), cos, sin)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return out


class GPT(nn.Module):
    """A decoder-only language model."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_tables(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """GPT-2's initialisation: standard deviation 0.02, less where a block adds to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        if isinstance(module, Attention):
            nn.init.normal_(module.proj.weight, std=residual)
        elif isinstance(module, Block):
            nn.init.normal_(module.down.weight, std=residual)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integer tokens [B, T] to logits [B, T, V]."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor, labels: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Cross-entropy of each next label, over tokens and labels [B, T]; labels of -100 are left out.

        Returns:
            A scalar, or the losses [B * (T - 1)] with ``reduction="none"``.
        """
        logits = self(tokens)[:, :-1, :].contiguous()
        targets = labels[:, 1:].contiguous()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction=reduction)


def rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_width / 2] of the angles position * 10000^(-2i / head_width)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angles = torch.outer(torch.arange(context), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the feature pairs (i, i + half) of x [B, H, T, D / H] by each position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
