"""LLM in a flash: neurons come from disk as tokens need them, and those of the last few tokens stay in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Pager
from trimtab.core.view import Exchange, Held


@dataclass(frozen=True)
class LLMInAFlash(Pager):
    """Of s(t), the neurons that token t needs, those are read that no token of the window needed; the rest are there.

        held(t) = s(t) u s(t-1) u ... u s(t-k+1),    read(t) = s(t) without held(t-1)

    Where held(t) would exceed the room, neurons needed longest ago go first. Where s(t) alone does, its first neurons
    stay, and the others are read, used and let go.

    Args:
        window: k, tokens whose neurons stay (paper: 4 or 5, what half of the model's bytes have room for); 0: none do,
            and all that a token needs is read.

    Reference: Alizadeh et al. 2023, arXiv:2312.11514, sections 3.1 (windowing) and 3.3 (memory).
    Departures: the paper's room is what the window was seen to need on a sample, so that it is never exceeded; here the
        user gives it, and it holds at least what tokens of a sample needed in the mean. What is needed may be known
        exactly too, from rows kept in memory (`engine.flash`). The paper computes with all that is held; here only what
        a token needs counts, so that a text does not depend on the room. Co-activated neurons are not stored together,
        which the paper tried and dropped.

    >>> view = Held(np.array([0, 0, 3, 9]), np.array([False, True, True, True]), room=400, record=100)
    >>> LLMInAFlash().decide(view)
    Exchange(load=array([0]), drop=array([3]))
    """

    window: int = 5

    card = Card(
        "llm-in-a-flash",
        catalogue=(323,),
        paper="arXiv:2312.11514",
        claim="A model whose feed-forward weights lie on disk is several times as fast as by reading them all, for the "
        "neurons that are read a token are few, and each is one piece.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"linear"}),
    )

    def decide(self, view: Held) -> Exchange:
        """What the layer reads, and what gives way to it."""
        fit = view.room // view.record if view.record > 0 else 0
        if self.window < 0 or fit < 1:
            raise UserError(
                f"llm-in-a-flash was asked for a window of {self.window} tokens in {view.room} bytes, where a neuron "
                f"takes {view.record}; it takes a window from 0 and room for at least one neuron"
            )
        needed = view.idle == 0
        stay = view.held & (view.idle < self.window)
        load = np.flatnonzero(needed & ~stay)
        spare = fit - int((stay & needed).sum())  # for what is read, and for what only the window asks for
        load = load[: max(spare, 0)]
        others = np.flatnonzero(stay & ~needed)
        excess = len(others) - max(spare - len(load), 0)
        if excess > 0:
            stay[others[np.argsort(-view.idle[others], kind="stable")[:excess]]] = False
        return Exchange(load, np.flatnonzero(view.held & ~stay))
