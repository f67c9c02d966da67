"""AWQ: scaling salient channels lowers what rounding to nearest loses, and leans less on the calibration text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Dense, Int
from trimtab.engine.measure import measure as score
from trimtab.formats.packed import pack_dense
from trimtab.quant.rtn import RTN
from trimtab.tasks.base import Batch

OUTLIERS = 20.0
LAYERS = "model.layers.*"

CLAIM = Claim(
    method="awq",
    statement="Scaling the channels that activations make salient lowers the perplexity of rounding to nearest at "
    "equal bits; it is the activations and not the weights that tell which channels to protect; and calibration text "
    "of another kind hurts less than it hurts GPTQ.",
    source="Lin et al. 2023, arXiv:2306.00978, tables 1, 4 and figure 8",
    figure="Llama-2-7B, perplexity on WikiText-2: 5.47 (fp16), 5.73 (RTN), 5.60 (AWQ) at 4 bits; 6.66 (RTN), 6.24 "
    "(AWQ) at 3",
    setting="The shipped language model, linears of all blocks, groups of 128; 24 calibration and 64 test windows of "
    "256 tokens. Outlier channels were planted (4 channels of each norm's output times 20, the function the same), but "
    "for the checks that say so. Protected channels: 1 % of each linear's inputs kept in full precision, by mean |x| "
    "or by norm of the weight's column. Other text: calibration windows with the fewest letters, test windows with the "
    "most, and reversed.",
    metric="perplexity a token; kl: mean KL divergence to the original, nats a token; rise: ratio of the KL with "
    "calibration text of another kind to that with text of the same kind",
    checks=(
        Check("4 bits: perplexity below RTN's", "perplexity_awq_4b", "<", "perplexity_rtn_4b"),
        Check("3 bits: perplexity below RTN's", "perplexity_awq_3b", "<", "perplexity_rtn_3b"),
        Check("4 bits without planted outliers: KL below RTN's", "kl_awq_4b_plain", "<", "kl_rtn_4b_plain"),
        Check("3 bits without planted outliers: KL below RTN's", "kl_awq_3b_plain", "<", "kl_rtn_3b_plain"),
        Check("1 % of channels by activations: KL below 1 % by weights", "kl_by_activations", "<", "kl_by_weights"),
        Check("other calibration text hurts less than it hurts GPTQ", "rise_awq", "<", "rise_gptq"),
    ),
)


def plan(method: str, bits: int) -> str:
    """The plan's text: AWQ is followed by rounding to nearest."""
    at = f"{LAYERS}={bits}b/g128"
    return f"awq @ {at} | rtn @ {at}" if method == "awq" else f"{method} @ {at}"


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    found = {}
    for name, outliers in (("", OUTLIERS), ("_plain", 0.0)):
        bench = lab.bench("pocket-lm", seed, outliers)
        found[f"perplexity{name}"] = bench.measure().value
        for bits in (4, 3):
            for method in ("rtn", "awq"):
                result = bench.measure(plan(method, bits))
                found[f"perplexity_{method}_{bits}b{name}"] = result.value
                found[f"kl_{method}_{bits}b{name}"] = result.damage
    return {**found, **protected(lab, seed), **shifted(lab, seed)}


def protected(lab: Any, seed: int) -> dict[str, float]:
    """Damage of 3-bit rounding with 1 % of the input channels left alone, picked by activations or by weights."""
    bench = lab.bench("pocket-lm", seed, OUTLIERS)
    statistics = bench.statistics(("absmean",))
    found = {}
    for name in ("activations", "weights"):
        stream = bench.stream()
        for path, stats in statistics.items():
            site = stream.sites[path]
            if site.kind != "linear" or site.block is None:
                continue
            weight = stream.weight(site)
            by = stats["absmean"] if name == "activations" else weight.norm(dim=0)
            kept = by.topk(max(1, round(0.01 * len(by)))).indices
            rounded = RTN().solve(weight, Int(3, 128)).dense()
            rounded[:, kept] = weight[:, kept]
            stream.put(site, pack_dense(rounded, Dense("fp32")))
        found[f"kl_by_{name}"] = score(stream, bench.test, bench.task, bench.chunk, bench._reference).damage()
    return found


def shifted(lab: Any, seed: int) -> dict[str, float]:
    """How much more is lost at 3 bits with calibration text of another kind, for AWQ and GPTQ."""
    rise = {"awq": 1.0, "gptq": 1.0}
    bench = lab.bench("pocket-lm", seed, OUTLIERS, calibration=128, items=128)
    tokenizer = bench.source.tokenizer()
    halves = {name: sides(getattr(bench, name), tokenizer) for name in ("calibration", "test")}
    losses: dict[tuple[str, int, int], float] = {}
    for tested in (0, 1):
        for calibrated in (0, 1):
            here = lab.bench("pocket-lm", seed, OUTLIERS)
            here.test, here.calibration = halves["test"][tested], halves["calibration"][calibrated]
            for method in rise:
                losses[method, tested, calibrated] = here.measure(plan(method, 3)).damage
    for method in rise:
        other, same = ((losses[method, 0, c] * losses[method, 1, 1 - c]) ** 0.5 for c in (1, 0))
        rise[method] = other / same
    return {f"rise_{method}": value for method, value in rise.items()}


def sides(batch: Batch, tokenizer: Any) -> tuple[Batch, Batch]:
    """The quarter of the windows with the fewest letters (code and data), and the quarter with the most (prose)."""
    texts = tokenizer.batch_decode(batch.inputs["input_ids"])
    letters = torch.tensor([sum(c.isalpha() or c == " " for c in text) / max(1, len(text)) for text in texts])
    order, quarter = letters.argsort(), len(texts) // 4
    return part(batch, order[:quarter]), part(batch, order[-quarter:])


def part(batch: Batch, pick: Tensor) -> Batch:
    """The items at these places."""
    return Batch({k: v[pick] for k, v in batch.inputs.items()}, batch.labels[pick], batch.amounts[pick])
