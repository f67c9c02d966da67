"""Allocators: always within the limits, against brute force and the exact programme, refusals with their numbers."""

from __future__ import annotations

from itertools import pairwise, product
from math import ceil, fsum, inf, log2
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.alloc.augmented_hessian import AugmentedHessian
from trimtab.alloc.evopress import EvoPress
from trimtab.alloc.lagrangian import Lagrangian
from trimtab.alloc.layerwisequant import LayerwiseQuant
from trimtab.alloc.milp import MILP
from trimtab.alloc.rd_prune import RDPrune, trace
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.table import Row
from trimtab.parts.budgeting import enclosing, exact, hull, human, ladder, lowered, open_menu
from trimtab.parts.scores import outlier_score

quick = settings(max_examples=30, deadline=None)
SMALL_SEARCH = EvoPress(generations=4, offspring=6, survivors=(3, 1), samples=(16, 64))


def total(choice, name):
    return fsum(getattr(row, name) for row in choice.values())


def floor(rows, name):
    """Least possible sum of a cost, in plain Python."""
    units = {row.unit for row in rows}
    return fsum(min(getattr(row, name) for row in rows if row.unit == unit) for unit in units)


def brute_force(rows, limits, goal="damage"):
    """Every plan tried: the least goal within the limits, or None."""
    units = dict.fromkeys(row.unit for row in rows)
    plans = product(*([row for row in rows if row.unit == unit] for unit in units))
    fitting = [p for p in plans if all(fsum(getattr(r, k) for r in p) <= v for k, v in limits.items())]
    return min((fsum(getattr(row, goal) for row in plan) for plan in fitting), default=None)


def seeded(units=12, width=5, seed=0):
    """A table as a probe gives it: fewer bits, fewer bytes, more damage, with noise; all units offer the same."""
    draw = np.random.default_rng(seed)
    rows = []
    for unit in range(units):
        weights = int(draw.integers(1, 20)) * 256
        hurt = float(np.exp(draw.normal(0, 1)))
        for bits in range(2, 2 + width):
            damage = hurt * 4.0**-bits * float(np.exp(draw.normal(0, 0.2)))
            size, time = weights * bits // 8, weights * bits * 1e-9
            rows.append(Row(f"layer.{unit}", f"rtn@{bits}b", size, time, damage, weights))
    return rows


@st.composite
def tables(draw, units=4, width=4):
    """Small tables, with ties and beaten rows; and two shares of the way from the least sums to the largest."""
    rows = []
    for unit in range(draw(st.integers(1, units))):
        for choice in range(draw(st.integers(1, width))):
            size, time = draw(st.integers(0, 1000)), draw(st.integers(0, 50)) / 1000
            rows.append(Row(f"u{unit}", f"c{choice}", size, time, draw(st.integers(0, 200)) / 64))
    return rows, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def limit_at(rows, name, share):
    units = {row.unit for row in rows}
    most = fsum(max(getattr(row, name) for row in rows if row.unit == unit) for unit in units)
    least = floor(rows, name)
    return max(least, least + share * (most - least))


def run(method, rows, limits):
    """Call an allocator with made-up but valid statistics."""
    units = list(dict.fromkeys(row.unit for row in rows))
    given_ = {
        "measure": lambda choice, samples=None: total(choice, "damage"),
        "rng": torch.Generator().manual_seed(0),
        "cosine": {unit: 1 / (1 + at) for at, unit in enumerate(units)},
        "outliers": None,
        "trace": {unit: float(at) for at, unit in enumerate(units)},
        "pairs": None,
    }
    return method.allocate(rows, limits, **{name: given_[name] for name in type(method).needs()})


@quick
@given(tables(), st.sampled_from(["bytes", "seconds", "damage"]))
@pytest.mark.parametrize("method", [Lagrangian(), MILP(), RDPrune(), RDPrune(bins=7), SMALL_SEARCH], ids=repr)
def test_one_row_a_unit_within_the_limit(method, table, name):
    rows, share, _ = table
    assume(not (isinstance(method, EvoPress) and name == "damage"))
    limits = {name: limit_at(rows, name, share)}
    choice = run(method, rows, limits)
    assert set(choice) == {row.unit for row in rows}
    assert all(row.unit == unit and row in rows for unit, row in choice.items())
    assert total(choice, name) <= limits[name]


