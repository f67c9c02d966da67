"""S-LoRA: adapters and texts share one pool; adapters are fetched as they are asked for, ahead where there is room."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.method import Card, Scheduler
from trimtab.core.traffic import Decision, View
from trimtab.parts.admission import Door


@dataclass(frozen=True)
class SLoRA(Scheduler):
    """Requests of any adapters run in one batch, and free = pool - pages(texts) - bytes(adapters) is one for all.

    A request begins, in order of arrival, at any tick in which its text at full length and its adapter fit. Adapters
    that no one uses stay until their memory is needed, and the one used longest ago goes first. While requests wait for
    a place, the adapters of the next `ahead` of them are fetched into memory that is free.

    Args:
        ahead: waiting requests whose adapters are fetched before they can begin.
        cluster: adapters of a batch, at most, as section 4.1's clustering has it; 0: any number (paper's default).

    Reference: Sheng et al. 2023, arXiv:2311.03285, sections 4 and 5.
    Departures: the pages of the pool are the operating system's own: texts and adapters have addresses for all that
        they may become, and memory for what they are, so that no kernel looks a page up. A request reserves its full
        length, so that none has to be thrown out once it runs; the paper's early abort, for objectives of latency, is
        left out.

    >>> from trimtab.core.traffic import Pages, Waiting
    >>> view = View(0, 64, 8, 10_000, Pages(64, 1000), (Waiting(0, 5, 20, "poet", 0),), known={"poet": 4000})
    >>> SLoRA().decide(view)
    Decision(admit=(), evict=(), load=('poet',), rows={})
    """

    ahead: int = 8
    cluster: int = 0

    card = Card(
        "s-lora",
        catalogue=(3,),
        paper="arXiv:2311.03285",
        claim="Thousands of adapters on one base at a throughput near that of one, and several times that of merging "
        "each into the base in turn.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: View) -> Decision:
        """Who begins, and which adapters come and go."""
        door = Door(view)
        waiting = view.waiting
        if self.cluster:
            active = dict.fromkeys(r.adapter for r in view.running)
            for request in waiting:
                if len(active) >= self.cluster:
                    break
                active.setdefault(request.adapter)
            waiting = tuple(request for request in waiting if request.adapter in active)
        door.let_in(waiting)
        admitted = {request.id for request in door.admit}
        door.fetch([request for request in waiting if request.id not in admitted][: self.ahead])
        return door.decision()
