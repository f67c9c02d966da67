"""Low-Rank Transformer against Linformer: thin weights for short sequences, thin attention for long ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Rank
from trimtab.engine.run import seconds_of
from trimtab.formats.structure import replay
from trimtab.lowrank.greenformers import LRT

WIDTH, HEADS, INNER, PROJECTED = 256, 4, 1024, 64
SHORT, LONG = 128, 2048
STEPS, ITEMS, LENGTH, RATE = 40, 4, 128, 5e-4

CLAIM = Claim(
    method="lrt",
    statement="At about half the parameters a low-rank transformer is smaller and faster than a dense one on short "
    "inputs and stays near its quality; Linformer, whose attention is low-rank in length, overtakes it on long ones.",
    source="Cahyawijaya 2021, arXiv:2108.10808, chapters 3-5",
    figure="LRT for up to 512 tokens, Linformer from 512 on; over 30 % lower cost of developing BERT-base",
    setting="Time: one encoder layer (width 256, inner 1,024), dense, factored at half the parameters, and Linformer "
    "with 64 projected positions, batch 4, 128 and 2,048 tokens. Quality: the shipped language model with every linear "
    "of its blocks factored at half its parameters; 40 AdamW steps on 4 windows of 128 tokens; 32 test windows of 256.",
    metric="seconds of a forward; loss: cross-entropy a token, nats; size: parameters as a share of dense",
    checks=(
        Check("LRT has at most 55 % of the parameters", "size", "<=", 0.55),
        Check("short inputs: LRT faster than dense", "short_lrt", "<", "short_dense"),
        Check("short inputs: LRT faster than Linformer", "short_lrt", "<", "short_linformer"),
        Check("long inputs: Linformer faster than LRT", "long_linformer", "<", "long_lrt"),
        Check("tuned LRT's loss within 10 % of dense, tuned or not", "loss_ratio", "<=", 1.1),
    ),
)


class Layer(nn.Module):
    """A transformer encoder layer; with `projected`, keys and values are projected in length, as Linformer has it."""

    def __init__(self, rng: torch.Generator, projected: int = 0, length: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.along = nn.Parameter(torch.randn(projected, length, generator=rng) / length**0.5) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.along is not None:
            k, v = self.along @ k, self.along @ v
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(self.up(self.norm2(x)).relu())


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Times of random layers, and losses of one draw of tuning and test windows."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name, length in (("short", SHORT), ("long", LONG)):
        x = torch.randn(4, length, WIDTH, generator=rng)
        layers = {"dense": Layer(rng), "lrt": _thin(Layer(rng), ("q", "k", "v", "o", "up", "down"))}
        layers["linformer"] = Layer(rng, PROJECTED, length)
        for kind, layer in layers.items():
            found[f"{name}_{kind}"] = _seconds(layer, x)
    sizes = [sum(p.numel() for p in layers[kind].parameters()) for kind in ("lrt", "dense")]
    found["size"] = sizes[0] / sizes[1]

    bench = lab.bench("pocket-lm", seed, items=32)
    test = bench.test.inputs["input_ids"]
    train = bench.task.batch("calibration", STEPS * ITEMS, seed).inputs["input_ids"]
    paths = [s.path for s in bench.modelmap.sites if s.block is not None]
    for name in ("dense", "lrt"):
        model = bench.stream().whole_model()
        if name == "lrt":
            _thin(model, paths)
        found[f"untuned_{name}"] = _loss(model, test)
        _tune(model, train)
        found[f"loss_{name}"] = _loss(model, test)
    return found | {"loss_ratio": found["loss_lrt"] / min(found["untuned_dense"], found["loss_dense"])}


def _thin(model: nn.Module, paths: Any) -> nn.Module:
    """Factor linears at half their parameters."""
    for path in paths:
        old = model.get_submodule(path)
        weight, bias = old.weight.detach(), old.bias
        rank = weight.numel() // (2 * sum(weight.shape))
        packed = LRT().solve(weight, Rank(rank), rng=torch.Generator().manual_seed(0))
        replay(model, [{"op": "factor", "path": path, "rank": rank}])
        new = model.get_submodule(path)
        with torch.no_grad():
            new.right.weight.copy_(packed.tensors["right"])
            new.left.weight.copy_(packed.tensors["left"])
            if bias is not None:
                new.left.bias.copy_(bias)
    return model


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    parts = [
        nn.functional.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        for x in ids.split(8)
    ]
    return float(torch.stack(parts).mean())


def _tune(model: nn.Module, ids: Tensor) -> None:
    parameters = [p.requires_grad_() for p in model.parameters()]
    adam = torch.optim.AdamW(parameters, RATE)
    for step in range(STEPS):
        x = ids[step * ITEMS % len(ids) :][:ITEMS, :LENGTH]
        adam.zero_grad()
        nn.functional.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()


@torch.no_grad()
def _seconds(layer: nn.Module, x: Tensor) -> float:
    return seconds_of(lambda: layer(x), repeats=7)