@quick
@given(tables())
@pytest.mark.parametrize(
    "method", [LayerwiseQuant(), AugmentedHessian(), AugmentedHessian(levels=("b4", "b2"))], ids=repr
)
def test_ranking_methods_keep_the_limit_with_shared_levels(method, table):
    drawn, share, _ = table
    sizes = {row.unit: row.bytes for row in drawn}
    rows = [Row(u, f"b{bits}", bits * size, 0.0, 1 / bits) for u, size in sizes.items() for bits in (8, 4, 2)]
    limits = {"bytes": limit_at(rows, "bytes", share)}
    choice = run(method, rows, limits)
    assert set(choice) == set(sizes)
    assert total(choice, "bytes") <= limits["bytes"]


@quick
@given(tables(), st.sampled_from([("bytes",), ("damage",), ("bytes", "seconds"), ("bytes", "seconds", "damage")]))
def test_milp_is_brute_force(table, names):
    rows, first, second = table
    limits = {name: limit_at(rows, name, share) for name, share in zip(names, (first, second, 0.5), strict=False)}
    goal = "bytes" if names == ("damage",) else "damage"
    best = brute_force(rows, limits, goal)
    if best is None:
        with pytest.raises(BudgetError, match=r"asked .*; within .* (is|takes|does)"):
            MILP().allocate(rows, limits)
        return
    choice = MILP().allocate(rows, limits)
    assert total(choice, goal) == pytest.approx(best, abs=1e-9)
    assert all(total(choice, name) <= limit for name, limit in limits.items())


@quick
@given(tables())
def test_lagrangian_with_two_limits_finds_a_plan_exactly_where_one_exists(table):
    rows, first, second = table
    limits = {"bytes": limit_at(rows, "bytes", first), "seconds": limit_at(rows, "seconds", second)}
    best = brute_force(rows, limits)
    if best is None:
        with pytest.raises(BudgetError):
            Lagrangian().allocate(rows, limits)
        return
    choice = Lagrangian().allocate(rows, limits)
    assert all(total(choice, name) <= limit for name, limit in limits.items())
    assert total(choice, "damage") >= best - 1e-9


@quick
@given(tables(units=5), st.sampled_from(["bytes", "seconds", "damage"]))
def test_lagrangian_is_within_one_hull_step_of_the_optimum(table, name):
    rows, share, _ = table
    limits = {name: limit_at(rows, name, share)}
    goal = "bytes" if name == "damage" else "damage"
    menu, _ = open_menu(rows, limits)
    found = hull(menu.cost(name), menu.cost(goal))
    path = np.concatenate([found.start[:, None], found.rows], axis=1)
    values = np.take_along_axis(menu.cost(goal), path, axis=1)
    step = float((values[:, :-1] - values[:, 1:]).max(initial=0.0))
    assert total(Lagrangian().allocate(rows, limits), goal) <= brute_force(rows, limits, goal) + step + 1e-9


@quick
@given(tables(units=5))
def test_dynamic_programme_is_exact_up_to_one_bin_a_unit(table):
    rows, share, _ = table
    units = len({row.unit for row in rows})
    asked, least = limit_at(rows, "bytes", share), floor(rows, "bytes")
    assert total(RDPrune().allocate(rows, {"bytes": asked}), "damage") == pytest.approx(
        brute_force(rows, {"bytes": asked}), abs=1e-9
    ), "whole bytes divide into fewer than 16384 bins here, so the result is exact"
    coarse = RDPrune(bins=50).allocate(rows, {"bytes": asked})
    tighter = asked - units * (asked - least) / 50
    if tighter >= least:
        assert total(coarse, "damage") <= brute_force(rows, {"bytes": tighter}) + 1e-9


def test_dynamic_programme_agrees_with_milp_on_a_large_table():
    rows = seeded(units=60, width=6)
    for share in (0.1, 0.4, 0.8):
        limits = {"bytes": limit_at(rows, "bytes", share)}
        best = total(MILP().allocate(rows, limits), "damage")
        assert total(RDPrune().allocate(rows, limits), "damage") == pytest.approx(best, rel=1e-9)
        seconds = {"seconds": limit_at(rows, "seconds", share)}
        best = total(MILP().allocate(rows, seconds), "damage")
        assert best <= total(RDPrune().allocate(rows, seconds), "damage") + 1e-12 <= 1.01 * best
        assert best <= total(Lagrangian().allocate(rows, seconds), "damage") + 1e-12 <= 1.05 * best


