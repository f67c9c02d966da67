"""Held-out text through the compiled program of an artifact, in a process of its own.

    python -m trimtab.models.compiled ARTIFACT ITEMS.safetensors [--threads N]

ITEMS holds `input_ids` and `labels`. Prints one JSON object: `scores` of the items and the `engine` that gave them, or
the `reason` why no program runs this model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trimtab.models.fresh import use_threads

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engine.session import Session
    from trimtab.tasks.base import Scores


def main() -> None:
    """Score what the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("items", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    use_threads(args.threads)
    print(json.dumps(scored(args.artifact, args.items)))


def scored(artifact: Path, items: Path) -> dict[str, Any]:
    """What this process prints."""
    from trimtab.engine.session import Runtime, Session
    from trimtab.evidence import scores_to_json
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.loading import load

    file, loaded = Checkpoint(items), load(artifact, packed=True)
    tokens, labels = file.read("input_ids"), file.read("labels")
    runtime = Runtime(loaded.model, loaded.packed, share=True)
    writer = runtime.open(tokens.shape[1])
    if not isinstance(writer, Session):
        return {"reason": f"no program runs this model here: {runtime.reason}"}
    return {"scores": scores_to_json(scores(writer, tokens, labels)), "engine": runtime.engine}


def scores(writer: Session, tokens: Tensor, labels: Tensor) -> Scores:
    """Scores of items, each a text of its own."""
    import torch

    from trimtab.engine.program import PROOF
    from trimtab.tasks.base import Scores
    from trimtab.tasks.causal_lm import CausalLM

    task, parts = CausalLM({}, {}), []
    for item, label in zip(tokens, labels, strict=True):
        writer.forget(0)
        logits = torch.cat([writer.outputs(some.tolist()) for some in item.split(PROOF)])
        parts.append(task.score(SimpleNamespace(logits=logits[None]), label[None], None))
    return Scores.join(parts)


if __name__ == "__main__":
    main()
