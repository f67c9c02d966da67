"""A small mixture of experts, trained on bytes of the standard library's sources: what claims about experts work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.tasks.text import stdlib_documents

LENGTH, EXPERTS = 64, 8


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


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Mean loss of the next byte."""
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
