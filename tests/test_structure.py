"""Changes of structure: recorded, rebuilt, and doing what the methods say; on tiny random models that are run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Depth, Width
from trimtab.core.method import Scene
from trimtab.core.modelmap import ModelMap, trace
from trimtab.formats.structure import (
    Dropped,
    Factored,
    plain_config_changes,
    replay,
    returned,
    sublayer_path,
    weight_of,
)
from trimtab.parts.folding import least_squares_refit, normalised_moment
from trimtab.prune.channels import ChannelEnergy, ChannelNorm
from trimtab.prune.llm_drop import LLMDrop
from trimtab.prune.slicegpt import SliceGPT
from trimtab.prune.unified_layer_skipping import UnifiedLayerSkipping

transformers = pytest.importorskip("transformers")


def llama(layers: int = 3, **extra: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **extra,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def phi() -> nn.Module:
    config = transformers.PhiConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    return transformers.PhiForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def mixed() -> nn.Module:
    """Layers of two sorts, whose caches differ."""
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_sliding_window=True, sliding_window=4,
        max_window_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def mixtral() -> nn.Module:
    """Experts in stacks, two of which see each token."""
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


class Residual(nn.Module):
    def __init__(self, entry: int, exit: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(entry, exit, 3, stride, 1, bias=False), nn.BatchNorm2d(exit)
        self.conv2, self.norm2 = nn.Conv2d(exit, exit, 3, 1, 1, bias=False), nn.BatchNorm2d(exit)
        self.shortcut = nn.Conv2d(entry, exit, 1, stride) if entry != exit else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, a depthwise convolution, two residual blocks and a head that reads flattened positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.norm = (
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
            nn.BatchNorm2d(8),
        )
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.depthwise(torch.relu(self.stem(x)))))
        return self.head(nn.functional.adaptive_avg_pool2d(self.blocks(x), 2).flatten(1))


FIRST = "the first site"
LANGUAGE = {"llama": llama, "gpt2": gpt2, "opt": opt, "phi": phi}
TRANSFORMERS = {**LANGUAGE, "tied": lambda: llama(tie_word_embeddings=True), "vit": vit}


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with every parameter random, norms and biases too; batch norms have seen data."""
    model, rng = make().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng) + (p.dim() == 1 and "weight" in name))
        for name, b in model.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=rng) + 0.5)
    return model


def inputs(model: nn.Module, seed: int = 1, items: int = 6) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": torch.randn(items, 3, 16, 16, generator=rng)}
    if isinstance(model, ResNet):
        return {"x": torch.randn(items, 3, 8, 8, generator=rng)}
    return {"input_ids": torch.randint(0, 50, (items, 12), generator=rng)}


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return out if isinstance(out, Tensor) else out.logits