def test_trace_adds_up_by_hand():
    steps = np.array([[0.0, 1.0, 3.0], [0.0, 2.0, inf]])
    value = np.array([[9.0, 5.0, 1.0], [4.0, 1.0, inf]])
    assert [trace(steps, value, room).tolist() for room in (0, 1, 2, 3, 4, 5)] == [
        *([0, 0], [1, 0], [1, 0]),
        *([2, 0], [2, 0], [2, 1]),
    ]


def test_hull_skips_rows_above_it_and_beaten_rows():
    cost = np.array([[4.0, 1.0, 2.0, 3.0, 5.0], [1.0, 1.0, 2.0, inf, inf]])
    value = np.array([[1.0, 9.0, 8.0, 2.0, 3.0], [5.0, 4.0, 4.0, inf, inf]])
    found = hull(cost, value)
    assert found.start.tolist() == [1, 1]
    assert found.rows.tolist() == [[3, 0], [1, 1]]
    assert found.slope.tolist() == [[3.5, 1.0], [0.0, 0.0]]


def test_exact_obeys_the_limit_below_the_solver_tolerance():
    """One part in 10^9 over the limit is over it, though the solver's tolerance would let it pass."""
    rows = [Row("a", "big", 10**9, 0.0, 0.0), Row("a", "small", 10**9 - 1, 0.0, 1.0), Row("b", "only", 5, 0.0, 0.0)]
    menu, limits = open_menu(rows, {"bytes": 10**9 + 4})
    plan, proven = exact(menu, "damage", limits)
    assert proven
    assert menu.chosen(plan)["a"].choice == "small"


def test_refusals_name_the_limit_what_was_asked_and_the_least_possible():
    offers = (("8b", 2_340_000, 0.001), ("4b", 1_170_000, 0.004))
    rows = [Row(u, c, size, time, 0.5) for u in "ab" for c, size, time in offers]
    for method in (Lagrangian(), MILP(), RDPrune(), SMALL_SEARCH, LayerwiseQuant(), AugmentedHessian()):
        with pytest.raises(BudgetError) as error:
            run(method, rows, {"bytes": 1_000_000})
        assert "limit on bytes: asked 1.0 MB; the smallest plan is 2.3 MB." in str(error.value)
        with pytest.raises(BudgetError) as error:
            run(method, rows, {"seconds": 0.0005})
        assert "limit on seconds: asked 500.0 µs; the fastest plan takes 2.0 ms." in str(error.value)
    for method in (Lagrangian(), MILP(), RDPrune()):
        with pytest.raises(BudgetError, match=r"limit on damage: asked 0\.9 nats; the least damaging plan does 1 nats"):
            run(method, rows, {"damage": 0.9})
    for method in (Lagrangian(), MILP()):
        with pytest.raises(BudgetError, match=r"seconds: asked 3\.0 ms; within 2\.4 MB the fastest plan takes 8\.0 ms"):
            run(method, rows, {"bytes": 2_400_000, "seconds": 0.003})


def test_user_errors_say_what_was_found():
    good = [Row("a", "4b", 4, 0.0, 0.5)]
    with pytest.raises(UserError, match="empty"):
        MILP().allocate([], {"bytes": 1})
    with pytest.raises(UserError, match="'4b' has damage = nan"):
        MILP().allocate([Row("a", "4b", 4, 0.0, float("nan"))], {"bytes": 9})
    with pytest.raises(UserError, match="'4b' has seconds = inf"):
        MILP().allocate([Row("a", "4b", 4, inf, 0.5)], {"bytes": 9})
    with pytest.raises(UserError, match="a: every row has infinite damage"):
        MILP().allocate([Row("a", "2b", 2, 0.0, inf)], {"bytes": 9})
    with pytest.raises(UserError, match=r"'joules'.*bytes, seconds, damage"):
        MILP().allocate(good, {"joules": 1})
    with pytest.raises(UserError, match="rd-prune keeps at most 1 limit, 2 were asked"):
        RDPrune().allocate(good, {"bytes": 9, "seconds": 1})
    with pytest.raises(UserError, match="lagrangian keeps at most 2 limits, 3 were asked"):
        Lagrangian().allocate(good, {"bytes": 9, "seconds": 1, "damage": 1})
    with pytest.raises(UserError, match="evopress cannot keep a limit on damage"):
        run(SMALL_SEARCH, good, {"damage": 1})
    with pytest.raises(UserError, match=r"survivors=\(4, 2\)"):
        run(EvoPress(survivors=(4, 2), samples=(1, 2)), good, {"bytes": 9})
    with pytest.raises(UserError, match="score='cosine', was given no statistic"):
        LayerwiseQuant().allocate(good, {"bytes": 9})
    with pytest.raises(UserError, match="name both levels or neither"):
        run(LayerwiseQuant(high="4b"), good, {"bytes": 9})
    with pytest.raises(UserError, match="no unit offers the level '3b'; the table has 4b"):
        run(LayerwiseQuant(high="4b", low="3b"), good, {"bytes": 9})
    with pytest.raises(UserError, match="given none"):
        AugmentedHessian().allocate(good, {"bytes": 9}, trace={})
    with pytest.raises(UserError, match="names 'z'"):
        AugmentedHessian().allocate(good, {"bytes": 9}, trace={"a": 1.0}, pairs={("a", "z"): 1.0})


