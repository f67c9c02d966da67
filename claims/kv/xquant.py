"""XQuant: keys and values made anew from rounded inputs do less harm than rounded keys and values."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Method
from trimtab.kv.xquant import XQuant
from trimtab.tasks.build import task_for
from trimtab.tasks.reading import caching, perplexity, read

CONTEXT, ITEMS, WINDOW = 512, 6, 64
BITS = (4, 3, 2)

CLAIM = Claim(
    method="xquant",
    statement="From inputs in 16 bits keys and values are the original's; with codes of 4, 3 and 2 bits the perplexity "
    "is lower than with keys and values rounded at no fewer bytes, and rises by less than 0.1 where bytes fall most.",
    source="Tomar et al. 2025, arXiv:2508.10395, abstract, sections 3 and 4",
    figure="7.7 times less memory with a perplexity higher by less than 0.1, on Llama and Mistral models",
    setting="The shipped language model, whose heads of queries share heads of keys two by two, so that the latent "
    "form is taken; 6 test windows of 512 tokens, as long as it was trained on, packed in windows of 64. Rounded keys "
    "and values are KIVI's in groups of 64. Plain: the inputs themselves, as many numbers as keys and values here.",
    metric="perplexity a token; rise of it over that in 16 bits; bytes of a packed window of one layer and text",
    checks=(
        Check("inputs in 16 bits give the original's perplexity", "difference_16b", "<", 0.001),
        *(
            Check(f"{b} bits: perplexity below that of rounded keys and values", f"latent_{b}b", "<", f"kivi_{b}b")
            for b in BITS
        ),
        *(Check(f"{b} bits: no more bytes", f"bytes_latent_{b}b", "<=", f"bytes_kivi_{b}b") for b in BITS),
        *(Check(f"{b} bits: the perplexity rises by less than 0.1", f"rise_{b}b", "<", 0.1) for b in BITS),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows."""
    bench = lab.bench("pocket-lm", seed)
    tokens = task_for(bench.source, length=CONTEXT).batch("test", ITEMS, seed).inputs["input_ids"]
    model = bench.source.materialise()

    def value(keeper: str | Method) -> tuple[float, float]:
        nats, held = read(caching(keeper, model, bench.modelmap, CONTEXT), tokens)
        stored = getattr(held.layers[0], "stored", [])
        return perplexity(nats), stored[0].nbytes / ITEMS if stored else 0.0

    full, _ = value("fp16")
    same, _ = value(XQuant(bits=16, residual=WINDOW))
    found = {"perplexity": full, "difference_16b": abs(same / full - 1)}
    for b in BITS:
        rows: dict[str, str | Method] = {
            "latent": XQuant(bits=b, group=64, residual=WINDOW),
            "plain": XQuant(bits=b, group=64, residual=WINDOW, latent=False),
            "kivi": f"kivi(bits={b}, group=64, residual={WINDOW})",
        }
        for name, keeper in rows.items():
            found[f"{name}_{b}b"], found[f"bytes_{name}_{b}b"] = value(keeper)
        found[f"rise_{b}b"] = found[f"latent_{b}b"] - full
    return found
