"""The one driver of update rules: a `torch.optim.Optimizer` that applies a method's direction to each parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Optimiser
from trimtab.parts.gathering import Means
from trimtab.parts.integer_weight import Held


class Stepping(torch.optim.Optimizer):
    """`param <- (1 - lr decay) param - lr direction`, the direction being the method's.

    Args:
        params: parameters, or groups of them as torch takes them.
        method: the update rule.
        lr: learning rate.
        weight_decay: decoupled.
        means: of what linears read and get back, for a rule that asks for them.
        held: parameters that stand for weights of 8 bits, see `parts.integer_weight`.
        seed: of everything random: what is drawn for a parameter follows from seed, its place and its step alone, so
            that a run that goes on from a checkpoint draws the same.

    Raises:
        UserError: a negative rate or decay, or a gradient that is sparse.

    >>> from trimtab.optim.adamw import AdamW
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> optimiser = Stepping([w], AdamW(), lr=0.1)
    >>> (w ** 2).sum().backward(); optimiser.step(); w.data
    tensor([0.9000, 0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        method: Optimiser,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        held: Mapping[Any, Held] | None = None,
        means: Means | None = None,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise UserError(f"lr={lr} and weight_decay={weight_decay} were given; neither may be negative")
        self.method, self.seed, self.needs, self.held = method, seed, method.needs(), dict(held or {})
        if "inputs" in self.needs and means is None:
            raise UserError(
                f"{method.card.name} needs what linears read and get back; give means=Means(model), of "
                "`trimtab.parts.gathering`"
            )
        self.means = means
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; what the closure gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for param in group["params"]:
                place += 1
                if param.grad is not None:
                    self._one(param, group, place)
        return loss

    def _one(self, param: Tensor, group: dict[str, Any], place: int) -> None:
        if param.grad is None or param.grad.is_sparse:
            raise UserError(f"a parameter of shape {tuple(param.shape)} has a sparse gradient; use dense embeddings")
        state, held = self.state[param], self.held.get(param)
        target = param if held is None else held.dense()
        if not state:
            state.update(self.method.init(target))
        given: dict[str, Any] = {"seed": self.seed} if "seed" in self.needs else {}
        if "rng" in self.needs:
            given["rng"] = self._rng(place, int(state["step"]))
        if self.means is not None and "inputs" in self.needs:
            given |= dict(zip(("inputs", "errors"), self.means.take(param), strict=True))
        direction = self.method.step(param.grad, state, target, **given)
        if group["weight_decay"]:
            target.mul_(1 - group["lr"] * group["weight_decay"])
        grad, factor = direction if isinstance(direction, tuple) else (direction, None)
        if factor is None or factor.numel() == 1:  # a number is cheaper than a tensor that is broadcast
            target.add_(grad, alpha=-group["lr"] * (1.0 if factor is None else float(factor)))
        else:
            target.addcmul_(grad, factor, value=-group["lr"])

        if held is not None:
            held.store(target, self._rng(-place, int(state["step"])))

    def _rng(self, place: int, step: int) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, place, step)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but for the types of the state, which stay what they are."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, values in state_dict["state"].items():
            self.state[params[int(index)]].update(
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            )

    def state_bytes(self) -> int:
        """Bytes of the state that is held now."""
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))
