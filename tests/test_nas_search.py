"""Fronts, predictors and searchers: against brute force, against what is known, and what every searcher must hold."""

from __future__ import annotations

import inspect
import sys
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.catalogue import data_folder
from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Knob
from trimtab.core.method import Hunt, Searcher, Trial, discover, method
from trimtab.engine.hunting import Rung
from trimtab.nas.deeparchitect import DeepArchitect
from trimtab.nas.evolution import Evolution
from trimtab.nas.linas import LINAS
from trimtab.nas.mo_asha import MOASHA
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.breeding import Known, design, every
from trimtab.parts.fronts import Free, crowding, dominates, excess, front, hypervolume, ranks, table
from trimtab.parts.growing import deeper, wider
from trimtab.parts.hashing import fingerprint
from trimtab.parts.neural_predictors import Mixer, Pretrained, diff_kendall
from trimtab.parts.predicting import Concord, Encoding, Predictor, Ridge, Scores
from trimtab.parts.protocol import relative_improvement
from trimtab.peers import installed
from trimtab.tasks.digit_nets import costs, digit_nets, scores
from trimtab.tasks.nas_tables import bench201, macro, needed


def given_to(cls: type[Searcher]) -> list[inspect.Parameter]:
    """The parameters by which a searcher asks for what the engine has."""
    return [p for p in inspect.signature(cls.ask).parameters.values() if p.kind is p.KEYWORD_ONLY]


SEARCHERS = {
    name: cls
    for name, cls in discover().items()
    if issubclass(cls, Searcher) and all(p.default is not p.empty for p in given_to(cls) if p.name != "rng")
}  # those that need nothing but a generator
PEERS = {"optuna-tpe": "optuna", "optuna-nsga2": "optuna", "pymoo-nsga2": "pymoo"}


def where_installed(name: str) -> object:
    """A searcher's name, skipped where it is of a library that is not here."""
    lacks = name in PEERS and not installed(PEERS[name])
    return pytest.param(name, marks=pytest.mark.skipif(lacks, reason=f"{PEERS.get(name)} is not installed"))


each_searcher = pytest.mark.parametrize("name", [where_installed(name) for name in SEARCHERS])
each_peer = pytest.mark.parametrize("name", [where_installed(name) for name in PEERS])
quick = settings(max_examples=40, deadline=None)
points = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.tuples(*[st.integers(0, 6)] * m), min_size=1, max_size=14).map(lambda p: np.array(p, float))
)
TREE = Domain(
    (
        Knob("depth", (1, 2, 3), "depth"),
        Knob("width", (8, 16, 32), "width"),
        Knob("op 2", ("conv", "pool", "skip"), when=(("depth", frozenset({1, 2})),)),
        Knob("op 3", ("conv", "pool"), when=(("depth", frozenset({2})),)),
        Knob("rate", (0.1, 0.3, 1.0), "recipe"),
    )
)


def scored(genome: tuple[int, ...]) -> dict[str, float]:
    """Two values that pull apart, and a third to limit."""
    depth, width, second, third, rate = genome
    error = 9 - 2 * depth - 1.5 * width + abs(rate - 1) + 0.5 * (second == 1) + 0.25 * third
    return {"error": error, "ms": (1 + depth) * (1.0 + width) + second, "bytes": 4.0 * (1 + width)}


def trials_of(genomes: list[tuple[int, ...]]) -> tuple[Trial, ...]:
    return tuple(Trial(genome, scored(genome)) for genome in genomes)


def run(searcher: Searcher, count: int, batch: int = 4, seed: int = 0, **hunt: object) -> tuple[Trial, ...]:
    """A search of the tree, as the driver does it."""
    trials: tuple[Trial, ...] = ()
    while len(trials) < count:
        asked = Hunt(TREE, trials, **{"objectives": ("error", "ms"), "seed": seed, **hunt})  # type: ignore[arg-type]
        offered = {"rng": Random(f"{seed}/{len(trials)}"), "price": None, "nodes": None, "identity": None}
        new = searcher.ask(asked, min(batch, count - len(trials)), **{k: offered[k] for k in searcher.needs()})
        if not new:
            break
        trials += trials_of(new)
    return trials


