"""LLM-Drop: remove the attention layers, MLPs or blocks that change the residual least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Depth
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.core.modelmap import ModelMap
from trimtab.formats.structure import apply_edit, drop_edits, sublayer_path

TARGETS = ("attention", "mlp", "block", "joint")


@dataclass(frozen=True)
class LLMDrop(Rewriter):
    """Drop the sublayers whose input and output are most alike.

    For a sublayer y = x + f(norm(x)), residual included, the importance is S = 1 - mean over tokens of cos(x, y); the
    sublayers with the smallest S go, all at once, their norms with them. A dropped attention needs no key-value cache.

    Fields:
        target: what may be dropped: `attention` (the paper's Attention Drop), `mlp`, `block`, or `joint` (attention
            layers and MLPs ranked in one list: Joint Layer Drop).

    Reference: He et al. 2024, arXiv:2406.15786, sections 3.1-3.4, equations 1-5.
    Departures: none; the choice is a function of its own, so that an allocator may choose otherwise and use the same
        rewrite.

    >>> import torch
    >>> LLMDrop().importance({"a": torch.tensor(0.99), "b": torch.tensor(0.5)})
    {'a': 0.01, 'b': 0.5}
    """

    target: str = "attention"

    card = Card(
        "llm-drop",
        catalogue=(194,),
        paper="arXiv:2406.15786",
        claim="At equal sublayers removed, attention by similarity costs less than MLPs, blocks or random ones.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "dropped"}),
        keeps=frozenset({"deterministic"}),
        levels=("drop", "keep"),
        kinds=frozenset({"sublayer", "block"}),
    )

    def importance(self, cosine: Mapping[str, Tensor]) -> dict[str, float]:
        """S = 1 - cosine for each path."""
        return {path: round(1 - float(value), 6) for path, value in cosine.items()}

    def pick(self, modelmap: ModelMap, count: int, cosine: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Paths of the `count` least important sublayers or blocks of the target, least important first.

        Args:
            modelmap: says which paths are attentions, MLPs and blocks.
            count: how many to drop.
            cosine: similarity of input and output for each path.

        Raises:
            UserError: an unknown target, or fewer candidates than asked for.
        """
        if self.target not in TARGETS:
            raise UserError(f"llm-drop: target {self.target!r} was given; it is one of {', '.join(TARGETS)}")
        kinds = {"joint": ("attention", "mlp")}.get(self.target, (self.target,))
        paths = modelmap.blocks
        if self.target != "block":
            paths = tuple(sublayer_path(modelmap, s) for s in modelmap.sublayers if s.kind in kinds)
        scores = self.importance({p: cosine[p] for p in paths if p in cosine})
        if not 0 <= count <= len(scores):
            raise UserError(
                f"llm-drop: {count} of target {self.target!r} were to be dropped, the model has {len(scores)}"
            )
        return tuple(sorted(scores, key=lambda p: scores[p])[:count])

    def rewrite(self, scene: Scene) -> None:
        """Drop every sublayer or block that the levels name with `drop`."""
        drop_named(scene)


def drop_named(scene: Scene) -> None:
    """Drop what the levels name with `drop`: sublayers give way to zeros, and whole blocks leave the model.

    A block is whole where it is named itself, or all its sublayers are.

    Raises:
        UserError: a path that is no sublayer or block, a level other than `drop` or `keep`, or no block left.
    """
    modelmap, named = scene.modelmap, set()
    for path, level in scene.levels.items():
        if not isinstance(level, Depth):
            raise UserError(
                f"{path} was to be taken to {level}; a sublayer or block is dropped (`drop`) or kept (`keep`)"
            )
        named |= set() if level.keep else {path}
    whole = []
    for index, block in enumerate(modelmap.blocks):
        inside = {sublayer_path(modelmap, s) for s in modelmap.sublayers if s.block == index}
        if block in named or (inside and inside <= named):
            whole.append(block)
            named -= inside | {block}
    if len(whole) == len(modelmap.blocks) > 0:
        raise UserError(f"all {len(whole)} blocks were to be dropped; keep at least one")
    edits = [edit for path in sorted(named) for edit in drop_edits(scene.model, modelmap, path)]
    # From the last block to the first: taking one out of its list moves those behind it.
    edits += [edit for block in reversed(whole) for edit in drop_edits(scene.model, modelmap, block)]
    for edit in edits:
        apply_edit(scene.model, edit)
    scene.edits += edits
