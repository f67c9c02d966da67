"""The modelmap against models of known shape: roles and pairs by comparison, folding and coupling by execution."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.modelmap import ModelMap, trace

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
ENCODER = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
IDS = {"input_ids": torch.arange(14).view(2, 7) + 3}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out, and idle threads of a busy machine cost more than the sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def language_model(name: str, **changes: object) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    special = {
        "qwen3": {"head_dim": 16},
        "gemma2": {"head_dim": 8},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "mixtral": {"num_local_experts": 4},
    }
    base = {"bos_token_id": 1, "eos_token_id": 2} if name == "gpt2" else SIZES
    config = AutoConfig.for_model(name, **{**base, **special.get(name, {}), **changes})
    attention = changes.get("attn_implementation", "sdpa" if name != "gemma2" else "eager")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def vision_model() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)).eval()


def scatter_norms(model: nn.Module) -> None:
    """Norm scales away from one and shifts away from zero, so that folding is not trivially right."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=rng)
            assert parameter.isfinite().all(), name


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def roles_of(found: ModelMap, block: int | None) -> list[str]:
    return [site.role for site in found.sites if site.block == block]


GATED = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN = ["q", "k", "v", "o", "up", "down"]
EXPECTED = {
    "llama": (["embed", "lm_head"], GATED, "rms"),
    "qwen2": (["embed", "lm_head"], GATED, "rms"),
    "qwen3": (["embed", "lm_head"], GATED, "rms"),
    "mistral": (["embed", "lm_head"], GATED, "rms"),
    "gemma2": (["embed", "lm_head"], GATED, "rms"),
    "phi3": (["embed", "lm_head"], ["qkv", "o", "gate_up", "down"], "rms"),
    "gpt2": (["embed", "position", "lm_head"], ["qkv", "o", "up", "down"], "layer"),
    "opt": (["embed", "position", "lm_head"], PLAIN, "layer"),
    "gpt_neox": (["embed", "lm_head"], ["qkv", "o", "up", "down"], "layer"),
    "cohere": (["embed", "lm_head"], GATED, "layer"),  # attention and mlp side by side, norms spelt out
    "mixtral": (["embed", "lm_head"], ["q", "k", "v", "o", "router", "expert", "expert"], "rms"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_language_models_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = language_model(name)
        found = trace(model, IDS)
    outside, inside, norm = EXPECTED[name]
    assert roles_of(found, None) == outside
    assert roles_of(found, 0) == roles_of(found, 1) == inside
    assert len(found.blocks) == 2
    assert found.residual is not None and found.residual.width == 32 and found.residual.norm == norm
    assert found.residual.closed and found.residual.prenorm == (name != "gemma2")
    assert [(s.block, s.kind) for s in found.sublayers] == [(b, k) for b in (0, 1) for k in ("attention", "mlp")]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    for sublayer in found.sublayers:
        assert sublayer.norm in found.roles and found.roles[sublayer.norm] == "norm"
        assert found.roles[sublayer.output] in ("o", "down", "expert")
        assert sublayer.path in modules
    for site in found.sites:
        names = dict(model.named_parameters(remove_duplicate=False))
        stored = tuple(names.get(f"{site.path}.weight", names.get(site.path)).shape)
        assert site.shape == ((*stored[:-2], stored[-1], stored[-2]) if site.transposed else stored)
        assert site.transposed == (name == "gpt2" and site.block is not None)
    json.dumps(found.to_dict())


def test_llama_in_full() -> None:
    with torch.device("meta"):
        found = trace(language_model("llama"), IDS)
    first = "model.layers.0"
    attention = tuple(f"{first}.self_attn.{p}_proj" for p in "qkv")
    gates = (f"{first}.mlp.gate_proj", f"{first}.mlp.up_proj")
    assert found.blocks == ("model.layers.0", "model.layers.1")
    assert found.siblings[:2] == (attention, gates)
    assert found.readers[f"{first}.input_layernorm"] == attention
    assert found.readers["model.norm"] == ("lm_head",)
    sublayer = found.sublayers[0]
    assert (sublayer.path, sublayer.norm) == (f"{first}.self_attn", f"{first}.input_layernorm")
    assert (sublayer.inputs, sublayer.output) == (attention, f"{first}.self_attn.o_proj")
    assert found.residual.writers[:3] == ("model.embed_tokens", f"{first}.self_attn.o_proj", f"{first}.mlp.down_proj")
    assert found.residual.readers[-1] == "lm_head" and len(found.residual.norms) == 5
    mlp = Coupled(48, (*(Member(p, "out") for p in gates), Member(f"{first}.mlp.down_proj", "in")))
    assert mlp in found.coupled
    heads = found.where("q")[0], next(group for group in found.coupled if group.kind == "heads")
    assert heads[1].width == 2 and heads[1].members[0] == Member(heads[0].path, "out", 0, 16, 16)
    assert found.attentions[0].heads == 4 and found.attentions[0].kv_heads == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
def test_real_and_meta_agree(name: str) -> None:
    with torch.device("meta"):
        on_meta = trace(language_model(name), IDS)
    assert trace(language_model(name), IDS) == on_meta


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
def test_eager_attention_reads_the_same(name: str) -> None:
    with torch.device("meta"):
        assert trace(language_model(name, attn_implementation="eager"), IDS) == trace(language_model(name), IDS)


def test_norms_that_others_read_do_not_fold() -> None:
    with torch.device("meta"):
        found = trace(language_model("qwen3"), IDS)
    inner = [norm.path for norm in found.norms if norm.width == 16]
    assert len(inner) == 4 and not set(inner) & set(found.readers)


def test_tied_parameters() -> None:
    with torch.device("meta"):
        assert trace(language_model("gpt2"), IDS).tied == (("transformer.wte.weight", "lm_head.weight"),)
        assert trace(language_model("llama"), IDS).tied == ()


@pytest.mark.parametrize("masked", [False, True])
def test_bert(masked: bool) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    with torch.device("meta"):
        found = trace((BertForMaskedLM if masked else BertModel)(BertConfig(**ENCODER)), IDS)
    assert roles_of(found, None) == ["embed", "embed", "position", "other", *["lm_head"] * masked]
    assert roles_of(found, 0) == roles_of(found, 1) == PLAIN
    assert not found.residual.prenorm and found.residual.norm == "layer"
    assert all(sublayer.norm is None and sublayer.post_norm for sublayer in found.sublayers)
    assert len(found.readers) == 2 * masked  # inside the stack every norm is read by the residual as well


def test_vit() -> None:
    with torch.device("meta"):
        found = trace(vision_model(), IMAGE)
    assert roles_of(found, None) == ["embed", "classifier"] and roles_of(found, 1) == PLAIN
    projection, head = found.sites[0], found.sites[-1]
    assert (projection.kind, projection.reuse, head.kind) == ("conv", 16, "head")
    loose = {
        path: role for path, role in found.roles.items() if path.startswith("vit.embeddings") and "patch" not in path
    }
    assert sorted(loose.values()) == ["embed", "position"] and set(loose) < set(found.residual.writers)
    assert found.residual.closed and found.residual.prenorm


def fold(model: nn.Module, found: ModelMap) -> int:
    """Move each foldable norm's scale and shift into its readers; returns how many were folded."""
    norms = {norm.path: norm for norm in found.norms}
    sites = {site.path: site for site in found.sites}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, readers in found.readers.items():
            norm = norms[path]
            weight = parameters[norm.weight]
            scale = weight + norm.offset
            for reader in readers:
                target = parameters.get(f"{reader}.weight", parameters.get(reader))
                view = target.mT if sites[reader].transposed else target
                if norm.bias is not None:
                    shift = view @ parameters[norm.bias]
                    module = model.get_submodule(reader)
                    if module.bias is None:
                        module.bias = nn.Parameter(torch.zeros(view.shape[0]))
                    module.bias += shift
                view *= scale
            weight.fill_(1 - norm.offset)
            if norm.bias is not None:
                parameters[norm.bias].zero_()
    return len(found.readers)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "opt", "gpt2", "gpt_neox", "mixtral", "vit"]
)
def test_folding_keeps_the_function(name: str) -> None:
    model = vision_model() if name == "vit" else language_model(name, tie_word_embeddings=False)
    inputs = IMAGE if name == "vit" else IDS
    scatter_norms(model)
    before = logits(model, inputs)
    assert fold(model, trace(model, inputs)) == 5
    after = logits(model, inputs)
    assert torch.allclose(before, after, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        next(m for n, m in model.named_modules() if n == trace(model, inputs).norms[0].path).weight.add_(0.5)
    assert not torch.allclose(after, logits(model, inputs), atol=1e-4)


class Residual(nn.Module):
    """A residual block of convolutions; its shortcut is the identity, a strided convolution, or zero-padded."""

    def __init__(self, inner: int, outer: int, stride: int, pad: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.side = nn.Identity()
        self.padding = (outer - inner) // 2 if pad else 0
        if inner != outer and not pad:
            self.side = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        x = self.side(x)
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        y += x
        return F.relu(y)


def resnet(pad: bool) -> nn.Sequential:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(Residual(a, b, stride, pad), Residual(b, b, 1, pad))
        for a, b, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2))
    ]
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def vgg() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10),
    ).eval()  # fmt: skip


