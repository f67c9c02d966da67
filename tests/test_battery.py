"""The conformance battery: what every method must hold, by its verb, card and signature; none is named here."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from functools import cache
from math import fsum
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import torch
from battery import (
    ALLOCATORS,
    CACHER_FIELDS,
    CACHERS,
    CASES,
    ELASTICS,
    EXAMPLES,
    MERGERS,
    METHODS,
    MODELS,
    PARENT_SHAPES,
    PRICERS,
    REWRITERS,
    SOLVERS,
    STATISTICS,
    WINDOWS,
    Case,
    Family,
    Traced,
    by_unit,
    device,
    extreme,
    finer,
    other_values,
    rank_of,
    resources,
    small,
    stored_by,
    subclasses,
    table,
    whole,
    work,
)
from test_structure import rebuilt, run
from torch import Tensor, nn

from trimtab.core.device import Product, Work
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.level import Dense, Depth, Level, Width, parse_level
from trimtab.core.method import (
    FAMILIES,
    VERBS,
    Allocator,
    Architecture,
    Cacher,
    Elastic,
    Estimator,
    Joiner,
    Merger,
    Method,
    Objective,
    Optimiser,
    Policy,
    Pricer,
    Relaxer,
    Rewriter,
    Searcher,
    Solver,
    method,
)
from trimtab.core.plan import Plan, check
from trimtab.core.site import Kind, Site
from trimtab.core.table import Row
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.packed import Packed, tensor_names

LEVELLESS = (
    *(Allocator, Pricer, Cacher, Merger, Joiner, Objective, Optimiser, Estimator, Policy, Searcher, Elastic),
    *(Architecture, Relaxer),
)
ENTRIES = 391  # rows of the catalogue of papers

each_method = pytest.mark.parametrize("name", METHODS)
each_rewriter = pytest.mark.parametrize("name", REWRITERS)
each_merger = pytest.mark.parametrize("name", MERGERS)
each_allocator = pytest.mark.parametrize("name", ALLOCATORS)
each_pricer = pytest.mark.parametrize("name", PRICERS)
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_level_of_a_solver = pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, cls in SOLVERS.items() for text in cls.card.levels]
)
each_level_of_a_rewriter = pytest.mark.parametrize(
    ("name", "text", "place"),
    [(name, text, place) for name, cls in REWRITERS.items() for text in cls.card.levels for place in MODELS],
)


def others(cls: type[Method]) -> list[Level]:
    """A level of every type that the card does not list."""
    known = {type(parse_level(text)) for text in cls.card.levels}
    return [level for level in EXAMPLES if type(level) not in known]


# ---- every method


def test_every_verb_is_covered_and_every_name_is_taken_once() -> None:
    assert {cls.verb for cls in METHODS.values()} <= set(VERBS) == set(STATISTICS)
    ours = [c for c in subclasses(Method) if c.__module__.startswith("trimtab.") and not inspect.isabstract(c)]
    assert sorted(c.card.name for c in ours) == sorted(n for n, c in METHODS.items() if c in ours)
    ids = [i for cls in ours for i in cls.card.catalogue]
    assert len(ids) == len(set(ids)), "two methods say that they are the same paper's"


@each_method
def test_a_card_is_sound(name: str) -> None:
    cls = METHODS[name]
    card = cls.card
    assert name == card.name and re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert cls.family() in FAMILIES
    assert all(type(i) is int and 1 <= i <= ENTRIES for i in card.catalogue)
    assert card.claim.strip().endswith("."), "the claim is a sentence"
    assert card.kinds <= set(get_args(Kind))
    assert bool(card.levels) is not issubclass(cls, LEVELLESS)
    assert set(cls.needs()) <= STATISTICS[cls.verb], "it asks for what no engine has"


@each_method
def test_a_class_is_a_frozen_dataclass_of_defaults_without_logic(name: str) -> None:
    cls = METHODS[name]
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__post_init__" not in vars(cls), "the constructor has no logic"
    fields = dataclasses.fields(cls)
    assert [f.name for f in fields if f.default is dataclasses.MISSING] == []
    assert cls().config() == {} and cls() == cls() and hash(cls()) == hash(cls())
    assert [c for c in cls.__subclasses__()] == [], "a method is final"


@each_method
def test_a_docstring_says_what_where_from_and_what_differs(name: str) -> None:
    cls = METHODS[name]
    text = inspect.getdoc(cls) or ""
    order = [text.find(word) for word in ("Reference:", "Departures:", ">>> ")]
    assert min(order) > 0 and order == sorted(order), "Reference, Departures and an example, in that order"
    assert all(re.search(rf"\b{f.name}\b", text) for f in dataclasses.fields(cls)), "every field is explained"
    lines = Path(inspect.getfile(cls)).read_text("utf-8").count("\n")
    assert lines <= 200, f"the file has {lines} lines"


@each_method
def test_levels_round_trip_and_rise(name: str) -> None:
    levels = [parse_level(text) for text in METHODS[name].card.levels]
    assert [str(level) for level in levels] == list(METHODS[name].card.levels)
    wrong = [(str(a), str(b)) for i, a in enumerate(levels) for b in levels[i + 1 :] if finer(a, b)]
    assert wrong == [], "the card's levels go from coarse to fine"


@each_method
def test_a_configuration_round_trips_through_text_and_toml(name: str) -> None:
    cls = METHODS[name]
    for field, value in other_values(cls).items():
        changed = cls(**{field: value})
        assert changed.config() == {field: value}
        assert method(name, **json.loads(json.dumps(changed.config()))) == changed
        if not issubclass(cls, Solver | Rewriter):  # no step of a plan
            continue
        plan = Plan.parse(f"{name}({field}={value!r}) @ {cls.card.levels[0]}")
        assert plan.steps[0].method == changed
        assert Plan.parse(str(plan)) == plan
        assert Plan.from_toml(plan.to_toml()) == plan


@each_method
def test_a_plan_with_a_level_of_another_type_is_refused(name: str) -> None:
    cls = METHODS[name]
    site = Site("blocks.0.up", next(iter(sorted(cls.card.kinds))), (64, 64))
    for level in others(cls) if cls.card.levels else ():
        with pytest.raises(UserError, match=re.escape(str(level))):
            check([(cls(), {site.path: level})], [site])


# ---- solvers


def solved(method: Solver, level: Level, case: Case) -> Packed:
    """The verb on copies, which it must leave as they are, as it must torch's own generator."""
    weight, stats = case.weight.clone(), case.statistics()
    wanted: dict[str, Any] = {k: stats[k] for k in method.needs()}
    before = {k: v.clone() for k, v in wanted.items() if isinstance(v, Tensor)}
    state = torch.random.get_rng_state()
    packed = method.solve(weight, level, **wanted)
    assert torch.equal(weight, case.weight), "the weight was changed in place"
    assert all(torch.equal(wanted[k], v) for k, v in before.items()), "a statistic was changed in place"
    assert torch.equal(torch.random.get_rng_state(), state), "randomness comes from `rng` alone"
    return packed