# ---- fronts


@quick
@given(points)
def test_the_front_is_what_nobody_dominates(points: np.ndarray) -> None:
    unbeaten = {tuple(p) for p in points if not any((q <= p).all() and (q < p).any() for q in points)}
    assert {tuple(p) for p in points[front(points)]} == unbeaten
    assert len(front(points)) == len(unbeaten)
    assert {tuple(p) for p in points[ranks(points) == 0]} == unbeaten


@quick
@given(points)
def test_the_hypervolume_counts_unit_cells(points: np.ndarray) -> None:
    corner = np.full(points.shape[1], 7.0)
    cells = np.array(list(product(range(7), repeat=points.shape[1])), float)
    covered = (points[:, None, :] <= cells[None]).all(2).any(0)
    assert hypervolume(points, corner) == covered.sum()


@quick
@given(points, st.integers(0, 10**6))
def test_an_expected_gain_is_the_mean_gain(points: np.ndarray, seed: int) -> None:
    rng, m = np.random.default_rng(seed), points.shape[1]
    corner = np.full(m, 5.5)
    samples = [rng.integers(0, 8, (3, 2)).astype(float) for _ in range(m)]
    before = hypervolume(points, corner)
    for i, gain in enumerate(Free(points, corner).gain(samples)):
        each = [
            hypervolume(np.vstack([points, [samples[j][i, c] for j, c in enumerate(chosen)]]), corner) - before
            for chosen in product(range(2), repeat=m)
        ]
        assert gain == pytest.approx(np.mean(each))


def test_ranks_put_broken_limits_last_and_the_less_broken_first() -> None:
    over = excess({"ms": np.array([1.0, 9.0, 6.0, 2.0])}, {"ms": 4.0})
    assert over.tolist() == [0, 1.25, 0.5, 0]
    assert ranks(np.array([[5.0], [0.0], [0.0], [6.0]]), over).tolist() == [0, 3, 2, 1]


def test_crowding_is_infinite_at_the_ends_and_small_in_a_crowd() -> None:
    room = crowding(np.array([[0.0, 3.0], [1.0, 2.0], [1.1, 1.9], [3.0, 0.0]]))
    assert np.isinf(room[[0, 3]]).all() and room[1] < room[2]


def test_a_trial_without_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="has no value 'ms'; it has error"):
        table([Trial((0,), {"error": 1.0})], ("ms",))
    with pytest.raises(UserError, match="no number"):
        table([Trial((0,), {"error": float("nan")})], ("error",))


def test_dominates_is_strict() -> None:
    assert dominates(np.array([[1.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 2.0], [0.0, 2.0]])).tolist() == [
        [False, True, False]
    ]


# ---- predictors


def test_weighted_distances_are_the_sum_over_knobs() -> None:
    encoding, rng = Encoding(TREE), Random(0)
    one, other = (encoding.rows([TREE.random(rng) for _ in range(5)]) for _ in range(2))
    weights = np.array([0.1, 2.0, 0.5, 0.3, 1.0])
    far = encoding.distances(one, other)
    assert far.min() >= 0 and far.max() == pytest.approx(1)
    assert np.allclose(encoding.weighted(one, other, weights), far @ weights)


def test_scores_go_there_and_back() -> None:
    values = np.array([5.0, 1.0, 9.0, 2.0, 4.0, 5.0])
    scores = Scores(values)
    assert np.allclose(scores.back(scores.scores), values)
    assert scores.scores[0] == scores.scores[-1]
    assert scores.back(np.array([-5.0]))[0] < 1.0, "below the best it goes on"
    assert scores.back(np.array([5.0]))[0] == 9.0, "above the worst it does not"


def test_a_predictor_ranks_what_it_has_not_seen() -> None:
    genomes = list(every(TREE))
    rng = Random(1)
    rng.shuffle(genomes)
    fitted = Predictor(TREE, genomes[:30], [scored(g)["error"] for g in genomes[:30]])
    rest = genomes[30:]
    truth = [scored(g)["error"] for g in rest]
    found = Concord(fitted.mean(rest), truth)
    assert found.tau > 0.85
    low, high = found.interval
    assert low <= found.tau <= high
    samples = fitted.samples(rest)
    assert (np.diff(samples, axis=1) >= 0).all()
    wrong = [scored(g)["error"] + 3 * Random(str(g)).random() for g in genomes[:30]]
    noisy = Predictor(TREE, genomes[:30], wrong)
    assert np.ptp(noisy.samples(rest), axis=1).mean() > np.ptp(samples, axis=1).mean(), "noise makes it less sure"


