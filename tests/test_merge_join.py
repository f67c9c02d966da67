"""Whole models joined into one: what must come out exactly, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_structure import filled, gpt2, inputs, llama, mixtral, run, vit
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Rank, Width
from trimtab.core.method import Scene
from trimtab.core.modelmap import trace
from trimtab.core.plan import Plan
from trimtab.engine.apply import apply
from trimtab.engine.experts import routing, sensitivity
from trimtab.engine.joining import join, moments, settle
from trimtab.evidence import Evidence
from trimtab.formats.cutting import out_dim
from trimtab.formats.structure import put_weight, replay, weight_of
from trimtab.lab import Bench
from trimtab.loading import load
from trimtab.merge.m_smoe import MSMoE
from trimtab.merge.mc_smoe import MCSMoE
from trimtab.merge.pleas import PLeaS
from trimtab.merge.sn_net import SNNet
from trimtab.merge.sn_netv2 import SNNetv2
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig
from trimtab.models.source import open_source


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).requires_grad_(
        False
    )


def cnn(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A residual network whose batch norms have seen the images beside it."""
    torch.manual_seed(seed)
    model = PocketCNN(PocketCNNConfig(widths=(8, 16), inner=((12,), (20,)))).eval()
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    settle(model, [{"pixel_values": images}])
    return model, {"pixel_values": images}


