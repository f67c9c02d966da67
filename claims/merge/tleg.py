"""TLEG: from two stored blocks, models of several depths start better than from blocks of a trained model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.claim import Check, Claim
from trimtab.core.recipe import block_of
from trimtab.merge.tleg import TLEG
from trimtab.tasks import domains as d

AUXILIARY = 4
DEPTHS = (3, 5, 6)
RATE = 1e-3

CLAIM = Claim(
    method="tleg",
    statement="One stored pair of blocks, learnt by distillation, initialises transformers of three depths that it "
    "was not learnt at; they start above models made of two blocks of a trained transformer and above scratch, and "
    "are above them after an epoch.",
    source="Xia et al. 2024, arXiv:2312.05614, tables 1 and 2",
    figure="about half of the training; +6.87 % iNaturalist 2019, +7.66 % CIFAR-100 over other ways to initialise",
    setting="Transformers as wide as the shipped image transformer, which is the teacher (half of the target); the "
    "pair is learnt in 20 epochs over digits as an auxiliary model of 4 blocks, and expanded to 3, 5 and 6. Against "
    "it, at equal storage: the shipped transformer's embedding and head with its first two blocks, the rest random "
    "(first) or each of the two repeated (repeated). One epoch of tuning for all; 300 test images, mean over depths.",
    metric="accuracy before tuning (start) and after an epoch",
    checks=(
        Check("before tuning: above two blocks, the rest random", "start_expanded", ">", "start_first"),
        Check("before tuning: above two repeated blocks", "start_expanded", ">", "start_repeated"),
        Check("after an epoch: above scratch", "expanded", ">", "scratch"),
        Check("after an epoch: above two blocks, the rest random", "expanded", ">", "first"),
        Check("after an epoch: above two repeated blocks", "expanded", ">", "repeated"),
        Check("in half of the storage of the model that it was learnt as", "storage", "<=", 0.6),
    ),
)

State = Mapping[str, Tensor]


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one learning of the pair."""
    lab.hashes |= {"pocket-vit": d.base_hash()}
    parents, shipped = learnt(seed), d.base_state()
    made: dict[str, Callable[[nn.Module, int], State]] = {
        "expanded": lambda model, depth: expanded(parents, model, depth),
        "scratch": lambda model, depth: state_of(model),
        "first": lambda model, depth: placed(shipped, model, [min(i, 2) for i in range(depth)]),
        "repeated": lambda model, depth: placed(shipped, model, [2 * i // depth for i in range(depth)]),
    }
    found = dict.fromkeys((*made, *(f"start_{name}" for name in made)), 0.0)
    for depth in DEPTHS:
        for name, start in made.items():
            model = vit(depth, 100 + seed)
            model.load_state_dict({**model.state_dict(), **start(model, depth)})
            found[f"start_{name}"] += accuracy(model) / len(DEPTHS)
            train(list(model.parameters()), lambda x, m=model: m(pixel_values=x).logits, 1, RATE, seed)
            found[name] += accuracy(model) / len(DEPTHS)
    auxiliary = vit(AUXILIARY, seed)
    auxiliary.load_state_dict({**auxiliary.state_dict(), **expanded(parents, auxiliary, AUXILIARY)})
    stored, whole = (sum(t.numel() for s in states for t in s.values()) for states in (parents, [state_of(auxiliary)]))
    return {**found, "auxiliary": accuracy(auxiliary), "storage": stored / whole}


def vit(depth: int, seed: int) -> nn.Module:
    """A transformer as the shipped one, of another depth and with random weights."""
    import copy

    from transformers import ViTForImageClassification

    torch.manual_seed(seed)
    config = copy.deepcopy(d.base_model().config)
    config.num_hidden_layers = depth
    return ViTForImageClassification(config)


def learnt(seed: int) -> tuple[State, State]:
    """A and what goes along with it, and B, learnt together as an expanded model of the auxiliary depth."""
    first = state_of(vit(1, seed))
    second = {n: 0.1 * t * (t.dim() > 1) for n, t in state_of(vit(1, seed + 50)).items() if block_of(n)}
    parents = tuple({n: nn.Parameter(t.clone()) for n, t in state.items()} for state in (first, second))
    model = vit(AUXILIARY, seed)

    def run(images: Tensor) -> Tensor:
        state = expanded(parents, model, AUXILIARY)
        return torch.func.functional_call(model, dict(state), kwargs={"pixel_values": images}).logits

    train([p for parent in parents for p in parent.values()], run, 20, 1.5e-3, seed, taught=True)
    a, b = ({n: p.detach() for n, p in parent.items()} for parent in parents)
    return a, b


def expanded(parents: Sequence[State], model: nn.Module, depth: int) -> State:
    """The state of a model of that depth."""
    found = {}
    for name, _ in model.named_parameters():
        if block := block_of(name):
            stored = f"{block[0]}.0.{block[2]}"
            found[name] = TLEG().merge([parent[stored] for parent in parents], None, block=(block[1], depth))
        else:
            found[name] = parents[0][name]
    return found


def placed(source: State, model: nn.Module, blocks: Sequence[int]) -> State:
    """The state of a model whose block i is the source's block `blocks[i]`; 2 and more: as it was."""
    found = {}
    for name, own in state_of(model).items():
        block = block_of(name)
        if block is None:
            found[name] = source[name]
        else:
            found[name] = own if blocks[block[1]] > 1 else source[f"{block[0]}.{blocks[block[1]]}.{block[2]}"]
    return found


def state_of(model: nn.Module) -> State:
    """A model's weights."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def train(
    params: list[nn.Parameter],
    run: Callable[[Tensor], Tensor],
    epochs: int,
    rate: float,
    seed: int,
    taught: bool = False,
) -> None:
    """AdamW with warm-up and a linear fall of the rate; `taught`: half of the target is the teacher's answer."""
    images, labels = d.data("plain", "train")
    rng, steps = torch.Generator().manual_seed(seed), epochs * -(-len(images) // 64)
    optimiser = torch.optim.AdamW(params, lr=rate, weight_decay=0.05)
    step = 0
    for _ in range(epochs):
        for picked in torch.randperm(len(images), generator=rng).split(64):
            optimiser.param_groups[0]["lr"] = rate * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
            logits = run(images[picked])
            loss = functional.cross_entropy(logits, labels[picked], label_smoothing=0.05)
            if taught:
                answer = teacher()[picked].log_softmax(1)
                loss = (
                    loss + functional.kl_div(logits.log_softmax(1), answer, log_target=True, reduction="batchmean")
                ) / 2
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            step += 1


@functools.cache
def teacher() -> Tensor:
    """The shipped transformer's logits of the training images."""
    return d.logits(d.base_state(), d.data("plain", "train")[0])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are named rightly."""
    images, labels = d.data("plain", "test")
    return float((model.eval()(pixel_values=images).logits.argmax(1) == labels).float().mean())