class Dense(nn.Module):
    """Channels joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.norm(torch.cat([x, self.b(x)], 1))).mean((2, 3))


PICTURE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()


def dimension(model: nn.Module, found: ModelMap, member: Member) -> list[tuple[Tensor, int]]:
    """The tensors, each with its dimension, that a member stands for."""
    names = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if member.side == "param":
        return [(names[member.path], member.dim)]
    if member.side == "norm":
        tails = ("weight", "bias", "running_mean", "running_var")
        return [(names[f"{member.path}.{t}"], 0) for t in tails if f"{member.path}.{t}" in names]
    site = found.site(member.path)
    weight = names.get(f"{site.path}.weight", names.get(site.path))
    if site.kind == "conv":
        out, inner = 0, 1
    elif site.kind == "embedding":
        out, inner = 1, 0
    else:
        out, inner = (weight.dim() - 1, weight.dim() - 2) if site.transposed else (weight.dim() - 2, weight.dim() - 1)
    if member.side == "in":
        return [(weight, inner)]
    bias = names.get(f"{site.path}.bias", names.get(site.path.replace("in_proj_weight", "in_proj_bias")))
    return [(weight, out)] + ([(bias, 0)] if bias is not None and bias is not weight else [])


def check_coupled(model: nn.Module, found: ModelMap, group: Coupled, run: object) -> None:
    """With the readers of one unit silenced, nothing else of that unit matters; left loud, it does."""
    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(2)

    def disturb(*sides: str, silence: bool) -> None:
        with torch.no_grad():
            for member in group.members:
                if member.side in sides:
                    places = torch.tensor(group.indices(member, [group.width - 1]))
                    for tensor, dim in dimension(model, found, member):
                        shape = list(tensor.shape)
                        shape[dim] = len(places)
                        noise = torch.zeros(shape) if silence else 3 * torch.rand(shape, generator=rng) + 0.5
                        tensor.index_copy_(dim, places, noise)

    disturb("in", silence=True)
    quiet = run(model)
    disturb("out", "norm", "depthwise", "param", silence=False)
    assert torch.allclose(quiet, run(model), atol=1e-5), group
    disturb("in", silence=False)
    assert not torch.allclose(quiet, run(model), atol=1e-4), group


@pytest.mark.parametrize("build, count", [(lambda: resnet(False), 9), (lambda: resnet(True), 11), (vgg, 3), (Dense, 2)])
def test_coupled_channels(build: object, count: int) -> None:
    model = build()
    found = trace(model, PICTURE)
    assert len(found.coupled) == count
    for group in found.coupled:
        check_coupled(model, found, group, lambda m: m(PICTURE).detach())
    sites = {site.path: site for site in found.sites}
    cuttable = {(m.path, m.side) for g in found.coupled for m in g.members}
    wanted = {(p, "out") for p, s in sites.items() if s.role != "classifier" and s.groups == 1} - {("c", "out")}
    assert wanted <= cuttable  # no convolution is left out but the one that gives the output


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "phi3", "gemma2", "mixtral", "vit"])
def test_coupled_heads_and_widths(name: str) -> None:
    model = vision_model() if name == "vit" else language_model(name)
    inputs = IMAGE if name == "vit" else IDS
    scatter_norms(model)
    found = trace(model, inputs)
    heads = [group for group in found.coupled if group.kind == "heads"]
    inner = [
        group
        for group in found.coupled
        if group.kind == "channels"
        and group.width == found.site(group.members[-1].path).shape[-1]
        and len(group.members) < 4
    ]
    assert len(heads) == 2 and len(inner) == 2
    for group in [*heads, *inner]:
        check_coupled(model, found, group, lambda m: logits(m, inputs))


def test_cutting_a_residual_network() -> None:
    """Cut one unit of every group for good: the smaller network runs, and equals the silenced large one."""
    model = resnet(False)
    found = trace(model, PICTURE)
    silent, small = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for group in found.coupled:
            for member in group.members:
                if member.side == "in":
                    for tensor, dim in dimension(silent, found, member):
                        tensor.index_fill_(dim, torch.tensor(group.indices(member, [1])), 0)
                for tensor, dim in dimension(small, found, member):
                    gone = set(group.indices(member, [1]))
                    keep = torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone])
                    tensor.data = tensor.index_select(dim, keep)
    assert torch.allclose(silent(PICTURE), small(PICTURE), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_residual_network_in_full() -> None:
    found = trace(resnet(False), PICTURE)
    assert found.blocks == ("3.0", "3.1", "4.0", "4.1", "5.0", "5.1")
    assert found.residual is None and found.readers == {}
    assert {site.role for site in found.sites} == {"conv", "classifier"}
    assert [(s.path, s.kind, s.output) for s in found.sublayers][2] == ("4.0.norm2", "block", "4.0.second")
    assert found.batch_norms["4.0.side.0"] == "4.0.side.1" and len(found.batch_norms) == 15
    assert found.site("4.0.first").reuse == 64
    stream = found.coupled[0]
    assert [m.path for m in stream.members if m.side == "in"] == ["3.0.first", "3.1.first", "4.0.first", "4.0.side.0"]


def test_zero_padded_shortcuts_shift_channels() -> None:
    found = trace(resnet(True), PICTURE)
    stream = found.coupled[0]
    assert stream.width == 8 and not stream.padded
    offsets = {member.path: member.offset for member in stream.members if member.side == "out"}
    assert (offsets["0"], offsets["4.0.second"], offsets["5.1.second"]) == (0, 4, 12)
    assert sum(group.padded for group in found.coupled) == 4


def test_flatten_and_depthwise() -> None:
    found = trace(vgg(), PICTURE)
    assert Coupled(12, (Member("7", "out"), Member("11", "in", 0, 16, 16))) in found.coupled
    assert Member("4", "depthwise") in found.coupled[0].members and found.site("4").groups == 8
    assert found.blocks == () and found.roles["14"] == "classifier"


def test_concatenation_offsets() -> None:
    second = trace(Dense(), PICTURE).coupled[1]
    assert {(m.path, m.side, m.offset) for m in second.members} == {
        ("b", "out", 0),
        ("norm", "norm", 4),
        ("c", "in", 4),
    }


@pytest.mark.parametrize("first", [True, False])
def test_torch_encoder(first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=first, batch_first=True, dropout=0.0)
    model = nn.Sequential(
        nn.Embedding(61, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 3)
    )
    found = trace(model, IDS["input_ids"])
    assert roles_of(found, 0) == ["qkv", "o", "up", "down"] and roles_of(found, None) == ["embed", "classifier"]
    assert found.site("1.layers.0.self_attn.in_proj_weight").shape == (96, 32)
    assert found.residual.prenorm == first and len(found.readers) == (4 if first else 1)
    heads = [group for group in found.coupled if group.kind == "heads"]
    assert len(heads) == 2
    for group in heads:
        check_coupled(model.eval(), found, group, lambda m: m(IDS["input_ids"]).detach())


def test_encoder_decoder() -> None:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    found = trace(model, (torch.ones(2, 5, 32), torch.ones(2, 4, 32)))
    assert [s.kind for s in found.sublayers].count("attention") == 6 and len(found.sublayers) == 10
    assert not found.residual.closed  # its streams start at the caller's tensors


def test_plain_mlp_and_mixer() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.silu(self.up(self.norm(x))))

    found = trace(nn.Sequential(nn.Linear(5, 8), Mixer(), Mixer(), Mixer(), nn.Linear(8, 2)), torch.ones(3, 5))
    assert found.blocks == ("1", "2", "3") and roles_of(found, 1) == ["up", "down"]
    assert found.residual.writers == ("0", "1.down", "2.down", "3.down") and found.residual.closed
    assert found.readers == {f"{i}.norm": (f"{i}.up",) for i in (1, 2, 3)}


def test_experts_as_modules() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.silu(self.a(x)) * self.b(x))

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 3)
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            share, chosen = self.router(h).softmax(-1).topk(1, dim=-1)
            out = torch.zeros_like(h)
            for index, expert in enumerate(self.experts):
                rows = (chosen[:, 0] == index).nonzero()[:, 0]
                if len(rows):
                    out.index_add_(0, rows, expert(h[rows]) * share[rows])
            return x + out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Mixture(), Mixture(), nn.Linear(8, 2))
    with torch.no_grad():
        for mixture in model[1:3]:
            mixture.router.bias.copy_(torch.tensor([0.0, 0.0, -99.0]))
    found = trace(model, torch.randn(16, 5))
    assert found.blocks == ("1", "2")
    assert roles_of(found, 0) == ["router", *["expert"] * 6]
    assert {name.split(".")[2] for name in found.idle} == {"2"} and len(found.idle) == 12
    assert found.readers == {}  # the experts that did not run read the norm as well
    with torch.no_grad():
        for mixture in model[1:3]:
            mixture.router.bias.zero_()
    found = trace(model, torch.randn(64, 5))
    assert found.idle == () and len(found.readers["1.norm"]) == 7 and found.readers["1.norm"][0] == "1.router"


def test_a_linear_that_also_reads_elsewhere_takes_no_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(self.norm(x)))

    assert trace(Shared(), torch.ones(2, 8)).readers == {}


@pytest.mark.parametrize("spelling", ["rsqrt", "sqrt", "reciprocal", "power", "var"])
@pytest.mark.parametrize("centred", [False, True])
def test_norms_spelt_out(spelling: str, centred: bool) -> None:
    class Spelt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.next = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x - x.mean(-1, keepdim=True) if centred or spelling == "var" else x
            s = (x.var(-1, keepdim=True) if spelling == "var" else (y * y).mean(-1, keepdim=True)) + 1e-6
            y = {
                "rsqrt": lambda: y * s.rsqrt(),
                "power": lambda: y * s**-0.5,
                "reciprocal": lambda: y * s.sqrt().reciprocal(),
            }.get(spelling, lambda: y / s.sqrt())()
            return self.next(y * self.scale + self.shift)

    found = trace(Spelt(), torch.linspace(0, 1, 24).view(3, 8))
    kind = "layer" if centred or spelling == "var" else "rms"
    assert [(n.kind, n.weight, n.bias, n.width) for n in found.norms] == [(kind, "scale", "shift", 8)]
    assert found.readers == {"scale": ("next",)}


def test_what_only_looks_like_a_norm_is_none() -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (x * x).mean(-1, keepdim=True).sqrt() / x.pow(2).mean(0).sqrt())

    assert trace(Loud(4, 2), torch.ones(3, 4)).norms == ()


def test_the_model_is_left_as_it_was() -> None:
    model = resnet(False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, PICTURE)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(PICTURE).sum().backward()
    assert model[0].weight.grad is not None


def test_refusals_name_the_cause() -> None:
    with pytest.raises(UserError, match=r"Linear could not be traced.*RuntimeError"):
        trace(nn.Linear(4, 4), torch.ones(1, 5))

    class Peeks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    assert trace(Peeks(4, 2), torch.ones(1, 4)).roles == {"weight": "classifier"}
    with pytest.raises(UserError, match="load the real weights"):
        trace(Peeks(4, 2, device="meta"), torch.ones(1, 4))
    with pytest.raises(UserError, match="no site 'missing'"):
        trace(nn.Linear(4, 4), torch.ones(1, 4)).site("missing")


def test_a_large_model_on_meta_is_quick() -> None:
    with torch.device("meta"):
        model = language_model("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
        start = time.process_time()
        found = trace(model, IDS)
        spent = time.process_time() - start
    assert len(found.blocks) == 32 and len(found.sites) == 226
    assert spent < 8  # about one second on an idle core