def may_refuse(level: Level, case: Case) -> str | None:
    """Why a solver may refuse a level that its card lists for a weight, or None where it may not."""
    if rank_of(level) > min(case.weight.shape):
        return "the weight has fewer rows or columns than the rank, so that the level stores more than the weight"
    return None


@pytest.mark.parametrize("case", CASES)
@each_level_of_a_solver
def test_a_solver_takes_odd_weights(name: str, text: str, case: str) -> None:
    method, level, given = SOLVERS[name](), parse_level(text), CASES[case]
    if given.site and "conv" not in method.card.kinds:
        pytest.skip("its card lists no convolutions")
    shape = tuple(given.weight.shape)
    try:
        packed = solved(method, level, given)
    except UserError as refusal:
        assert may_refuse(level, given), refusal
        assert text in str(refusal) or str(rank_of(level)) in str(refusal), "the refusal names what was asked"
        return
    assert isinstance(packed, Packed) and packed.shape == shape
    assert packed.nbytes == packed.level.bytes(shape)
    if packed.level != level:
        assert re.search(r"level (that it )?(chosen|chooses)", inspect.getdoc(type(method)) or ""), (
            f"{packed.level} came back for {level}, and the docstring does not say that the method chooses"
        )
        assert type(packed.level) is type(level) and packed.nbytes <= level.bytes(shape)
    dense = packed.dense()
    assert dense.shape == given.weight.shape and dense.dtype == torch.float32 and bool(dense.isfinite().all())
    assert set(packed.tensors) == set(tensor_names(packed.level))
    if case == "zeros":
        assert not dense.any(), "nothing became something"
    if given.site:
        assert dense.reshape(given.site).shape == given.site
    if case == "plain":
        assert given.damage(packed) < 1, "worse than no weight at all"


