"""Speculative decoding: a draft proposes the same number of tokens before every step of the target."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Drafter
from trimtab.core.view import Drafting


@dataclass(frozen=True)
class SpeculativeDecoding(Drafter):
    """gamma tokens are proposed a step. Where each is accepted with probability alpha, independently, a step gives
    (1 - alpha^(gamma + 1)) / (1 - alpha) tokens.

    Args:
        tokens: gamma (paper: 3 to 10, by alpha and cost).

    Reference: Leviathan et al. 2023, arXiv:2211.17192, sections 2.3 and 3.1; acceptance itself is
        `engine.speculation.judge`.
    Departures: fewer are proposed where the text, the context or the step has no room for them.

    >>> SpeculativeDecoding(tokens=4).decide(Drafting(room=3))
    3
    """

    tokens: int = 4

    card = Card(
        "speculative-decoding",
        paper="arXiv:2211.17192",
        claim="What is written does not change, and a step of the target gives more than one token.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: Drafting) -> int:
        """How many tokens to propose."""
        if self.tokens < 0:
            raise UserError(f"speculative-decoding was asked for {self.tokens} tokens; ask for 0 or more")
        return min(self.tokens, view.room)
