"""SliceGPT: rotation keeps the outputs, and principal axes are the ones to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Width
from trimtab.core.method import Scene
from trimtab.engine.measure import measure as score
from trimtab.engine.measure import references, through
from trimtab.engine.run import seconds_of
from trimtab.prune.slicegpt import SliceGPT

SLICED = Width(0.75)

CLAIM = Claim(
    method="slicegpt",
    statement="Rotating the residual changes nothing; deleting a quarter of its principal axes costs less than "
    "deleting random or unrotated columns, and the narrower dense network is faster.",
    source="Ashkboos et al. 2024, arXiv:2401.15024, theorem 1 and sections 3-4",
    figure="25 % of parameters removed: 99 % (LLaMA-2-70B, OPT-66B) and 90 % (Phi-2) of zero-shot accuracy; 64-66 % of "
    "the compute",
    setting="The shipped language model (width 256); 24 calibration and 64 test windows of 256 tokens. Deleted columns "
    "are the same at every place: drawn at random, or those of least energy behind the norms. Time: one forward of 8 "
    "windows, as a share of the original's in the same run; a quarter sliced with one shared rotation.",
    metric="perplexity a token; kl: mean KL divergence to the original, nats a token; time: share of the original's",
    checks=(
        Check("rotation alone: KL below 1e-5", "kl_rotated", "<", 1e-5),
        Check("perplexity below deleting random columns", "perplexity_sliced", "<", "perplexity_random"),
        Check("perplexity below deleting unrotated columns", "perplexity_sliced", "<", "perplexity_unrotated"),
        Check(
            "one shared rotation: below deleting unrotated columns", "perplexity_shared", "<", "perplexity_unrotated"
        ),
        Check("the sliced forward is faster", "time_shared", "<", 1.0),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    stats = bench.statistics(("gram", "mean"))
    gram = {path: s["gram"] for path, s in stats.items()}
    mean = {path: s["mean"] for path, s in stats.items()}
    rng = torch.Generator().manual_seed(seed)
    width = len(next(iter(gram.values())))
    # With a diagonal moment the axes are the columns themselves, in the order of that diagonal.
    lots = torch.diag(torch.rand(width, generator=rng) + 1)
    energy = {path: torch.diag(g.diagonal()) for path, g in gram.items()}
    arms: dict[str, tuple[SliceGPT, Width, Mapping[str, Tensor]]] = {
        "rotated": (SliceGPT(), Width(1.0), gram),
        "sliced": (SliceGPT(), SLICED, gram),
        "shared": (SliceGPT(shared=True), SLICED, gram),
        "unrotated": (SliceGPT(shared=True, damp=0.0), SLICED, energy),
        "random": (SliceGPT(shared=True, damp=0.0), SLICED, dict.fromkeys(gram, lots)),
    }
    original = bench.stream()
    flow = through(original, bench.test, bench.chunk)
    kept = references(original, flow, bench.test, bench.task)
    before = score(original, bench.test, bench.task, bench.chunk)
    ids = bench.test.inputs["input_ids"][:8]
    found = {"perplexity": _perplexity(before), "parameters": float(bench.modelmap.parameters)}
    times = {"original": _seconds(original.model, ids)}
    for name, (method, level, moments) in arms.items():
        stream = bench.stream()
        model = stream.whole_model()
        scene = Scene(model, bench.modelmap, levels={bench.sites[0].path: level})
        method.rewrite(scene, gram=moments, mean=mean)
        changed = stream.over(model, bench.calibration)
        scores = score(changed, bench.test, bench.task, bench.chunk, kept)
        found[f"perplexity_{name}"] = _perplexity(scores)
        found[f"kl_{name}"] = float(scores.kl.sum() / scores.count.sum())
        found[f"parameters_{name}"] = float(sum(p.numel() for p in model.parameters()))
        times[name] = _seconds(model, ids)
    return found | {f"time_{name}": times[name] / times["original"] for name in ("sliced", "shared")}


def _perplexity(scores: Any) -> float:
    return float((scores.nll.sum() / scores.count.sum()).exp())


@torch.no_grad()
def _seconds(model: Any, ids: Tensor) -> float:
    return seconds_of(lambda: model(input_ids=ids, use_cache=False), repeats=9)
