"""LLM-Drop: attention layers are the ones that a language model can do without."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.engine.apply import sublayer_cosines
from trimtab.engine.run import seconds_of
from trimtab.formats.structure import sublayer_path
from trimtab.prune.llm_drop import LLMDrop

DRAWS = 3  # random choices that the random arm averages

CLAIM = Claim(
    method="llm-drop",
    statement="At equal numbers of sublayers removed, attention layers chosen by similarity cost less than MLPs, whole "
    "blocks or random sublayers; their key-value cache and their time go with them.",
    source="He et al. 2024, arXiv:2406.15786, sections 3-4",
    figure="LLaMA-2-70B: half of the attention layers dropped, 48.4 % faster, 2.4 % lower score",
    setting="The shipped language model (6 blocks); two of its twelve sublayers removed: two attentions, two MLPs, one "
    "block, or two at random (mean of three draws). 24 calibration and 64 test windows of 256 tokens. Time: one "
    "forward of 8 windows, as a share of the original's in the same run.",
    metric="kl: mean KL divergence to the original, nats a token; perplexity a token; cache, time: share of original",
    checks=(
        Check("KL below dropping MLPs", "kl_attention", "<", "kl_mlp"),
        Check("KL below dropping a block", "kl_attention", "<", "kl_block"),
        Check("KL below dropping at random", "kl_attention", "<", "kl_random"),
        Check("the cache of the dropped attentions is gone", "cache_attention", "<=", 4 / 6),
        Check("the forward is faster", "time_attention", "<", 1.0),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    modelmap = bench.modelmap
    cosine = sublayer_cosines(bench.stream(), bench.calibration, bench.chunk)
    picks = {
        "attention": LLMDrop().pick(modelmap, 2, cosine),
        "mlp": LLMDrop(target="mlp").pick(modelmap, 2, cosine),
        "joint": LLMDrop(target="joint").pick(modelmap, 2, cosine),
        "block": LLMDrop(target="block").pick(modelmap, 1, cosine),
    }
    rng = torch.Generator().manual_seed(seed)
    every = [sublayer_path(modelmap, s) for s in modelmap.sublayers]
    for draw in range(DRAWS):
        picks[f"random{draw}"] = tuple(every[i] for i in torch.randperm(len(every), generator=rng)[:2].tolist())
    whole = bench.measure()
    found = {"perplexity": whole.value}
    models = {"original": whole.applied.stream.model}
    for name, paths in picks.items():
        done = bench.measure("llm-drop @ " + ", ".join(f"{p}=drop" for p in paths))
        found |= {f"perplexity_{name}": done.value, f"kl_{name}": done.damage}
        models[name] = done.applied.stream.model
    for number in ("perplexity", "kl"):
        found[f"{number}_random"] = sum(found.pop(f"{number}_random{d}") for d in range(DRAWS)) / DRAWS
    ids = bench.test.inputs["input_ids"][:8]
    with torch.no_grad():
        for name in ("attention", "mlp", "block"):
            pair = [
                seconds_of(lambda m=m: m(input_ids=ids, use_cache=False), 9) for m in (models[name], models["original"])
            ]
            found[f"time_{name}"] = pair[0] / pair[1]
        cache = {
            name: models[name](input_ids=ids, use_cache=True).past_key_values for name in ("original", "attention")
        }
    size = {name: sum(t.numel() for t in _filled(c)) for name, c in cache.items()}
    return found | {"cache_attention": size["attention"] / size["original"]}


def _filled(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
