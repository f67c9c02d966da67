"""KIVI: keys rounded channel by channel, values token by token, the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Pair
from trimtab.parts.cache_grid import rounded

Axis = Literal["channel", "token"]


@dataclass(frozen=True)
class KIVI(Cacher):
    """Round to the grid that spans a group: q = round((x - z) / s), z = min x, s = (max x - min x) / (2^bits - 1).

    X' = q s + z stands for X. A group of keys is one channel over `group` tokens, for outliers of keys stay in few
    channels, and a grid that they share with others leaves those no points; a group of values is one token over
    `group` channels, for attention picks few tokens, and their errors then stay their own. The newest tokens, at most
    `residual` (R), stay as floats; when R are there, all of them are stored, and the next begins a new window.

    Args:
        bits: of a code (paper: 2, and 4).
        group: numbers that share z and s, which are stored in 16 bits each (paper's G: 32).
        residual: tokens of a window (paper's R: 128).
        key_axis, value_axis: `channel` groups a channel's tokens, `token` a token's channels (paper: channel, token).

    Raises:
        UserError: bits outside 1 to 8, or no group.

    Reference: Liu et al. 2024, arXiv:2402.02750, section 3.2 and algorithm 1; the defaults of the authors' code.
    Departures: values leave full precision together with the keys of their window, not one by one, so that 1 to R
        of them are exact where the paper keeps R. A prompt is read window by window, each seeing the windows before it
        as they are stored, where the paper's first pass sees all of a prompt exactly: the same text then gives the same
        outputs, however it was cut. z and s are rounded to 16 bits before codes are chosen against them.

    >>> import torch
    >>> keys, values = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0)).unbind()
    >>> stored = KIVI(bits=4).store(keys, values)
    >>> stored.nbytes, [bool((a - b).abs().max() < 0.3) for a, b in zip(stored.dense(), (keys, values))]
    (10240, [True, True])
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    key_axis: Axis = "channel"
    value_axis: Axis = "token"

    card = Card(
        "kivi",
        catalogue=(387,),
        paper="arXiv:2402.02750",
        claim="At 2 bits, keys by channel and values by token give a perplexity below the other choices of axes at "
        "equal bytes, near that of a cache in 16 bits.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values `[..., tokens, channels]` of whole windows."""
        by_channel = [axis == "channel" for axis in (self.key_axis, self.value_axis)]
        pairs = zip((keys, values), by_channel, strict=True)
        return Pair(*(rounded(x, self.bits, self.group, across) for x, across in pairs))
