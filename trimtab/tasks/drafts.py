"""Targets, drafts and prompts that speculative decoding is tried on."""

from __future__ import annotations

import copy
from typing import Any

TOPICS = ("code", "prose", "tables")


def topics(tokenizer: Any, seed: int, count: int, length: int, within: int = 0) -> dict[str, list[list[int]]]:
    """Prompts of so many tokens: of code, of English prose and of tables of numbers, all that Python brings along.

    Args:
        within: all of a topic are from so many documents, which are long; 0: each is from one of its own.
    """
    from importlib.resources import files
    from pydoc_data.topics import topics as prose

    import numpy as np

    from trimtab.tasks.text import stdlib_documents

    tables = [f.read_text("utf-8") for f in files("encodings").iterdir() if f.name.startswith(("cp", "mac", "iso8859"))]
    texts = ([d.text for d in stdlib_documents("test")], list(prose.values()), sorted(tables))
    rng, found = np.random.default_rng(seed), {}
    for name, documents in zip(TOPICS, texts, strict=True):
        if within:
            documents = sorted(documents, key=len, reverse=True)[: 10 * within]
        pool: list[list[int]] = []
        for i in rng.permutation(len(documents)):
            if len(tokens := tokenizer(documents[i])["input_ids"]) > 4 * length:
                pool.append(tokens)
            if len(pool) == (within or count):
                break
        drawn = [pool[i % len(pool)] for i in range(count)]
        starts = [int(rng.integers(length, len(tokens) - length)) for tokens in drawn]
        found[name] = [tokens[start : start + length] for tokens, start in zip(drawn, starts, strict=True)]
    return found


def distilled(target: Any, tokenizer: Any, seed: int, *, blocks: int, steps: int, windows: int = 8) -> Any:
    """A draft of the target's first blocks, distilled from it on windows of 64 tokens of code that the target knows.

    Args:
        windows: a step, of AdamW at 1e-3.
    """
    import torch
    from torch.nn import functional

    from trimtab.tasks.text import stdlib_documents, token_blocks

    draft = copy.deepcopy(target).requires_grad_(True)
    draft.model.layers = draft.model.layers[:blocks]
    draft.config.num_hidden_layers = blocks
    documents = stdlib_documents("train")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found = token_blocks(tokenizer, [documents[i] for i in order[:150]], 64, limit=steps * windows).tokens
    optimiser = torch.optim.AdamW(draft.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        window = found[torch.arange(step * windows, (step + 1) * windows) % len(found)].long()
        with torch.no_grad():
            theirs = functional.log_softmax(target(input_ids=window).logits.flatten(0, 1), 1)
        ours = functional.log_softmax(draft(input_ids=window).logits.flatten(0, 1), 1)
        optimiser.zero_grad()
        functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).backward()
        optimiser.step()
    return draft.requires_grad_(False)


def rounded(model: Any, level: str) -> Any:
    """A draft that is the model itself with its linears rounded to a level, ready to open sessions."""
    from trimtab.core.level import parse_level
    from trimtab.core.method import Solver, method
    from trimtab.engine.session import Runtime, map_of

    solver = method("rtn")
    assert isinstance(solver, Solver)
    packed = {}
    for site in map_of(model).sites:
        if site.kind == "linear":
            made = solver.solve(model.get_submodule(site.path).weight, parse_level(level))
            packed[f"{site.path}.weight"] = lambda made=made: made
    return Runtime(model, packed)


def padded(model: Any, width: int) -> Any:
    """The same function with feed-forward layers of so many channels, those added without effect: a step reads as much
    as a larger model's does, while what is written stays this model's text.
    """
    import torch
    from torch import nn

    wide = copy.deepcopy(model)
    for name, module in list(wide.named_modules()):
        role = name.rpartition(".")[2]
        if role not in ("gate_proj", "up_proj", "down_proj"):
            continue
        rows, cols = (module.out_features, width) if role == "down_proj" else (width, module.in_features)
        weight = torch.zeros(rows, cols)
        weight[: module.out_features, : module.in_features] = module.weight
        layer = nn.Linear(cols, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        wide.set_submodule(name, layer)
    wide.config.intermediate_size = width
    return wide
