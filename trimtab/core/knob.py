"""Knobs: what a network may be cut or grown to, as a flat table that prints, and the genomes that set them.

A genome is one place among the options of each knob, as a tuple of ints. Knobs may hang on others: the kernel of a
third block does not matter where there are two. Such a knob is *idle*; `Domain.canonical` puts idle knobs at their
first option, so that genomes that mean the same network are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

from trimtab.core.errors import UserError

Kind = Literal["choice", "width", "heads", "depth", "block", "resolution", "level", "recipe"]
Genome = tuple[int, ...]
Offered = Mapping[str, Sequence[int]]  # knob -> rising places of its options


@dataclass(frozen=True)
class Knob:
    """One free choice.

    Fields:
        name: as it prints; unique in its domain.
        options: what it may be set to; of widths and depths from smallest to largest.
        kind: a plain choice, a width, a number of heads, a depth, a block among several, the height of the
            images, a level of compression, or part of a recipe.
        when: (name of another knob, places of its options) pairs, under all of which this knob matters; from the
            outermost to the nearest, each knob hanging on those before it.
    """

    name: str
    options: tuple[Any, ...]
    kind: Kind = "choice"
    when: tuple[tuple[str, frozenset[int]], ...] = ()

    def nearest(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Places of the options nearest to shares of the largest, rising.

        >>> Knob("hidden", (32, 64, 96, 128), "width").nearest((0.5, 1.0))
        (1, 3)
        """
        places = range(len(self.options))
        return tuple(sorted({min(places, key=lambda p: abs(self.options[p] / self.options[-1] - s)) for s in shares}))

    @property
    def ordered(self) -> bool:
        """Whether its options are numbers, so that near places are near."""
        return all(isinstance(o, int | float) and not isinstance(o, bool) for o in self.options)


