"""SimQ-NAS: shape and bits at once against one after the other, and against 8 bits everywhere."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Domain, Genome, Knob
from trimtab.core.level import Int, parse_level
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.random_search import RandomSearch
from trimtab.nas.simq_nas import SimQNAS
from trimtab.parts.fronts import front, hypervolume, table
from trimtab.parts.protocol import beside, improvement
from trimtab.quant.rtn import RTN
from trimtab.tasks.digits import digits

WIDTH, BLOCKS, HIDDEN, EVALUATIONS = 32, 3, (16, 32, 64), 60
LEVELS = ("2b/row", "3b/row", "4b/row", "8b/row")


def domain(levels: tuple[str, ...]) -> Domain:
    """Depth, and of each block the width of its feed-forward layer and its level."""
    knobs = [Knob("depth", (1, 2, 3), "depth")]
    for i in range(BLOCKS):
        there = (("depth", frozenset(range(i, BLOCKS))),)
        knobs += [Knob(f"hidden {i}", HIDDEN, "width", there), Knob(f"level {i}", levels, "level", there)]
    return Domain(tuple(knobs))


DOMAIN = domain(LEVELS)

CLAIM = Claim(
    method="simq-nas",
    statement="A joint search of shape and bits covers more of the front of error and size than one after the other, "
    "and than a search of shapes at 8 bits, at equal evaluations.",
    source="Nandakumar et al. 2023, arXiv:2312.13301, section 4",
    figure="models up to 3.44 times smaller than quantised to 8 bits, without loss of accuracy",
    setting="An elastic transformer over the rows of digits (1 to 3 blocks of width 32, feed-forward widths of 16, 32 "
    "or 64, 2 to 8 bits a block, rounded to nearest), trained with random sub-networks; 60 evaluations on the search "
    "images. One after the other: 30 evaluations of shapes at 8 bits, then levels on the front's shapes.",
    metric="share of the volume of error below 90 % and bytes below the largest; unseen: that front on test images; "
    "improvement: of the best within the median bytes of 60 random networks of the same weights on their mean, in "
    "percent of its accuracy",
    checks=(
        Check("joint above sequential", "joint", ">", "sequential"),
        Check("joint above 8 bits everywhere", "joint", ">", "int8"),
        Check("unseen images: joint above sequential", "joint_unseen", ">", "sequential_unseen"),
        Check("unseen images: joint above 8 bits everywhere", "joint_unseen", ">", "int8_unseen"),
        *beside(),
    ),
    seeds=(0, 1, 2, 3, 4),
)


class Block(nn.Module):
    """Attention and a feed-forward layer whose first channels alone may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN[-1]), nn.Linear(HIDDEN[-1], WIDTH)

    def weights(self, hidden: int) -> dict[str, Tensor]:
        """The matrices of a width."""
        return {
            "mix": self.mix.weight,
            "out": self.out.weight,
            "up": self.up.weight[:hidden],
            "down": self.down.weight[:, :hidden],
        }

    def run(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The block with these matrices."""
        hidden = len(weights["up"])
        q, k, v = functional.linear(self.norms[0](x), weights["mix"], self.mix.bias).chunk(3, -1)
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v)]
        seen = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + functional.linear(seen, weights["out"], self.out.bias)
        wide = functional.gelu(functional.linear(self.norms[1](x), weights["up"], self.up.bias[:hidden]))
        return x + functional.linear(wide, weights["down"], self.down.bias)


class Elastic(nn.Module):
    """Rows of an image as tokens, blocks, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.place = nn.Linear(8, WIDTH), nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 10)

    def run(self, images: Tensor, weights: list[dict[str, Tensor]]) -> Tensor:
        """Logits of the sub-network with these matrices."""
        x = self.entry(images[:, 0]) + self.place
        for block, matrices in zip(self.blocks, weights, strict=False):
            x = block.run(x, matrices)
        return self.head(x.mean(1))

    def plain(self, setting: dict[str, Any]) -> list[dict[str, Tensor]]:
        """Matrices of a shape, in floating point."""
        return [self.blocks[i].weights(setting[f"hidden {i}"]) for i in range(setting["depth"])]