def transformer(make: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    return filled(make), inputs(make(), items=40)


def permuted(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> nn.Module:
    """The same function with the units of every coupled group of channels in another order."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    done: set[tuple[int, int, int]] = set()  # a tied weight lies in several places
    for group in trace(model, batch).coupled:
        if group.kind != "channels":
            continue
        order = torch.randperm(group.width, generator=rng).tolist()
        for m in group.members:
            old, new = (torch.tensor(group.indices(m, units)) for units in (order, list(range(group.width))))
            if m.side == "param":
                value = other.get_parameter(m.path).data
                value.index_copy_(m.dim, new, value.index_select(m.dim, old))
                continue
            module = other.get_submodule(m.path)
            dim = 1 if m.side == "in" else out_dim(module)
            weight = weight_of(module)
            size, place = weight.shape[dim], (weight.data_ptr(), dim, m.offset)
            if place in done:
                continue
            done.add(place)
            put_weight(module, weight.index_copy(dim, new, weight.index_select(dim, old)))
            for value in (*module._parameters.values(), *module._buffers.values()):
                if m.side != "in" and value is not None and value is not module.weight and value.shape == (size,):
                    value.data.index_copy_(0, new, value.data.index_select(0, old))
    return other


@pytest.mark.parametrize("make", [llama, gpt2, vit, None])
def test_a_model_and_its_own_permuted_copy_make_that_model(make: Any) -> None:
    model, batch = transformer(make) if make else cnn()
    other = permuted(model, batch)
    assert not all(map(torch.equal, model.parameters(), other.parameters()))
    before = run(model, batch)
    assert torch.allclose(run(other, batch), before, atol=1e-4 * float(before.abs().max()))
    for method in (PLeaS(), PLeaS(refit=False)):
        after = run(join(method, [model, other], [batch]), batch)
        assert (after - before).abs().max() <= 1e-3 * before.abs().max()
    unmatched = run(join(PLeaS(permute=False, refit=False), [model, other], [batch]), batch)
    assert (unmatched - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("refit", [True, False])
def test_side_by_side_is_the_mean_of_both(refit: bool) -> None:
    x = torch.randn(100, 6)
    one, other = mlp(0), mlp(1)
    joined: Any = join(PLeaS(extra=1.0, refit=refit), [one, other], [{"input": x}])
    assert joined[0].out_features == 24 and joined[2].weight.shape == (20, 24)
    assert torch.allclose(joined(x), (one(x) + other(x)) / 2, atol=1e-5)
    (first, batch), (second, _) = cnn(0), cnn(1)
    wide = run(join(PLeaS(extra=1.0, refit=refit), [first, second], [batch]), batch)
    mean = (run(first, batch) + run(second, batch)) / 2
    assert (wide - mean).abs().max() <= 1e-4 * mean.abs().max()


def test_wider_is_nearer_to_the_mean_of_both() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    one, other = mlp(0), mlp(1)
    errors = []
    for extra in (0.0, 0.3, 0.6, 1.0):
        joined = join(PLeaS(extra=extra), [one, other], [{"input": x}])
        errors.append(float((joined(x) - (one(x) + other(x)) / 2).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_a_layer_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x, first, second = torch.randn(300, 6), mlp(0)[:1], mlp(1)[:1]  # type: ignore[index]
    joined: Any = join(PLeaS(damp=1e-9), [first, second], [{"input": x}])
    ones = torch.cat([x, torch.ones(300, 1)], 1)
    wanted = torch.linalg.lstsq(ones, (first(x) + second(x)) / 2).solution.T
    assert torch.allclose(torch.cat([joined[0].weight, joined[0].bias[:, None]], 1), wanted, atol=1e-4)


def test_moments_are_those_of_all_rows_side_by_side() -> None:
    one, other, x = mlp(0), mlp(1), torch.randn(50, 6)
    found = moments([one, other], [("2", "4")], [{"input": x[:30]}, {"input": x[30:]}])["2", "4"]
    u = torch.cat([one[:2](x), other[:4](x), torch.ones(50, 1)], 1).double()  # type: ignore[index]
    assert torch.allclose(found, u.T @ u / 50, atol=1e-6)


def test_settled_batch_norms_have_the_statistics_of_what_they_see() -> None:
    model, batch = cnn()
    seen: list[Tensor] = []
    norm: Any = model.get_submodule("stem.1")
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, batch)
    handle.remove()
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1 and not any(m.training for m in model.modules())


def test_what_cannot_be_joined_is_refused() -> None:
    batch = [{"input": torch.randn(9, 6)}]
    with pytest.raises(UserError, match=r"extra=2; it is a share"):
        join(PLeaS(extra=2.0), [mlp(0), mlp(1)], batch)
    with pytest.raises(UserError, match="was given 3 models"):
        join(PLeaS(), [mlp(0), mlp(1), mlp(2)], batch)
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 3))
    with pytest.raises(UserError, match=r"0\.(weight|bias).*models of one architecture|2\.weight.*one architecture"):
        join(PLeaS(), [mlp(0), other], batch)


# ---- stitched


class Tower(nn.Module):
    """A residual network whose blocks are in a list."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(Branch(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def towers() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tower(2, 8), Tower(4, 12), torch.randn(64, 6)


def both_ends(model: Any, small: Any, large: Any, x: Tensor) -> None:
    for place, route in enumerate(model.routes):
        model.place = place
        if len(route) == 1:
            assert torch.equal(model(x), (small, large)[route[0].anchor](x))


@pytest.mark.parametrize("method", [SNNet(), SNNetv2(rank=2), SNNetv2(rank=0)])
def test_routes_of_one_anchor_are_that_anchor_bit_for_bit(method: Any) -> None:
    small, large, x = towers()
    model: Any = join(method, [small, large], [{"x": x}])
    both_ends(model, small, large, x)
    for place in range(len(model.routes)):  # and still, after every other route has run
        model.place = place
        assert model(x).shape == (64, 3)
    both_ends(model, small, large, x)
    costs = [model.cost(i) for i in range(len(model.routes))]
    assert costs[0] == sum(p.numel() for p in small.layers.parameters() if p.dim() > 1)  # type: ignore[union-attr]


def test_a_stitched_route_is_its_blocks_and_its_map() -> None:
    small, large, x = towers()
    model: Any = join(SNNet(), [small, large], [{"x": x}])
    model.place = 1
    first: Any = small
    second: Any = large
    state = first.layers[0](first.entry(x))
    wanted = second.layers[1](second.layers[0](second.entry(x)))
    solved = torch.linalg.lstsq(torch.cat([state, torch.ones(64, 1)], 1).double(), wanted.double()).solution.float()
    y = torch.cat([state, torch.ones(64, 1)], 1) @ solved
    expected = second.head(second.layers[3](second.layers[2](y)))
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_there_and_back_runs_all_three_legs() -> None:
    torch.manual_seed(0)
    small, large, x = Tower(3, 8), Tower(3, 12), torch.randn(64, 6)
    model: Any = join(SNNetv2(rank=2), [small, large], [{"x": x}])
    model.place = next(i for i, route in enumerate(model.routes) if len(route) == 3 and route[0].anchor == 1)
    s: Any = small
    b: Any = large
    down, up = model.stitches["1_1__0_1"], model.stitches["0_2__1_2"]
    assert torch.equal(model(x), b.head(b.layers[2](up(s.layers[1](down(b.layers[0](b.entry(x))))))))
    assert not down.weight.requires_grad and down.up.requires_grad and not bool(down.up.any())


def test_anchors_that_cannot_be_stitched_are_refused() -> None:
    small, large, x = towers()
    with pytest.raises(UserError, match="models of 4, 2 blocks"):
        join(SNNet(), [large, small], [{"x": x}])
    with pytest.raises(UserError, match="rank=-1"):
        join(SNNetv2(rank=-1), [small, large], [{"x": x}])


# ---- experts


def moe() -> tuple[Any, Any, dict[str, Tensor]]:
    model, batch = filled(mixtral), inputs(mixtral())
    return model.requires_grad_(False), trace(model, batch), batch


def merged_experts(model: Any, modelmap: Any, method: MSMoE, keep: float, stats: Any) -> Scene:
    levels = {s.path: Width(keep) for s in modelmap.sites if s.kind == "experts"}
    scene = Scene(copy.deepcopy(model), modelmap, levels=levels)
    method.rewrite(scene, usage=stats["usage"], likeness=stats["likeness"])
    return scene


def test_routing_counts_choices_and_compares_logits() -> None:
    model, modelmap, batch = moe()
    path, logits = "model.layers.0.mlp", []
    handle = model.get_submodule(f"{path}.gate").register_forward_hook(lambda _, args, out: logits.append(out[0]))
    found = routing(model, modelmap, [batch])
    handle.remove()
    chosen = logits[0].topk(2).indices
    assert torch.allclose(
        found["usage"][f"{path}.experts"], torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
    )
    cosine = nn.functional.cosine_similarity(logits[0].T[:, None], logits[0].T[None], dim=-1)
    assert torch.allclose(found["likeness"][f"{path}.experts"].float(), cosine, atol=1e-4)


def test_experts_that_differ_by_the_order_of_units_are_merged_without_loss() -> None:
    model, modelmap, batch = moe()
    rng = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        stack = layer.mlp.experts
        for twin, lead in ((2, 0), (3, 1)):
            order = torch.randperm(24, generator=rng)
            stack.gate_up_proj[twin] = stack.gate_up_proj[lead][torch.cat([order, 24 + order])]
            stack.down_proj[twin] = stack.down_proj[lead][:, order]
    likeness = torch.eye(4)
    likeness[0, 2] = likeness[2, 0] = likeness[1, 3] = likeness[3, 1] = 0.9
    paths = [f"model.layers.{i}.mlp.experts" for i in range(3)]
    usage = torch.tensor([0.4, 0.3, 0.1, 0.2])
    stats = {"usage": dict.fromkeys(paths, usage), "likeness": dict.fromkeys(paths, likeness)}
    scene, before = merged_experts(model, modelmap, MSMoE(), 0.5, stats), run(model, batch)
    assert [e["members"] for e in scene.edits] == [[0, 1, 0, 1]] * 3
    assert scene.model.get_parameter(f"{paths[0]}.down_proj").shape[0] == 2
    assert torch.allclose(run(scene.model, batch), before, atol=1e-4 * float(before.abs().max()))
    unaligned = run(merged_experts(model, modelmap, MSMoE(permute=False), 0.5, stats).model, batch)
    assert (unaligned - before).abs().max() > 1e-2 * before.abs().max()


def test_experts_count_by_use() -> None:
    model, modelmap, batch = moe()
    stats = routing(model, modelmap, [batch])
    path = "model.layers.1.mlp.experts"
    usage = torch.tensor([0.5, 0.3, 0.15, 0.05])
    stats["usage"] = dict.fromkeys(stats["usage"], usage)
    scene = merged_experts(model, modelmap, MSMoE(permute=False), 0.25, stats)
    old, new = (m.get_parameter(f"{path}.down_proj") for m in (model, scene.model))
    assert torch.allclose(new[0], (usage[:, None, None] * old).sum(0), atol=1e-6)


def test_a_level_that_is_no_width_is_refused_for_experts() -> None:
    model, modelmap, batch = moe()
    scene = Scene(model, modelmap, levels={"lm_head": Width(0.5)})
    with pytest.raises(UserError, match="takes one width for stacks of experts"):
        MSMoE().rewrite(scene, **routing(model, modelmap, [batch]))


@pytest.mark.parametrize("members", [[0, 2, 2, 0], [0, 1], [0, 1, 0, -1]])
def test_experts_whose_places_make_no_sense_are_refused(members: list[int]) -> None:
    with pytest.raises(UserError, match=r"edit share of '?model\.layers\.0\.mlp\.experts|edit share: .*leave a gap"):
        replay(mixtral(), [{"op": "share", "path": "model.layers.0.mlp.experts", "members": members}])


def split(model: Any, method: MCSMoE, rank: int, sizes: dict[str, Tensor], batch: dict[str, Tensor]) -> Scene:
    scene = Scene(copy.deepcopy(model), trace(model, batch), levels=dict.fromkeys(sizes, Rank(rank)))
    method.rewrite(scene, sensitivity=sizes)
    return scene


def test_split_experts_are_thin_factors_and_the_rows_that_matter_most() -> None:
    model, modelmap, batch = moe()
    sizes = {s.path: torch.rand_like(model.get_parameter(s.path)) for s in modelmap.sites if s.kind == "experts"}
    before = run(model, batch)
    whole = split(model, MCSMoE(rows=1.0), 3, sizes, batch)
    assert torch.allclose(run(whole.model, batch), before, atol=1e-4 * float(before.abs().max()))
    scene = split(model, MCSMoE(rows=0.1), 3, sizes, batch)
    assert sum(scene.model.get_buffer(f"{p}_places").numel() for p in sizes) == sum(e["rows"] for e in scene.edits)
    assert sum(scene.model.get_parameter(f"{p}_rows").numel() for p in sizes) <= 0.1 * sum(
        map(Tensor.numel, sizes.values())
    )
    kept, left_out = [], []
    for path, size in sizes.items():
        weight, places = model.get_parameter(path), scene.model.get_buffer(f"{path}_places").tolist()
        u, s, v = torch.linalg.svd(weight)
        rest = weight - (u[..., :3] * s[..., None, :3]) @ v[:, :3]
        for i, score in enumerate((rest * size).abs().mean(2).flatten().tolist()):
            (kept if i in places else left_out).append(score)
    assert min(kept) >= max(left_out)
    replayed = replay(filled(mixtral), scene.edits)
    replayed.load_state_dict(scene.model.state_dict())
    assert torch.equal(run(replayed, batch), run(scene.model, batch))
    assert not any(hasattr(replayed.get_submodule(p.rpartition(".")[0]), p.rpartition(".")[2]) for p in sizes)


def test_merged_experts_are_split_and_trained() -> None:
    model, modelmap, batch = moe()
    merged = merged_experts(model, modelmap, MSMoE(), 0.5, routing(model, modelmap, [batch]))
    again = trace(merged.model, batch)
    sizes = sensitivity(merged.model, again, [lambda: merged.model(**batch, labels=batch["input_ids"]).loss])
    assert not any(p.requires_grad for p in merged.model.parameters())
    scene = Scene(merged.model, again, levels=dict.fromkeys(sizes, Rank(4)), edits=merged.edits)
    MCSMoE(rows=0.05).rewrite(scene, sensitivity=sizes)
    assert {e["op"] for e in scene.edits} == {"share", "thin"}
    replayed: Any = replay(filled(mixtral), scene.edits)
    replayed.load_state_dict(scene.model.state_dict())
    assert torch.equal(run(replayed, batch), run(scene.model, batch))
    replayed.requires_grad_(True)(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(bool(replayed.get_parameter(f"{p}_{part}").grad.any()) for p in sizes for part in ("left", "right"))


def test_sensitivity_is_the_mean_size_of_gradients() -> None:
    model, modelmap, batch = moe()
    losses = [lambda k=k: k * model(**batch, labels=batch["input_ids"]).loss for k in (1.0, -3.0)]  # type: ignore[misc]
    found, path = sensitivity(model, modelmap, losses), "model.layers.1.mlp.experts.down_proj"
    weight = model.get_parameter(path).requires_grad_(True)
    losses[0]().backward()
    assert torch.allclose(found[path], 2 * weight.grad.abs(), rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "level", "said"),
    [
        (MCSMoE(rows=1.5), Rank(2), "rows=1.5; it is a share"),
        (MCSMoE(), Rank(2, bias=True), "one rank"),
        (MCSMoE(), Width(0.5), "one rank"),
        (MCSMoE(), Rank(999), "a rank of 999"),
    ],
)
def test_splits_that_make_no_sense_are_refused(method: MCSMoE, level: Any, said: str) -> None:
    model, modelmap, _ = moe()
    sizes = {s.path: torch.ones_like(model.get_parameter(s.path)) for s in modelmap.sites if s.kind == "experts"}
    with pytest.raises(UserError, match=said):
        method.rewrite(Scene(model, modelmap, levels=dict.fromkeys(sizes, level)), sensitivity=sizes)


@pytest.mark.parametrize(
    ("path", "more"), [("down_proj", {"rank": 0}), ("down_proj", {"rows": 1 << 20}), ("gate", {}), ("act_fn", {})]
)
def test_thin_stacks_that_make_no_sense_are_refused(path: str, more: dict[str, int]) -> None:
    edit = {"op": "thin", "path": f"model.layers.0.mlp.experts.{path}", "rank": 2, "rows": 3, **more}
    with pytest.raises(UserError, match="edit thin"):
        replay(mixtral(), [edit])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A tiny mixture of experts in a folder, with pocket's tokenizer."""
    from conftest import add_tokenizer
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=4096, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe", save_original_format=False)
    add_tokenizer(tmp_path / "moe")
    return Bench(open_source(str(tmp_path / "moe")), calibration=2, items=1)


def test_a_plan_merges_experts_and_rounds_the_rest(bench: Bench, tmp_path: Path) -> None:
    plan = "m-smoe @ w50% | gptq @ 4b/g32, lm_head=8b/row"
    applied = apply(bench.stream(), Plan.parse(plan).resolve(bench.sites), bench.calibration, bench.chunk)
    job: Any = SimpleNamespace(source=bench.source, journal=None)
    Evidence(job).write(applied, plan, tmp_path / "out")
    loaded: Any = load(tmp_path / "out").model
    assert {e["op"] for e in applied.edits} == {"share"} and len(applied.edits) == 2
    assert loaded.get_parameter("model.layers.0.mlp.experts.down_proj").shape[0] == 2
    batch = {"input_ids": torch.arange(40).reshape(2, 20)}
    assert torch.allclose(run(loaded, batch), run(applied.stream.whole_model(), batch), atol=1e-4)


def test_a_plan_that_asks_for_what_no_fit_collects_is_refused(bench: Bench) -> None:
    steps = Plan.parse("mc-smoe @ r2").resolve(bench.sites)
    with pytest.raises(UserError, match="mc-smoe needs sensitivity, which no plan collects"):
        apply(bench.stream(), steps, bench.calibration, bench.chunk)
