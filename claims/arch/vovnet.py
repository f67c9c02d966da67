"""VoVNet: one-shot aggregation against a dense block of as much arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.arch.vovnet import VoVNet
from trimtab.core.claim import Check, Claim
from trimtab.parts.convolving import ConvNorm
from trimtab.tasks.contest import Contest, forward, in_turns, network, operations, touched

INPUTS, GROWTH, LAYERS = 24, 12, 12
OUTPUTS = INPUTS + LAYERS * GROWTH

CLAIM = Claim(
    method="vovnet",
    statement="At as much arithmetic, layers gathered once take less time and touch less memory than dense ones.",
    source="Lee et al. 2019, arXiv:1904.09730, section 3 and table 1",
    figure="detectors 2 times as fast as with DenseNet, and 1.6 to 4.1 times less energy",
    setting="The paper's pair: a dense block of 12 layers, growth 12, on 24 channels, and 5 layers of 43 channels "
    "gathered to the dense block's 168; both of convolution, norm and ReLU. Trained on patches of 4 x 4 of 2,000 of "
    "CIFAR-10's images, 200 steps; timed on 8 images of 32 x 32 places, the processor's seconds, one thread, in turns.",
    metric="accuracy on 2,000 test images; of a forward of the block: seconds, and bytes that convolutions touch",
    checks=(
        Check("no more arithmetic", "osa_operations", "<=", "dense_operations"),
        Check("less time", "osa_seconds", "<", "dense_seconds"),
        Check("less memory touched", "osa_bytes", "<", "dense_bytes"),
        Check("the accuracy is not lower", "osa", ">=", "dense"),
    ),
    seeds=tuple(range(4)),
    needs=("data",),
)


class DenseBlock(nn.Module):
    """Every layer reads all before it: x_i = C_i [x_0, ..., x_{i-1}]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (INPUTS + i * GROWTH for i in range(LAYERS))
        self.layers = nn.ModuleList(nn.Sequential(ConvNorm(w, GROWTH, 3), nn.ReLU()) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        """All layers' outputs beside the input."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed)
    makes = {"osa": lambda: VoVNet(layers=5, width=43).build(INPUTS, OUTPUTS), "dense": DenseBlock}
    blocks = {name: make().eval() for name, make in makes.items()}
    x = torch.randn(8, INPUTS, 32, 32)
    found = {f"{n}_seconds": s for n, s in in_turns({n: forward(b, x) for n, b in blocks.items()}).items()}
    for name, make in makes.items():
        found |= {f"{name}_operations": operations(blocks[name], x), f"{name}_bytes": touched(blocks[name], x)}
        found[name] = contest.accuracy(contest.train(lambda make=make: network(INPUTS, [make()], OUTPUTS, patch=4)))
    return found