def test_rows_of_infinite_damage_are_never_chosen_and_no_limit_means_least_damage():
    rows = [Row("a", "2b", 1, 0.0, inf), Row("a", "4b", 2, 0.0, 0.5), Row("a", "8b", 4, 0.0, 0.1)]
    for method in (Lagrangian(), MILP(), RDPrune()):
        assert run(method, rows, {"bytes": 3})["a"].choice == "4b"
        assert run(method, rows, {})["a"].choice == "8b"
        assert run(method, rows, {"bytes": inf})["a"].choice == "8b"
        with pytest.raises(BudgetError, match="the smallest plan is 2 B"):
            run(method, rows, {"bytes": 1})


def test_damage_limit_alone_asks_for_the_fewest_bytes():
    rows = seeded()
    cap = 1.5 * total({r.unit: r for r in rows if r.choice == "rtn@4b"}, "damage")
    best = MILP().allocate(rows, {"damage": cap})
    uniform = {r.unit: r for r in rows if r.choice == "rtn@4b"}
    assert total(best, "damage") <= cap
    assert total(best, "bytes") < total(uniform, "bytes")
    for method in (Lagrangian(), RDPrune()):
        choice = method.allocate(rows, {"damage": cap})
        assert total(choice, "damage") <= cap
        assert total(best, "bytes") <= total(choice, "bytes") <= 1.02 * total(best, "bytes")


