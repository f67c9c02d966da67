"""What claims and benchmarks of elastic training share: one space and data, super-networks trained on them, networks
trained alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Elastic, method
from trimtab.core.plan import parse_method

if TYPE_CHECKING:
    from trimtab.engine.costing import Costs
    from trimtab.engine.elastic import Maker, Supernet
    from trimtab.engine.jury import Jury
    from trimtab.tasks.base import Task


@dataclass
class Elasticity:
    """A space or a cut model with its task; trains super-networks, and scores their networks on test items.

    Fields:
        maker, task: see `trimtab.searching`.
        batch, rate, decay: of every training.
        seed: of weights, order and draws.
        gathered, tested: items for the statistics of norms, and that networks are scored on.
    """

    maker: Maker
    task: Task
    batch: int = 64
    rate: float = 3e-3
    decay: float = 0.01
    seed: int = 0
    gathered: int = 256
    tested: int = 10_000
    passes: dict[str, int] = field(default_factory=dict)

    @property
    def domain(self) -> Domain:
        """The knobs."""
        return self.maker.domain

    @cached_property
    def items(self) -> Any:
        """Items that are trained on."""
        return self.task.batch("calibration", 1 << 40, self.seed)

    @cached_property
    def jury(self) -> Jury:
        """Scores networks on test items."""
        from trimtab.engine.jury import Jury

        items = self.task.batch("test", self.tested, self.seed)
        return Jury(self.task, self.items.take(0, self.gathered), items)

    @cached_property
    def costs(self) -> Costs:
        """Parameters, bytes and flops of every network."""
        from trimtab.engine.costing import Costs

        return Costs(self.maker, dict(self.items.take(0, 1).inputs), self.task.options)

    def trained(self, how: str | Elastic, steps: int, sort: bool = False) -> Supernet:
        """A super-network trained by a method.

        Args:
            sort: put the channels in the order of their importance first, for a model that was trained before.
        """
        import torch

        from trimtab.engine.elastic import Supernet
        from trimtab.engine.teaching import Course, Teaching
        from trimtab.engine.train import train

        made = parse_method(how) if isinstance(how, str) else how
        assert isinstance(made, Elastic)
        supernet = Supernet(self.maker, self.seed, made.transforms)
        if sort:
            supernet.sort(dict(self.items.take(0, 1).inputs))
        if not steps:
            return supernet.requires_grad_(False)
        recipe = Course(steps=steps, batch=self.batch, rate=self.rate, decay=self.decay, seed=self.seed, method=made)
        optimiser = torch.optim.AdamW(supernet.parameters(), lr=self.rate, weight_decay=self.decay)
        options = self.task.options
        teaching = Teaching(supernet, made, self.items.inputs, self.items.labels, steps, self.seed, options)
        train(supernet, None, len(self.items), recipe, optimiser, backward=teaching)  # type: ignore[arg-type]
        self.passes[str(how)] = teaching.passes
        return supernet.requires_grad_(False)

    def alone(self, genome: Genome, steps: int, sort: bool = False) -> Supernet:
        """A super-network of which one network was trained."""
        made = method("alone", genome=genome)
        assert isinstance(made, Elastic)
        return self.trained(made, steps, sort)

    def error(self, supernet: Supernet, genome: Genome) -> float:
        """The test error of a network."""
        return self.jury.of(supernet, genome)

    def spread(self, count: int, cost: str = "flops", within: Domain | None = None) -> list[Genome]:
        """Networks at so many budgets, in equal ratios from the smallest to the largest: the nearest of random ones.

        Args:
            within: what is offered of the domain.
        """
        rng, domain = Random(self.seed), within or self.domain
        drawn = sorted({self.domain.genome(domain.setting(domain.random(rng))) for _ in range(3000)})
        ends = [self.domain.genome(domain.setting(g)) for g in (domain.smallest(), domain.largest())]
        costs = self.costs.price(drawn)[cost]
        low, high = self.costs.price(ends)[cost]
        found = [ends[0]]
        for i in range(1, count - 1):
            wanted = low * (high / low) ** (i / (count - 1))
            found.append(drawn[int(abs(costs - wanted).argmin())])
        return [*found, ends[1]]


def digits_space(seed: int = 0, space: str = "mobile-cnn", **options: Any) -> Elasticity:
    """A named space on scikit-learn's digits."""
    from trimtab.space import Space, open_function
    from trimtab.tasks.fresh import task_of

    function, name = open_function(space)
    task, known = task_of(function, None)
    return Elasticity(Space(function, name, **known), task, seed=seed, **options)


def cut_model(
    model: str, seed: int = 0, length: int = 64, training: int = 4096, data: str | None = None, **options: Any
) -> Elasticity:
    """A shipped model that is made elastic."""
    from trimtab.engine.cuts import Cuts
    from trimtab.engine.stream import traced
    from trimtab.models.source import open_source
    from trimtab.tasks.build import task_for

    source = open_source(model)
    task = task_for(source, data, length, training=training)
    some = task.batch("calibration", 4, seed)
    maker = Cuts(source.name, source.materialise(), traced(source, some), some.inputs, task.options)
    return Elasticity(maker, task, seed=seed, **options)
