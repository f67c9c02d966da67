"""Differentiable search: what mixes options, what is chosen of them, and the training in turns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from battery import METHODS, seeded
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Relaxer
from trimtab.engine.relaxing import Course, Relaxed
from trimtab.nas.darts import DARTS
from trimtab.nas.darts_pt import DARTSPT
from trimtab.nas.pc_darts import PCDARTS
from trimtab.nas.proxylessnas import ProxylessNAS
from trimtab.nas.single_path_nas import SinglePathNAS, gated
from trimtab.parts.mixing import Node, Vote, Weighted, strongest
from trimtab.space import OneOf, Space, Width, open_space

RELAXERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Relaxer)}
SPACES = {"single-path-nas": "kernel-chain"}
SMALL = {"width": 4}
COURSE = Course(steps=4, batch=8, tune=1)


def data(count: int = 32) -> tuple[Tensor, Tensor]:
    rng = seeded(0)
    return torch.randn(count, 3, 16, 16, generator=rng), torch.randint(10, (count,), generator=rng)


def relaxed(name: str, **fields: Any) -> Relaxed:
    space = open_space(SPACES.get(name, "cell"), **SMALL)
    return Relaxed(space, RELAXERS[name](**fields), *data(), COURSE)


each = pytest.mark.parametrize("name", RELAXERS)


@each
def test_a_search_ends_with_a_network_of_the_space(name: str) -> None:
    search = relaxed(name).train()
    genome = search.choose()
    assert genome == search.space.domain.canonical(genome)
    net = search.space.network(genome)
    assert net(data()[0]).shape == (32, 10)
    assert not any(isinstance(m, Weighted) for m in net.modules()), "what is found is plain"
    assert len(search.seconds) >= COURSE.steps and all(search.saved_bytes.values())
    again = relaxed(name).train()
    for mine, other in zip(search.votes.values(), again.votes.values(), strict=True):
        assert all(p.isfinite().all() for p in mine.architecture())
        if name != "darts-pt":  # it trains on while it chooses
            assert all(map(torch.equal, mine.architecture(), other.architecture())), "by its seed alone"


@each
def test_votes_and_weights_move_and_only_when_they_may(name: str) -> None:
    search = relaxed(name)
    votes = [p.detach().clone() for v in search.votes.values() for p in v.architecture()]
    weights = [p.detach().clone() for p in search.weights]

    def moved(before: list[Tensor], now: list[Tensor]) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))

    search.step(0.1, learning=False)
    now = [p for v in search.votes.values() for p in v.architecture()]
    assert moved(weights, search.weights) and not moved(votes, now), "in the warm-up votes stand still"
    search.step(0.1, learning=True)
    assert moved(votes, now)


@each
def test_the_same_choice_is_one_vote_wherever_it_stands(name: str) -> None:
    search = relaxed(name)
    mixed: list[Any] = [block for _, block, _, _ in search._made]
    assert len({id(block.vote) for block in mixed}) == len(search.votes) == len(search.space.domain.knobs)
    if name not in SPACES:
        assert len(mixed) == 2 * len(search.votes), "two cells"


def test_a_mixture_of_one_option_is_that_option() -> None:
    for cls in (DARTS, DARTSPT, ProxylessNAS):
        mixed: Any = cls().mix([lambda: nn.Linear(3, 3)], ())
        x = torch.randn(2, 3)
        assert torch.allclose(mixed(x), mixed.options[0](x))


def test_darts_weighs_by_a_softmax() -> None:
    mixed = DARTS().mix([nn.Identity, nn.ReLU, nn.Tanh], ())
    vote: Any = mixed.vote
    with torch.no_grad():
        vote.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    x = torch.randn(5, generator=seeded(0))
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert torch.allclose(mixed(x), p[0] * x + p[1] * x.relu() + p[2] * x.tanh())
    vote.kept[2] = 0
    assert torch.allclose(mixed(x), p[0] * x + p[1] * x.relu()), "what is left out leaves the others as they are"
    vote.kept.zero_()
    assert torch.equal(mixed(x), torch.zeros(5))


def test_a_node_keeps_its_strongest_edges_and_nothing_is_no_option() -> None:
    votes = {name: Vote(3) for name in "abc"}
    logits = {"a": [5.0, 0.0, 1.0], "b": [0.0, 2.0, 0.0], "c": [0.0, 0.0, 3.0]}
    for name, vote in votes.items():
        vote.beside, vote.keep, vote.nothing = list(votes.values()), 2, 0
        with torch.no_grad():
            vote.logits.copy_(torch.tensor(logits[name]))
    assert strongest(votes) == {"a": None, "b": 1, "c": 2}, "a is sure of nothing but of nothing"
    with torch.no_grad():
        votes["a"].edge.fill_(9.0)
    by_edge = PCDARTS().choose(votes)
    assert by_edge == {"a": 2, "b": None, "c": 2}


def test_pc_darts_sends_most_channels_past_the_options() -> None:
    mixed: Any = PCDARTS(share=4).mix([lambda width: nn.Conv2d(width, width, 1), lambda width: nn.Identity()], (8,))
    x = torch.randn(2, 8, 3, 3, generator=seeded(0))
    y = mixed(x)
    back = y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(back[:, 2:], x[:, 2:])
    assert torch.allclose(back[:, :2], mixed.mixed(x[:, :2]))
    assert sorted(y[0, :, 0, 0].tolist()) == sorted(back[0, :, 0, 0].tolist()), "channels are only shuffled"
    with pytest.raises(UserError, match="K divides"):
        PCDARTS(share=3).mix([lambda width: nn.Identity()], (8,))


def test_edges_of_a_node_share_one() -> None:
    search = relaxed("pc-darts")
    node = next(m for m in search.network.modules() if isinstance(m, Node) and len(m.edges) == 3)
    assert math.isclose(sum(float(edge.vote.share().detach()) for edge in node.edges), 1.0, abs_tol=1e-6)


def test_proxylessnas_computes_the_drawn_paths_alone() -> None:
    seen: list[int] = []

    class Path(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number
            self.scale = nn.Parameter(torch.tensor(float(number)))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.number)
            return x * self.scale

    mixed: Any = ProxylessNAS().mix([lambda i=i: Path(i) for i in range(1, 6)], ())
    vote = mixed.vote
    rng = seeded(0)
    vote.draw(rng, learning=False)
    mixed(torch.ones(1))
    assert seen == [vote.drawn[0] + 1]
    seen.clear()
    vote.draw(rng, learning=True)
    first, second = vote.drawn
    before = vote.weights().detach()
    out = mixed(torch.ones(1))
    out.sum().backward()
    assert sorted(seen) == sorted((first + 1, second + 1)) and out.tolist() == [first + 1]
    p = vote.logits.detach()[[first, second]].softmax(0)
    outs = torch.tensor([first + 1.0, second + 1.0])
    wanted = p * (outs - (p * outs).sum())
    assert torch.allclose(vote.logits.grad[[first, second]], wanted, atol=1e-5)
    assert int((vote.logits.grad != 0).sum()) == 2
    assert mixed.options[second].scale.grad is None, "the closed path needs no gradient of its own"
    with torch.no_grad():
        vote.logits[[first, second]] += torch.tensor([1.0, -0.3])
    vote.settle()
    after = vote.weights().detach()
    others = [i for i in range(5) if i not in vote.drawn]
    assert torch.allclose(after[others], before[others], atol=1e-6) and after[first] > before[first]


def test_proxylessnas_weighs_seconds() -> None:
    loss, seconds = torch.tensor(2.0), torch.tensor(0.3)
    assert float(ProxylessNAS(latency=0.5).weigh(loss, seconds, 0.6)) == pytest.approx(2.25)
    search = relaxed("proxylessnas", latency=1.0)
    name, vote = next(iter(search.votes.items()))
    search.costs = {n: torch.zeros_like(c) for n, c in search.costs.items()}
    search.costs[name][0] = 1.0
    (grad,) = torch.autograd.grad(search.expected(), vote.logits)
    assert grad[0] > 0 and (grad[1:] < 0).all()


def test_single_path_nas_opens_and_closes_parts_of_one_kernel() -> None:
    def block(kernel: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, width, 1), nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width))

    shapes = [(3, 2), (3, 4), (5, 2), (5, 4)]
    mixed: Any = SinglePathNAS().mix([lambda s=s: block(*s) for s in shapes], ())
    conv, vote = mixed.block[1], mixed.vote
    whole = conv.parametrizations.weight.original.detach()

    def says(kernel: Tensor, place: int) -> None:
        assert torch.allclose(conv.weight, kernel, atol=1e-6)
        assert torch.allclose(vote.weights(), torch.eye(4)[place], atol=1e-6)

    says(whole, 3)
    with torch.no_grad():
        vote.outer.fill_(2.0)
    inner = torch.zeros_like(whole)
    inner[..., 1:4, 1:4] = whole[..., 1:4, 1:4]
    says(inner, 1)
    with torch.no_grad():
        vote.further.fill_(2.0)
    inner[2:] = 0
    says(inner, 0)
    assert SinglePathNAS().choose({"block": vote}) == {"block": 0}
    vote.weights()[0].backward()
    assert vote.outer.grad is not None and vote.outer.grad[0] > 0, "a higher threshold, more of the smaller option"
    with pytest.raises(UserError, match="every side with every width"):
        SinglePathNAS().mix([lambda s=s: block(*s) for s in shapes[:3]], ())
    with pytest.raises(UserError, match="0 depthwise"):
        SinglePathNAS().mix([nn.Identity], ())


def test_a_closed_part_closes_those_behind_it() -> None:
    parts = [torch.ones(2), torch.full((2,), 0.1), torch.full((2,), 3.0)]
    total, gates = gated(parts, torch.tensor([1.0, 1.0]), torch.ones(3))
    assert total.tolist() == [1, 1] and [float(g.detach()) for g in gates] == [0, 1]


def test_darts_pt_takes_what_is_missed_most_and_goes_on_with_it() -> None:
    votes = {name: Vote(3) for name in "ab"}
    for vote in votes.values():
        vote.beside, vote.keep, vote.nothing = list(votes.values()), 1, 0
    harms = {("a", 1): 0.4, ("a", 2): 0.9, ("b", 1): 0.8, ("b", 2): 0.1, ("a", None): 2.0, ("b", None): 1.0}
    taken: list[Any] = []
    found = DARTSPT().choose(votes, harm=lambda *key: harms[key], take=lambda *key: taken.append(key), rng=seeded(0))
    assert found == {"a": 2, "b": None}
    assert sorted(taken[:2]) == [("a", 2), ("b", 1)] and taken[2:] == [("b", None)]


def test_harm_and_take_change_the_network_and_harm_puts_it_back() -> None:
    search = relaxed("darts-pt").train()
    name = "edge01"
    whole = {k: v.clone() for k, v in search.votes[name].named_parameters()}
    assert search.harm(name, None) != search.harm(name, 1)
    assert search.votes[name].kept.tolist() == [1] * 5
    assert all(torch.equal(v, whole[k]) for k, v in search.votes[name].named_parameters())
    search.take(name, 3)
    assert torch.allclose(search.votes[name].weights(), torch.tensor([0.0, 0, 0, 1, 0]), atol=1e-6)
    search.take(name, None)
    assert search.votes[name].weights().tolist() == [0] * 5


def test_spaces_without_blocks_to_choose_are_refused() -> None:
    with pytest.raises(UserError, match="no choice of blocks"):
        Relaxed(Space(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, Width(8, 10)))), DARTS(), *data(), COURSE)


def test_an_edge_of_no_option_needs_one_of_that_name() -> None:
    def network() -> nn.Module:
        def edge(name: str) -> Any:
            return OneOf(nn.Identity, nn.ReLU, name=name)()

        node = Node([edge("one"), edge("two")], 1)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.node, self.head = node, nn.Linear(768, 10)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.node([x, x]).flatten(1))

        return Net()

    search = Relaxed(Space(network), DARTS(), *data(), COURSE)
    with pytest.raises(UserError, match="called none"):
        search.train().choose()
