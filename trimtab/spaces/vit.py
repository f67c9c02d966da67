"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): elastic width, depth, heads and hidden units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.space import Depth, Heads, Width

SIZE = 16  # channels of a head


class Attention(nn.Module):
    """Attention of every patch to every patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = Heads(2, 3, 4)
        self.q, self.k, self.v = (nn.Linear(width, self.heads * SIZE) for _ in range(3))
        self.out = nn.Linear(self.heads * SIZE, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, patches, width] to the same."""
        q, k, v = (layer(x).unflatten(2, (self.heads, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = Width(64, 128, 192)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, patches, width] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, blocks, the mean over patches, and a linear layer."""

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        width = Width(32, 48, 64)
        patch = max(2, size // 8)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in Depth(3, 4, 5, name="blocks")))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, size, size] to logits [n, classes]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def network(channels: int = 3, classes: int = 10, size: int = 32) -> ViT:
    """The space's network."""
    return ViT(channels, classes, size)
