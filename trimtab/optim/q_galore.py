"""Q-GaLore: GaLore with weights and moments in 8 bits, projections in 4, and subspaces found ever more rarely."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.method import Card, Optimiser
from trimtab.parts.integer_weight import Rounding
from trimtab.parts.moments import adam, at_least_one, begin, leading, lift, moment_bytes, narrowed, project
from trimtab.parts.saving import GROUP, Codec, Encoded, decode, encode

SEEN = 5  # similarities of a subspace with the one before that are averaged


@dataclass(frozen=True)
class QGaLore(Optimiser):
    """R = P^T G with P in 4 bits; d = alpha P Adam(R), moments in 8 bits; weights in 8 bits, rounded at random.

    P is found anew every T steps. Where its leading vector was alike the last five times (mean |cosine| >= threshold),
    T doubles for this matrix.

    Args:
        rank: r (128).
        scale: alpha (0.25).
        every: T at first (200).
        threshold: mean similarity from which on a subspace counts as settled (0.4).
        rounding: `stochastic` (paper) or `nearest`: how an updated weight comes onto its grid.
        betas, eps: Adam's (0.9, 0.999, 1e-6).

    Raises:
        UserError: a rank or T below 1.

    Reference: Zhang et al. 2024, arXiv:2407.08296, section 3 and algorithm 1.
    Departures: projections and moments lie on symmetric grids in groups of 64, the mean through a square root and the
        square through a fourth root, in place of asymmetric groups of 256 and bitsandbytes' table. The cosine is taken
        with the stored 4-bit vector, and without its sign, which a decomposition leaves open. P as in GaLore here.

    >>> QGaLore(rank=4).state_bytes((100, 10)), QGaLore(rank=4).state_bytes((10,))
    (978, 80)
    """

    rank: int = 128
    scale: float = 0.25
    every: int = 200
    threshold: float = 0.4
    rounding: Rounding = "stochastic"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    integers: ClassVar[bool] = True
    card = Card(
        "q-galore",
        catalogue=(272,),
        paper="arXiv:2407.08296",
        claim="GaLore's loss with weights of 8 bits, a quarter of its state, and fewer decompositions.",
        keeps=frozenset({"deterministic"}),
    )

    def init(self, param: Tensor) -> dict[str, Any]:
        """Codes of the projection and of both moments; Adam's own where it is no larger matrix than the rank."""
        at_least_one("q-galore", param, rank=self.rank, every=self.every)
        shape = narrowed(tuple(param.shape), self.rank)
        if shape is None:
            return begin(tuple(param.shape), param)
        state: dict[str, Any] = {"step": 0, "next": 0, "gap": self.every, "found": 0, "alike": torch.zeros(SEEN)}
        _put(state, "basis", torch.zeros(min(param.shape), self.rank), "int4")
        for name in ("mean", "square"):
            _put(state, name, torch.zeros(shape), "int8")
        return state

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor, *, rng: torch.Generator) -> Tensor:
        """The direction, in the parameter's shape."""
        if "next" not in state:
            return adam(grad, state, self.betas, self.eps)
        size = (min(grad.shape), self.rank)
        if state["step"] >= state["next"]:
            self._find(grad.float(), state, rng)
        basis = _get(state, "basis", size, "int4")
        narrow = project(grad.float(), basis)
        root, fourth = (_get(state, name, tuple(narrow.shape), "int8") for name in ("mean", "square"))
        moments = {"step": state["step"], "mean": root * root.abs(), "square": fourth.pow_(4)}
        direction = adam(narrow, moments, self.betas, self.eps)
        state["step"] = moments["step"]
        _put(state, "mean", moments["mean"].sign() * moments["mean"].abs().sqrt_(), "int8")
        _put(state, "square", moments["square"].pow_(0.25), "int8")
        return lift(direction, basis, tuple(grad.shape)).mul_(self.scale).to(grad.dtype)

    def _find(self, grad: Tensor, state: dict[str, Any], rng: torch.Generator) -> None:
        """A new basis; more steps until the next where it was alike the ones before."""
        found = leading(grad, self.rank, rng)
        if state["found"]:
            before = _get(state, "basis", tuple(found.shape), "int4")
            alike = torch.cosine_similarity(before[:, 0], found[:, 0], dim=0).abs()
            state["alike"][(state["found"] - 1) % SEEN] = alike
            if state["found"] >= SEEN and float(state["alike"].mean()) >= self.threshold:
                state["gap"] *= 2
        state["found"] += 1
        state["next"] = state["step"] + state["gap"]
        _put(state, "basis", found, "int4")

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and their scales; both moments in fp32 of what is not projected."""
        small = narrowed(shape, self.rank)
        if small is None:
            return moment_bytes(shape)
        groups, basis = -(-prod(small) // GROUP), -(-min(shape) * self.rank // GROUP)
        return 2 * groups * (GROUP + 2) + basis * (GROUP // 2 + 2) + 4 * SEEN


def _put(state: dict[str, Any], name: str, values: Tensor, codec: Codec) -> None:
    """Keep values as codes, in the tensors that are there once they are."""
    packed = encode(values.flatten(), codec)
    for key, tensor in ((name, packed.codes), (f"{name}-scale", packed.scale)):
        if key in state:
            state[key].copy_(tensor)
        else:
            state[key] = tensor


def _get(state: dict[str, Any], name: str, shape: tuple[int, ...], codec: Codec) -> Tensor:
    packed = Encoded(codec, state[name], state[f"{name}-scale"], prod(shape), torch.float32)
    return decode(packed).view(shape)
