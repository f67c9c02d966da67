"""One weight for matrices of any kind of level, in every compiled variant."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_variants import variants

from trimtab.core.level import NM, Int, Plus, Rank, Sparse, parse_level
from trimtab.core.method import method
from trimtab.formats.packed import Packed, pack_codebook, pack_plus, pack_rank
from trimtab.kernels.integer.reference import linear
from trimtab.kernels.weight import weight_of

COLS = 96
KINDS = ("4b/g32", "8b/row", "nvfp4", "bf16", "50%", "2:4", "vq/d4/k16", "r8", "4b/g32+r8", "50%+r8", "bf16+r8")


def packed(text: str, rows: int, rng: torch.Generator) -> Packed:
    """Random weights at a level."""
    level, weight = parse_level(text), torch.randn(rows, COLS, generator=rng)
    if text.startswith("vq"):
        indices = torch.randint(16, (rows, COLS // 4), generator=rng)
        return pack_codebook([indices], [torch.randn(16, 4, generator=rng)], level, (rows, COLS))  # type: ignore[arg-type]
    if isinstance(level, Rank):
        return pack_rank(weight[:, : level.rank], weight[: level.rank], None, level, (rows, COLS))
    if isinstance(level, Plus):
        return pack_plus(packed(str(level.base), rows, rng), packed(str(level.extra), rows, rng), level)
    if text == "bf16":
        return Packed(level, (rows, COLS), {"weight": weight.bfloat16()})
    return method("magnitude" if isinstance(level, Sparse | NM) else "rtn").solve(weight, level)


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("m", [1, 5, 40])
def test_matrices_of_all_kinds_stack(module: ModuleType, m: int) -> None:
    rng = torch.Generator().manual_seed(m)
    parts = [packed(text, 24 + i, rng) for i, text in enumerate(KINDS)] + [torch.randn(7, COLS, generator=rng)]
    whole, each = weight_of(module, parts), [weight_of(module, [part]) for part in parts]
    x = torch.randn(m, COLS, generator=rng).numpy()
    assert (whole.rows, whole.cols, whole.nbytes) == (sum(w.rows for w in each), COLS, sum(w.nbytes for w in each))
    assert np.array_equal(whole.apply(x), np.concatenate([w.apply(x) for w in each], 1))
    rows = np.stack([whole.row(r) for r in range(whole.rows)])
    dense = torch.cat([p.dense() if isinstance(p, Packed) else p for p in parts])
    assert np.allclose(rows, dense.numpy(), atol=1e-4)


@pytest.mark.parametrize("module", variants())
def test_a_correction_is_added_to_its_bases_own_kernel(module: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    base, extra = packed("4b/g32", 40, rng), packed("r8", 40, rng)
    assert isinstance(base.level, Int) and isinstance(extra.level, Rank)
    x = torch.randn(3, COLS, generator=rng)
    found = weight_of(module, [pack_plus(base, extra, Plus(base.level, extra.level))]).apply(x.numpy())
    assert torch.allclose(torch.from_numpy(found), linear(base, x) + x @ extra.dense().T, atol=1e-3)


@pytest.mark.parametrize("module", variants())
def test_what_does_not_read_the_same_inputs_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="weights of 3 and 4 columns"):
        module.stack([module.dense_fp32(np.ones((2, 3), np.float32)), module.dense_fp32(np.ones((2, 4), np.float32))])
    with pytest.raises(ValueError, match="at least one part"):
        module.stack([])