def trained(seed: int) -> Elastic:
    """The super-network: the largest, the smallest and one random sub-network a step."""
    torch.manual_seed(seed)
    model, rng = Elastic(), Random(seed)
    images, labels = digits("train")
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    ends = [DOMAIN.setting(DOMAIN.largest()), DOMAIN.setting(DOMAIN.smallest())]
    for step in range(250):
        items = torch.randint(len(labels), (48,))
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 250)
        optimiser.zero_grad()
        for setting in (*ends, DOMAIN.setting(DOMAIN.random(rng))):
            functional.cross_entropy(model.run(images[items], model.plain(setting)), labels[items]).backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def evaluated(model: Elastic, setting: dict[str, Any]) -> dict[str, float]:
    """Errors in percent, and bytes of the blocks' matrices."""
    size, weights = 0, []
    for i, matrices in enumerate(model.plain(setting)):
        level = parse_level(setting[f"level {i}"])
        assert isinstance(level, Int)
        packed = {name: RTN().solve(weight.contiguous(), level) for name, weight in matrices.items()}
        size += sum(matrix.nbytes for matrix in packed.values())
        weights.append({name: matrix.dense() for name, matrix in packed.items()})
    found = {"bytes": float(size)}
    for name, split in (("error", "search"), ("unseen", "test")):
        images, labels = digits(split)
        found[name] = 100 - 100 * float((model.run(images, weights).argmax(1) == labels).double().mean())
    return found


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one super-network."""
    model = trained(seed)
    corner = np.array([90.0, evaluated(model, DOMAIN.setting(DOMAIN.largest()))["bytes"] * 1.001])
    found = {}
    searches: tuple[tuple[str, Searcher, Domain], ...] = (
        ("joint", SimQNAS(), DOMAIN),
        ("sequential", SimQNAS(joint=False), DOMAIN),
        ("int8", SimQNAS(), domain(LEVELS[-1:])),
    )
    for kind, searcher, space in searches:
        trials = searched(model, searcher, space, seed)
        volumes = []
        for error in ("error", "unseen"):
            chosen = front(table(trials, ("error", "bytes")))
            volumes.append(hypervolume(table([trials[i] for i in chosen], (error, "bytes")), corner) / corner.prod())
        found |= {kind: volumes[0], f"{kind}_unseen": volumes[1]}
        if kind == "joint":
            best = trials
    drawn = searched(model, RandomSearch(), DOMAIN, seed)
    limit = float(np.median([trial.values["bytes"] for trial in drawn]))
    within = [trial for trial in drawn if trial.values["bytes"] <= limit]
    for name, trials in (("", best), ("random_", drawn)):
        met = [trial for trial in trials if trial.values["bytes"] <= limit]
        error = min(met, key=lambda trial: trial.values["error"]).values["unseen"]
        found[f"{name}improvement"] = improvement(100 - error, [100 - trial.values["unseen"] for trial in within])
    return found


def searched(model: Elastic, searcher: Searcher, space: Domain, seed: int) -> list[Trial]:
    """A search of a space, which may be smaller than the evaluations."""
    trials: list[Trial] = []
    known: dict[Genome, dict[str, float]] = {}
    while len(trials) < EVALUATIONS:
        hunt = Hunt(space, tuple(trials), ("error", "bytes"), seed=seed)
        new = searcher.ask(hunt, min(5, EVALUATIONS - len(trials)), rng=Random(f"{seed}/{len(trials)}"))
        if not new:
            break
        for genome in new:
            known[genome] = evaluated(model, space.setting(genome))
            trials.append(Trial(genome, known[genome]))
    return trials
