"""The plans shipped to be copied resolve and are legal on a model; plans round-trip through both their forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.core.method import Solver, discover, method
from trimtab.core.plan import Plan, Step, check
from trimtab.engine.stream import own_sites

PLANS = sorted(Path(__file__).parent.parent.joinpath("plans").glob("*.toml"))
SOLVERS = sorted(n for n, c in discover().items() if issubclass(c, Solver))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sites(request: pytest.FixtureRequest) -> list:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.core.modelmap import trace

    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": request.param},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return list(own_sites(trace(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})).values())


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_shipped_plans_are_legal(path: Path, sites: list) -> None:
    plan = Plan.from_toml(path.read_text("utf-8"))
    roles = {s.role for s in sites}
    usable = Plan(tuple(Step(s.method, tuple(r for r in s.levels if r[0] in roles | {"*"})) for s in plan.steps))
    facts = check(usable.resolve(sites), sites, padding=False)
    assert any("int" in left for left in facts.values())


def test_there_are_plans_to_copy() -> None:
    assert len(PLANS) >= 3


@given(
    st.lists(
        st.tuples(st.sampled_from(SOLVERS), st.sampled_from(["*", "q", "lm_head", "model.layers.*"])),
        min_size=1,
        max_size=4,
    )
)
def test_plans_round_trip(parts: list[tuple[str, str]]) -> None:
    levels = {name: discover()[name].card.levels[0] for name, _ in parts}
    text = " | ".join(f"{name} @ {'' if where == '*' else where + '='}{levels[name]}" for name, where in parts)
    plan = Plan.parse(text)
    assert str(plan) == text
    assert Plan.from_toml(plan.to_toml()) == plan


@given(st.text("gptqrnaw @|=()*/.,0123456789b%'\"[]{}", max_size=40))
def test_any_text_is_a_plan_or_a_user_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except UserError:
        return
    assert Plan.parse(str(plan)) == plan


def test_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(UserError, match="damp"):
        method("gptq", damp="much")
    with pytest.raises(UserError, match="no field"):
        method("gptq", dump=0.1)
    with pytest.raises(UserError, match="did you mean 'gptq'"):
        method("gptp")