def moments(
    model: nn.Module, modelmap: ModelMap, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moment and mean of every site's input, an own implementation."""
    seen: dict[str, Tensor] = {}
    handles = []
    for site in modelmap.sites:
        if site.kind == "embedding" or site.groups > 1:
            continue

        def hook(module: Any, args: tuple, path: str = site.path) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(
                    x, module.kernel_size, module.dilation, module.padding, module.stride
                ).transpose(1, 2)
            seen[path] = x.reshape(-1, x.shape[-1])

        handles.append(model.get_submodule(site.path).register_forward_pre_hook(hook))
    run(model, batch)
    for handle in handles:
        handle.remove()
    return {p: x.T @ x / len(x) for p, x in seen.items()}, {p: x.mean(0) for p, x in seen.items()}


def rebuilt(make: Callable[[], nn.Module], model: nn.Module, edits: list[dict[str, Any]]) -> nn.Module:
    """The edited model from a skeleton without weights, the edits as a file gives them, and its own weights."""
    with torch.device("meta"):
        skeleton = make().eval()
    replay(skeleton, json.loads(json.dumps(edits)))
    missing = {n for n, b in make().named_buffers() if n not in model.state_dict()}
    skeleton.load_state_dict(model.state_dict(), strict=True, assign=True)
    real = dict(model.named_buffers())
    for name in missing:
        if name in real:
            owner, _, key = name.rpartition(".")
            skeleton.get_submodule(owner)._buffers[key] = real[name]
    return skeleton


def rewritten(
    method: Any, model: nn.Module, levels: dict[str, Any], batch: dict[str, Tensor]
) -> tuple[nn.Module, Scene]:
    model = copy.deepcopy(model)
    modelmap = trace(model, batch)
    levels = {modelmap.sites[0].path if path == FIRST else path: level for path, level in levels.items()}
    scene = Scene(model, modelmap, tuple(range(len(modelmap.blocks))), levels)
    needs = method.needs()
    gram, mean = moments(model, modelmap, batch) if needs else ({}, {})
    method.rewrite(scene, **{k: v for k, v in {"gram": gram, "mean": mean}.items() if k in needs})
    return model, scene


# ---- SliceGPT


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rotation_alone_keeps_the_outputs(name: str, shared: bool) -> None:
    model = filled(TRANSFORMERS[name])
    batch = inputs(model)
    turned, scene = rewritten(SliceGPT(shared=shared), model, {FIRST: Width(1.0)}, batch)
    before, after = run(model, batch), run(turned, batch)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    changed = [
        n
        for n, p in turned.named_parameters()
        if p.dim() == 2 and not torch.equal(p, dict(model.named_parameters()).get(n, p))
    ]
    assert len(changed) >= 6, "the rotation must have reached the weights"
    assert any("shortcut" in n for n, _ in turned.named_parameters()) is not shared
    assert torch.equal(run(rebuilt(TRANSFORMERS[name], turned, scene.edits), batch), after)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sliced_shapes_and_rebuilding(name: str) -> None:
    model = filled(TRANSFORMERS[name])
    batch = inputs(model)
    sliced, scene = rewritten(SliceGPT(), model, {FIRST: Width(0.75)}, batch)
    modelmap = scene.modelmap
    for path in modelmap.residual.readers:
        assert weight_of(sliced.get_submodule(path)).shape[1] == 24
    for sub in modelmap.sublayers:
        assert len(weight_of(sliced.get_submodule(sub.output))) == 24
    after = run(sliced, batch)
    assert after.isfinite().all() and after.shape == run(model, batch).shape
    assert torch.equal(run(rebuilt(TRANSFORMERS[name], sliced, scene.edits), batch), after)
    assert torch.equal(run(copy.deepcopy(sliced), batch), after), "shortcuts must belong to the copy"


def test_slicing_a_signal_of_low_rank_is_exact() -> None:
    """Where the residual lives in half of the axes, half of the axes are enough."""
    model = filled(lambda: llama(2))
    rng = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(32, 16, generator=rng)).Q
    project = basis @ basis.T
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif "embed" in name:
                p.copy_(p @ project)
            elif "o_proj" in name or "down_proj" in name:
                p.copy_(project @ p)
    batch = inputs(model)
    before = run(model, batch)
    for shared in (False, True):
        sliced, _ = rewritten(SliceGPT(shared=shared), model, {FIRST: Width(0.5)}, batch)
        assert (run(sliced, batch) - before).abs().max() < 1e-3 * before.abs().max()


def test_principal_axes_beat_random_ones() -> None:
    """Slicing by principal axes changes the outputs less than deleting the same share of unrotated columns."""
    model = filled(lambda: llama(2))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a residual with strong and weak directions, turned so that no column is special
        q = torch.linalg.qr(torch.randn(32, 32, generator=rng)).Q
        shrink = q @ torch.diag(torch.logspace(0, -3, 32)) @ q.T
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif "embed" in name:
                p.copy_(p @ shrink)
            elif "o_proj" in name or "down_proj" in name:
                p.copy_(shrink @ p)
    batch, fresh = inputs(model), inputs(model, 7)
    before = run(model, fresh)
    sliced, _ = rewritten(SliceGPT(shared=True), model, {FIRST: Width(0.75)}, batch)
    error = (run(sliced, fresh) - before).square().mean()
    columns = copy.deepcopy(model)
    gone = torch.arange(24, 32)
    with torch.no_grad():
        columns.model.embed_tokens.weight[:, gone] = 0
        for layer in columns.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    assert error < 0.5 * (run(columns, fresh) - before).square().mean()


