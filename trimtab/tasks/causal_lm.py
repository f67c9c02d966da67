"""Causal language models: windows of text, perplexity a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.tasks.base import Batch, Reference, Scores, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CausalLM(Task):
    """Predict the next token of held-out text; the metric is perplexity, exp(sum of negative log-likelihoods / tokens).

    Fields:
        windows: split -> token windows `[n, length]` int64.
        sizes: split -> bytes of text that each window covers `[n]`.
    """

    name: ClassVar[str] = "causal-lm"
    metric: ClassVar[str] = "perplexity"
    higher: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    windows: dict[str, Tensor]
    sizes: dict[str, Tensor]

    def batch(self, split: str, items: int, seed: int = 0) -> Batch:
        import torch

        tokens = self.windows[split]
        pick = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:items]
        labels = tokens[pick].clone()
        labels[:, 0] = -100
        return Batch({"input_ids": tokens[pick]}, labels, self.sizes[split][pick])

    def pick(self, output: Any, labels: Tensor) -> Tensor:
        logits = getattr(output, "logits", output)
        return logits[:, :-1][labels[:, 1:] != -100]

    def targets(self, labels: Tensor) -> Tensor:
        shifted = labels[:, 1:]
        return shifted[shifted != -100]

    def counts(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] != -100).sum(1)

    def value(self, scores: Scores, amounts: Tensor) -> Tensor:
        return (scores.nll / scores.count).clamp_max(700).exp()


@dataclass
class MaskedLM(CausalLM):
    """Predict masked tokens (15 %, chosen by a fixed seed); the metric is the perplexity of the masked tokens."""

    name: ClassVar[str] = "masked-lm"
    options: ClassVar[Mapping[str, Any]] = {}
    mask_token: int = 0

    def batch(self, split: str, items: int, seed: int = 0) -> Batch:
        import torch

        plain = super().batch(split, items, seed)
        tokens = plain.inputs["input_ids"]
        hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1_000_003 + seed)) < 0.15
        hidden[:, 0] = True
        labels = torch.where(hidden, tokens, -100)
        return Batch({"input_ids": torch.where(hidden, self.mask_token, tokens)}, labels, plain.amounts)

    def pick(self, output: Any, labels: Tensor) -> Tensor:
        return output.logits[labels != -100]

    def targets(self, labels: Tensor) -> Tensor:
        return labels[labels != -100]

    def counts(self, labels: Tensor) -> Tensor:
        return (labels != -100).sum(1)


@dataclass
class Embedding(CausalLM):
    """Keep the last hidden states of an encoder; the metric is their mean cosine similarity to the original's.

    Damage is 1 - cosine, in place of the KL divergence that a model without logits does not have.
    """

    name: ClassVar[str] = "embedding"
    metric: ClassVar[str] = "similarity"
    options: ClassVar[Mapping[str, Any]] = {}
    higher: ClassVar[bool] = True

    def pick(self, output: Any, labels: Tensor) -> Tensor:
        return output.last_hidden_state.flatten(0, 1)

    def counts(self, labels: Tensor) -> Tensor:
        import torch

        return torch.full((len(labels),), labels.shape[1])

    def reference(self, output: object, labels: Tensor) -> Reference:
        states = self.pick(output, labels).float()
        return states, states.norm(dim=1)

    def score(self, output: object, labels: Tensor, reference: Reference | None) -> Scores:
        import torch

        ours = self.pick(output, labels).float()
        away = torch.zeros(len(ours)) if reference is None else 1 - torch.cosine_similarity(ours, reference[0], dim=1)
        return self.gather(away, torch.zeros(len(ours)), away, labels)

    def value(self, scores: Scores, amounts: Tensor) -> Tensor:
        return 1 - scores.nll / scores.count
