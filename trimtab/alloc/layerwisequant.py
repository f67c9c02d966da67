"""Two levels by layer importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import enclosing, ladder, lowered, objective, open_menu, refusal


@dataclass(frozen=True)
class LayerwiseQuant(Allocator):
    """Rank layers by importance: as many as the budget allows take the higher of two levels, the rest the lower.

    LIM(L) = -cos(input of L, output of L): a layer that changes its input more matters more.
    ZD(L) = |{w in L : (w - mean) / std > 1}| / |L|: a layer with fewer weights far above its mean matters more.

    Fields:
        score: "cosine" (LIM) or "outliers" (ZD).
        high, low: texts of the two levels. "": every level that all units offer forms a ladder, and the two neighbours
            between which the budget falls are used.

    Args of `allocate`:
        rows: the table; limits: any. With "damage" limited and "bytes" not, as few layers are high as the summed damage
            allows.
        cosine: {unit, or path of the sublayer or block that encloses it: mean over tokens of the cosine similarity of
            its input and output, residual included}; scalars in [-1, 1]. Asked for by "cosine" only.
        outliers: {unit or enclosing path: `outlier_score` of its weight}; scalars in [0, 1]. Asked for by "outliers"
            only. A unit without a value (an embedding, a head) counts as the most important. Ties go to the earlier
            unit.

    Raises:
        BudgetError: the lower level everywhere is still over a limit. UserError: the statistic or a level is missing.

    Reference: Dumitru et al. 2024, arXiv:2406.17415, section 3 (LIM and ZD scores).
    Departures: a unit is what the table says, so parts of one layer may differ where the border falls inside it; the
        paper moves whole layers. The paper leaves embeddings and head alone; here they take the higher level first.
        Units that do not offer a level take their own row nearest to it in bytes a weight.

    >>> table = [Row(unit, f"{n}b", n, 0.0, 1 / n) for unit in ("l.0", "l.1", "l.2") for n in (4, 2)]
    >>> cosine = {"l.0": 0.3, "l.1": 0.99, "l.2": 0.8}
    >>> method = LayerwiseQuant(high="4b", low="2b")
    >>> {unit: row.choice for unit, row in method.allocate(table, {"bytes": 9}, cosine=cosine).items()}
    {'l.0': '4b', 'l.1': '2b', 'l.2': '2b'}
    """

    score: Literal["cosine", "outliers"] = "cosine"
    high: str = ""
    low: str = ""

    card = Card(
        "layerwisequant",
        catalogue=(201,),
        paper="arXiv:2406.17415",
        claim="Perplexity under either order is below random and reversed orders at equal mean bits.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(
        self,
        rows: list[Row],
        limits: Mapping[str, float],
        *,
        cosine: Mapping[str, float | Tensor] | None = None,
        outliers: Mapping[str, float | Tensor] | None = None,
    ) -> dict[str, Row]:
        menu, limits = open_menu(rows, limits)
        given = {"cosine": cosine, "outliers": outliers}
        scores = given.get(self.score)
        if scores is None:
            found = ", ".join(name for name, values in given.items() if values is not None) or "no statistic"
            raise UserError(
                f"layerwisequant ranks by score={self.score!r}, was given {found}; use 'cosine' or 'outliers'"
            )
        if bool(self.high) != bool(self.low):
            raise UserError(f"layerwisequant: high={self.high!r} and low={self.low!r}; name both levels or neither")
        rungs = ladder(menu, (self.high, self.low) if self.high else ())
        # a large score means unimportant under both rules, so it is lowered first; -inf, for no score, comes last
        value = [enclosing(scores, unit, missing=-float("inf")) for unit in menu.units]
        order = sorted(range(len(value)), key=lambda at: (-value[at], -at))
        depth = range(len(order) * (len(rungs) - 1) + 1)
        for steps in reversed(depth) if objective(limits) == "bytes" else depth:
            if menu.fits(plan := lowered(rungs, order, steps), limits):
                return menu.chosen(plan)
        for name, limit in limits.items():
            if (least := min(menu.total(plan, name) for plan in rungs)) > limit:
                raise refusal(name, limit, least, within="with these levels ")
        raise UserError(f"layerwisequant: no share of the levels keeps {' and '.join(limits)} at once; use milp")
