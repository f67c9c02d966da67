"""Early stopping where there are several objectives: rungs, and at each only the best fronts go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Policy
from trimtab.parts.fronts import crowding, excess, ranks


@dataclass(frozen=True)
class MOASHA(Policy):
    """An evaluation goes on from a rung where it is among the best 1 / eta of all that came by there so far.

    The order at a rung is by constraint domination, and within a front by crowding; n came by before it:

        go on  <=>  place(values) < max(1, ceil((n + 1) / eta)),   or n < `warm`

    Rungs are the shares at which an evaluation reports, see `engine.hunting`. Nobody waits for anybody.

    Fields:
        eta: one of so many goes on.
        warm: how many pass a rung before the first is stopped there.

    Reference: Schmucker et al. 2021, arXiv:2106.12639, section 3 (MO-ASHA with non-dominated sorting); Li et al. 2018,
        arXiv:1810.05934 (ASHA).
    Departures: what is stopped is not taken up again; the order within a front is by crowding and not by an epsilon
        net; limits count first.

    >>> from types import SimpleNamespace
    >>> before = tuple({"error": float(i), "ms": float(i)} for i in range(8))
    >>> view = SimpleNamespace(others=before, objectives=("error", "ms"), limits={})
    >>> [MOASHA().decide(SimpleNamespace(**vars(view), values={"error": e, "ms": e})) for e in (0.5, 6.5)]
    [True, False]
    """

    eta: float = 3.0
    warm: int = 3

    card = Card(
        "mo-asha",
        paper="arXiv:2106.12639",
        claim="Nearly all of a front's volume for a part of the training.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def decide(self, view: Any) -> bool:
        """Whether the evaluation that reached the rung goes on.

        Raises:
            UserError: eta is not above 1.
        """
        if self.eta <= 1:
            raise UserError(f"mo-asha was asked to let one of {self.eta:g} go on; eta is above 1")
        if len(view.others) < self.warm:
            return True
        rows = [*view.others, view.values]
        points = np.array([[row[name] for name in view.objectives] for row in rows], dtype=float)
        over = excess({name: np.array([row[name] for row in rows]) for name in view.limits}, view.limits)
        place = ranks(points, over)
        mine = place == place[-1]
        room = crowding(points[mine])
        before = (place < place[-1]).sum() + (room > room[-1]).sum()
        return bool(before < max(1, np.ceil(len(rows) / self.eta)))