def test_a_predictor_of_one_trial_is_refused() -> None:
    with pytest.raises(UserError, match="with 1 trials; it needs at least 2"):
        Predictor(TREE, [TREE.smallest()], [1.0])


def test_ridge_finds_a_line() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3))
    fitted = Ridge(rows, rows @ [1.0, -2.0, 0.0] + 5, hold=1e-6)
    assert fitted.mean(np.array([[1.0, 1.0, 1.0]]))[0] == pytest.approx(4, abs=1e-4)


def test_tau_is_scipys() -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, 40), rng.integers(0, 9, 40)
    assert Concord(one, other).tau == pytest.approx(kendalltau(one, other).statistic)


# ---- breeding


def test_every_network_comes_once() -> None:
    genomes = list(every(TREE))
    assert len(genomes) == len(set(genomes)) == TREE.count()
    assert all(TREE.canonical(genome) == genome for genome in genomes)


def test_a_first_design_is_even() -> None:
    flat = Domain(tuple(Knob(f"k{i}", ("a", "b", "c")) for i in range(4)))
    columns = zip(*design(flat, 10, Random(0)), strict=True)
    assert all(sorted(map(column.count, range(3))) == [3, 3, 4] for column in columns)


def test_known_tells_apart_by_function() -> None:
    known = Known(Hunt(TREE, trials_of([(0, 0, 0, 0, 0)])), identity=lambda genome: str(genome[1]))
    assert (0, 0, 0, 0, 2) in known and (0, 1, 0, 0, 0) not in known
    found = known.taken(lambda: TREE.random(Random(3)), 1) + known.taken(lambda: (0, 1, 0, 0, 0), 5)
    assert len({genome[1] for genome in found}) == len(found)


# ---- what every searcher must hold


@each_searcher
def test_proposals_are_new_canonical_and_a_function_of_the_hunt(name: str) -> None:
    searcher = SEARCHERS[name]()
    trials = run(searcher, 40)
    genomes = [trial.genome for trial in trials]
    assert len(genomes) == 40 == len(set(genomes))
    assert all(TREE.canonical(genome) == genome for genome in genomes)
    assert run(SEARCHERS[name](), 40) == trials
    assert run(searcher, 40, seed=1) != trials


@each_searcher
def test_pending_genomes_are_not_proposed(name: str) -> None:
    searcher = SEARCHERS[name]()
    genomes = list(every(TREE))
    hunt = Hunt(TREE, trials_of(genomes[:40]), ("error", "ms"), pending=tuple(genomes[40:-3]))
    offered = {"rng": Random(0), "price": None, "nodes": None, "identity": None}
    given_ = {k: offered[k] for k in searcher.needs()}
    assert set(searcher.ask(hunt, 10, **given_)) == set(genomes[-3:]), "the last are found too"
    everything = Hunt(TREE, trials_of(genomes), ("error", "ms"))
    assert searcher.ask(everything, 4, **given_) == []


@each_searcher
def test_one_objective_and_limits_are_understood(name: str) -> None:
    trials = run(SEARCHERS[name](), 60, objectives=("error",), limits={"ms": 4.0})
    assert len(trials) == 60
    met = min(t.values["error"] for t in trials if t.values["ms"] <= 4)
    assert met <= 1.25 + min(v["error"] for g in every(TREE) if (v := scored(g))["ms"] <= 4)


def sums(genome: tuple[int, ...]) -> dict[str, float]:
    """An error that the knobs add up to, and a cost that is high where the error is low."""
    return {"error": float(sum(i * place for i, place in enumerate(genome))), "cost": float(24 - sum(genome))}


