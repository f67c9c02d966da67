"""XQuant: what a layer reads is kept, rounded, and its keys and values are made anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Place, Projection, Remade
from trimtab.parts.cache_grid import kept


@dataclass(frozen=True)
class Latents:
    """Orthonormal directions that a layer's projections read: W_k = M_k U_k^T and W_v = M_v U_v^T.

    Fields:
        projection: the layer's.
        key, value: U_k and U_v `[width, directions]`; None where inputs are kept as they are.
        key_map, value_map: M_k and M_v `[channels, directions]`.
    """

    projection: Projection
    key: Tensor | None
    value: Tensor | None
    key_map: Tensor
    value_map: Tensor


def directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U and M of W = M U^T by the singular value decomposition W = B S U^T, M = B S; the strongest direction first.

    >>> u, m = directions(torch.tensor([[3.0, 0.0, 4.0]]))
    >>> torch.allclose(m @ u.T, torch.tensor([[3.0, 0.0, 4.0]]), atol=1e-6)
    True
    """
    left, strength, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return right.T.float(), (left * strength).float()


@dataclass(frozen=True)
class XQuant(Cacher):
    """Keep X' = Q(X), what the projections read, and make K = place(X' W_k^T) and V = X' W_v^T when they are needed.

    Q rounds each token's channels, in groups, to a grid of `bits`. Where keys and values of all heads together have
    fewer channels than X, as with grouped-query attention, the latent form is kept: W_k = B_k S_k U_k^T, and
    Q(X U_k) and Q(X U_v) are as many numbers as K and V; K = place(Q(X U_k) (B_k S_k)^T). Latents of keys are rounded
    channel by channel over tokens, for the strongest direction is an outlier channel; those of values token by token.

    Args:
        bits: of a code; 16 keeps floats (paper: 4, 3 and 2).
        group: numbers that share a grid, whose step and lowest value are stored in 16 bits each (paper: 128).
        residual: tokens of a window; the newest 1 to so many are exact (paper's residual: 128).
        latent: take the latent form where each of the two projections has fewer channels than X.

    Raises:
        UserError: bits outside 1 to 8 and not 16, or no group.

    Reference: Tomar et al. 2025, arXiv:2508.10395, sections 3.1 to 3.3.
    Departures: a prompt is read window by window, each seeing the windows before it as they are stored. While a window
        is open, its keys and values are held beside X, in 16 bits.

    >>> weights = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    >>> layer = Projection(0, *weights, torch.zeros(8), torch.zeros(8), heads=2)
    >>> def place(keys):
    ...     return keys.unflatten(-1, (2, -1)).transpose(-2, -3)
    >>> x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    >>> exact = XQuant(bits=16)
    >>> stored = exact.store(x, x, inputs=x, place=place, prepared=exact.prepare(layer))
    >>> bool((stored.dense()[0] - place(x @ weights[0].T)).abs().max() < 0.02), stored.nbytes == 2 * 2 * 32 * 8
    (True, True)
    """

    bits: int = 4
    group: int = 128
    residual: int = 128
    latent: bool = True

    card = Card(
        "xquant",
        catalogue=(181,),
        paper="arXiv:2508.10395",
        claim="At equal bytes, keys and values made anew from rounded inputs give a lower perplexity than rounded keys "
        "and values; from inputs in 16 bits they are the original's.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def prepare(self, projection: Projection) -> Latents:
        """The directions of a layer."""
        channels, width = projection.key.shape
        if not (self.latent and channels < width):
            return Latents(projection, None, None, projection.key, projection.value)
        (key, key_map), (value, value_map) = directions(projection.key), directions(projection.value)
        return Latents(projection, key, value, key_map, value_map)

    def store(self, keys: Tensor, values: Tensor, *, inputs: Tensor, place: Place, prepared: Latents) -> Remade:
        """What is kept of inputs `[..., tokens, width]`."""
        x, maps = inputs.float(), (prepared.key_map, prepared.value_map)
        if prepared.key is None or prepared.value is None:
            part = kept(x, self.bits, self.group, by_channel=False)
            return Remade((part,), 0, 0, *maps, prepared.projection, place)
        key = kept(x @ prepared.key, self.bits, self.group, by_channel=True)
        value = kept(x @ prepared.value, self.bits, self.group, by_channel=False)
        return Remade((key, value), 0, 1, *maps, prepared.projection, place)
