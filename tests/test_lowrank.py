"""Low-rank factors, against LAPACK's own decompositions and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Rank, parse_level
from trimtab.formats.packed import Packed
from trimtab.lowrank.greenformers import LRT
from trimtab.lowrank.output_space import UnifiedLowRank
from trimtab.parts import factors
from trimtab.parts.factors import balanced, output_basis, truncated_svd

SHAPES = [(12, 12), (24, 8), (8, 24), (1, 9), (9, 1), (33, 17)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(cols: int, rows: int = 400, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a mean and a decaying spectrum: samples, gram and mean."""
    mix = torch.randn(cols, cols, generator=rng(seed)) * torch.logspace(0, -2, cols)[:, None]
    x = torch.randn(rows, cols, generator=rng(seed + 1)) @ mix + torch.randn(cols, generator=rng(seed + 2))
    return x, x.T @ x / rows, x.mean(0)


def solved(weight: Tensor, level: str) -> dict[str, Packed]:
    _, gram, mean = data(weight.shape[1])
    return {
        "lrt": LRT().solve(weight, parse_level(level.removesuffix("/bias")), rng=rng()),
        "output": UnifiedLowRank().solve(weight, parse_level(level), gram=gram, mean=mean),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=rng())
    for packed in solved(weight, f"r{min(shape)}").values():
        assert (packed.dense() - weight).abs().max() < 4e-3 * weight.abs().max()
    for packed in solved(weight, f"r{min(shape)}/bias").values():
        assert packed.bias() is None or packed.bias().abs().max() < 1e-3


@pytest.mark.parametrize("level", ["r1", "r3", "r5/bias", "r40", "r40/bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_bytes_are_the_level_s(shape: tuple[int, int], level: str) -> None:
    for packed in solved(torch.randn(shape, generator=rng()), level).values():
        assert packed.nbytes == packed.level.bytes(shape)
        assert packed.dense().shape == shape and packed.dense().isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd_is_lapack_s(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=rng(3))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(weight, rank)
        torch.testing.assert_close((left @ right).double(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), atol=1e-5, rtol=1e-4)


def test_the_randomised_path_is_nearly_as_good() -> None:
    size, rank = 600, 24
    u = torch.linalg.qr(torch.randn(size, size, generator=rng(1))).Q
    v = torch.linalg.qr(torch.randn(size, size, generator=rng(2))).Q
    s = 1 / torch.arange(1, size + 1)
    weight = (u * s) @ v.T
    assert size > factors.EXACT and 4 * (rank + factors.OVERSAMPLE) < size
    left, right = truncated_svd(weight, rank, rng(0))
    best = s[rank:].square().sum().sqrt()
    assert (weight - left @ right).norm() < 1.001 * best
    again = truncated_svd(weight, rank, rng(0))
    assert torch.equal(left, again[0]) and torch.equal(right, again[1])


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
@pytest.mark.parametrize("rank", [2, 6, 12])
def test_output_space_beats_weight_svd_on_outputs(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, generator=rng())
    x, gram, mean = data(shape[1])
    want = x @ weight.T

    def error(packed: Packed) -> float:
        shift = 0 if packed.bias() is None else packed.bias()
        return (x @ packed.dense().T + shift - want).square().mean().item()

    plain = error(LRT().solve(weight, Rank(rank), rng=rng()))
    output = error(UnifiedLowRank().solve(weight, Rank(rank), gram=gram, mean=mean))
    with_mean = error(UnifiedLowRank().solve(weight, Rank(rank, True), gram=gram, mean=mean))
    assert with_mean <= output * 1.001 < plain * 0.9


@pytest.mark.parametrize("shape", [(20, 20), (40, 12), (12, 40)])
def test_output_space_is_pca_of_the_outputs(shape: tuple[int, int]) -> None:
    """Against scikit-learn's PCA of the outputs themselves, and the bias against the mean that it reconstructs."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    weight, rank = torch.randn(shape, generator=rng()), 5
    x, gram, mean = data(shape[1])
    y = (x @ weight.T).double().numpy()
    pca = decomposition.PCA(rank, svd_solver="full").fit(y)
    want = torch.from_numpy(pca.inverse_transform(pca.transform(y)))
    basis = output_basis(weight, gram - torch.outer(mean, mean), rank, damp=0.0)
    torch.testing.assert_close(
        basis @ basis.T, torch.from_numpy(pca.components_.T @ pca.components_), atol=2e-3, rtol=1e-3
    )
    packed = UnifiedLowRank(damp=0.0).solve(weight, Rank(rank, True), gram=gram, mean=mean)
    found = x @ packed.dense().T + packed.bias()
    torch.testing.assert_close(found.double(), want, atol=2e-2 * want.abs().max().item(), rtol=0)


def test_the_mean_of_the_outputs_is_kept() -> None:
    weight = torch.randn(30, 20, generator=rng())
    x, gram, mean = data(20)
    packed = UnifiedLowRank().solve(weight, Rank(4, True), gram=gram, mean=mean)
    found = (x @ packed.dense().T + packed.bias()).mean(0)
    torch.testing.assert_close(found, weight @ mean, atol=1e-2, rtol=1e-2)


def test_unseen_directions_follow_the_weight() -> None:
    """Inputs that no sample moved: their part of the weight is ordered by size, and full rank loses nothing."""
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    kept = UnifiedLowRank().solve(weight, Rank(2), gram=gram, mean=torch.zeros(4)).dense().diagonal()
    torch.testing.assert_close(kept, torch.tensor([5.0, 4.0, 0.0, 0.0]), atol=1e-2, rtol=1e-2)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**16))
def test_error_never_grows_with_rank(rows: int, cols: int, rank: int, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=rng(seed))
    errors = [(weight - torch.matmul(*truncated_svd(weight, r))).norm() for r in (rank, rank + 1)]
    assert errors[1] <= errors[0] + 1e-5
    left, right = truncated_svd(weight, rank)
    assert left.shape == (rows, rank) and right.shape == (rank, cols)


def test_balanced_handles_empty_components() -> None:
    left, right = balanced(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0], [0.0]]), 3)
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(left @ right, torch.tensor([[4.0]]))
    torch.testing.assert_close(left[0, 0], right[0, 0])


def test_zero_weights_and_half_precision() -> None:
    for weight in (torch.zeros(6, 4), torch.randn(6, 4, generator=rng()).bfloat16()):
        for packed in solved(weight.float() if weight.dtype == torch.float32 else weight, "r2/bias").values():
            assert packed.dense().isfinite().all()


def test_lrt_has_no_mean_to_correct() -> None:
    with pytest.raises(UserError, match="r4"):
        LRT().solve(torch.ones(8, 8), Rank(4, True), rng=rng())
