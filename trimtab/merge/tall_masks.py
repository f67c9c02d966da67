"""TALL-masks and Consensus: which entries of the summed task vector each task uses, and dropping what few do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, TaskMerger
from trimtab.formats.bitstream import pack_bits, unpack_bits
from trimtab.parts.merging import changes, combine


@dataclass(frozen=True)
class TALLMasks(TaskMerger):
    """Task t uses the entries where |tau_t| >= lambda |tau - tau_t|, tau = sum_t tau_t, tau_t = W_t - W_0.

    Consensus: W = W_0 + alpha tau where at least k tasks use an entry, and W_0 elsewhere.
    Recovery of task t from the sum and a mask of one bit an entry: W = W_0 + tau where task t uses the entry. `split`
    gives the sum and these masks, eight entries a byte.

    Args:
        trust: lambda (0.4; the paper chooses among 0.2 to 0.6 by task on held-out data).
        least: k, how many tasks must use an entry (2: neither catastrophic nor selfish ones stay).
        scale: alpha of the consensus (0.3, the scale of task arithmetic; the paper chooses it on held-out data).
        task: place of the parent to recover in place of the consensus; -1: the consensus.
        weight: factor of each task vector in the sum (1).

    Raises:
        UserError: there is no parent of that place.

    Reference: Wang et al. 2024, arXiv:2405.07813, sections 4 and 5, equations 3 and 5.
    Departures: one lambda for all tasks unless a recipe says otherwise by tensor; of tau, the sum alone and not TIES.

    >>> import torch
    >>> base = torch.zeros(3)
    >>> parents = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, -0.9, 0.0])]
    >>> TALLMasks(scale=1.0).merge(parents, base, weight=(1.0, 1.0))
    tensor([2.0000, 0.1000, 0.0000])
    >>> TALLMasks(task=1).merge([parents[0], base], base, weight=(1.0, 1.0))
    tensor([0., 0., 0.])
    """

    trust: float = 0.4
    least: int = 2
    scale: float = 0.3
    task: int = -1
    weight: float = 1.0

    card = Card(
        "tall-masks",
        catalogue=(210,),
        paper="arXiv:2405.07813",
        claim="The sum and a bit an entry recover each task; dropping entries that few tasks use raises the mean.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...]) -> Tensor:
        """The consensus of all parents, or one of them recovered."""
        if self.task >= len(tensors):
            raise UserError(f"tall-masks was given task={self.task}, and there are {len(tensors)} parents, from 0 on")
        vectors = changes(tensors, base)
        total = combine(vectors, weight)
        if self.task >= 0:
            return base + total * self.uses(vectors[self.task], total)
        votes = torch.zeros_like(base)
        for vector in vectors:
            votes += self.uses(vector, total)
        return base + total.mul_(votes >= min(self.least, len(tensors))).mul_(self.scale)

    def split(
        self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The sum of the task vectors, and the mask of each task."""
        vectors = changes(tensors, base)
        total = combine(vectors, weight)
        return {"sum": total}, [{"mask": pack_bits(self.uses(vector, total), 1)} for vector in vectors]

    def restore(self, base: Tensor, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        """The base, and the sum where the task uses it."""
        mask = unpack_bits(own["mask"], 1, base.numel()).reshape(base.shape)
        return base + shared["sum"].reshape(base.shape) * mask

    def uses(self, vector: Tensor, total: Tensor) -> Tensor:
        """The mask of a task: the entries of the sum that it uses."""
        return vector.abs() >= self.trust * (total - vector).abs()
