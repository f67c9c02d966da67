"""ThinK: of each head's keys, the channels stay that queries meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Cacher, Card
from trimtab.formats.bitstream import pack_bits, unpack_bits
from trimtab.formats.cache import Pair
from trimtab.parts.cache_grid import halved


@dataclass(frozen=True)
class Channels:
    """Some channels of a tensor `[..., tokens, size]`, as floats; the others read as zeros.

    Fields:
        half: the kept channels, fp16 `[..., tokens, kept]`.
        mask: one bit for each channel of each head, in bytes.
        size: channels there were.
    """

    half: Tensor
    mask: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of channels and mask."""
        return 2 * self.half.numel() + self.mask.numel()

    def dense(self) -> Tensor:
        """The original's stand-in, fp32."""
        heads = self.half.shape[:-2]
        mask = unpack_bits(self.mask, 1, heads.numel() * self.size).reshape(*heads, 1, self.size).bool()
        full = torch.zeros(*self.half.shape[:-1], self.size)
        return full.masked_scatter(mask.expand_as(full), self.half.float())


@dataclass(frozen=True)
class ThinK(Cacher):
    """Drop the channels of keys that change the products with queries least, head by head: least |q_j|_2 |k_j|_2.

    The products of a head are sum_j q_j k_j^T over channels j, q_j the column of the last queries and k_j that of the
    keys; leaving a channel out changes them by q_j k_j^T, whose Frobenius norm is |q_j|_2 |k_j|_2. The share `prune`
    (lambda) of the channels with the least of it goes, the others and all values stay in 16 bits. The newest tokens,
    at most `residual`, keep all channels. Query heads that share keys count as one head with all their queries.

    Args:
        prune: share of the channels of keys that are dropped (paper's lambda: 0.4).
        observed: last tokens of a window whose queries are looked at (paper's S_obs: 32).
        residual: tokens of a window; the newest 1 to so many keep all channels (paper: 32 recent tokens).

    Raises:
        UserError: a share below 0, or of 1 and more.

    Reference: Xu et al. 2024, arXiv:2407.21018, section 3.2 and algorithm 1; S_obs and recent tokens from section 4.
    Departures: a window is pruned when it is full, by the queries at its own end, where the paper prunes the whole
        prompt once, by the queries at the prompt's end: a text then gives the same outputs, however it was cut. No
        tokens are evicted. Products over channels that are left out are zeros here, where they are not computed there.

    >>> keys = torch.tensor([[3.0, 1.0, 0.0, 2.0], [3.0, 1.0, 0.0, 2.0]])
    >>> stored = ThinK(prune=0.5).store(keys, keys, queries=torch.tensor([[0.1, 1.0, 5.0, 1.0]] * 2))
    >>> stored.keys.dense()[0], stored.nbytes
    (tensor([0., 1., 0., 2.]), 25)
    """

    prune: float = 0.4
    observed: int = 32
    residual: int = 128

    card = Card(
        "think",
        catalogue=(261,),
        paper="arXiv:2407.21018",
        claim="With 40 % of the channels of keys dropped, those that queries meet least, products of queries and keys "
        "and the perplexity are nearer the original's than with channels dropped by the keys' norm or at random.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def store(self, keys: Tensor, values: Tensor, *, queries: Tensor) -> Pair:
        """Keys and values `[..., tokens, channels]` of a window, and queries `[..., rows, channels]`."""
        heads = queries.shape[-2] // keys.shape[-2]
        return Pair(self.thin(keys, self.score(keys, queries[..., -self.observed * heads :, :])), halved(values))

    def score(self, keys: Tensor, queries: Tensor) -> Tensor:
        """What leaving out each channel changes, `[..., channels]`."""
        return queries.float().norm(dim=-2) * keys.float().norm(dim=-2)

    def thin(self, keys: Tensor, score: Tensor) -> Channels:
        """Keys without the channels of the least score `[..., channels]`."""
        size = keys.shape[-1]
        if not 0 <= self.prune < 1:
            raise UserError(
                f"think was given prune={self.prune} for keys of {size} channels; it is a share from 0 to below 1"
            )
        mask = torch.ones_like(score, dtype=torch.bool)
        mask.scatter_(-1, score.argsort(dim=-1)[..., : int(size * self.prune)], False)
        half = halved(keys).half[mask.unsqueeze(-2).expand_as(keys)]
        return Channels(half.reshape(*keys.shape[:-1], -1), pack_bits(mask, 1), size)
