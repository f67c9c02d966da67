"""What happens to a row of activations between two products with a weight.

- `norm`: `x / sqrt(mean(x^2) + eps) * weight`, or centred first, and then with a bias.
- `rotate`: channels `c` and `c + pairs` of a head turn by the angle of their pair at the token's position.
- `activate`: `f(x)`, times a second operand where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def norm(x: Tensor, rms: bool, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int = 1) -> Tensor:
    """Rows of `x [m, width]` normed, in `groups` runs of channels that share `weight` and `bias [width / groups]`."""
    y = x.reshape(len(x), groups, -1)
    y = y if rms else y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).reshape(x.shape)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads `x [m, heads, size]` turned by `cosine, sine [m, pairs]`; channels beyond the pairs stay."""
    pairs = cosine.shape[1]
    a, b, rest = x.split((pairs, pairs, x.shape[2] - 2 * pairs), 2)
    c, s = cosine[:, None], sine[:, None]
    return torch.cat((a * c - b * s, b * c + a * s, rest), 2)


def activate(kind: str, x: Tensor, times: Tensor | None = None) -> Tensor:
    """`kind` is none, relu, silu, gelu or gelu_tanh."""
    y = {
        "none": lambda t: t,
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    }[kind](x)
    return y if times is None else y * times
