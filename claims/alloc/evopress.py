"""EvoPress: levels found by evolution beat uniform levels and levels that local error chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.alloc.evopress import EvoPress
from trimtab.alloc.milp import MILP
from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int, Sparse
from trimtab.core.table import Row
from trimtab.prune.magnitude import Magnitude
from trimtab.quant.rtn import RTN

BITS = (2, 3, 4)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
LENGTH = 256
SEARCH = EvoPress(generations=25, offspring=12, survivors=(3, 1), samples=(256, 2048))

CLAIM = Claim(
    method="evopress",
    statement="At equal budget, levels from evolutionary search give lower perplexity than uniform levels and than "
    "levels chosen by local errors, for bits, sparsity and dropping; and plans of larger summed error can be better.",
    source="Sieberling et al. 2024, arXiv:2410.14649, abstract and section 1 (error monotonicity)",
    figure="no single figure: lowest perplexity in the paper's tables",
    setting="The shipped language model (6 blocks, 42 linears): round-to-nearest in groups of 64 at 2, 3 or 4 bits "
    "within the bytes of 3; magnitude sparsity of 30 to 70 % within the weights of 50 %; 3 of 12 sublayers dropped. "
    "Local error: relative squared error of each output (1 - cosine for dropping), exact minimum of its sum. 25 "
    "generations of 12 children on 256, then 2,048 tokens of search data; judged on 4,096 test tokens.",
    metric="perplexity a token; violations: plans of larger summed local error and lower perplexity, out of 3",
    checks=(
        Check("bits: below uniform", "bits_evo", "<", "bits_uniform"),
        Check("bits: below local error", "bits_evo", "<", "bits_local"),
        Check("sparsity: below uniform", "sparsity_evo", "<", "sparsity_uniform"),
        Check("sparsity: below local error", "sparsity_evo", "<", "sparsity_local"),
        Check("dropping: below local error", "drop_evo", "<", "drop_local"),
        Check("a violation of error monotonicity", "violations", ">=", 1.0),
    ),
    seeds=(0, 1, 2),
)

Choices = dict[str, dict[str, tuple[int, dict[str, Tensor]]]]


@torch.no_grad()
def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration, search and test windows."""
    bench = lab.bench("pocket-lm", seed)
    model, task = bench.source.materialise(), bench.task
    search, test = task.batch("search", 8, seed), task.batch("test", 16, seed)
    layers = {p: part for p, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in p}
    dense = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    grams, changes = statistics(model, layers, task.batch("calibration", 8, seed).inputs)
    parts = {samples: search.take(0, samples // LENGTH) for samples in SEARCH.samples}
    references = {n: task.reference(model(**part.inputs, use_cache=False), part.labels) for n, part in parts.items()}

    def scores(weights: dict[str, Tensor], batch: Any, against: Any) -> Any:
        for path, layer in layers.items():
            if layer.weight.data_ptr() != weights.get(path, dense[path]).data_ptr():
                layer.weight.data = weights.get(path, dense[path])
        return task.score(model(**batch.inputs, use_cache=False), batch.labels, against)

    def error(path: str, weight: Tensor) -> float:
        gram, old = grams[path], dense[path]
        return float(((weight - old) @ gram * (weight - old)).sum() / (old @ gram * old).sum())

    def linears(solve: Any, levels: dict[str, Any]) -> Choices:
        found: Choices = {}
        for path, weight in dense.items():
            packed = {name: solve(weight, level) for name, level in levels.items()}
            found[path] = {name: (p.nbytes, {path: p.dense()}) for name, p in packed.items()}
        return found

    def compare(choices: Choices, errors: dict[tuple[str, str], float], budget: float) -> tuple[dict[str, float], bool]:
        rows = [Row(u, c, size, 0.0, errors[u, c]) for u, by in choices.items() for c, (size, _) in by.items()]

        def weights(plan: dict[str, Row]) -> dict[str, Tensor]:
            return {p: w for u, row in plan.items() for p, w in choices[u][row.choice][1].items()}

        def damage(plan: dict[str, Row], samples: int) -> float:
            return scores(weights(plan), parts[samples], references[samples]).damage()

        rng = torch.Generator().manual_seed(seed)
        plans = {
            "evo": SEARCH.allocate(rows, {"bytes": budget}, measure=damage, rng=rng),
            "local": MILP().allocate(rows, {"bytes": budget}),
        }
        for name in ("3b", "50%"):
            if all(name in by for by in choices.values()):
                plans["uniform"] = {row.unit: row for row in rows if row.choice == name}
        found = {}
        for kind, plan in plans.items():
            after = scores(weights(plan), test, None)
            found[kind] = float((after.nll.sum() / after.count.sum()).exp())
        summed = {kind: sum(row.damage for row in plan.values()) for kind, plan in plans.items()}
        return found, summed["evo"] > summed["local"] and found["evo"] < found["local"]

    bits = linears(RTN().solve, {f"{n}b": Int(n, 64) for n in BITS})
    sparse = linears(Magnitude().solve, {f"{s:.0%}": Sparse(s) for s in SPARSITIES})
    kept = {  # the budget is in weights that stay
        unit: {choice: (sum(int(w.count_nonzero()) for w in ws.values()), ws) for choice, (_, ws) in by.items()}
        for unit, by in sparse.items()
    }
    drop: Choices = {
        path: {"keep": (1, {}), "drop": (0, {exit_of(path): torch.zeros_like(dense[exit_of(path)])})}
        for path in changes
    }
    numbers: dict[str, float] = {"violations": 0.0}
    for name, choices, budget in (
        ("bits", bits, sum(by["3b"][0] for by in bits.values())),
        ("sparsity", kept, sum(by["50%"][0] for by in kept.values())),
        ("drop", drop, len(drop) - 3),
    ):
        if name == "drop":
            errors = {(path, c): changes[path] * (c == "drop") for path in drop for c in ("keep", "drop")}
        else:
            errors = {(u, c): error(u, w[u]) for u, by in choices.items() for c, (_, w) in by.items()}
        found, violated = compare(choices, errors, budget)
        numbers |= {f"{name}_{kind}": value for kind, value in found.items()}
        numbers["violations"] += violated
    return numbers


def exit_of(sublayer: str) -> str:
    """The linear through which a sublayer adds to the residual stream."""
    return f"{sublayer}.o_proj" if sublayer.endswith("attn") else f"{sublayer}.down_proj"


def statistics(
    model: Any, layers: dict[str, Any], inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Grams of the linears' inputs, and for each sublayer 1 - cosine of the residual stream before and after it."""
    grams: dict[str, Tensor] = {}
    stream: dict[str, Tensor] = {}

    def gram(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            grams[path] = rows.T @ rows / len(rows)

        return hook

    def catch(name: str) -> Any:
        return lambda module, args: stream.__setitem__(name, args[0])

    handles = [layer.register_forward_pre_hook(gram(path)) for path, layer in layers.items()]
    names = []
    for at, layer in enumerate(model.model.layers):
        for part, norm in (("self_attn", layer.input_layernorm), ("mlp", layer.post_attention_layernorm)):
            names.append(f"model.layers.{at}.{part}")
            handles.append(norm.register_forward_pre_hook(catch(names[-1])))
    handles.append(model.model.norm.register_forward_pre_hook(catch("end")))
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    after = [stream[name] for name in (*names[1:], "end")]
    cosine = [torch.cosine_similarity(stream[name], y, dim=-1).mean() for name, y in zip(names, after, strict=True)]
    return grams, {name: 1 - float(value) for name, value in zip(names, cosine, strict=True)}
