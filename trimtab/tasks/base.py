"""What quality means: a task turns data into batches, and a model's outputs into scores.

Every prediction set (a text window, an image) is one item; its scores are sums over its predictions, so that any share
of the items can be
scored again without running the model: that is what the bootstrap does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

Reference = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class Batch:
    """Items of a split: what the model is called with, and the labels.

    Fields:
        inputs: keyword arguments of the model's forward, first dimension the item; an entry point's model takes them
            in order.
        labels: int64; for text `[items, length]` with -100 where nothing is to be predicted, for classes `[items]`.
        amounts: what an item covers in the metric's own unit beside predictions (bytes of text), or ones.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    amounts: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, start: int, stop: int) -> Batch:
        """Items `start` to `stop`."""
        return Batch(
            {k: v[start:stop] for k, v in self.inputs.items()}, self.labels[start:stop], self.amounts[start:stop]
        )


@dataclass(frozen=True)
class Scores:
    """Sums over each item's predictions, fp64 `[items]`: negative log-likelihood, hits, predictions, KL to the
    original (nats).
    """

    nll: Tensor
    hits: Tensor
    count: Tensor
    kl: Tensor

    @staticmethod
    def join(parts: list[Scores]) -> Scores:
        """Scores of consecutive chunks, end to end."""
        import torch

        return Scores(*(torch.cat([getattr(p, f) for p in parts]) for f in ("nll", "hits", "count", "kl")))

    def total(self) -> Scores:
        """The sums over all items."""
        return Scores(*(getattr(self, f).sum() for f in ("nll", "hits", "count", "kl")))

    def damage(self) -> float:
        """Mean KL divergence to the original, in nats a prediction: the one currency of probing and allocation."""
        return float(self.kl.sum() / self.count.sum())


class Task(ABC):
    """What quality means for a model."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher: ClassVar[bool]
    chunk: ClassVar[int] = 8  # items in one forward
    multiple: ClassVar[int] = 1  # items for each that a menu asks for: an image says less than a window of text
    options: ClassVar[Mapping[str, Any]] = {}  # keyword arguments of every forward

    @abstractmethod
    def batch(self, split: str, items: int, seed: int = 0) -> Batch:
        """Items of `calibration`, `search` or `test`, drawn by the seed; the three never share an item."""

    @abstractmethod
    def pick(self, output: object, labels: Tensor) -> Tensor:
        """The predictions that count, as rows of logits `[predictions, classes]`, in the order of the items."""

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """The class of each prediction that counts, in the same order."""

    @abstractmethod
    def counts(self, labels: Tensor) -> Tensor:
        """Number of predictions of each item."""

    @abstractmethod
    def value(self, scores: Scores, amounts: Tensor) -> Tensor:
        """The metric from sums; vectorised over leading dimensions of its arguments."""

    def overall(self, scores: Scores, amounts: Tensor) -> float:
        """The metric over all items."""
        return float(self.value(scores.total(), amounts.double().sum()))

    def data_hash(self) -> str:
        """A hash of the data behind the splits, for records."""
        import hashlib

        digest = hashlib.sha256()
        for split in ("calibration", "search", "test"):
            batch = self.batch(split, 8)
            for tensor in (*batch.inputs.values(), batch.labels):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def retained(self, value: float, original: float) -> float:
        """Share of the original's metric that is kept: 1 is the original's quality, whichever way the metric points."""
        if self.higher:
            return value / original if original else float("nan")
        return original / value if value else float("nan")

    def reference(self, output: object, labels: Tensor) -> Reference:
        """What to keep of the original's output: the probabilities p of the predictions that count, and sum p log p
        of each.
        """
        logp = self.pick(output, labels).float().log_softmax(-1)
        p = logp.exp()
        return p, (p * logp).sum(1)

    def score(self, output: object, labels: Tensor, reference: Reference | None) -> Scores:
        """Scores of a chunk of items; without a reference the KL is zero.

        KL(p || q) = sum p log p - sum p z + log sum exp z, for logits z: no second table of log-probabilities is made.
        """
        import torch

        logits = self.pick(output, labels).float()
        target, total = self.targets(labels), logits.logsumexp(1)
        nll = total - logits.gather(1, target[:, None])[:, 0]
        hits = (logits.argmax(1) == target).double()
        kl = torch.zeros_like(nll)
        if reference is not None:
            kl = (reference[1] - torch.einsum("ij,ij->i", reference[0], logits) + total).clamp_min(0)
        return self.gather(nll, hits, kl, labels)

    def gather(self, nll: Tensor, hits: Tensor, kl: Tensor, labels: Tensor) -> Scores:
        """Sum predictions to items."""
        import torch

        counts = self.counts(labels)
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)

        def total(x: Tensor) -> Tensor:
            return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, x.double())

        return Scores(total(nll), total(hits), counts.double(), total(kl))


def bootstrap(
    task: Task, ours: Scores, theirs: Scores, amounts: Tensor, draws: int = 1000, seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """95 % intervals by resampling items, the same items for both: (ours, theirs, ours - theirs), each (low, high).

    A paired bootstrap: what makes an item hard for one model makes it hard for the other, and cancels in the
    difference.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    items = len(amounts)
    weight = torch.zeros(draws, items, dtype=torch.float64)
    pick = torch.randint(items, (draws, items), generator=rng)
    weight.scatter_add_(1, pick, torch.ones_like(weight))

    def values(s: Scores) -> Tensor:
        sums = Scores(*(weight @ x for x in (s.nll, s.hits, s.count, s.kl)))
        return task.value(sums, weight @ amounts.double())

    a, b = values(ours), values(theirs)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    spans = [tuple(torch.quantile(x, ends).tolist()) for x in (a, b, a - b)]
    return spans[0], spans[1], spans[2]  # type: ignore[return-value]
