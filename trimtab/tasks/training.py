"""From a model's outputs and labels to the loss that a training minimises, with as little kept as can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engine.run import PackedLinear
from trimtab.parts.cross_entropy import IGNORED, chunked_cross_entropy

HEADS = (nn.Linear, PackedLinear)


class Prediction:
    """The loss of predicting labels: of text each token from those before it, of classes each item's.

    A language model's logits are most of what it would keep. Its head is bypassed and the loss worked out in chunks,
    once the first batch has shown that the model does nothing else to its logits; otherwise the plain loss is used.

    Args:
        inputs: by the name of the model's argument, first dimension the item.
        labels: `[items]`, or `[items, length]` with -100 where nothing is to be predicted.
        options: of every forward.
    """

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor, options: Mapping[str, Any] | None = None) -> None:
        self.inputs, self.labels, self.options = dict(inputs), labels, dict(options or {})
        self.lean: bool | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, model: nn.Module, places: Tensor) -> tuple[Tensor, int]:
        """Sum of the losses of the items at `places`, and how many predictions they are."""
        inputs = {k: v[places] for k, v in self.inputs.items()}
        labels = self.labels[places]
        if labels.dim() == 1:
            output = self._call(model, inputs)
            logits = getattr(output, "logits", output).float()
            return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)
        targets = labels[:, 1:].flatten()
        count = int((targets != IGNORED).sum())
        if self.lean is None:
            self.lean = self._provable(model, inputs, targets)
        lean = self.lean and isinstance(model.get_output_embeddings(), HEADS)  # type: ignore[operator]
        return (self._chunked if lean else self._plain)(model, inputs, targets), count

    def items(self, model: nn.Module, places: Tensor) -> Tensor:
        """Losses of the items at `places`, each the mean over its predictions."""
        labels = self.labels[places]
        output = self._call(model, {k: v[places] for k, v in self.inputs.items()})
        logits = getattr(output, "logits", output).float()
        if labels.dim() == 1:
            return nn.functional.cross_entropy(logits, labels, reduction="none")
        targets = labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)

    def _call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        by_name = hasattr(model, "config")
        return model(**inputs, **self.options) if by_name else model(*inputs.values())

    def _plain(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        logits = self._call(model, inputs).logits[:, :-1].flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def _chunked(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        head = model.get_output_embeddings()  # type: ignore[operator]
        forward = head.forward
        head.forward = lambda hidden: hidden
        try:
            hidden = self._call(model, inputs).logits
        finally:
            head.forward = forward
        rows = hidden[:, :-1].flatten(0, 1)
        weight = head.packed if isinstance(head, PackedLinear) else head.weight
        return chunked_cross_entropy(rows, weight, head.bias, targets, count=1)

    @torch.no_grad()
    def _provable(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> bool:
        """Whether the chunked loss is the plain one on a first item."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, HEADS):
            return False
        one = {k: v[:1] for k, v in inputs.items()}
        first = targets[: len(targets) // len(next(iter(inputs.values())))]
        state = torch.get_rng_state()
        training = model.training
        model.eval()  # dropout would make two passes differ
        try:
            plain, ours = self._plain(model, one, first), self._chunked(model, one, first)
        finally:
            torch.set_rng_state(state)
            model.train(training)
        return bool((plain - ours).abs() <= 1e-3 * plain.abs().clamp_min(1e-6))
