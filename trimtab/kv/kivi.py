"""KIVI: keys rounded channel by channel, values token by token, the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Coded, Stored

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

    def store(self, keys: Tensor, values: Tensor) -> Stored:
        """Keys and values `[..., tokens, channels]` of whole windows."""
        if not (1 <= self.bits <= 8 and self.group >= 1):
            found = f"bits={self.bits} and group={self.group} for keys {list(keys.shape)}"
            raise UserError(f"kivi was given {found}; bits are 1 to 8, and a group has at least one member")
        return Stored(self._coded(keys, self.key_axis), self._coded(values, self.value_axis))

    def _coded(self, x: Tensor, axis: Axis) -> Coded:
        x = x.float().transpose(-1, -2) if axis == "channel" else x.float()
        cols, top = x.shape[-1], float((1 << self.bits) - 1)
        padded = torch.arange(-(-cols // self.group) * self.group).clamp_max(
            cols - 1
        )  # repeats the last of a short group
        groups = x[..., padded].unflatten(-1, (-1, self.group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step, low = (t.clamp(-65504, 65504).half().float() for t in ((high - low) / top, low))
        codes = ((groups - low) / torch.where(step == 0, 1.0, step)).clamp(0, top).round()
        codes = codes.flatten(-2)[..., :cols]
        return Coded.of(codes, self.bits, self.group, step.squeeze(-1), low.squeeze(-1), axis == "channel")
