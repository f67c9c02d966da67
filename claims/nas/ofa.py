"""OFA: sub-networks cut out of one elastic CNN, against the same networks trained alone."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

STEPS, NETWORKS = 240, 5

CLAIM = Claim(
    method="ofa",
    statement="Sub-networks taken without retraining from a network trained by progressive shrinking are near those "
    "trained alone, and shrinking in phases is better than drawing sub-networks evenly from the start.",
    source="Cai et al. 2020, arXiv:1908.09791, figure 6 and section 4.1",
    figure="2.5 to 3.5 points of ImageNet accuracy over sub-networks without progressive shrinking",
    setting=f"The space mobile-cnn on scikit-learn's digits; {NETWORKS} networks from the smallest to the largest by "
    f"flops. {STEPS} steps of 64 images for progressive shrinking and for each network alone; drawing evenly gets as "
    "many passes through networks as progressive shrinking. Seconds of single forwards on one thread.",
    metric="error on 300 test images, mean over the networks (error); share of the measured seconds (seconds_off)",
    checks=(
        Check("within 1 point of the networks trained alone", "behind_alone", "<", 0.01),
        Check("better than drawing sub-networks evenly at equal passes", "error_ofa", "<", "error_even"),
        Check("predicted seconds are within 10 % of those measured, on average", "seconds_off", "<", 0.1),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights, order and sub-networks."""
    from trimtab.elasticity import digits_space
    from trimtab.engine.costing import Costs

    bench = digits_space(seed)
    genomes = bench.spread(NETWORKS)
    ours = bench.trained("ofa", STEPS)
    even = bench.trained("uniform-sampling", bench.passes["ofa"])
    errors = {
        "ofa": [bench.error(ours, g) for g in genomes],
        "even": [bench.error(even, g) for g in genomes],
        "alone": [bench.error(bench.alone(g, STEPS), g) for g in genomes],
    }
    costs = Costs(bench.maker, dict(bench.items.take(0, 1).inputs), seconds=True, threads=1)
    off = [abs(float(costs.price([g])["seconds"][0]) / costs.measure(g) - 1) for g in genomes]
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    return {
        **{f"error_{name}": value for name, value in means.items()},
        **{"behind_alone": means["ofa"] - means["alone"], "seconds_off": sum(off) / len(off)},
        **{"error_ofa_smallest": errors["ofa"][0], "error_alone_smallest": errors["alone"][0]},
    }
