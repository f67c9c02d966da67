"""LLaMA-NAS: a language model tuned once, a search over its sub-networks, and quantisation of the one found."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.parts.protocol import beside

STEPS, EVALUATIONS = 40, 32

CLAIM = Claim(
    method="llama-nas",
    statement="Sub-networks found by a genetic search in a once-tuned model dominate uniform and random ones, beat "
    "pruned models of their size, and lose little when they are quantised further.",
    source="Sarah et al. 2024, arXiv:2405.18377, figures 3 to 6",
    figure="LLaMA2-7B 1.5 times smaller and 1.3 times faster with negligible loss on some tasks",
    setting=f"The shipped language model tuned on Python's standard library, {STEPS} steps of 4 windows of 128 tokens "
    f"with one sub-network a step; {EVALUATIONS} evaluations by evolution and by random draws, the same weights. The "
    "pruned model: channels of smallest norm removed from every feed-forward layer, and tuned by as many passes.",
    metric="nats a token on 48 test windows (loss); dominated share of the corner of loss and parameters (volume); "
    "improvement: of the best within the median parameters of the random draws on their mean loss, in percent of it",
    checks=(
        Check("evolution dominates more than random draws", "volume_evolution", ">", "volume_random"),
        Check("evolution dominates more than uniform networks", "volume_evolution", ">", "volume_uniform"),
        Check("the found network beats a pruned one of no fewer parameters", "loss_found", "<", "loss_pruned"),
        Check("8-bit weights cost it less than 0.02 nats", "cost_of_int8", "<", 0.02),
        *beside(),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the windows, and of the draws."""
    import tempfile
    from itertools import product
    from pathlib import Path

    import numpy as np

    from trimtab.core.level import parse_level
    from trimtab.core.method import method
    from trimtab.core.plan import parse_method
    from trimtab.elasticity import cut_model
    from trimtab.engine.hunting import Chase, hunt
    from trimtab.parts.fronts import hypervolume

    bench = cut_model("pocket-lm", seed, length=128, batch=4, rate=3e-4, decay=0.0, tested=48)
    domain = bench.domain
    tuning = parse_method("llama-nas")
    offered = domain.within(tuning.offer(domain))  # type: ignore[attr-defined]
    net = bench.trained("llama-nas", STEPS, sort=True)
    known: dict[Any, float] = {}

    def whole(genome: Any) -> Any:
        return domain.genome(offered.setting(genome))

    def loss(genome: Any) -> float:
        if genome not in known:
            scores = bench.jury.scores(net.bound(whole(genome))[0])
            known[genome] = float(scores.nll.sum() / scores.count.sum())
        return known[genome]

    def price(genomes: Any) -> dict[str, Any]:
        return {"parameters": bench.costs.price([whole(g) for g in genomes])["parameters"]}

    def evaluate(genome: Any) -> dict[str, float]:
        return {"error": loss(genome), "parameters": float(price([genome])["parameters"][0])}

    fronts: dict[str, list[tuple[float, float]]] = {}
    for name in ("evolution", "random"):
        searcher: Any = method({"random": "random-search"}.get(name, name))
        chase = Chase(offered, searcher, ("error", "parameters"), {}, EVALUATIONS, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            trials = hunt(chase, evaluate, Path(folder))
        fronts[name] = [(t.values["error"], t.values["parameters"]) for t in trials]
        if name == "evolution":
            wanted = 0.85 * float(price([offered.largest()])["parameters"][0])
            found = min(trials, key=lambda t: abs(t.values["parameters"] - wanted))
    limit = float(np.median([size for _, size in fronts["random"]]))
    best = {name: min(nats for nats, size in points if size <= limit) for name, points in fronts.items()}
    mean = float(np.mean([nats for nats, size in fronts["random"] if size <= limit]))
    kinds = sorted({k.kind for k in offered.knobs if len(k.options) > 1})
    uniform = set()
    for places in product(range(3), repeat=len(kinds)):
        at = dict(zip(kinds, places, strict=True))
        uniform.add(offered.canonical(min(at.get(k.kind, 0), len(k.options) - 1) for k in offered.knobs))
    fronts["uniform"] = [tuple(evaluate(g).values()) for g in sorted(uniform)]  # type: ignore[misc]
    ends = np.array([p for points in fronts.values() for p in points])
    corner, low = ends.max(0) * 1.01, ends.min(0)
    volumes = {n: hypervolume((np.array(p) - low) / (corner - low), [1.0, 1.0]) for n, p in fronts.items()}

    module = net.extract(whole(found.genome))
    eight = parse_level("8b/row")
    for path, linear in module.named_modules():
        if type(linear).__name__ == "Linear" and "lm_head" not in path:
            packed = method("rtn").solve(linear.weight.detach(), eight)  # type: ignore[attr-defined]
            linear.weight.data.copy_(packed.dense())
    scores = bench.jury.scores(module)
    eight_loss = float(scores.nll.sum() / scores.count.sum())

    pruned = pruned_loss(bench, float(found.values["parameters"]))
    return {
        **{f"volume_{n}": float(v) for n, v in volumes.items()},
        **{"loss_found": found.values["error"], "loss_pruned": pruned, "loss_whole": loss(offered.largest())},
        **{"share_of_parameters": found.values["parameters"] / float(price([offered.largest()])["parameters"][0])},
        **{"improvement": 100 * (mean - best["evolution"]) / mean},
        **{"random_improvement": 100 * (mean - best["random"]) / mean},
        "cost_of_int8": eight_loss - found.values["error"],
    }


def pruned_loss(bench: Any, parameters: float) -> float:
    """Test loss of the model with feed-forward layers pruned evenly to no fewer parameters, then tuned alone."""
    domain = bench.domain
    shares = range(8)
    genomes = [
        domain.largest({k.name: (min(s, len(k.options) - 1),) for k in domain.knobs if k.kind == "width"})
        for s in shares
    ]
    sizes = bench.costs.price(genomes)["parameters"]
    genome = next(g for g, size in zip(genomes, sizes, strict=True) if size >= parameters)
    net = bench.alone(genome, 2 * STEPS, sort=True)
    scores = bench.jury.scores(net.bound(genome)[0])
    return float(scores.nll.sum() / scores.count.sum())