@dataclass(frozen=True)
class Domain:
    """The knobs of a search, each behind all that it hangs on.

    >>> two = Domain((Knob("depth", (1, 2), "depth"), Knob("kernel", (3, 5), when=(("depth", frozenset({1})),))))
    >>> two.canonical((0, 1)), two.count(), two.setting((1, 1))
    ((0, 0), 3, {'depth': 2, 'kernel': 5})
    """

    knobs: tuple[Knob, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for knob in self.knobs:
            assert knob.options, f"knob {knob.name} has no option"
            assert knob.name not in seen, f"two knobs are called {knob.name}"
            assert all(name in seen for name, _ in knob.when), f"knob {knob.name} hangs on a later one"
            seen.add(knob.name)

    @cached_property
    def _conditions(self) -> tuple[tuple[tuple[int, frozenset[int]], ...], ...]:
        place = {knob.name: i for i, knob in enumerate(self.knobs)}
        return tuple(tuple((place[name], places) for name, places in knob.when) for knob in self.knobs)

    def active(self, genome: Genome) -> tuple[bool, ...]:
        """Which knobs matter in a genome; one that hangs on an idle knob is idle."""
        found: list[bool] = []
        for conditions in self._conditions:
            found.append(all(found[i] and genome[i] in places for i, places in conditions))
        return tuple(found)

    def canonical(self, genome: Iterable[int]) -> Genome:
        """The genome with every idle knob at its first option.

        Raises:
            UserError: another number of knobs, or a place that a knob has not.
        """
        given = tuple(genome)
        if len(given) != len(self.knobs):
            raise UserError(f"a genome of {len(given)} places was given; this search has {len(self.knobs)} knobs")
        for knob, place in zip(self.knobs, given, strict=True):
            if not 0 <= place < len(knob.options):
                raise UserError(f"place {place} of {knob.name} was given; it has {len(knob.options)} options")
        return tuple(p if on else 0 for p, on in zip(given, self.active(given), strict=True))

    def setting(self, genome: Genome) -> dict[str, Any]:
        """What a genome says: name -> option, of the knobs that matter."""
        pairs = zip(self.knobs, genome, self.active(genome), strict=True)
        return {knob.name: knob.options[place] for knob, place, on in pairs if on}

    def genome(self, setting: Mapping[str, Any]) -> Genome:
        """The canonical genome of a setting; knobs that are not named stand at their first option.

        Raises:
            UserError: an unknown name, or an option that the knob has not.
        """
        known = {knob.name: knob for knob in self.knobs}
        for name, option in setting.items():
            if name not in known:
                raise UserError(f"no knob is called {name!r}; there are {', '.join(known)}")
            if option not in known[name].options:
                raise UserError(f"{name} cannot be {option!r}; it may be {', '.join(map(str, known[name].options))}")
        return self.canonical(k.options.index(setting[k.name]) if k.name in setting else 0 for k in self.knobs)

    def smallest(self, offered: Offered | None = None) -> Genome:
        """Every knob at its first option, of those offered."""
        return self.canonical(places[0] for places in self._offered(offered))

    def largest(self, offered: Offered | None = None) -> Genome:
        """Every knob at its last option, of those offered."""
        return self.canonical(places[-1] for places in self._offered(offered))

    def random(self, rng: Random, offered: Offered | None = None) -> Genome:
        """A genome with every knob drawn evenly, from the places that are offered; knobs not named stand at their last
        place where others are.
        """
        return self.canonical(rng.choice(places) for places in self._offered(offered))

    def _offered(self, offered: Offered | None) -> Iterator[Sequence[int]]:
        for knob in self.knobs:
            last = len(knob.options) - 1
            yield range(last + 1) if offered is None else offered.get(knob.name) or (last,)

    def within(self, offered: Offered) -> Domain:
        """The domain of what is offered alone; `genome(small.setting(g))` leads back.

        Knobs with one option stay, so that a setting says all of a network.
        """
        places = {knob.name: tuple(kept) for knob, kept in zip(self.knobs, self._offered(offered), strict=True)}
        return Domain(
            tuple(
                Knob(
                    knob.name,
                    tuple(knob.options[p] for p in places[knob.name]),
                    knob.kind,
                    tuple(
                        (n, frozenset(i for i, p in enumerate(places[n]) if p in allowed)) for n, allowed in knob.when
                    ),
                )
                for knob in self.knobs
            )
        )

    def mutated(self, genome: Genome, rng: Random, rate: float) -> Genome:
        """Each knob that matters is drawn anew with probability `rate`, at least one of them."""
        active = [i for i, on in enumerate(self.active(genome)) if on and len(self.knobs[i].options) > 1]
        if not active:
            return genome
        chosen = [i for i in active if rng.random() < rate] or [rng.choice(active)]
        places = list(genome)
        for i in chosen:
            places[i] = rng.choice([p for p in range(len(self.knobs[i].options)) if p != genome[i]])
        return self.canonical(places)

    def crossed(self, one: Genome, other: Genome, rng: Random) -> Genome:
        """Each knob from one of two parents."""
        return self.canonical(rng.choice(pair) for pair in zip(one, other, strict=True))

    def neighbours(self, genome: Genome) -> Iterator[Genome]:
        """Every other network that one knob away reaches; next options only where they are ordered."""
        seen = {genome}
        for i, (knob, on) in enumerate(zip(self.knobs, self.active(genome), strict=True)):
            near = (genome[i] - 1, genome[i] + 1) if knob.ordered else range(len(knob.options))
            for place in near if on else ():
                if 0 <= place < len(knob.options):
                    other = self.canonical((*genome[:i], place, *genome[i + 1 :]))
                    if other not in seen:
                        seen.add(other)
                        yield other

    def count(self) -> int:
        """How many different networks there are, exactly."""
        below: list[list[int]] = [[] for _ in self.knobs]
        roots: list[int] = []
        for i, conditions in enumerate(self._conditions):
            (below[conditions[-1][0]] if conditions else roots).append(i)
        totals = [0] * len(self.knobs)
        for i in reversed(range(len(self.knobs))):
            places = range(len(self.knobs[i].options))
            totals[i] = sum(math.prod(totals[j] for j in below[i] if p in self._conditions[j][-1][1]) for p in places)
        return math.prod(totals[i] for i in roots)

    def log10(self) -> float:
        """Decimal logarithm of the count."""
        return math.log10(self.count())
