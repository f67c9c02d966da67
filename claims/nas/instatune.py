"""InstaTune: shapes that were sampled while a model was fine-tuned, against the same shapes cut afterwards."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

STEPS, NETWORKS = 150, 5

CLAIM = Claim(
    method="instatune",
    statement="Sub-networks of a model that was made elastic while it was fine-tuned beat the same shapes cut after "
    "ordinary fine-tuning, and the whole model stays as good.",
    source="Sridhar et al. 2023, arXiv:2308.15609, figures 2 to 4",
    setting="The shipped vision transformer, trained on scikit-learn's digits, tuned further on them: "
    f"{STEPS} steps of 64 images with one sub-network a step, or {2 * STEPS} ordinary steps, which are as many passes. "
    f"{NETWORKS} shapes from the smallest to the largest by flops, channels sorted by importance before the tuning.",
    metric="error on 300 test images, mean over the shapes but the whole model (error), and of the whole model (whole)",
    checks=(
        Check("the shapes beat those cut after ordinary tuning", "error_ours", "<", "error_cut"),
        Check("the whole model is within 1 point of the ordinary one", "whole_behind", "<", 0.01),
        Check("the shapes beat those of the sandwich rule at equal passes", "error_ours", "<", "error_sandwich"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the images and draw of sub-networks."""
    from trimtab.core.plan import parse_method
    from trimtab.elasticity import cut_model

    bench = cut_model("pocket-vit", seed, rate=1e-3, decay=0.0)
    offered = bench.domain.within(parse_method("instatune").offer(bench.domain))  # type: ignore[attr-defined]
    genomes = bench.spread(NETWORKS, within=offered)
    tuned = {
        "ours": bench.trained("instatune", STEPS, sort=True),
        "cut": bench.trained("alone", 2 * STEPS, sort=True),
        "sandwich": bench.trained("sandwich(between=1)", 2 * STEPS // 3, sort=True),
    }
    errors = {name: [bench.error(net, g) for g in genomes] for name, net in tuned.items()}
    found = {f"error_{name}": sum(values[:-1]) / (NETWORKS - 1) for name, values in errors.items()}
    whole = {f"whole_{name}": values[-1] for name, values in errors.items()}
    return {**found, **whole, "whole_behind": whole["whole_ours"] - whole["whole_cut"]}