@each_level_of_a_solver
def test_a_solver_gives_the_same_bytes_twice(name: str, text: str) -> None:
    for case in (CASES["plain"], CASES["few samples, and inputs that are always zero"]):
        once, again = (solved(SOLVERS[name](), parse_level(text), case) for _ in range(2))
        assert once.level == again.level and once.tensors.keys() == again.tensors.keys()
        for part, stored in once.tensors.items():
            assert stored.dtype == again.tensors[part].dtype and torch.equal(stored, again.tensors[part]), part


@each_solver
def test_what_a_solver_gives_is_the_same_after_a_file(name: str, tmp_path: Path) -> None:
    solver, case = SOLVERS[name](), CASES["columns that no group divides"]
    packed = {text: solved(solver, parse_level(text), case) for text in solver.card.levels}
    parts = {f"{text}|{part}": t for text, p in packed.items() for part, t in p.tensors.items()}
    write_safetensors(parts, tmp_path / "solved.safetensors")
    file = Checkpoint(tmp_path / "solved.safetensors")
    for text, before in packed.items():
        level = parse_level(str(before.level))
        after = Packed(level, before.shape, {part: file.read(f"{text}|{part}") for part in tensor_names(level)})
        assert after.nbytes == before.nbytes
        assert torch.equal(after.dense(), before.dense()), text
        assert (after.bias() is None) == (before.bias() is None)


@each_solver
def test_a_solver_refuses_a_level_that_its_card_does_not_list(name: str) -> None:
    for level in others(SOLVERS[name]):
        with pytest.raises(UserError, match=re.escape(str(level))):
            solved(SOLVERS[name](), level, CASES["plain"])


@pytest.mark.parametrize("name", [n for n, cls in SOLVERS.items() if "monotone" in cls.card.keeps])
def test_a_finer_level_is_nearer_where_promised(name: str) -> None:
    solver, compared = SOLVERS[name](), 0
    levels = [parse_level(text) for text in solver.card.levels]
    for case in (CASES["plain"], CASES["columns that no group divides"]):
        # a method that looks at the inputs is judged by the outputs, any other by the weight
        judge = (
            case
            if solver.needs() and solver.needs() != ("rng",)
            else Case(case.weight, torch.eye(case.weight.shape[1]))
        )
        damage = {level: judge.damage(solved(solver, level, case)) for level in levels}
        for a in levels:
            for b in levels:
                if finer(a, b):
                    compared += 1
                    assert damage[a] <= damage[b] * (1 + 1e-4) + 1e-7, (
                        f"{a} is finer than {b}, and further from the original"
                    )
    assert compared, "no two levels of the card compare, so nothing was promised"


# ---- rewriters


@cache
def traced(place: str) -> Traced:
    return Traced.of(MODELS[place])


# where a rewriter may refuse a model, by what its sentence says, and why that is right
REFUSALS = (
    ("mixtral", r"no rotation folds into .*experts", "stacks of experts are no modules that a norm folds into"),
    ("mixtral", r"no channels that can be removed", "its channels lie in stacks, which are not cut"),
    ("cnn", r"residual cannot be turned", "batch norms lie on the residual: no rotation passes them"),
    ("cnn", r"another shape", "its second block halves the map and doubles the channels, as what follows expects"),
)


