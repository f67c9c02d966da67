"""Rounding of what a cache holds to grids that span groups of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.formats.cache import Coded, Part, Plain


def rounded(x: Tensor, bits: int, group: int, by_channel: bool) -> Coded:
    """Codes q = round((x - z) / s) of groups that each have a grid z = min x, s = (max x - min x) / (2^bits - 1).

    z and s are rounded to 16 bits before codes are chosen against them.

    Args:
        x: `[..., tokens, channels]`.
        bits: of a code, 1 to 8.
        group: numbers that share z and s.
        by_channel: a group is one channel's tokens; otherwise one token's channels.

    Raises:
        UserError: bits outside 1 to 8, or no group.

    >>> rounded(torch.tensor([[0.0, 1.0, 3.0, 3.0]]), 2, 4, by_channel=False).dense()
    tensor([[0., 1., 3., 3.]])
    """
    if not (1 <= bits <= 8 and group >= 1):
        found = f"bits={bits} and group={group} were given for {list(x.shape)}"
        raise UserError(f"{found}; bits are 1 to 8, and a group has at least one member")
    x = x.float().transpose(-1, -2) if by_channel else x.float()
    cols, top = x.shape[-1], float((1 << bits) - 1)
    padded = torch.arange(-(-cols // group) * group).clamp_max(cols - 1)  # repeats the last of a short group
    groups = x[..., padded].unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step, low = (t.clamp(-65504, 65504).half().float() for t in ((high - low) / top, low))
    codes = ((groups - low) / torch.where(step == 0, 1.0, step)).clamp(0, top).round()
    codes = codes.flatten(-2)[..., :cols]
    return Coded.of(codes, bits, group, step.squeeze(-1), low.squeeze(-1), by_channel)


def halved(x: Tensor) -> Plain:
    """In 16 bits; too large a number becomes the largest."""
    return Plain(x.clamp(-65504, 65504).half())


def kept(x: Tensor, bits: int, group: int, by_channel: bool) -> Part:
    """Rounded to codes of so many bits; at 16 bits as floats."""
    return halved(x) if bits == 16 else rounded(x, bits, group, by_channel)
