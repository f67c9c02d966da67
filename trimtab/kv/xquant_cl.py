"""XQuant-CL: of what a layer reads, only the difference to the layer below is kept, rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Part, Place, Projection, Remade
from trimtab.parts.cache_grid import kept


@dataclass(frozen=True)
class Sum:
    """A layer's inputs as the layer below has them, and a stored difference in some directions.

    Fields:
        below: the stand-in of the inputs of the layer below; None for the first layer.
        difference: `[..., tokens, directions]`.
        basis: U `[width, directions]`, orthonormal; None where the difference is kept as it is.
    """

    below: Sum | None
    difference: Part
    basis: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the difference; what is below belongs to the layer below."""
        return self.difference.nbytes

    def dense(self) -> Tensor:
        """The inputs' stand-in, fp32 `[..., tokens, width]`."""
        x = self.difference.dense()
        x = x if self.basis is None else x @ self.basis.T
        return x if self.below is None else self.below.dense() + x


@dataclass(frozen=True)
class XQuantCL(Cacher):
    """Keep Q(X_l - X'_(l-1)), the difference to the stand-in of the layer below; X'_l = X'_(l-1) + Q(X_l - X'_(l-1)).

    The residual stream makes inputs of neighbouring layers alike, so that differences span less, and grids are finer.
    The first `base` layers are kept as they are, at `base_bits`. Keys and values are made anew from X'_l. Where keys
    and values together have no more channels than X, as with grouped-query attention, the directions that they read,
    U from [W_k; W_v] = B S U^T, are those in which the difference is kept: X'_l = X'_(l-1) + Q((X_l - X'_(l-1)) U) U^T.
    Each token's channels are rounded, in groups.

    Args:
        bits: of a code of a difference (paper: 4, 3 and 2).
        base: first layers without differences (paper: 3).
        base_bits: of their codes (paper: 4).
        group: numbers that share a grid, whose step and lowest value are stored in 16 bits each (paper: 128).
        residual: tokens of a window; the newest 1 to so many are exact (paper's residual: 128).
        latent: keep differences in the directions that keys and values read.

    Raises:
        UserError: bits outside 1 to 8 and not 16, or no group.

    Reference: Tomar et al. 2025, arXiv:2508.10395, sections 3.2 and 3.3.
    Departures: as of XQuant. X is what the projections read, behind the norm. The stand-in of the layer below is summed
        up anew for each layer; the paper passes one running sum from layer to layer, which is the same number.

    >>> weights = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    >>> layer = Projection(0, *weights, torch.zeros(8), torch.zeros(8), heads=2)
    >>> def place(keys):
    ...     return keys.unflatten(-1, (2, -1)).transpose(-2, -3)
    >>> x, method = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)), XQuantCL(base=1)
    >>> given = {"place": place, "prepared": method.prepare(layer)}
    >>> first = method.store(x, x, inputs=x, below=None, **given)
    >>> second = method.store(x, x, inputs=x + 0.01, below=first, **given)
    >>> [bool((s.parts[0].dense() - x).abs().max() < 0.2) for s in (first, second)]
    [True, True]
    """

    bits: int = 3
    base: int = 3
    base_bits: int = 4
    group: int = 128
    residual: int = 128
    latent: bool = True

    card = Card(
        "xquant-cl",
        paper="arXiv:2508.10395",
        claim="At 2 and 3 bits, differences of inputs between layers give a lower perplexity than the inputs "
        "themselves at equal bytes.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def prepare(self, projection: Projection) -> tuple[Projection, Tensor | None]:
        """A layer's projections and the directions that they read."""
        both = torch.cat((projection.key, projection.value))
        if not self.latent or len(both) > both.shape[1]:
            return projection, None
        return projection, torch.linalg.svd(both.double(), full_matrices=False).Vh.T.float()

    def store(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        inputs: Tensor,
        place: Place,
        below: Remade | None,
        prepared: tuple[Projection, Tensor | None],
    ) -> Remade:
        """What is kept of inputs `[..., tokens, width]`, given what the layer below keeps of the same tokens."""
        projection, basis = prepared
        alone = below is None or projection.layer < self.base
        lower = None if alone else below.parts[0]  # type: ignore[union-attr]
        x = inputs.float() if lower is None else inputs.float() - lower.dense()
        basis = None if alone else basis
        x = x if basis is None else x @ basis
        part = Sum(lower, kept(x, self.base_bits if alone else self.bits, self.group, by_channel=False), basis)  # type: ignore[arg-type]
        return Remade((part,), 0, 0, projection.key, projection.value, projection, place)
