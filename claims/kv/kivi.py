"""KIVI: at 2 bits, keys by channel and values by token do less harm than the other choices of axes at equal bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.engine.cache import Caching
from trimtab.formats.cache import CacheFormat
from trimtab.kv.kivi import KIVI
from trimtab.tasks.build import task_for

CONTEXT, ITEMS = 1024, 4
FORM = CacheFormat.parse("kivi2")
AXES = ("channel", "token")
OTHERS = {
    "both_by_channel": ("channel", "channel"),
    "both_by_token": ("token", "token"),
    "swapped": ("token", "channel"),
}
OUTLIER = 8.0  # by which planted channels of keys are larger

CLAIM = Claim(
    method="kivi",
    statement="With 2-bit codes, grouping keys by channel and values by token gives a lower perplexity than the three "
    "other choices of axes, at equal bytes, and one near that of a cache in 16 bits; the bytes fall as computed.",
    source="Liu et al. 2024, arXiv:2402.02750, abstract and section 3",
    figure="Llama, Falcon and Mistral models keep almost the same quality at 2 bits, with 2.6 times less peak memory",
    setting="The shipped language model as it is, without planted outliers; 4 test windows of 1,024 tokens, its whole "
    "context, read 128 at a time, groups of 32, the newest 1 to 128 tokens in fp16. Numbers that end in _outliers are "
    "of the same function with a pair of channels in each head of keys made 8 times larger, and of queries smaller.",
    metric="perplexity a token, with 2 bits but for perplexity_4b; bytes of a packed window of one layer; rise: of the "
    "perplexity over that in 16 bits, as a share",
    checks=(
        *(
            Check(f"perplexity below {name.replace('_', ' ')}", "perplexity_kivi", "<", f"perplexity_{name}")
            for name in OTHERS
        ),
        Check("the perplexity rises by less than 5 %", "rise", "<", 0.05),
        Check("a packed window takes as many bytes as computed", "bytes", "<=", "bytes_computed"),
        Check("and less than a fifth of fp16's", "bytes", "<", "bytes_fifth"),
        *(
            Check(
                f"outliers planted: perplexity below {name.replace('_', ' ')}",
                "perplexity_kivi_outliers",
                "<",
                f"perplexity_{name}_outliers",
            )
            for name in ("both_by_token", "swapped")  # nothing changes where keys go by channel
        ),
    ),
    seeds=(0, 1, 2),
)


@torch.no_grad()
def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows."""
    bench = lab.bench("pocket-lm", seed)
    tokens = task_for(bench.source, length=CONTEXT).batch("test", ITEMS, seed).inputs["input_ids"]
    model = bench.source.materialise()
    found = {"perplexity": perplexity(model, tokens, None), "perplexity_4b": perplexity(model, tokens, KIVI(bits=4))}
    for suffix in ("", "_outliers"):
        if suffix:
            plant(model, bench.modelmap.attentions)
        for name, (keys, values) in {"kivi": AXES, **OTHERS}.items():
            if not (suffix and name == "both_by_channel"):
                method = KIVI(key_axis=keys, value_axis=values)
                found[f"perplexity_{name}{suffix}"] = perplexity(model, tokens, method)
    head = bench.modelmap.attentions[0]
    shape = (head.kv_heads, FORM.window, head.head_size)
    stored = KIVI().store(torch.randn(shape), torch.randn(shape))
    fewer, more = (FORM.bytes(head.kv_heads, head.head_size, FORM.window * n + 1) for n in (1, 2))
    plain = 4 * torch.Size(shape).numel()
    rise = found["perplexity_kivi"] / found["perplexity"] - 1
    return {**found, "rise": rise, "bytes": stored.nbytes, "bytes_computed": more - fewer, "bytes_fifth": plain / 5}


def perplexity(model: Any, tokens: Tensor, method: KIVI | None) -> float:
    """Of windows `[n, length]`, read as a text is read when it is written on; None: all keys and values in fp16."""
    cache = Caching(method or KIVI(), FORM.window if method else tokens.shape[1]).new()
    loss = 0.0
    for first, last in FORM.cuts(0, tokens.shape[1] - 1, FORM.window):
        logits = model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True).logits
        targets = tokens[:, first + 1 : last + 1]
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return float(torch.tensor(loss / (tokens.numel() - len(tokens))).exp())


def plant(model: Any, attentions: Any) -> None:
    """The same function with keys whose first pair of channels, which turn together, is larger in every head."""
    for at in attentions:
        factor = torch.ones(at.head_size)
        factor[[0, at.head_size // 2]] = OUTLIER
        for path, heads, scale in ((at.k, at.kv_heads, factor), (at.q, at.heads, 1 / factor)):
            weight = model.get_submodule(path).weight
            weight.data = weight.data.float() * scale.repeat(heads)[:, None]
