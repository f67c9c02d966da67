"""Frozen snapshots that policies decide from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, at a step of a training.

    Fields:
        path: as `named_modules` has it.
        block: index of its block.
        numbers: how many it has.
    """

    path: str
    block: int
    numbers: int


@dataclass(frozen=True)
class Turn:
    """A step of a training, before it begins.

    Fields:
        step, steps: this one from 0, and how many there are.
        layers: all that can be frozen, in forward order.
        active: paths of those that the last step trained; all before the first.
    """

    step: int
    steps: int
    layers: tuple[Layer, ...]
    active: tuple[str, ...]


@dataclass(frozen=True)
class Drafting:
    """A text, before a draft writes ahead of it.

    Fields:
        room: tokens that there is room for.
        past: of each of the text's last steps how many tokens were proposed, and how many accepted; newest last.
        cost: of a step of the draft, as a share of the target's.
    """

    room: int
    past: tuple[tuple[int, int], ...] = ()
    cost: float = 0.1


@dataclass(frozen=True)
class Held:
    """The neurons of one feed-forward layer, before a token goes through it.

    Fields:
        idle: tokens since each neuron was last needed, `[neurons]`: 0 where this one needs it, 1 where the last did.
        held: which are in memory, bools `[neurons]`.
        room: bytes that the layer has in memory.
        record: bytes of a neuron.
    """

    idle: NDArray[np.int64]
    held: NDArray[np.bool_]
    room: int
    record: int


@dataclass(frozen=True)
class Exchange:
    """What a layer's memory takes in and lets go, numbers of neurons in rising order."""

    load: NDArray[np.int64]
    drop: NDArray[np.int64]


@dataclass(frozen=True)
class Prompted:
    """A prompt that was read with all neurons, before some of them write on.

    Fields:
        activations: what the neurons of each feed-forward layer gave, `[tokens, neurons]`, in forward order.
        prepared: what the policy worked out before the first prompt.
    """

    activations: tuple[Tensor, ...]
    prepared: Any = None