def test_shared_slicing_of_rms_model_is_a_plain_folder(tmp_path: Any) -> None:
    model = filled(lambda: llama(tie_word_embeddings=True))
    batch = inputs(model)
    sliced, scene = rewritten(SliceGPT(shared=True), model, {FIRST: Width(0.75)}, batch)
    changes = plain_config_changes(sliced, scene.edits)
    assert changes == {"hidden_size": 24, "head_dim": 8, "tie_word_embeddings": False}
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    plain = type(model)(config).eval()
    plain.load_state_dict(sliced.state_dict(), strict=True)
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, batch), run(sliced, batch))
    per_branch, other = rewritten(SliceGPT(), model, {FIRST: Width(0.75)}, batch)
    assert plain_config_changes(per_branch, other.edits) is None


def test_slicegpt_refuses_what_cannot_be_turned() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    with pytest.raises(UserError, match="norm"):
        rewritten(SliceGPT(), bert, {FIRST: Width(0.5)}, batch)
    with pytest.raises(UserError, match="head"):
        headless = llama().eval().model
        SliceGPT().rewrite(
            Scene(headless, trace(headless, batch), levels={"embed_tokens": Width(0.5)}), gram={}, mean={}
        )
    with pytest.raises(UserError, match="one width"):
        rewritten(SliceGPT(), llama().eval(), {FIRST: Width(0.5), "lm_head": Width(0.75)}, batch)
    with pytest.raises(UserError, match=r"no\.such"):
        rewritten(SliceGPT(), llama().eval(), {"no.such": Width(0.5)}, batch)