def attempt(method: Rewriter, place: str, level: Level) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Level]]:
    """The model rewritten at a level, the edits and what was named; skips with the reason where it may be refused."""
    given = traced(place)
    levels = given.named(method.card, level)
    if not levels:
        pytest.skip(f"{place} has no site of the kinds {', '.join(sorted(method.card.kinds))}")
    try:
        return *given.rewritten(method, levels), levels
    except UserError as refusal:
        reason = next((why for model, said, why in REFUSALS if model == place and re.search(said, str(refusal))), None)
        assert reason, f"refused without a reason that the battery knows: {refusal}"
        return pytest.skip(f"refused, as it may: {reason}")


@each_level_of_a_rewriter
def test_a_rewritten_model_runs_and_is_rebuilt_from_its_edits(name: str, text: str, place: str) -> None:
    method, level, given = REWRITERS[name](), parse_level(text), traced(place)
    original = copy.deepcopy(given.model.state_dict())
    model, edits, _ = attempt(method, place, level)
    assert all(torch.equal(v, original[k]) for k, v in given.model.state_dict().items())
    after = run(model, given.fresh)
    assert after.shape == run(given.model, given.fresh).shape and bool(after.isfinite().all())
    assert json.loads(json.dumps(edits)) == edits
    assert torch.equal(run(rebuilt(given.make, model, edits), given.fresh), after)
    was, now = ({k: v.shape for k, v in m.state_dict().items()} for m in (given.model, model))
    if "shape" in method.card.keeps:
        assert was == now and not edits
    if isinstance(level, Width) and not whole(level):
        assert any(sum(now[k]) < sum(was[k]) for k in was.keys() & now.keys()), "nothing became narrower"
    if isinstance(level, Depth) and not whole(level):
        assert was.keys() - now.keys(), "nothing was dropped"
        assert not torch.equal(after, run(given.model, given.fresh))


def keeping(cls: type[Method]) -> list[str]:
    """Levels at which the function must stay: those that keep everything, or all where the card promises no less."""
    levels = {text: whole(parse_level(text)) for text in cls.card.levels}
    always = "function" in cls.card.keeps and not any(levels.values())
    return [text for text, keeps in levels.items() if keeps or always]


@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, cls in REWRITERS.items() for text in keeping(cls)])
def test_a_rewriter_keeps_the_function_where_it_must(name: str, text: str, place: str) -> None:
    method, given = REWRITERS[name](), traced(place)
    model, _, _ = attempt(method, place, parse_level(text))
    for batch in (given.calibration, given.fresh):
        before, after = run(given.model, batch), run(model, batch)
        assert (after - before).abs().max() <= method.card.tolerance * before.abs().max()


@each_rewriter
def test_a_rewriter_does_something(name: str) -> None:
    method, changed = REWRITERS[name](), []
    for place in MODELS:
        before = traced(place).model.state_dict()
        levels = traced(place).named(method.card, parse_level(method.card.levels[0]))
        try:
            after = traced(place).rewritten(method, levels)[0].state_dict() if levels else before
        except UserError:  # whether it may refuse is another test's business
            continue
        if before.keys() != after.keys() or any(
            v.shape != after[k].shape or not torch.equal(v, after[k]) for k, v in before.items()
        ):
            changed.append(place)
    assert changed


@each_rewriter
def test_a_rewriter_gives_the_same_model_twice(name: str) -> None:
    method = REWRITERS[name]()
    for text in method.card.levels:
        (one, edits, _), (two, again, _) = (attempt(method, "llama", parse_level(text)) for _ in range(2))
        assert edits == again
        assert one.state_dict().keys() == two.state_dict().keys()
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


@each_rewriter
def test_a_rewriter_refuses_paths_that_the_model_does_not_have(name: str) -> None:
    method, given = REWRITERS[name](), traced("llama")
    level = parse_level(method.card.levels[0])
    with pytest.raises(UserError):
        given.rewritten(method, {"no.such.path": level})


# ---- mergers


