"""Sparse changes: which weights are marked, and that they add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_merge import save, weights

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import Checkpoint
from trimtab.merge.composable_sft import ComposableSFT
from trimtab.merging import merge


def test_the_mask_marks_the_largest_changes_of_the_whole_model() -> None:
    base, rng = {"a": torch.zeros(5, 7), "b": torch.zeros(9)}, torch.Generator().manual_seed(0)
    tuned = {"a": torch.randn(5, 7, generator=rng), "b": 10 * torch.randn(9, generator=rng)}
    mask = ComposableSFT().mask(base, tuned, 12)
    marked = torch.cat([tuned[n][mask[n]].abs() for n in base])
    rest = torch.cat([tuned[n][~mask[n]].abs() for n in base])
    assert len(marked) == 12 and marked.min() >= rest.max() and int(mask["b"].sum()) > 5
    with pytest.raises(UserError, match="99 weights were to be tuned; give a number from 1 to 44"):
        ComposableSFT().mask(base, tuned, 99)


def test_sparse_changes_add_up_on_disk(tmp_path: Any) -> None:
    base = weights(0, torch.float32)
    rng, parents = torch.Generator().manual_seed(1), []
    for name in ("task", "language"):
        state = {
            n: t + torch.randn(t.shape, generator=rng) * (torch.rand(t.shape, generator=rng) < 0.1)
            for n, t in base.items()
        }
        parents.append((save(tmp_path / name, state, dtype="float32"), state))
    origin = save(tmp_path / "base", base, dtype="float32")
    merge([p for p, _ in parents], base=origin, method="composable-sft", out=tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    for name, tensor in base.items():
        wanted = tensor + sum(state[name] - tensor for _, state in parents)
        torch.testing.assert_close(found.read(name), wanted)