def test_parallel_branches_with_two_norms_are_noticed() -> None:
    """Where the order of calls does not tell, the first run does, and one shared rotation still works."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = filled(lambda: transformers.GPTNeoXForCausalLM(config))
    batch = inputs(model)
    turned, _ = rewritten(SliceGPT(), model, {FIRST: Width(1.0)}, batch)
    with pytest.raises(UserError, match="shared=True"):
        run(turned, batch)
    turned, _ = rewritten(SliceGPT(shared=True), model, {FIRST: Width(1.0)}, batch)
    assert (run(turned, batch) - run(model, batch)).abs().max() < 1e-4 * run(model, batch).abs().max()


def test_normalised_moment_undoes_scale_and_shift() -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(500, 6, generator=rng)
    scale, shift = torch.rand(6, generator=rng) + 0.5, torch.randn(6, generator=rng)
    y = z * scale + shift
    found = normalised_moment(y.T @ y / 500, y.mean(0), scale, shift)
    torch.testing.assert_close(found.float(), z.T @ z / 500, atol=1e-4, rtol=1e-3)


# ---- dropping


@torch.no_grad()
def step_by_step(model: nn.Module, ids: Tensor) -> Tensor:
    cache, logits = None, []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def paths_of(modelmap: ModelMap, kind: str) -> list[str]:
    return [sublayer_path(modelmap, s) for s in modelmap.sublayers if s.kind == kind]


@pytest.mark.parametrize("which", [[0], [1], [0, 2]])
@pytest.mark.parametrize("name", [*LANGUAGE, "mixed"])
def test_attention_drop_keeps_prefill_and_decode_equal(name: str, which: list[int]) -> None:
    make = {**LANGUAGE, "mixed": mixed}[name]
    model = filled(make)
    batch = inputs(model)
    dead = paths_of(trace(model, batch), "attention")
    dropped, scene = rewritten(LLMDrop(), model, {dead[i]: Depth(0) for i in which}, batch)
    whole = run(dropped, batch)
    assert not torch.allclose(whole, run(model, batch))
    torch.testing.assert_close(step_by_step(dropped, batch["input_ids"]), whole, atol=2e-5, rtol=2e-4)
    cache = dropped(**batch, use_cache=True).past_key_values
    used = [layer for layer in cache.layers if layer.is_initialized]
    assert len(used) == len(dead) - len(which)
    assert torch.equal(run(rebuilt(make, dropped, scene.edits), batch), whole)
    assert sum(p.numel() for p in dropped.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_dropped_sublayer_adds_nothing(name: str, kind: str) -> None:
    """Dropping equals zeroing what the sublayer writes."""
    model = filled(TRANSFORMERS[name])
    batch = inputs(model)
    sub = next(s for s in trace(model, batch).sublayers if s.kind == kind)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        writer = zeroed.get_submodule(sub.output)
        writer.weight.zero_()
        if writer.bias is not None:
            writer.bias.zero_()
    dropped, scene = rewritten(LLMDrop(), model, {sublayer_path(trace(model, batch), sub): Depth(0)}, batch)
    torch.testing.assert_close(run(dropped, batch), run(zeroed, batch), atol=1e-6, rtol=1e-6)
    assert torch.equal(run(rebuilt(TRANSFORMERS[name], dropped, scene.edits), batch), run(dropped, batch))
    assert sub.output not in [n.rpartition(".")[0] for n, _ in dropped.named_parameters()]


def test_the_map_reads_through_what_was_dropped() -> None:
    model = filled(llama)
    batch = inputs(model)
    dropped, _ = rewritten(LLMDrop(), model, {"model.layers.1.self_attn": Depth(0)}, batch)
    after = trace(dropped, batch)
    assert paths_of(after, "attention") == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert len(paths_of(after, "mlp")) == 3


@pytest.mark.parametrize("name", [*LANGUAGE, "mixed"])
def test_whole_blocks_leave_a_plain_model(name: str, tmp_path: Any) -> None:
    make = {**LANGUAGE, "mixed": mixed}[name]
    model = filled(make)
    batch = inputs(model)
    modelmap = trace(model, batch)
    smaller, scene = rewritten(UnifiedLayerSkipping(), model, {modelmap.blocks[1]: Depth(0)}, batch)
    count = len(modelmap.blocks) - 1
    assert smaller.config.num_hidden_layers == count and len(trace(smaller, batch).blocks) == count
    torch.testing.assert_close(step_by_step(smaller, batch["input_ids"]), run(smaller, batch), atol=2e-5, rtol=2e-4)
    changes = plain_config_changes(smaller, scene.edits)
    assert changes is not None and changes["num_hidden_layers"] == count
    if name == "mixed":
        assert changes["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    smaller.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, batch), run(smaller, batch))
    assert torch.equal(run(rebuilt(make, smaller, scene.edits), batch), run(smaller, batch))


def test_dropping_all_sublayers_of_a_block_removes_it() -> None:
    model = filled(llama)
    batch = inputs(model)
    levels = {"model.layers.0.self_attn": Depth(0), "model.layers.0.mlp": Depth(0), "model.layers.2.mlp": Depth(0)}
    dropped, scene = rewritten(LLMDrop(target="joint"), model, levels, batch)
    assert [e["op"] for e in scene.edits] == ["drop", "drop", "remove"]
    assert len(dropped.model.layers) == 2 and isinstance(dropped.model.layers[1].mlp, Dropped)
    torch.testing.assert_close(step_by_step(dropped, batch["input_ids"]), run(dropped, batch), atol=2e-5, rtol=2e-4)


def test_drop_after_slicing_keeps_the_shortcuts() -> None:
    model = filled(llama)
    batch = inputs(model)
    want, _ = rewritten(LLMDrop(), model, {"model.layers.1.self_attn": Depth(0)}, batch)
    turned, _ = rewritten(SliceGPT(), model, {FIRST: Width(1.0)}, batch)
    replay(turned, [{"op": "drop", "path": "model.layers.1.self_attn", "returns": 2}])
    assert (run(turned, batch) - run(want, batch)).abs().max() < 1e-4 * run(want, batch).abs().max()
    with pytest.raises(UserError, match="before slicing"):
        replay(turned, [{"op": "remove", "path": "model.layers.1"}])


def test_ranking() -> None:
    model = llama()
    modelmap = trace(model, inputs(model))
    cosine = {}
    for i in range(3):
        cosine |= {
            f"model.layers.{i}.self_attn": torch.tensor(0.9 + 0.03 * i),
            f"model.layers.{i}.mlp": torch.tensor(0.95 - 0.2 * i),
        }
        cosine[f"model.layers.{i}"] = torch.tensor([0.5, 0.8, 0.6][i])
    assert LLMDrop().pick(modelmap, 2, cosine) == ("model.layers.2.self_attn", "model.layers.1.self_attn")
    assert LLMDrop(target="mlp").pick(modelmap, 1, cosine) == ("model.layers.0.mlp",)
    assert LLMDrop(target="block").pick(modelmap, 1, cosine) == ("model.layers.1",)
    joint = LLMDrop(target="joint").pick(modelmap, 3, cosine)
    assert joint == ("model.layers.2.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn")
    with pytest.raises(UserError, match="has 3"):
        LLMDrop().pick(modelmap, 4, cosine)
    with pytest.raises(UserError, match="heads"):
        LLMDrop(target="heads").pick(modelmap, 1, cosine)


@given(st.integers(1, 200), st.floats(1.05, 10))
def test_balanced_spacing(blocks: int, speedup: float) -> None:
    kept = UnifiedLayerSkipping(speedup=speedup).kept(blocks)
    assert len(set(kept)) == len(kept) == max(1, int(blocks / speedup))
    assert kept[0] == 0 and (len(kept) == 1 or kept[-1] == blocks - 1)
    gaps = [b - a for a, b in pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_dropping_everything_is_refused() -> None:
    model = llama().eval()
    batch = inputs(model)
    with pytest.raises(UserError, match="keep at least one"):
        rewritten(LLMDrop(), model, {f"model.layers.{i}": Depth(0) for i in range(3)}, batch)
    with pytest.raises(UserError, match="is no sublayer"):
        rewritten(LLMDrop(), model, {"model.norm": Depth(0)}, batch)


def test_blocks_that_change_the_shape_stay() -> None:
    model = filled(ResNet)
    batch = inputs(model)
    smaller, scene = rewritten(UnifiedLayerSkipping(), model, {"blocks.0": Depth(0)}, batch)
    assert len(smaller.blocks) == 1 and run(smaller, batch).shape == (6, 10)
    assert torch.equal(run(rebuilt(ResNet, smaller, scene.edits), batch), run(smaller, batch))
    with pytest.raises(UserError, match="another shape"):
        rewritten(UnifiedLayerSkipping(), model, {"blocks.1": Depth(0)}, batch)


def test_returned_reads_the_source() -> None:
    model = llama()
    assert returned(model.model.layers[0].self_attn) == 2 and returned(model.model.layers[0].mlp) == 0
    assert returned(gpt2().transformer.h[0].attn) == 2 and returned(nn.MultiheadAttention(4, 2)) == 2
    assert returned(nn.Linear(2, 2)) == 0


# ---- channels


def zero_units(model: nn.Module, modelmap: ModelMap, path: str, units: list[int]) -> None:
    """Zero some channels in everything that makes or scales them."""
    group = next(
        g
        for g in modelmap.coupled
        if g.kind == "channels" and any(m.path == path and m.side == "out" for m in g.members)
    )
    with torch.no_grad():
        for m in group.members:
            module, index = model.get_submodule(m.path), group.indices(m, units)
            if m.side == "in":
                weight_of(module)[:, index] = 0
                continue
            weight_of(module)[index] = 0
            if getattr(module, "bias", None) is not None:
                module.bias[index] = 0
            if m.side == "norm":
                module.running_mean[index] = 0


@pytest.mark.parametrize("method", [ChannelNorm(), ChannelNorm(p=2), ChannelEnergy(), ChannelEnergy(refit=False)])
@pytest.mark.parametrize(
    "name,path",
    [
        ("resnet", "stem"),
        ("resnet", "blocks.0.conv1"),
        ("resnet", "blocks.1.conv2"),
        ("llama", "model.layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
        ("opt", "model.decoder.layers.2.fc1"),
        ("vit", "vit.layers.0.mlp.fc1"),
    ],
)
def test_removing_zeroed_channels_changes_nothing(name: str, path: str, method: Any) -> None:
    make = {**TRANSFORMERS, "resnet": ResNet}[name]
    model = filled(make)
    batch = inputs(model)
    modelmap = trace(model, batch)
    rows = len(weight_of(model.get_submodule(path)))
    units = torch.randperm(rows, generator=torch.Generator().manual_seed(2))[: rows // 4].tolist()
    zero_units(model, modelmap, path, units)
    cut, scene = rewritten(method, model, {path: Width(0.75)}, batch)
    assert len(weight_of(cut.get_submodule(path))) == rows - rows // 4
    torch.testing.assert_close(run(cut, batch), run(model, batch), atol=1e-5, rtol=1e-5)
    assert torch.equal(run(rebuilt(make, cut, scene.edits), batch), run(cut, batch))


def test_everything_that_shares_channels_is_cut_together() -> None:
    model = filled(ResNet)
    batch = inputs(model)
    levels = {s.path: Width(0.5) for s in trace(model, batch).sites if s.kind == "conv" and s.groups == 1}
    cut, _ = rewritten(ChannelNorm(), model, levels, batch)
    assert [
        len(cut.get_submodule(p).weight) for p in ("stem", "depthwise", "norm", "blocks.0.conv2", "blocks.1.shortcut")
    ] == [4, 4, 4, 4, 8]
    assert cut.depthwise.groups == 4 and cut.head.in_features == 32
    assert run(cut, batch).shape == (6, 10)
    assert len(trace(cut, batch).coupled) == 4


def test_energy_with_refit_beats_norm() -> None:
    model = filled(llama)
    batch, fresh = inputs(model, 1, 64), inputs(model, 5)
    before = run(model, fresh)
    levels = {s.path: Width(0.5) for s in trace(model, batch).sites if s.role in ("gate", "up")}
    errors = {}
    for name, method in {"norm": ChannelNorm(), "energy": ChannelEnergy(refit=False), "refit": ChannelEnergy()}.items():
        cut, scene = rewritten(method, model, levels, batch)
        errors[name] = (run(cut, fresh) - before).square().mean().item()
        assert plain_config_changes(cut, scene.edits) == {"intermediate_size": 24}
    assert errors["refit"] < errors["energy"] < errors["norm"]


def test_plain_only_where_all_blocks_agree() -> None:
    model = filled(llama)
    batch = inputs(model)
    cut, scene = rewritten(ChannelNorm(), model, {"model.layers.0.mlp.up_proj": Width(0.5)}, batch)
    assert plain_config_changes(cut, scene.edits) is None


def test_unclear_widths_are_refused() -> None:
    model = llama().eval()
    batch = inputs(model)
    with pytest.raises(UserError, match="share their channels"):
        levels = {"model.layers.0.mlp.up_proj": Width(0.5), "model.layers.0.mlp.gate_proj": Width(0.75)}
        rewritten(ChannelNorm(), model, levels, batch)
    with pytest.raises(UserError, match="no channels"):
        rewritten(ChannelNorm(), model, {"model.layers.0.self_attn.q_proj": Width(0.5)}, batch)


def test_refit_is_least_squares() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=rng) @ torch.randn(10, 10, generator=rng)
    w, keep = torch.randn(4, 10, generator=rng), torch.tensor([0, 2, 3, 5, 8])
    found = least_squares_refit(w, x.T @ x / 400, keep, damp=0.0)
    want = torch.linalg.lstsq(x[:, keep].double(), (x @ w.T).double()).solution.T.float()
    torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-3)


# ---- edits as files give them


BROKEN = [
    ("no dict", "is no edit"),
    ({"op": "explode", "path": "0"}, "unknown edit"),
    ({"op": "drop"}, "is no edit"),
    ({"op": "drop", "path": "9"}, "no module '9'"),
    ({"op": "drop", "path": ""}, "no module"),
    ({"op": "drop", "path": "0", "returns": True}, "returns"),
    ({"op": "drop", "path": "0", "returns": 99}, "at most 16"),
    ({"op": "drop", "path": "0", "colour": 1}, "not 'colour'"),
    ({"op": "resize", "path": "0"}, "lacks shape"),
    ({"op": "resize", "path": "0", "shape": [8, 5]}, "only shrink"),
    ({"op": "resize", "path": "0", "shape": [8]}, "only shrink"),
    ({"op": "resize", "path": "0", "shape": [0, 4]}, "shape"),
    ({"op": "resize", "path": "0", "shape": [1 << 40, 4]}, "shape"),
    ({"op": "resize", "path": "0", "shape": [2.0, 4]}, "shape"),
    ({"op": "resize", "path": "1", "shape": [4]}, "has no weight"),
    ({"op": "resize", "path": "0.weight.data", "shape": [4]}, "no module"),
    ({"op": "norm", "path": "0", "width": 4}, "layer norm"),
    ({"op": "factor", "path": "1", "rank": 2}, "rank 2"),
    ({"op": "factor", "path": "0", "rank": 0}, "rank 0"),
    ({"op": "shortcut", "path": "weight", "norm": "0", "branch": "2", "width": 4}, "shortcut"),
    ({"op": "shortcut", "path": "a.shortcut_0", "norm": "0", "branch": "2", "width": 4}, "no module"),
    ({"op": "remove", "path": "2.weight"}, "no module"),
    ({"op": "untie", "path": "1"}, "no weight"),
]


@pytest.mark.parametrize("edit,says", BROKEN)
def test_broken_edits_are_refused(edit: Any, says: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UserError, match=says):
        replay(model, [edit])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("shape", "bias", "groups", "returns", "width", "rank", "norm", "branch", "eps")
OPS = ("drop", "remove", "resize", "norm", "factor", "shortcut", "untie")
EDIT = st.fixed_dictionaries(
    {"op": st.sampled_from(OPS) | JSON, "path": st.sampled_from(["0", "1", "2", "0.weight", ""]) | JSON},
    optional={f: JSON for f in FIELDS},
)


@settings(max_examples=150, deadline=None)
@given(EDIT | JSON)
def test_any_json_is_applied_or_refused(edit: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    try:
        replay(model, [edit])
    except UserError:
        return
    assert all(d <= 8 for p in model.parameters() for d in p.shape)


def test_factored_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(32, 6))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    conv, linear, before = model[0], model[2], model(x)
    replay(model, [{"op": "factor", "path": "0", "rank": 8}, {"op": "factor", "path": "2", "rank": 6}])
    assert isinstance(model[0], Factored)
    with torch.no_grad():
        for made, old in ((model[0], conv), (model[2], linear)):
            rank = len(made.right.weight)
            u, s, v = torch.linalg.svd(old.weight.flatten(1), full_matrices=False)
            made.left.weight.copy_((u * s).reshape(made.left.weight.shape))
            made.right.weight.copy_(v[:rank].reshape(made.right.weight.shape))
            made.left.bias.copy_(old.bias)
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
