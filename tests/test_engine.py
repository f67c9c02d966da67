"""The engine: a model that streams block by block gives what the same model in memory gives, to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Depth, Int, parse_level
from trimtab.core.method import Solver, discover, method
from trimtab.core.plan import Plan, check
from trimtab.core.site import Site
from trimtab.engine.apply import apply, solve
from trimtab.engine.measure import measure, references, through
from trimtab.engine.stream import Stream, give_back_freed_memory, own_sites, plan_sites
from trimtab.formats.packed import join_rows, row_separable
from trimtab.lab import planted
from trimtab.models.source import open_source
from trimtab.quant.rtn import RTN
from trimtab.tasks.causal_lm import CausalLM

VOCABULARY, LENGTH = 96, 24


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": request.param == "tied"},
    )
    path = tmp_path_factory.mktemp(request.param)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def task() -> CausalLM:
    rng = torch.Generator().manual_seed(1)
    windows = {s: torch.randint(VOCABULARY, (16, LENGTH), generator=rng) for s in ("calibration", "search", "test")}
    return CausalLM(windows, {s: torch.full((16,), LENGTH) for s in windows})


def stream_of(folder: Path, task: CausalLM, resident: bool) -> Stream:
    from trimtab.core.modelmap import trace

    source = open_source(str(folder))
    modelmap = trace(source.skeleton(), dict(task.batch("search", 1).inputs))
    return Stream(source, modelmap, {"use_cache": False}, resident)


def logits(stream: Stream, tokens: Tensor) -> Tensor:
    flow = through(stream, SimpleNamespace(inputs={"input_ids": tokens}), 4)
    return torch.cat([out.logits for _, out in stream.finish(flow)])


@pytest.mark.parametrize("resident", [True, False])
def test_streaming_gives_the_models_own_outputs(folder: Path, task: CausalLM, resident: bool) -> None:
    tokens = task.batch("test", 6).inputs["input_ids"]
    with torch.no_grad():
        expected = open_source(str(folder)).materialise()(input_ids=tokens).logits
    assert torch.allclose(logits(stream_of(folder, task, resident), tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        "rtn @ 4b/g16",
        "gptq @ 3b/g16 | rtn @ embed=8b/row",
        "gptq @ 4b/g16, model.layers.1.*=2b/g16",
        "output-space @ up=r8/bias",
    ],
)
def test_streamed_and_resident_plans_agree_to_the_bit(folder: Path, task: CausalLM, plan: str) -> None:
    found = []
    for resident in (True, False):
        stream = stream_of(folder, task, resident)
        applied = apply(stream, Plan.parse(plan).resolve(stream.sites.values()), task.batch("calibration", 8), 4)
        found.append((applied, logits(applied.stream, task.batch("test", 4).inputs["input_ids"])))
    (one, ours), (two, theirs) = found
    assert one.packed.keys() == two.packed.keys()
    for path in one.packed:
        assert all(torch.equal(t, two.packed[path].tensors[k]) for k, t in one.packed[path].tensors.items())
    assert torch.equal(ours, theirs)


def test_a_block_that_is_not_in_use_holds_no_weights(folder: Path, task: CausalLM) -> None:
    stream = stream_of(folder, task, False)
    with stream.loaded(1) as block:
        assert not any(p.is_meta for p in block.parameters())
        others = stream.model.get_submodule(stream.paths[0]), stream.model.get_submodule(stream.paths[2])
        assert all(p.is_meta for other in others for p in other.parameters())
    assert all(p.is_meta for p in stream.model.parameters())


@pytest.mark.parametrize("resident", [True, False])
def test_a_swap_leaves_no_trace(folder: Path, task: CausalLM, resident: bool) -> None:
    stream, batch = stream_of(folder, task, resident), task.batch("search", 4)
    reference = references(stream, through(stream, batch, 4), batch, task)
    site = stream.sites["model.embed_tokens"]
    packed = RTN().solve(stream.weight(site), Int(2, 16))
    with stream.swapped({site.path: packed}):
        changed = measure(stream, batch, task, 4, reference)
    after = measure(stream, batch, task, 4, reference)
    assert changed.damage() > 1e-4
    assert after.damage() < 1e-6


def test_planted_outliers_keep_the_function(folder: Path, task: CausalLM) -> None:
    stream, tokens = stream_of(folder, task, True), task.batch("test", 4).inputs["input_ids"]
    source = planted(stream.source, stream.map, 20.0, seed=0)
    with torch.no_grad():
        ours = source.materialise()(input_ids=tokens).logits
    assert torch.allclose(ours, logits(stream, tokens), atol=1e-5)
    assert float(source.read("model.norm.weight").max()) == (20.0 if "untied" in folder.name else 1.0)
    assert float(source.read("model.layers.0.input_layernorm.weight").max()) == 20.0


def test_tied_weights_stay_tied(folder: Path, task: CausalLM) -> None:
    stream = stream_of(folder, task, True)
    model = stream.model
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("tied" in folder.name and "untied" not in folder.name)


def test_dropping_a_sublayer_takes_its_branch_out(folder: Path, task: CausalLM) -> None:
    stream = stream_of(folder, task, True)
    tokens = task.batch("test", 4).inputs["input_ids"]
    with stream.swapped({"model.layers.1.mlp": None}):
        dropped = logits(stream, tokens)
    with torch.no_grad():
        model = open_source(str(folder)).materialise()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        assert torch.allclose(dropped, model(input_ids=tokens).logits, atol=1e-5)


def test_tiles_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 36, generator=torch.Generator().manual_seed(0))
    site = Site("x", "linear", (50, 36))
    whole = RTN().solve(weight, Int(3, 16))
    monkeypatch.setattr("trimtab.engine.apply.TILE", 300)
    tiled = solve(RTN(), site, weight, Int(3, 16), {}, 0)
    assert all(torch.equal(t, tiled.tensors[k]) for k, t in whole.tensors.items())
    assert join_rows([whole], whole.shape) is whole
    other = RTN().solve(
        weight[8:],
        Int(3, 18),
    )
    assert join_rows([RTN().solve(weight[:8], Int(3, 16)), other], whole.shape) is None


SOLVERS = [
    (name, text)
    for name, cls in discover().items()
    if issubclass(cls, Solver) and "rng" not in cls.needs()
    for text in cls.card.levels
    if row_separable(parse_level(text))
]


@pytest.mark.parametrize(("name", "text"), SOLVERS)
def test_every_method_solves_rows_in_tiles_as_it_solves_the_whole(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine takes for granted: where the rows of a weight are stored apart, they are solved apart."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(75, 64, generator=rng) * torch.logspace(-2, 0, 75)[:, None]
    x = torch.randn(200, 64, generator=rng) + 0.3
    stats = {"gram": x.T @ x / 200, "mean": x.mean(0), "absmean": x.abs().mean(0)}
    solver, level, site = method(name), parse_level(text), Site("x", "linear", (75, 64))
    assert isinstance(solver, Solver)
    whole = solve(solver, site, weight, level, stats, 0)
    monkeypatch.setattr("trimtab.engine.apply.TILE", 10 * 64)
    monkeypatch.setattr("trimtab.engine.apply.LARGE", 10 * 64)
    tiled = solve(solver, site, weight, level, stats, 0)
    assert tiled.level == whole.level and tiled.shape == whole.shape
    assert (tiled.dense() != whole.dense()).double().mean() < 0.01  # a value on an edge may round either way


def test_what_a_plan_solved_outlives_a_change_of_structure(folder: Path, task: CausalLM) -> None:
    plan = "rtn @ up=4b/g16 | output-space @ down=r8/bias | llm-drop @ model.layers.1.mlp=drop"
    stream, batch = stream_of(folder, task, False), task.batch("calibration", 8)
    done = apply(stream, Plan.parse(plan).resolve(plan_sites(stream.map)), batch, 4)
    assert {p.split(".")[2] for p in done.packed} == {"0", "2"} and len(done.packed) == 4
    assert done.packed is done.stream.packed and done.packed.keys() <= done.stream.sites.keys()
    for path, packed in done.packed.items():
        assert torch.equal(done.stream.current(f"{path}.weight"), packed.dense())
    tensors = [done.stream.current(name) for name in done.stream.source.names]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)  # tied ones once


def test_memory_is_left_to_a_c_library_without_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (object(), OSError("no library")):
        monkeypatch.setattr("ctypes.CDLL", Mock(side_effect=[library]))
        give_back_freed_memory()


def test_an_illegal_plan_is_refused_naming_both_steps(folder: Path, task: CausalLM) -> None:
    stream = stream_of(folder, task, True)
    sites = own_sites(stream.map).values()
    steps = Plan.parse("gptq @ q=4b/g16 | sparsegpt @ q=50%").resolve(sites)
    with pytest.raises(UserError, match=r"sparsegpt.*float.*gptq"):
        check(steps, sites)
    with pytest.raises(UserError, match="takes levels like"):
        check([(RTN(), {"model.layers.0.mlp.up_proj": Depth(0)})], sites)
