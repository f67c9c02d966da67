"""Pieces of convolutional blocks: a convolution with its norm, the two as one, squeeze-and-excite, a residual branch.

Shapes are those of images, `[n, channels, h, w]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError


class ConvNorm(nn.Sequential):
    """A convolution without bias and a batch norm; the output is as large as the input over the stride.

    Args:
        inputs, outputs: channels.
        kernel: side, odd; two numbers for height and width.
        stride, groups, dilation: as of the convolution.
        scale: of the norm at the start; 0 makes a residual branch begin as nothing.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        scale: float = 1.0,
    ) -> None:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (dilation * (sides[0] // 2), dilation * (sides[1] // 2))
        conv = nn.Conv2d(inputs, outputs, sides, stride, pads, dilation, groups, bias=False)
        norm = nn.BatchNorm2d(outputs)
        nn.init.constant_(norm.weight, scale)
        super().__init__(conv, norm)

    def merged(self) -> nn.Conv2d:
        """The one convolution that computes the same out of training."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return with_norm(conv, norm)


def with_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution and the batch norm behind it as one: W' = W g / s, b' = (b - m) g / s + t, s = sqrt(v + eps).

    g and t are the norm's scale and shift, m and v its running mean and variance.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
    return convolution(
        conv.weight * factor[:, None, None, None], (bias - norm.running_mean) * factor + norm.bias, like=conv
    )


def pointwise_product(second: nn.Conv2d, first: nn.Conv2d) -> nn.Conv2d:
    """A convolution and a pointwise one behind it as one: W = W2 W1, b = W2 b1 + b2."""
    assert second.kernel_size == (1, 1) and first.bias is not None and second.bias is not None
    matrix = second.weight[:, :, 0, 0]
    weight = torch.einsum("oi,ickl->ockl", matrix, first.weight)
    return convolution(weight, matrix @ first.bias + second.bias, like=first)


def convolution(weight: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    """A convolution of these numbers, with stride, padding and groups of another."""
    outputs, inputs = len(weight), weight.shape[1] * like.groups
    sides = (weight.shape[2], weight.shape[3])
    made = nn.Conv2d(
        *(inputs, outputs, sides, like.stride, like.padding, like.dilation, like.groups),  # type: ignore[arg-type]
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        assert made.bias is not None
        made.bias.copy_(bias)
    return made.train(like.training)


class SqueezeExcite(nn.Module):
    """Every channel is scaled by a gate that sees the mean of all: x * gate(W2 relu(W1 mean(x))).

    Args:
        channels: of the input.
        hidden: rows of W1.
        gate: what maps onto 0..1.
    """

    def __init__(self, channels: int, hidden: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """The scaled input."""
        return x * self.gate(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.branch(x)


class FeedForward(nn.Sequential):
    """Two pointwise convolutions with their norms, a ReLU between; as a residual branch it begins as nothing."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(ConvNorm(channels, hidden), nn.ReLU(), ConvNorm(hidden, channels, scale=0.0))


def same_width(what: str, inputs: int, outputs: int) -> int:
    """The one width of a block that adds its input to its output.

    Raises:
        UserError: two widths were asked for.
    """
    if inputs != outputs:
        raise UserError(
            f"{what} from {inputs} to {outputs} channels was asked for; it adds its input to its output, so that both "
            "must be equal"
        )
    return at_least_one(what, inputs)


def at_least_one(what: str, *numbers: int) -> int:
    """The first of some numbers that must be at least 1.

    Raises:
        UserError: one is below.
    """
    if min(numbers) < 1:
        raise UserError(f"{what} was asked for {', '.join(map(str, numbers))}; each must be at least 1")
    return numbers[0]


def odd(what: str, *kernels: int) -> None:
    """Check sides of kernels.

    Raises:
        UserError: one is even or below 1.
    """
    for kernel in kernels:
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"{what} was asked for a kernel of side {kernel}; it takes odd sides from 1 on")