@pytest.mark.parametrize("shape", PARENT_SHAPES)
@each_merger
def test_a_merger_keeps_shapes_and_inputs_and_is_deterministic(name: str, shape: str) -> None:
    method, family = MERGERS[name](), Family.of(PARENT_SHAPES[shape])
    assert isinstance(method, Merger)
    before, state = copy.deepcopy(family), torch.random.get_rng_state()
    once, again = family.merged(method), family.merged(method)
    assert once.shape == family.base.shape and once.dtype == torch.float32 and bool(once.isfinite().all())
    assert torch.equal(once, again), "other numbers the second time"
    assert torch.equal(family.base, before.base), "the base was changed in place"
    assert all(map(torch.equal, family.parents, before.parents)), "a parent was changed in place"
    assert torch.equal(torch.random.get_rng_state(), state), "randomness comes from `rng` alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", PARENT_SHAPES)
@each_merger
def test_a_model_merged_with_itself_is_itself(name: str, shape: str, dtype: torch.dtype) -> None:
    method = MERGERS[name]()
    if "exact" not in method.card.keeps:
        pytest.skip("its card does not promise it")
    base = Family.of(PARENT_SHAPES[shape], dtype=dtype).base
    assert isinstance(method, Merger)
    assert torch.equal(Family(base, [base.clone() for _ in range(3)]).merged(method), base.float())


@each_merger
def test_the_order_of_parents_does_not_matter_where_the_card_says_so(name: str) -> None:
    method, family = MERGERS[name](), Family.of((40, 33))
    assert isinstance(method, Merger)
    if "symmetric" not in method.card.keeps:
        pytest.skip("its card does not promise it")
    one, other = family.merged(method), family.merged(method, (2, 0, 1))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@each_merger
def test_a_merger_that_is_tiled_knows_no_neighbours(name: str) -> None:
    """An element of the result is the same, whatever lies beside it: statistics and random numbers are given."""
    method, family = MERGERS[name](), Family.of((30, 40))
    assert isinstance(method, Merger)
    if not method.tiled:
        pytest.skip("it takes whole tensors")
    count = method.most or 3
    given = {
        "weight": (0.5, 0.75, 1.0)[:count],
        "density": (0.2, 0.5, 0.8)[:count],
        "depth": 0.5,
        "block": (1, 3),
        "gram": torch.tensor([[1.0, 0.4, 0.1], [0.4, 1.0, 0.2], [0.1, 0.2, 1.0]])[:count, :count],
        "threshold": (0.01, 0.02, 0.03)[:count],
        "peak": (0.3, 0.3, 0.3)[:count],
    }
    if "rng" in method.needs():
        pytest.skip("random numbers are drawn in order")
    wanted = {k: given[k] for k in method.needs()}
    base = family.base if method.needs_base() else None
    whole = method.merge(family.parents[:count], base, **wanted)
    part = method.merge([p[:7] for p in family.parents[:count]], None if base is None else base[:7], **wanted)
    assert torch.equal(whole[:7], part)


@each_merger
def test_nan_in_a_parent_is_refused_and_named(name: str) -> None:
    method, family = MERGERS[name](), Family.of((5, 7))
    assert isinstance(method, Merger)
    family.parents[0][2, 3] = float("nan")
    with pytest.raises(UserError, match=r"parent 0.*blocks\.0\.weight.*NaN"):
        family.merged(method)


# ---- allocators

# limits that an allocator may refuse to keep, and why that is right; a limit on bytes alone is kept by all
UNKEPT = {
    ("damage",): "what makes damage small with the rest limited cannot also hold damage to a limit",
    ("bytes", "seconds"): "a dynamic programme has one budget",
}


