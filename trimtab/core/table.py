"""The table that every allocator sees: what each choice for each unit costs, and the damage it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One choice for one unit (a site, or sites that must share a level).

    Fields:
        unit: name of the unit; exactly one row of each unit is chosen.
        choice: `method@level` text, or the original's type (`bf16`).
        bytes: bytes stored.
        seconds: seconds of the unit in one forward on this device.
        damage: mean KL divergence to the original's outputs, in nats a prediction, with only this unit changed.
        weights: number of the original's weights in the unit.
    """

    unit: str
    choice: str
    bytes: int
    seconds: float
    damage: float
    weights: int = 0
