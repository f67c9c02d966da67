"""TALL-masks: a mask of one bit an entry recovers each task from the sum; consensus raises the mean."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.tall_masks import TALLMasks
from trimtab.merge.task_arithmetic import TaskArithmetic
from trimtab.tasks import domains as d

TRUSTS = (0.2, 0.3, 0.4, 0.5, 0.6)
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)

CLAIM = Claim(
    method="tall-masks",
    statement="The masked sum of the task vectors recovers more than 99 % of each task's accuracy with far less "
    "storage than all models; consensus raises the mean accuracy of task arithmetic.",
    source="Wang et al. 2024, arXiv:2405.07813, abstract and tables 1 and 2",
    figure="ViT-L/14, 20 tasks: 99.7 % of the accuracy is kept, storage from 57 Gb to 8.2 Gb",
    setting="The shipped image transformer tuned to five ways to show digits; lambda by task, and the scale, chosen on "
    "300 search images, accuracy on 300 others, mean over the five. Storage: base, and sum and masks as `split` gives "
    "them, against five models, all in 32 bits.",
    metric="mean accuracy; kept: share of the tuned models' accuracy; storage: share of the bytes of all tuned models",
    checks=(
        Check("99 % of the tuned models' accuracy is kept", "kept", ">=", 0.99),
        Check("in less than half of the storage", "storage", "<", 0.5),
        Check("the masks help: above the sum without them", "masked", ">", "task_arithmetic"),
        Check("consensus is above task arithmetic, both at their best", "consensus", ">", "task_arithmetic"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one tuning of the five models."""
    parents, base = [d.tuned((name,), seed) for name in d.DOMAINS], d.base_state()
    lab.hashes |= {"pocket-vit": d.base_hash()}
    masked = []
    for task, name in enumerate(d.DOMAINS):
        _, state = d.best([TALLMasks(task=task, trust=t) for t in TRUSTS], parents, base, (name,))
        masked.append(d.accuracy(state, name, "test"))
    tuned = sum(d.accuracy(p, n, "test") for p, n in zip(parents, d.DOMAINS, strict=True)) / len(parents)
    consensus = d.best([TALLMasks(trust=t, scale=s) for t in TRUSTS for s in SCALES], parents, base)[1]
    mean = sum(masked) / len(masked)
    return {
        "masked": mean,
        "tuned": tuned,
        "kept": mean / tuned,
        "storage": d.stored_share(TALLMasks(), parents, base),
        "consensus": d.mean_accuracy(consensus, "test"),
        "task_arithmetic": d.mean_accuracy(d.best([TaskArithmetic(scale=s) for s in SCALES], parents, base)[1], "test"),
    }
