"""Spaces that come with Trimtab: what their networks compute, and that each is a part of one super-network."""

from __future__ import annotations

from random import Random

import pytest
import torch
from battery import seeded
from torch import nn

from trimtab.core.knob import Genome
from trimtab.engine.elastic import Supernet
from trimtab.space import Space, open_space

SHAPES = {"unet": (2, 3, 18, 13), "cell": (2, 10), "kernel-chain": (2, 10)}


def corners(space: Space) -> list[Genome]:
    """The smallest, the largest, a few at random, and every option once."""
    domain, rng = space.domain, Random(0)
    found = [domain.smallest(), domain.largest(), *(domain.random(rng) for _ in range(3))]
    largest = domain.largest()
    for i, knob in enumerate(domain.knobs):
        found += [domain.canonical((*largest[:i], p, *largest[i + 1 :])) for p in range(len(knob.options))]
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_every_option_makes_a_network_that_is_part_of_the_shared_weights(name: str) -> None:
    space = open_space(name)
    shared, x = Supernet(space), torch.randn(2, 3, 18, 13, generator=seeded(0))
    with torch.no_grad():
        for genome in corners(space):
            net = shared.extract(genome).eval()
            assert net(x).shape == SHAPES[name]
            assert torch.equal(shared.bound(genome)[0].eval()(x), net(x))
            plain = space.network(genome)
            assert {k: v.shape for k, v in plain.state_dict().items()} == {
                k: v.shape for k, v in net.state_dict().items()
            }


def test_a_narrow_unet_is_narrow_on_both_sides_of_a_concatenation() -> None:
    space = open_space("unet")
    setting = {"width0": 8, "width1": 24, "width2": 64}
    net = space.network(space.domain.genome({**space.domain.setting(space.domain.largest()), **setting}))
    joins = [up.join[0] for up in net.ups]  # type: ignore[union-attr, index]
    assert [(c.in_channels, c.out_channels) for c in joins if isinstance(c, nn.Conv2d)] == [(64 + 24, 24), (24 + 8, 8)]


def test_a_cell_is_alike_wherever_it_stands_and_nothing_is_zero() -> None:
    space = open_space("cell")
    assert space.domain.count() == 5**6
    plain = space.network(space.domain.genome(dict.fromkeys((k.name for k in space.domain.knobs), "skip")))
    one, other = (cell.state_dict() for cell in (plain[1], plain[2]))  # type: ignore[index]
    assert one.keys() == other.keys()
    empty = space.network(space.domain.smallest()).eval()
    x = torch.randn(2, 3, 16, 16, generator=seeded(0))
    assert torch.equal(empty[:3](x), torch.zeros(2, 16, 4, 4))  # type: ignore[index]
