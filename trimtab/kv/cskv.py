"""CSKV: keys and values as a few features of what a layer reads, the newest tokens exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Place, Projection, Remade
from trimtab.parts.cache_grid import kept
from trimtab.parts.factors import output_basis


@dataclass(frozen=True)
class Shrunk:
    """A layer's projections as pairs of factors, W = up down.

    Fields:
        projection: the layer's.
        key_down, value_down: `[features, width]`.
        key_up, value_up: `[channels, features]`.
    """

    projection: Projection
    key_down: Tensor
    value_down: Tensor
    key_up: Tensor
    value_up: Tensor


@dataclass(frozen=True)
class CSKV(Cacher):
    """Keep the features c = A x of fewer channels, from which k = place(B c): W_k ~ B A, and the same for values.

    The cache has two branches: the newest tokens, at most `residual`, as exact keys and values, and all before them as
    features. A and B are those of the least reconstruction loss |X W^T - X A^T B^T|_F on a sample of text, layer by
    layer; nothing else of the model is trained. Features may be rounded in turn, those of keys by channel over the
    tokens of a window, those of values by token.

    Args:
        keep: share of the channels of keys, and of values, that features have (paper: 0.2, 80 % less).
        bits: of a feature; 16 keeps floats (paper: 16, and 4).
        residual: tokens of a window; the newest 1 to so many are exact (paper's window: 32).
        init: `trained` minimises the reconstruction loss, `svd` is the best pair of factors of the weight alone.

    Raises:
        UserError: a share that leaves no feature or more than there are channels.

    Reference: Wang et al. 2024, arXiv:2409.10593, sections 2.2 to 2.4.
    Departures: the least reconstruction loss of a given rank is known in closed form, by the eigenvectors of
        W X^T X W^T, and is taken from there; the paper trains A and B from an activation-aware decomposition towards
        the same loss, with the sample's own texts. Keys and values have equal shares. A prompt is read window by
        window, where the paper's first pass is exact. With `bits`, factors are not trained for the rounding.

    >>> weights = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    >>> layer = Projection(0, *weights, torch.zeros(8), torch.zeros(8), heads=2)
    >>> x, method = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)), CSKV(keep=1.0)
    >>> def place(keys):
    ...     return keys.unflatten(-1, (2, -1)).transpose(-2, -3)
    >>> stored = method.store(x, x, inputs=x, place=place, prepared=method.prepare(layer, gram=x.T @ x / 32))
    >>> bool((stored.dense()[0] - place(x @ weights[0].T)).abs().max() < 0.02), stored.nbytes
    (True, 1024)
    """

    keep: float = 0.2
    bits: int = 16
    residual: int = 32
    init: Literal["trained", "svd"] = "trained"

    card = Card(
        "cskv",
        catalogue=(212,),
        paper="arXiv:2409.10593",
        claim="With 80 % less of keys and values, factors of least reconstruction loss and an exact window give a "
        "lower perplexity than factors of the weights alone, and than a cache of equal bytes that keeps fewer tokens.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def prepare(self, projection: Projection, *, gram: Tensor) -> Shrunk:
        """A layer's factors, by what its projections read, X^T X / n `[width, width]`."""
        channels = len(projection.key)
        rank = round(self.keep * channels)
        if not 1 <= rank <= min(projection.key.shape):
            raise UserError(
                f"cskv was given keep={self.keep}, which is {rank} of {channels} channels; it keeps at least one, and "
                f"no more than {min(projection.key.shape)}"
            )
        metric = gram if self.init == "trained" else torch.eye(len(gram))
        pairs = []
        for weight in (projection.key, projection.value):
            up = output_basis(weight, metric, rank).float()
            pairs.append((up.T @ weight, up))
        (key_down, key_up), (value_down, value_up) = pairs
        return Shrunk(projection, key_down, value_down, key_up, value_up)

    def store(self, keys: Tensor, values: Tensor, *, inputs: Tensor, place: Place, prepared: Shrunk) -> Remade:
        """Features of inputs `[..., tokens, width]`."""
        x = inputs.float()
        key = kept(x @ prepared.key_down.T, self.bits, self.residual, by_channel=True)
        value = kept(x @ prepared.value_down.T, self.bits, prepared.value_up.shape[1], by_channel=False)
        return Remade((key, value), 0, 1, prepared.key_up, prepared.value_up, prepared.projection, place)
