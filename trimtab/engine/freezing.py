"""What of a model is frozen at a step of a training: a policy decides, the engine keeps the books.

A frozen layer has no gradient and no state of an optimiser, and keeps nothing for a backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Policy
from trimtab.core.view import Layer, Turn


class Freezing:
    """A policy at work on a model's layers.

    Args:
        blocks: path of a module -> index of its block; modules of no block are never frozen.
        policy: it gives the paths of the layers that are trained, see `Turn`. It may ask for `rng`, seeded by the run's
            seed and the step, and for `changes`: path -> mean |change| over mean |weight| of the last step that trained
            it, of layers that were trained before.
        optimiser: whose state of what is frozen goes.
        seed: of what the policy draws.

    A layer is a module of a block that has trained parameters of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, int],
        policy: Policy,
        optimiser: torch.optim.Optimizer,
        steps: int,
        seed: int = 0,
    ) -> None:
        self.policy, self.optimiser, self.steps, self.seed = policy, optimiser, steps, seed
        self.layers: dict[str, list[nn.Parameter]] = {}
        self.places: dict[str, int] = {}
        for path, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own and path in blocks:
                self.layers[path], self.places[path] = own, blocks[path]
        self.changes: dict[str, float] = {}
        self.active: tuple[str, ...] = tuple(self.layers)
        self._before: dict[str, list[Tensor]] = {}

    def turn(self, step: int) -> None:
        """Freeze and thaw for a step."""
        layers = tuple(Layer(path, self.places[path], sum(p.numel() for p in own)) for path, own in self.layers.items())
        view, needs = Turn(step, self.steps, layers, self.active), self.policy.needs()
        given = {"rng": torch.Generator().manual_seed(self.seed * 1_000_003 + step), "changes": dict(self.changes)}
        wanted = set(self.policy.decide(view, **{k: given[k] for k in needs}))
        self.active = tuple(path for path in self.layers if path in wanted)
        for path, own in self.layers.items():
            thawed = path in wanted
            for param in own:
                param.requires_grad_(thawed)
                if not thawed:
                    param.grad = None
                    self.optimiser.state.pop(param, None)
        if "changes" in needs:
            self._before = {path: [p.detach().clone() for p in self.layers[path]] for path in self.active}

    @torch.no_grad()
    def turned(self) -> None:
        """Measure how far a step moved what was trained: mean |change| over mean |weight|."""
        for path, before in self._before.items():
            pairs = list(zip(self.layers[path], before, strict=True))
            moved = sum(float((now - then).abs().sum()) for now, then in pairs)
            self.changes[path] = moved / max(sum(float(then.abs().sum()) for _, then in pairs), 1e-30)
        self._before = {}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"changes": self.changes, "active": list(self.active)}

    def load(self, numbers: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.changes, self.active = dict(numbers["changes"]), tuple(numbers["active"])
