"""Unified Layer Skipping: keep as many blocks as the target speed-up allows, evenly spaced through the depth."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.core.modelmap import ModelMap
from trimtab.prune.llm_drop import drop_named


@dataclass(frozen=True)
class UnifiedLayerSkipping(Rewriter):
    """Skip the same blocks for every sample and token, balanced through the depth, as many as a speed-up asks for.

    Of L blocks n = floor(L / r) stay, for a target speed-up r: the first, the last, and those at
    round(i (L - 1) / (n - 1)), i = 0 .. n - 1. As nothing depends on the input, batches and the key-value cache work as
    before, and the skipped blocks' weights and caches need not exist.

    Fields:
        speedup: r, the target speed-up of the blocks, above 1; the paper tries 2, 3 and 5.

    Reference: Liu et al. 2024, arXiv:2404.06954, section 3.
    Departures: the authors' code steps by the integer floor(L / (n - 1)) and fills up from the bottom, which leaves a
        run of skipped blocks at the top whenever that division has a remainder; here the spacing is even for every L
        and n. The skipped blocks are removed, so that prefill skips them too. The authors tune the model with the
        blocks skipped; healing is a step of its own.

    >>> UnifiedLayerSkipping(speedup=2.0).kept(9)
    (0, 3, 5, 8)
    """

    speedup: float = 2.0

    card = Card(
        "unified-layer-skipping",
        catalogue=(209,),
        paper="arXiv:2404.06954",
        claim="At equal skipped blocks, balanced skipping loses less than a contiguous run at the top or bottom.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "dropped"}),
        keeps=frozenset({"deterministic"}),
        levels=("drop", "keep"),
        kinds=frozenset({"block"}),
    )

    def kept(self, blocks: int, count: int | None = None) -> tuple[int, ...]:
        """Indices of the blocks that stay, of `blocks`; `count` of them, or as many as the speed-up says.

        Raises:
            UserError: a speed-up of at most 1, or more blocks asked for than there are.
        """
        if count is None:
            if not self.speedup > 1:
                raise UserError(f"unified-layer-skipping: speedup={self.speedup} was given; it is above 1")
            count = max(1, int(blocks / self.speedup))
        if not 1 <= count <= blocks:
            raise UserError(f"unified-layer-skipping: {count} of {blocks} blocks were to stay")
        if count == 1:
            return (0,)
        return tuple(int(i * (blocks - 1) / (count - 1) + 0.5) for i in range(count))

    def pick(self, modelmap: ModelMap, count: int | None = None) -> tuple[str, ...]:
        """Paths of the blocks to drop: `count` of them, or as many as the speed-up says."""
        total = len(modelmap.blocks)
        stay = set(self.kept(total, None if count is None else total - count))
        return tuple(path for i, path in enumerate(modelmap.blocks) if i not in stay)

    def rewrite(self, scene: Scene) -> None:
        """Drop every block that the levels name with `drop`."""
        drop_named(scene)
