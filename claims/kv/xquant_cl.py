"""XQuant-CL: differences of inputs between layers do less harm when rounded than the inputs themselves."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Method
from trimtab.kv.xquant import XQuant
from trimtab.kv.xquant_cl import XQuantCL
from trimtab.tasks.build import task_for
from trimtab.tasks.reading import caching, perplexity, read

CONTEXT, ITEMS, WINDOW = 512, 6, 64
BITS = (3, 2)

CLAIM = Claim(
    method="xquant-cl",
    statement="With codes of 3 and 2 bits, differences of inputs between layers give a lower perplexity than inputs "
    "and their latents at no fewer bytes; with the first layer at 4 bits it rises by less than 0.1.",
    source="Tomar et al. 2025, arXiv:2508.10395, abstract, sections 3.2 and 4",
    figure="10 times less memory with a perplexity higher by 0.01, and 12.5 times by 0.1",
    setting="The shipped language model of 6 layers; 6 test windows of 512 tokens, as long as it was trained on, "
    "packed in windows of 64, groups of 64. The first layer alone is kept as it is; at the same bits as the others "
    "where bytes are compared, at 4 bits where rises are. The paper keeps three of 32 layers or more.",
    metric="perplexity a token; rise of it over that in 16 bits; bytes of all layers after a text of 512 tokens",
    checks=(
        *(
            Check(f"{b} bits: perplexity below that of {name}", f"differences_{b}b", "<", f"{name}_{b}b")
            for b in BITS
            for name in ("inputs", "latents")
        ),
        *(Check(f"{b} bits: no more bytes", f"bytes_differences_{b}b", "<=", f"bytes_latents_{b}b") for b in BITS),
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
        return perplexity(nats), held.nbytes / ITEMS

    found = {"perplexity": value("fp16")[0]}
    for b in BITS:
        shared: dict[str, Any] = {"bits": b, "group": 64, "residual": WINDOW}
        rows = {
            "inputs": XQuant(**shared, latent=False),
            "latents": XQuant(**shared),
            "differences": XQuantCL(**shared, base=1, base_bits=b),
        }
        for name, keeper in rows.items():
            found[f"{name}_{b}b"], found[f"bytes_{name}_{b}b"] = value(keeper)
        found[f"rise_{b}b"] = value(XQuantCL(**shared, base=1, base_bits=4))[0] - found["perplexity"]
    return found
