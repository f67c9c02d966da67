"""Levels of compression as further choices: one genome says both what is left of a block and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome, Knob
from trimtab.core.level import Level, rows_cols
from trimtab.core.method import Solver
from trimtab.engine.cuts import Cuts
from trimtab.formats.packed import Packed

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN = "fp32"


class Pressed:
    """The networks that a trained model can be cut to, each block's matrices at a level of their own.

    Args:
        cuts: the networks.
        levels: what is offered beside fp32, by its text.
        solver: carries a level out on a matrix; it needs no statistics.

    Raises:
        UserError: the solver needs statistics, or the model has no blocks.
    """

    def __init__(self, cuts: Cuts, levels: Mapping[str, Level], solver: Solver) -> None:
        if solver.needs():
            raise UserError(
                f"{solver.card.name} needs {', '.join(solver.needs())}, which change with every network; round with rtn"
            )
        if not cuts.map.blocks:
            raise UserError(f"{cuts.name} has no blocks whose matrices could have levels of their own")
        self.cuts, self.name, self.levels, self.solver = cuts, cuts.name, dict(levels), solver
        self.matrices = {f"{s.path}.weight": s for s in cuts.map.sites if s.kind == "linear" and s.block is not None}
        options = (*self.levels, PLAIN)
        knobs = [Knob(f"{b}.level", options, "level", cuts.hangs(b)) for b in cuts.map.blocks]
        self.domain = Domain((*cuts.domain.knobs, *knobs))

    def build(self, genome: Genome, meta: bool = True) -> tuple[nn.Module, dict[str, Any]]:
        """See `Cuts.build`; levels change no module."""
        return self.cuts.build(self._shape(genome), meta)

    def edits(self, genome: Genome) -> list[dict[str, Any]]:
        """See `Cuts.edits`."""
        return self.cuts.edits(self._shape(genome))

    def level(self, name: str, genome: Genome) -> Level | None:
        """The level of one of the model's tensors, by its own name; None: as it is."""
        site = self.matrices.get(name)
        if site is None or site.block is None:
            return None
        knob = len(self.cuts.domain.knobs) + site.block
        return self.levels.get(str(self.domain.knobs[knob].options[genome[knob]]))

    def pack(self, name: str, weight: Tensor, genome: Genome) -> Packed | None:
        """A tensor at its level; None: as it is."""
        level = self.level(name, genome)
        if level is None:
            return None
        turned = self.matrices[name].transposed
        return self.solver.solve(weight.detach().float().t() if turned else weight.detach().float(), level)

    def dense(self, name: str, weight: Tensor, genome: Genome) -> Tensor:
        """What a tensor at its level is worth."""
        packed = self.pack(name, weight, genome)
        if packed is None:
            return weight
        return packed.dense().t() if self.matrices[name].transposed else packed.dense()

    def stored(self, name: str, shape: Sequence[int], genome: Genome) -> int | None:
        """Bytes of a tensor of that shape at its level; None: as it is."""
        level = self.level(name, genome)
        turned = level is not None and self.matrices[name].transposed
        return None if level is None else level.bytes(rows_cols(tuple(shape)[::-1] if turned else tuple(shape)))

    def _shape(self, genome: Genome) -> Genome:
        return tuple(genome[: len(self.cuts.domain.knobs)])
