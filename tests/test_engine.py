"""The engine: a model that streams block by block gives what the same model in memory gives, to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Depth, Int
from trimtab.core.plan import Plan, check
from trimtab.engine.apply import apply, solve
from trimtab.engine.measure import measure, references, through
from trimtab.engine.stream import Stream, own_sites
from trimtab.formats.packed import join_rows
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
    from trimtab.core.site import Site

    weight = torch.randn(50, 36, generator=torch.Generator().manual_seed(0))
    site = Site("x", "linear", (50, 36))
    whole = RTN().solve(weight, Int(3, 16))
    monkeypatch.setattr("trimtab.engine.apply.TILE", 300)
    tiled = solve(RTN(), site, weight, Int(3, 16), {}, 0)
    assert all(torch.equal(t, tiled.tensors[k]) for k, t in whole.tensors.items())
    assert torch.equal(join_rows([whole]).dense(), whole.dense())


def test_an_illegal_plan_is_refused_naming_both_steps(folder: Path, task: CausalLM) -> None:
    stream = stream_of(folder, task, True)
    sites = own_sites(stream.map).values()
    steps = Plan.parse("gptq @ q=4b/g16 | sparsegpt @ q=50%").resolve(sites)
    with pytest.raises(UserError, match=r"sparsegpt.*float.*gptq"):
        check(steps, sites)
    with pytest.raises(UserError, match="takes levels like"):
        check([(RTN(), {"model.layers.0.mlp.up_proj": Depth(0)})], sites)