def allocated(name: str, rows: list[Row], limits: dict[str, float]) -> dict[str, Row]:
    """The verb on copies; skips with the reason where such limits may be refused."""
    method, extra, before = small(ALLOCATORS[name]), resources(rows), list(rows)
    state = torch.random.get_rng_state()
    try:
        choice = method.allocate(rows, limits, **{k: extra[k] for k in method.needs()})
    except BudgetError:
        raise
    except UserError as refusal:
        reason = UNKEPT.get(tuple(limits))
        assert reason and any(limit in str(refusal) for limit in limits), refusal
        pytest.skip(f"refused, as it may: {reason}")
    assert rows == before and torch.equal(torch.random.get_rng_state(), state)
    return choice


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("costs", [("bytes",), ("seconds",), ("damage",), ("bytes", "seconds")], ids="+".join)
@each_allocator
def test_an_allocator_keeps_the_limits(name: str, costs: tuple[str, ...], share: float, ragged: bool) -> None:
    for seed in range(2):
        rows = table(seed, ragged=ragged)
        least, most = ({c: extreme(rows, c, pick) for c in costs} for pick in (min, max))
        limits = {c: least[c] + share * (most[c] - least[c]) for c in costs}
        try:
            choice = allocated(name, rows, limits)
        except BudgetError as refusal:
            # a plan meets the limits, but perhaps none of the levels that every unit offers, and the sentence says so
            assert ragged and "with these levels" in str(refusal)
            pytest.skip("refused, as it may: a ladder has no rungs but the levels that all units offer")
        offers = by_unit(rows)
        assert choice.keys() == offers.keys() and all(row in offers[unit] for unit, row in choice.items())
        for cost, limit in limits.items():
            assert fsum(getattr(r, cost) for r in choice.values()) <= limit
        assert allocated(name, rows, limits) == choice, "another choice the second time"
        if share == 1.0 and costs == ("bytes",) and not ragged:
            assert fsum(r.damage for r in choice.values()) == extreme(rows, "damage", min), (
                "there was room for the best"
            )


@pytest.mark.parametrize("cost", ["bytes", "seconds", "damage"])
@each_allocator
def test_an_allocator_refuses_what_no_plan_meets(name: str, cost: str) -> None:
    rows = [dataclasses.replace(row, damage=row.damage + 0.01) for row in table(4)]
    with pytest.raises(BudgetError, match=cost):
        allocated(name, rows, {cost: 0.9 * extreme(rows, cost, min)})


@each_allocator
def test_an_allocator_refuses_a_table_that_is_none(name: str) -> None:
    method = small(ALLOCATORS[name])
    for rows in ([], [dataclasses.replace(row, damage=float("nan")) for row in table(5)]):
        extra = resources(rows)
        with pytest.raises(UserError):
            method.allocate(rows, {"bytes": 1e9}, **{k: extra[k] for k in method.needs()})


# ---- pricers


@each_pricer
@pytest.mark.parametrize("text", ["4b/g64", "fp32", "2b/g32"])
def test_a_price_is_ordered_deterministic_and_grows_with_the_work(name: str, text: str) -> None:
    pricer, machine, level = PRICERS[name](), device(), parse_level(text)
    assert isinstance(pricer, Pricer)
    little, same = (pricer.price(work(level), machine) for _ in range(2))
    assert little == same and 0 < little.low <= little.mid <= little.high and little.bytes > 0
    more = [work(level, **{size: 1024}) for size in ("rows", "cols")]
    more += [work(level, layers=8), work(level, tokens=16), work(level, batch=4), work(level, context=512)]
    for larger in (pricer.price(w, machine) for w in more):
        assert larger.mid > little.mid and larger.bytes > little.bytes


@each_pricer
def test_a_price_holds_at_the_edges(name: str) -> None:
    pricer, machine = PRICERS[name](), device()
    assert isinstance(pricer, Pricer)
    nothing = pricer.price(Work(()), machine)
    assert 0 <= nothing.mid < 1e-3
    one = pricer.price(Work((Product(Dense("fp32"), 1, 1),)), machine)
    huge = pricer.price(work(Dense("fp32"), rows=1 << 16, cols=1 << 14, tokens=4096, context=1 << 20), machine)
    assert nothing.mid <= one.mid < huge.mid < float("inf")


@each_pricer
def test_a_pricer_refuses_a_profile_that_has_nothing_to_go_by(name: str) -> None:
    pricer = PRICERS[name]()
    assert isinstance(pricer, Pricer)
    with pytest.raises(UserError, match="fp32"):
        pricer.price(work(Dense("fp32")), device(kernels=()))