@pytest.mark.parametrize("start", ["uniform", "lagrangian"])
@pytest.mark.parametrize("seed", [0, 1])
def test_evopress_never_worse_than_its_start_and_better_where_units_interact(start, seed):
    rows = seeded(units=10, seed=seed)
    limits = {"bytes": limit_at(rows, "bytes", 0.5)}
    calls = []

    def measure(choice, samples=None):
        # low neighbours hurt each other, which no table of single units can tell
        low = [int(row.choice[4]) for row in choice.values()]
        calls.append(samples)
        return total(choice, "damage") + sum(0.5 * 2.0 ** -(a + b - 4) for a, b in pairwise(low))

    search = EvoPress(generations=25, offspring=16, survivors=(4, 2, 1), samples=(8, 32, 128), start=start)
    found = [search.allocate(rows, limits, measure=measure, rng=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert found[0] == found[1]
    assert set(calls) == {8, 32, 128}
    assert calls.count(8) > calls.count(32) > calls.count(128)
    begun = EvoPress(generations=0, start=start).allocate(rows, limits, measure=measure, rng=torch.Generator())
    assert total(found[0], "bytes") <= limits["bytes"]
    assert measure(found[0]) <= measure(begun)
    assert measure(found[0]) < measure(Lagrangian().allocate(rows, limits))


@quick
@given(tables(), st.integers(0, 2**31))
def test_evopress_is_elitist_on_any_table_and_noise(table, seed):
    rows, share, _ = table
    limits = {"bytes": limit_at(rows, "bytes", share)}

    def measure(choice, samples=None):
        return crc32(repr((seed, samples, *(row.choice for row in choice.values()))).encode()) / 2**32

    rng = torch.Generator().manual_seed(seed)
    begun = EvoPress(generations=0, samples=(16, 64), survivors=(3, 1)).allocate(rows, limits, measure=measure, rng=rng)
    found = SMALL_SEARCH.allocate(rows, limits, measure=measure, rng=rng)
    assert measure(found, samples=64) <= measure(begun, samples=64)
    assert total(found, "bytes") <= limits["bytes"]


def test_evopress_counts_a_damage_that_is_not_a_number_as_infinite():
    rows = seeded(units=6)
    limits = {"bytes": limit_at(rows, "bytes", 0.5)}
    start = EvoPress(generations=0).allocate(rows, limits, measure=len, rng=torch.Generator())

    def measure(choice, samples=None):
        return 1.0 if choice == start else float("nan")

    assert run_search(rows, limits, measure) == start


def run_search(rows, limits, measure):
    return SMALL_SEARCH.allocate(rows, limits, measure=measure, rng=torch.Generator().manual_seed(0))


def test_layerwisequant_raises_the_most_important_first():
    rows = [Row(f"block.{n}.up", f"{bits}b", bits * 10, 0.0, 1 / bits, 80) for n in range(4) for bits in (8, 4, 2)]
    rows += [Row("embed", f"{bits}b", bits * 10, 0.0, 1 / bits, 80) for bits in (8, 4, 2)]
    cosine = {"block.0": torch.tensor(0.2), "block.1": torch.tensor(0.9), "block.2": 0.8, "block.3": 0.95}

    def bits(size, method=None):
        choice = (method or LayerwiseQuant()).allocate(rows, {"bytes": size}, cosine=cosine)
        return [int(choice[unit].choice[0]) for unit in ("embed", *(f"block.{n}.up" for n in range(4)))]

    assert bits(100) == [2, 2, 2, 2, 2]
    assert bits(139) == [4, 2, 2, 2, 2], "a unit without a score is the most important"
    assert bits(140) == [4, 4, 2, 2, 2]
    assert bits(160) == [4, 4, 2, 4, 2]
    assert bits(200) == [4, 4, 4, 4, 4]
    assert bits(240) == [8, 4, 4, 4, 4]
    assert bits(160, LayerwiseQuant(high="8b", low="2b")) == [8, 2, 2, 2, 2]
    assert bits(10**6) == [8, 8, 8, 8, 8]
    with pytest.raises(BudgetError, match="asked 150 B; with these levels the smallest plan is 200 B"):
        bits(150, LayerwiseQuant(high="8b", low="4b"))
    few = LayerwiseQuant(high="4b", low="2b").allocate(rows, {"damage": 2.0}, cosine=cosine)
    assert sum(row.choice == "4b" for row in few.values()) == 2, "fewest bytes within the summed damage"


def test_layerwisequant_by_outliers_and_a_unit_that_lacks_the_level():
    rows = [Row(u, f"{bits}b", bits * 10, 0.0, 1 / bits, 80) for u in "abc" for bits in (4, 2)]
    rows += [Row("conv", "rtn@4b", 80, 0.0, 0.2, 160), Row("conv", "rtn@2b", 45, 0.0, 0.4, 160)]
    outliers = {"a": 0.2, "b": 0.1, "c": 0.15, "conv": 0.3}
    method = LayerwiseQuant(score="outliers", high="4b", low="2b")
    choice = method.allocate(rows, {"bytes": 150}, outliers=outliers)
    assert {unit: row.choice for unit, row in choice.items()} == {"a": "2b", "b": "4b", "c": "4b", "conv": "rtn@2b"}
    with pytest.raises(UserError, match="no choice is offered by every unit"):
        LayerwiseQuant(score="outliers").allocate(rows, {"bytes": 150}, outliers=outliers)


def test_outlier_score_counts_above_one_deviation_on_the_high_side_only():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert outlier_score(normal) == pytest.approx(0.1587, abs=0.003)
    assert outlier_score(normal.half()) == pytest.approx(outlier_score(normal), abs=1e-3)
    assert outlier_score(torch.tensor([0.0, 0.0, 0.0, -4.0])) == 0
    assert outlier_score(torch.ones(5, 5)) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(2, 4), st.floats(0, 1), st.integers(0, 99))
def test_augmented_hessian_finds_the_last_plan_within_the_damage_in_log_measurements(units, depth, share, seed):
    rows = seeded(units=units, width=depth, seed=seed)
    rows = [Row(r.unit, r.choice, r.bytes, r.seconds, 4.0 ** -int(r.choice[4]) * (1 + len(r.unit))) for r in rows]
    sensitivity = dict(zip(dict.fromkeys(r.unit for r in rows), torch.rand(units).tolist(), strict=True))
    calls = []

    def measure(choice, samples=None):
        calls.append(choice)
        return total(choice, "damage")

    cap = limit_at(rows, "damage", share)
    choice = AugmentedHessian().allocate(rows, {"damage": cap}, trace=sensitivity, measure=measure)
    assert total(choice, "damage") <= cap
    assert len(calls) <= 1 + (depth - 1) * ceil(log2(units + 1))
    # the least sensitive units are lowered, and one more of them would be over the limit
    order = sorted(sensitivity, key=sensitivity.get)
    table = {(row.unit, row.choice): row for row in rows}
    top, below = f"rtn@{1 + depth}b", f"rtn@{depth}b"
    moved = sum(row.choice != top for row in choice.values())
    assert all(choice[unit].choice != top for unit in order[:moved])
    if moved < units:
        more = {unit: table[unit, below if at <= moved else top] for at, unit in enumerate(order)}
        assert total(more, "damage") > cap


def test_augmented_hessian_orders_by_pairs_and_meets_bytes_without_measuring():
    rows = [Row(u, f"{bits}b", bits, 0.0, 0.0 if bits == 8 else 0.1) for u in "abcd" for bits in (8, 4)]
    traces, pairs = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, {("a", "b"): 0.5, ("d", "a"): -0.02}

    def low(limits, **extra):
        found = AugmentedHessian(coupling=extra.pop("coupling", 0.5)).allocate(rows, limits, trace=traces, **extra)
        return "".join(unit for unit, row in found.items() if row.choice == "4b")

    assert low({"bytes": 24}) == "ab"
    assert low({"bytes": 24}, pairs=pairs) == "ac", "s is 0.34, 0.45, 0.30 and 0.39"
    assert low({"bytes": 24}, pairs=pairs, coupling=0.0) == "ab"
    assert low({"damage": 0.25}) == "ab", "without measure the rows' damages are added up"
    with pytest.raises(BudgetError, match=r"asked 0\.1 nats; within the limit on bytes the least .* does 0\.2 nats"):
        low({"bytes": 24, "damage": 0.1})
    with pytest.raises(BudgetError, match=r"asked 0\.1 nats; with these levels the least damaging plan does 5 nats"):
        low({"damage": 0.1}, measure=lambda choice, samples=None: 5.0)


def test_ladder_and_its_steps():
    offers = (("2b", 2, 0.9), ("4b", 4, 0.3), ("bad", 5, 0.4), ("8b", 8, 0.1))
    rows = [Row(unit, choice, size, 0.0, hurt) for unit in "ab" for choice, size, hurt in offers]
    menu, _ = open_menu(rows, {})
    rungs = ladder(menu)
    assert [menu.chosen(rung)["a"].choice for rung in rungs] == ["8b", "4b", "2b"]
    steps = [[menu.rows[u][r].choice for u, r in enumerate(lowered(rungs, [1, 0], n))] for n in range(5)]
    assert steps == [["8b", "8b"], ["8b", "4b"], ["4b", "4b"], ["4b", "2b"], ["2b", "2b"]]


def test_human_units_tell_values_apart():
    assert human("bytes", 512.0, 5.0) == ["512 B", "5 B"]
    assert human("seconds", 0.0123456, 0.0123457) == ["12.3456 ms", "12.3457 ms"]
    assert human("damage", 0.0, 0.25) == ["0 nats", "0.25 nats"]
    assert enclosing({"a.b": 1.0, "a": 2.0}, "a.b.c") == 1.0
    assert enclosing({"a.b": 1.0, "a": 2.0}, "a.c") == 2.0


def test_milp_out_of_time_falls_back_to_the_lagrangian_plan():
    rows = seeded(units=40)
    limits = {"bytes": limit_at(rows, "bytes", 0.4)}
    assert MILP(time_limit=0.0).allocate(rows, limits) == Lagrangian().allocate(rows, limits)
    with pytest.raises(BudgetError, match="no plan was found in 0 s"):
        MILP(time_limit=0.0).allocate(rows, {**limits, "seconds": 1, "damage": 1e9})