@each_peer
@pytest.mark.parametrize("limits", [{}, {"cost": 17.0}], ids=["free", "limited"])
def test_a_peer_learns_from_the_journal(name: str, limits: dict[str, float]) -> None:
    flat = Domain(tuple(Knob(f"k{i}", ("a", "b", "c")) for i in range(12)))
    best: dict[str, list[float]] = {name: [], "random-search": []}
    for kind, found in best.items():
        searcher = method(kind, **{"size": 10} if "nsga2" in kind else {})
        for seed in range(4):
            trials: tuple[Trial, ...] = ()
            while len(trials) < 200:
                hunt = Hunt(flat, trials, ("error",), limits, seed=seed)
                new = searcher.ask(hunt, 10, rng=Random(f"{seed}/{len(trials)}"))  # type: ignore[attr-defined]
                trials += tuple(Trial(genome, sums(genome)) for genome in new)
            found.append(min((t.values["error"] for t in trials if t.values["cost"] <= 17 or not limits), default=99.0))
    assert np.mean(best[name]) < 0.85 * np.mean(best["random-search"])


@pytest.mark.parametrize(("name", "package"), PEERS.items())
def test_a_peer_that_is_not_installed_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: pip install 'trimtab\[search\]'"):
        method(name).ask(Hunt(TREE), 0, rng=Random(0))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("searcher", "message"),
    [
        (method("optuna-tpe", draws=0), "draws=0"),
        (method("optuna-nsga2", cross=1.5), "cross=1.5"),
        (method("pymoo-nsga2", size=1), "size=1"),
        (method("enas", memory=-1.0), "memory=-1.0"),
        (method("functional-hash", sample=0), "sample=0"),
        (DeepArchitect(by="dfs"), "by='dfs'"),  # type: ignore[arg-type]
        (method("deeparchitect", by="smbo", explore=2.0), "explore=2.0"),
        (method("fbnetv3", draws=1), "draws=1"),
        (method("simq-nas", shapes=0), "shapes=0"),
        (method("netadapt"), "no price"),
        (method("eas", parents=0), "parents=0"),
        (method("parzc"), "no statistics of nodes"),
        (Evolution(first=0), "first=0"),
        (Evolution(cross=2.0), "cross=2.0"),
        (LINAS(first=1), "first=1"),
        (LINAS(beyond=-1.0), "beyond=-1.0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(searcher: Searcher, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(searcher, 4)


def test_a_price_is_taken_as_exact() -> None:
    asked: list[int] = []

    def price(genomes: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
        asked.append(len(genomes))
        return {"ms": np.array([scored(g)["ms"] for g in genomes])}

    hunt = Hunt(TREE, tuple(Trial(g, {**scored(g), "ms": 0.0}) for g in list(every(TREE))[:30]), ("error", "ms"))
    assert len(LINAS().ask(hunt, 3, rng=Random(0), price=price)) == 3
    assert sum(asked) > 100


def test_both_searchers_of_a_tree_beat_chance_on_it() -> None:
    best = {}
    for name, config in (("deeparchitect", {}), ("deeparchitect", {"by": "smbo"}), ("random-search", {})):
        found = [run(method(name, **config), 24, 1, seed, objectives=("error",)) for seed in range(8)]
        best[name + str(config)] = np.mean([min(t.values["error"] for t in trials) for trials in found])
    random = best.pop("random-search{}")
    assert max(best.values()) < random


def test_netadapt_shrinks_until_the_limit_is_met() -> None:
    searcher, trials, rounds = method("netadapt", saving=0.1), (), 0
    price = lambda genomes: {"bytes": np.array([1.0 + sum((1 + i) * p for i, p in enumerate(g)) for g in genomes])}  # noqa: E731
    while True:
        hunt = Hunt(TREE, trials, ("error",), {"bytes": 8.0})
        new = searcher.ask(hunt, 99, rng=Random(0), price=price)  # type: ignore[attr-defined]
        if not new:
            break
        rounds += 1
        trials += tuple(Trial(g, {"error": scored(g)["error"], "bytes": float(price([g])["bytes"][0])}) for g in new)
    costs = [trial.values["bytes"] for trial in trials]
    assert trials[0].genome == TREE.largest() and rounds > 3
    assert sum(cost <= 8 for cost in costs) >= 1
    assert all(0.1 * costs[0] <= costs[0] - cost for cost in costs[1:4]), "each proposal saves a step"


def test_a_sequential_search_takes_shapes_first_and_levels_then() -> None:
    domain = Domain((Knob("width", (1, 2, 3), "width"), Knob("bits", ("2b", "4b", "8b"), "level")))
    searcher, trials = method("simq-nas", joint=False, first=2, shapes=3), ()
    for _ in range(6):
        hunt = Hunt(domain, trials, ("error", "bytes"))
        (new,) = searcher.ask(hunt, 1, rng=Random(len(trials)))  # type: ignore[attr-defined]
        trials += (Trial(new, {"error": float(-new[0] - new[1]), "bytes": float(abs(new[0] - 1) + new[1])}),)
    assert {t.genome[1] for t in trials[:3]} == {2} and {t.genome[1] for t in trials[3:]} <= {0, 1}
    assert {t.genome[0] for t in trials[3:]} <= {1, 2}, "shapes of the front alone"


# ---- neural predictors, hashes, rungs


def test_the_smooth_tau_is_tau_where_differences_are_large() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.permutation(20), rng.permutation(20)
    smooth = 1 - float(diff_kendall(torch.tensor(one, dtype=torch.float), torch.tensor(other, dtype=torch.float), 20))
    assert smooth == pytest.approx(Concord(one, other).tau, abs=1e-5)


def test_a_mixer_learns_which_nodes_count() -> None:
    rng = np.random.default_rng(0)
    nodes = 10 ** rng.normal(size=(120, 6))
    values = np.log10(nodes) @ [2.0, -1.0, 0, 0, 0, 0.5]
    fitted = Mixer(nodes[:60], values[:60])
    assert Concord(fitted.mean(nodes[60:]), values[60:]).tau > 0.8 > abs(Concord(nodes[60:].sum(1), values[60:]).tau)
    assert np.array_equal(fitted.mean(nodes), fitted.mean(nodes))


def test_pretraining_on_what_costs_nothing_helps() -> None:
    encoding, rng = Encoding(TREE), Random(0)
    genomes = list(every(TREE))
    rng.shuffle(genomes)
    rows, error = encoding.rows(genomes), np.array([scored(g)["error"] for g in genomes])
    free = np.array([[g[0] + g[1], g[4]] for g in genomes], dtype=float)
    taus = []
    for statistics in ((rows, free), None):
        fitted = [Pretrained(statistics, rows[:8], error[:8], seed) for seed in range(3)]
        taus.append(np.mean([Concord(one.mean(rows[8:]), error[8:]).tau for one in fitted]))
    assert taus[0] > taus[1]


@pytest.mark.parametrize("width", [4, 5, 9])
def test_growth_keeps_the_function(width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    conv, next_, last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.Linear(6 * 9, 5)
    x = torch.randn(3, 2, 8, 8)

    def outputs(a: nn.Module, b: nn.Module, c: nn.Module, *more: nn.Module) -> torch.Tensor:
        return nn.Sequential(a, nn.ReLU(), *more, b, nn.ReLU(), nn.Flatten(), c)(x)

    before = outputs(conv, next_, last)
    a, b = wider(conv, next_, width, rng)
    assert a.weight.shape[0] == width and torch.allclose(outputs(a, b, last), before, atol=1e-5)
    c, d = wider(next_, last, width + 2, rng)
    assert torch.allclose(outputs(conv, c, d), before, atol=1e-5)
    assert torch.allclose(outputs(conv, next_, last, deeper(conv), nn.ReLU()), before, atol=1e-5)
    noisy = wider(conv, next_, 9, rng, noise=0.1)
    assert not torch.allclose(outputs(*noisy, last), before, atol=1e-5)


def test_growth_that_cannot_be_is_refused() -> None:
    rng = torch.Generator()
    with pytest.raises(UserError, match="3 channels were asked for between layers of 4 and 4"):
        wider(nn.Linear(2, 4), nn.Linear(4, 1), 3, rng)
    with pytest.raises(UserError, match="its sides must be odd"):
        deeper(nn.Conv2d(1, 2, 2))


def test_the_protocol_is_of_the_mean_random_network() -> None:
    mean, half = relative_improvement([99.0, 99.0], [90.0] * 5)
    assert mean == pytest.approx(10) and half == 0
    with pytest.raises(UserError, match="at least 2 and 5"):
        relative_improvement([99.0, 99.0], [90.0] * 4)


def test_a_hash_is_of_the_function() -> None:
    x = np.linspace(-1, 1, 40)
    same = fingerprint([(x + 1) ** 2]), fingerprint([x**2 + 2 * x + 1])
    assert same[0] == same[1] != fingerprint([x**2 + 2 * x + 1.001])
    assert fingerprint([np.zeros(3)]) != fingerprint([np.zeros(4)])
    assert fingerprint([np.array([np.nan])]) == fingerprint([np.array([np.nan])])


def test_a_rung_lets_the_best_share_of_the_fronts_go_on() -> None:
    before = tuple({"error": float(i), "ms": float(8 - i)} for i in range(9))

    def decided(limits: dict[str, float] | None = None, **values: float) -> bool:
        return MOASHA().decide(Rung(values, before, ("error", "ms"), limits or {}, 0.3, 0))

    assert decided(error=-1.0, ms=-1.0) and not decided(error=9.0, ms=9.0)
    assert not decided({"ms": 4.0}, error=-1.0, ms=9.0), "a limit counts first"
    with pytest.raises(UserError, match="eta is above 1"):
        MOASHA(eta=1.0).decide(Rung({}, before, ("error",), {}, 0.3, 0))


# ---- the tables

DATA = data_folder()
needs_data = pytest.mark.skipif(DATA is None or not (DATA / "nas").is_dir(), reason="the shared data are not here")


@needs_data
def test_the_tables_hold_what_was_published() -> None:
    blocks, cells = macro(DATA), bench201(DATA)
    assert blocks.domain.count() == 6561 == len(blocks.values["error"])
    assert cells.domain.count() == 15625 == len(cells.values["ms"])
    found = blocks.evaluate((0, 2, 0, 1, 2, 1, 0, 0))
    assert found["error"] == pytest.approx(10.53) and found["flops"] == pytest.approx(47.327744)
    everything = [Trial(g, blocks.evaluate(g)) for g in every(blocks.domain)]
    assert blocks.share(everything) == pytest.approx(1)
    shares = blocks.shares(everything[:50])
    assert shares == sorted(shares) and shares[-1] == pytest.approx(blocks.share(everything[:50]))


@needs_data
def test_predictors_find_more_of_a_front_than_evolution_or_chance() -> None:
    cells = bench201(DATA)
    found = {}
    for searcher in (LINAS(), Evolution(), RandomSearch()):
        trials: tuple[Trial, ...] = ()
        while len(trials) < 70:
            hunt = Hunt(cells.domain, trials, cells.objectives)
            given_ = {"rng": Random(len(trials))}
            trials += tuple(Trial(g, cells.evaluate(g)) for g in searcher.ask(hunt, 10, **given_))
        found[searcher.card.name] = cells.share(trials)
    assert found["linas"] > 0.95 and found["linas"] > max(found["evolution"], found["random-search"])


def test_without_the_data_a_table_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TRIMTAB_DATA"):
        macro(tmp_path)
    assert needed([0.1, 0.5, 0.9], 0.5) == 2


def test_the_networks_of_the_digits_are_all_there() -> None:
    nets = digit_nets()
    assert nets.domain.count() == len(nets.values["error"]) == 216
    assert nets.values["error"].min() < 15 < nets.values["error"].max()
    setting = {"depth": 2, "width": 4, "kernel": 3, "pool": "late"}
    assert costs(setting) == {"macs": (64 * 36 + 16 * 144 + 16 * 10) / 1e3, "params": (40 + 148 + 170) / 1e3}
    row = nets.domain.genome({**setting, "optimiser": "adam", "rate": 0.01})
    assert nets.evaluate(row)["macs"] == costs(setting)["macs"]
    assert scores(row)[0] == pytest.approx(nets.evaluate(row)["error"], abs=2.0)
