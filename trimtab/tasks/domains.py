"""Digits in other clothes: tasks that one small model is tuned to, so that there is something to merge.

Every domain shows scikit-learn's digits in another way, with the same ten classes. The base, `pocket-vit`, knows the
plain one. A tuned model is kept in a folder of this process, so that several claims share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.core.method import Merger, TaskMerger
from trimtab.core.recipe import block_of
from trimtab.tasks.digits import BLACK, digits

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]


def _striped(images: Tensor) -> Tensor:
    striped = images.clone()
    striped[..., ::3] = BLACK
    return striped


def _bent(images: Tensor, turn: float, shear: float) -> Tensor:
    """Turned by an angle in degrees, and sheared."""
    import math

    import torch
    from torch.nn import functional

    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    maps = torch.tensor([[cos, -sin + shear, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images - BLACK, grid, align_corners=False) + BLACK


DOMAINS: dict[str, Callable[[Any], Any]] = {
    "striped": _striped,
    "shifted": lambda images: images.roll(2, 3),
    "turned": lambda images: _bent(images, 40, 0.0),
    "sheared": lambda images: _bent(images, 0, -0.7),
    "faded": lambda images: 0.35 * images + 0.4,
}


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned: a plain loop of AdamW with a linear fall of the rate.

    Fields:
        epochs: passes over the training images.
        rate: first learning rate.
        decay: weight decay.
        batch: images a step.
        smoothing: share of the label that is spread over all classes.
    """

    epochs: int = 8
    rate: float = 5e-4
    decay: float = 0.01
    batch: int = 64
    smoothing: float = 0.0


@functools.cache
def base_model() -> nn.Module:
    """The shipped image transformer, in fp32 and evaluation mode; not to be changed."""
    from trimtab.models.source import open_source

    return open_source("pocket-vit").materialise().eval()


def base_state() -> State:
    """The base's weights."""
    return {name: tensor.detach() for name, tensor in base_model().named_parameters()}


def base_hash() -> str:
    """Of the base's weights, for records."""
    from trimtab.models.source import open_source

    return open_source("pocket-vit").hash


def data(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a domain; `plain` is the digits as they are."""
    images, labels = digits(split)
    return (images if domain == "plain" else DOMAINS[domain](images)), labels


@functools.cache
def tuned(domains: tuple[str, ...], seed: int, tuning: Tuning = Tuning()) -> State:
    """The base tuned to the images of one domain, or of several together."""
    import copy

    import torch

    model = copy.deepcopy(base_model()).train()
    pairs = [data(domain, "train") for domain in domains]
    images, labels = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    rng = torch.Generator().manual_seed(1000 + seed)
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=tuning.rate, weight_decay=tuning.decay)
    epochs = max(1, tuning.epochs)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = tuning.rate * (1 - epoch / epochs)
        for picked in torch.randperm(len(images), generator=rng).split(tuning.batch):
            logits = model(pixel_values=images[picked]).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[picked], label_smoothing=tuning.smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The base's architecture with other weights."""
    import torch

    with torch.no_grad():
        return torch.func.functional_call(base_model(), dict(state), kwargs={"pixel_values": images}).logits


def accuracy(state: Mapping[str, Tensor], domain: str, split: str) -> float:
    """Share of a domain's images that are named rightly."""
    images, labels = data(domain, split)
    return float((logits(state, images).argmax(1) == labels).float().mean())


def mean_accuracy(state: Mapping[str, Tensor], split: str, domains: Sequence[str] = tuple(DOMAINS)) -> float:
    """Mean accuracy over domains."""
    return sum(accuracy(state, domain, split) for domain in domains) / len(domains)


def merged_state(
    method: Merger,
    parents: Sequence[State],
    base: State | None = None,
    weight: Sequence[float] | None = None,
    seed: int = 0,
) -> State:
    """Parents merged in memory, as the engine merges them."""
    from trimtab.engine.merge import Piece, merged

    count = len(parents)
    names = tuple(map(str, range(count)))
    weights = tuple(weight) if weight is not None else (float(getattr(method, "weight", 1.0)),) * count
    density = (float(getattr(method, "density", 1.0)),) * count
    blocks = {name: found[1] for name in parents[0] if (found := block_of(name))}
    deepest, behind = max(blocks.values()), list(parents[0]).index(list(blocks)[-1])
    merged_tensors = {}
    for i, (name, tensor) in enumerate(parents[0].items()):
        depth = blocks[name] / deepest if name in blocks else float(i > behind)
        block = (blocks.get(name, 0), deepest + 1)
        piece = Piece(name, tuple(tensor.shape), method, names, weights, density, depth, seed, block)
        root = base[name] if base is not None and method.needs_base() else None
        merged_tensors[name] = merged(piece, [p[name] for p in parents], root)
    return merged_tensors


def stored_share(method: TaskMerger, parents: Sequence[State], base: State) -> float:
    """Bytes of what each parent is made again of, as a share of the bytes of all parents; fp32."""
    whole = sum(t.numel() * t.element_size() for t in base.values())
    total = whole if method.restores_on_base() else 0
    for name, origin in base.items():
        shared, own = method.split([p[name] for p in parents], origin, weight=(1.0,) * len(parents))
        total += sum(t.numel() * t.element_size() for part in (shared, *own) for t in part.values())
    return total / (len(parents) * whole)


def best(
    methods: Sequence[Merger], parents: Sequence[State], base: State, domains: Sequence[str] = tuple(DOMAINS)
) -> tuple[Merger, State]:
    """Of several settings the one with the highest mean accuracy on the search images, and what it merges."""
    tried = [(method, merged_state(method, parents, base)) for method in methods]
    scores = [mean_accuracy(state, "search", domains) for _, state in tried]
    return tried[scores.index(max(scores))]
