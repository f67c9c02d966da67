"""M-SMoE: aligned merging by use above plain averaging and above leaving experts out, at equal experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Width
from trimtab.core.method import Scene
from trimtab.core.modelmap import ModelMap, trace
from trimtab.engine.experts import routing
from trimtab.merge.m_smoe import MSMoE, dominants
from trimtab.tasks.text import stdlib_documents

LENGTH, EXPERTS, HALF = 64, 8, Width(0.5)

CLAIM = Claim(
    method="m-smoe",
    statement="Of a trained mixture of experts half of the experts are left: merged into the most used ones, aligned "
    "and weighted by use, they lose less than averaged, unaligned, replaced by the most used or left out.",
    source="Li et al. 2023, arXiv:2310.01334, tables 2 and 4",
    figure="up to 80 % less memory with virtually no loss, after distillation",
    setting="A language model on bytes of the standard library's sources (two blocks 64 wide, 8 experts, two for each "
    "byte), trained for 300 steps; use and logits from 32 windows of the training text, 64 test windows of 64 bytes. "
    "No training after merging.",
    metric="loss, nats a byte; rank: entropy rank of the experts' matrices over their width",
    checks=(
        Check("below plain averaging of the same groups", "merged", "<", "averaged"),
        Check("below merging by use without alignment", "merged", "<", "unaligned"),
        Check("below the dominant experts alone, in the others' place", "merged", "<", "replaced"),
        Check("below leaving the others out of the router", "merged", "<", "left_out"),
        Check("merged experts have a lower rank", "rank_merged", "<", "rank"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one training."""
    train, test = windows("train", 2000, seed), windows("test", 64, seed)
    model = trained(train, seed)
    batches = [{"input_ids": train[:32]}]
    modelmap = trace(model, {"input_ids": train[:2]})
    found = routing(model, modelmap, batches)
    usage, likeness = found["usage"], found["likeness"]
    counts = dominants(usage, HALF.keep)
    kept = {path: usage[path].argsort(descending=True, stable=True)[:count] for path, count in counts.items()}
    alone = {path: torch.zeros(EXPERTS).index_copy(0, k, usage[path][k]) for path, k in kept.items()}

    def merged(method: MSMoE, by: dict[str, Tensor]) -> nn.Module:
        result = copy.deepcopy(model)
        levels = {s.path: HALF for s in modelmap.sites if s.kind == "experts"}
        method.rewrite(Scene(result, modelmap, levels=levels), usage=by, likeness=likeness)
        return result

    ours = merged(MSMoE(), usage)
    return {
        "original": loss(model, test),
        "merged": loss(ours, test),
        "averaged": loss(merged(MSMoE(permute=False, weigh=False), usage), test),
        "unaligned": loss(merged(MSMoE(permute=False), usage), test),
        "replaced": loss(merged(MSMoE(), alone), test),
        "left_out": loss(left_out(model, modelmap, kept), test),
        "rank": rank(model),
        "rank_merged": rank(ours),
    }


def windows(split: str, count: int, seed: int) -> Tensor:
    """Windows of bytes `[count, length]`, drawn."""
    text = torch.frombuffer(
        bytearray("\n".join(doc.text for doc in stdlib_documents(split)).encode()), dtype=torch.uint8
    ).long()
    starts = torch.randint(0, len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(LENGTH)]


def trained(tokens: Tensor, seed: int, steps: int = 300, rate: float = 3e-3) -> nn.Module:
    """A small mixture of experts; the loss that keeps the use of experts even is the library's own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=LENGTH,
        output_router_logits=True, router_aux_loss_coef=0.01, sliding_window=None,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = tokens[torch.randint(0, len(tokens), (16,), generator=rng)]
        value = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.config.output_router_logits = False
    return model.eval().requires_grad_(False)


def left_out(model: nn.Module, modelmap: ModelMap, kept: dict[str, Tensor]) -> nn.Module:
    """The model whose routers choose among these experts alone."""
    result = copy.deepcopy(model)
    for site in modelmap.where("router"):
        stack = next(p for p in kept if p.startswith(site.path.rpartition(".")[0]))
        barred = torch.ones(EXPERTS, dtype=torch.bool).index_fill(0, kept[stack], False)

        def choose(module: Any, args: Any, output: Any, barred: Tensor = barred) -> Any:
            logits = output[0].masked_fill(barred, -torch.inf)
            shares, places = logits.float().softmax(-1).topk(min(2, int((~barred).sum())), -1)
            return logits, shares / shares.sum(-1, keepdim=True), places

        result.get_submodule(site.path).register_forward_hook(choose)
    return result


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Mean loss of the next byte."""
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))


def rank(model: nn.Module) -> float:
    """Mean over the experts' matrices of the exponential of the entropy of their singular values, over the width."""
    found = []
    for parameter in model.parameters():
        if parameter.dim() == 3:
            values = torch.linalg.svdvals(parameter)
            shares = values / values.sum(1, keepdim=True)
            found.append((-(shares * shares.clamp_min(1e-12).log()).sum(1)).exp() / values.shape[1])
    return float(torch.cat(found).mean())