# ---- cachers


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("name", CACHERS)
def test_a_cacher_stores_what_it_was_given_nearly_and_the_same_twice(name: str, case: str) -> None:
    cacher, given = CACHERS[name](**CACHER_FIELDS.get(name, {})), WINDOWS[case]
    assert isinstance(cacher, Cacher)
    before, state = [t.clone() for t in given], torch.random.get_rng_state()
    stored, again = stored_by(cacher, *given), stored_by(cacher, *given)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), "its input was changed in place"
    assert torch.equal(torch.random.get_rng_state(), state)
    for found, same, original in zip(stored.dense(), again.dense(), given, strict=True):
        assert found.shape == original.shape and found.dtype == torch.float32 and bool(found.isfinite().all())
        assert torch.equal(found, same)
        if case in ("plain", "all the same"):
            assert float((found - original).square().sum()) <= 0.5 * float(original.square().sum())
    if case == "plain":
        floats = sum(2 * t.numel() for t in given)
        assert stored.nbytes > 0 and (stored.nbytes < floats) is not hasattr(stored, "read"), "it saves no bytes"
        first = stored_by(cacher, *(t[:1] for t in given)).dense()
        assert all(torch.equal(a, b[:1]) for a, b in zip(first, stored.dense(), strict=True)), "sequences mix"


# ---- elastic training


@cache
def _supernet(name: str) -> Any:
    from trimtab.engine.elastic import Supernet
    from trimtab.space import open_space

    return Supernet(open_space(name))


@pytest.mark.parametrize("space", ["mobile-cnn", "vit"])
@pytest.mark.parametrize("name", ELASTICS)
def test_a_curriculum_names_networks_of_what_it_offers(name: str, space: str) -> None:
    from trimtab.core.method import Elastic, Lesson

    made, domain = ELASTICS[name](), _supernet(space).domain
    assert isinstance(made, Elastic)
    offered = made.offer(domain)
    for knob in domain.knobs:
        places = list(offered.get(knob.name, ()))
        assert places == sorted(set(places)) and all(0 <= p < len(knob.options) for p in places)
    assert offered.keys() <= {knob.name for knob in domain.knobs}
    small = domain.within(offered)
    for step in (0, 1, 50, 70, 99):
        lesson = Lesson(domain, offered, step, 100)
        pupils = made.teach(lesson, Random(step))
        assert pupils and pupils == made.teach(lesson, Random(step)), "the same step, the same networks"
        for place, pupil in enumerate(pupils):
            assert domain.canonical(pupil.genome) == pupil.genome
            assert small.genome(domain.setting(pupil.genome)), "a network that is not offered"
            assert pupil.weight > 0 and 0 <= pupil.labels <= 1
            assert pupil.teacher in (None, "before") or 0 <= pupil.teacher < place  # type: ignore[operator]
        assert sum(p.weight for p in pupils) == pytest.approx(1)
        assert isinstance(made.sorts(lesson), bool)


@pytest.mark.parametrize("name", ELASTICS)
def test_a_step_of_a_curriculum_trains_what_its_networks_have_and_nothing_else(name: str) -> None:
    from trimtab.engine.teaching import Teaching

    made, supernet = ELASTICS[name](), _supernet("vit")
    supernet.zero_grad()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    before = {n: p.detach().clone() for n, p in supernet.named_parameters()}
    teaching = Teaching(supernet, made, {"images": images}, labels, 10)
    found = [teaching(torch.arange(4), 0)]
    grads = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    found.append(Teaching(supernet, made, {"images": images}, labels, 10)(torch.arange(4), 0))
    assert found[0] == found[1] and found[0][1] == 4 and found[0][0] > 0
    assert grads and all(torch.equal(grads[n], p.grad) for n, p in supernet.named_parameters() if p.grad is not None)
    assert all(torch.equal(before[n], p) for n, p in supernet.named_parameters()), "weights move in the optimiser"
    touched = {place.shared for pupil in _pupils(made, supernet) for place in supernet.network(pupil.genome).parameters}
    assert {n.replace("/", ".") for n, g in grads.items() if bool(g.any())} <= touched


def _pupils(made: Any, supernet: Any) -> Any:
    from trimtab.core.method import Lesson

    return made.teach(Lesson(supernet.domain, made.offer(supernet.domain), 0, 10), Random(0))
