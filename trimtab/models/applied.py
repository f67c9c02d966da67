"""An adapter put onto its model on disk, a linear at a time: what merging reads where an adapter is a parent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.overlay import overlay
from trimtab.formats.peft import Adapter, read_adapter


def apply_adapter(adapter: Path, base: Path, folder: Path) -> Checkpoint:
    """Write a checkpoint that is the base with the adapter's sums in it, W + B A, in fp32; the rest is linked.

    With DoRA's lengths m, the rows of the sum are scaled to them: m_i (W + B A)_i / |(W + B A)_i|.

    Raises:
        UserError: it is no adapter of linears, or of another model.
    """
    return overlay(Checkpoint(base), folder, _sums(read_adapter(adapter, dora=True), Checkpoint(base)))


def _sums(adapter: Adapter, base: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    turned = bool(adapter.config.get("fan_in_fan_out"))
    for path, (down, up) in adapter.factors.items():
        name = _stored(f"{path}.weight", adapter, base)
        weight, delta = base.read(name).float(), up @ down
        weight = weight.T if turned else weight
        if weight.shape != delta.shape:
            raise UserError(f"{adapter.name} adapts {path} with {tuple(delta.shape)}, and {base.path} has "
                            f"{tuple(weight.shape)} there; it is of another model")  # fmt: skip
        weight = weight + delta
        if path in adapter.lengths:
            weight = weight * (adapter.lengths[path] / weight.norm(dim=1))[:, None]
        yield name, (weight.T if turned else weight).contiguous()


def _stored(name: str, adapter: Adapter, base: Checkpoint) -> str:
    """The name under which a checkpoint has a weight; some leave the prefix of the body out."""
    if name in base:
        return name
    shorter = [n for n in base.names() if name.endswith(f".{n}")]
    if len(shorter) != 1:
        raise UserError(f"{adapter.name} adapts {name}, and {base.path} has no such tensor; it is of another model")
    return shorter[0]
