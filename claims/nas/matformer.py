"""MatFormer: nested language models against those trained alone, truncated ones, and mixtures between."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

STEPS, HIDDEN, BLOCKS = 150, (32, 64, 128, 256), 4
LENGTH, PROMPT, TEXTS, DRAFTED = 64, 24, 24, 4

CLAIM = Claim(
    method="matformer",
    statement="Each nested model is about as good as one of its size trained alone; mixtures that were never trained "
    "lie on the line between; nested drafts agree with the whole model more than independent ones, and more of what "
    "they propose is accepted in speculative decoding.",
    source="Devvrit et al. 2023, arXiv:2310.07707, figures 2 and 3, section 4.1",
    setting=f"A decoder of {BLOCKS} blocks of width 64 on Python's standard library, windows of 64 tokens, 16 a step: "
    f"{STEPS} steps for each of four sizes alone, and {4 * STEPS} for the nested model, which is as much in all. "
    f"{TEXTS} prompts of {PROMPT} tokens of test text go on for {LENGTH - PROMPT} tokens, the likeliest each time, "
    f"with {DRAFTED} drafted at a time by the smallest size.",
    metric="nats a token on test text (loss); share of the most likely tokens that are the whole model's (agree); "
    "share of drafted tokens that are accepted (accepted), tokens a step of the whole model (per_step)",
    checks=(
        Check("nested models are within 0.05 nats of those trained alone, on average", "behind_alone", "<", 0.05),
        Check("a plain model cut to the smallest size is worse than the nested one", "loss_smallest", "<", "loss_cut"),
        Check("mixtures are at most 0.02 nats above the line between their neighbours", "mix_above_line", "<", 0.02),
        Check(
            "the smallest nested model agrees more with its whole than one trained alone", "agree", ">", "agree_alone"
        ),
        Check("more of a nested draft is accepted than of one trained alone", "accepted", ">", "accepted_alone"),
        Check("with either draft the text is the whole model's own", "same", ">=", 1.0),
    ),
)


def space(vocabulary: int, length: int) -> Any:
    """A small decoder whose feed-forward layers are elastic, block by block."""
    import torch
    from torch import nn
    from torch.nn import functional

    from trimtab.space import Width

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            hidden = Width(*HIDDEN)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            q, k, v = (layer(y).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, 64)
            self.place = nn.Parameter(torch.randn(length, 64) * 0.02)
            self.blocks = nn.Sequential(*(Block(64) for _ in range(BLOCKS)))
            self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, vocabulary)

        def forward(self, input_ids: Any) -> Any:
            x = self.embed(input_ids) * 0.02 + self.place[: input_ids.shape[1]]
            return self.head(self.norm(self.blocks(x)))

    return Decoder()


class Rereading:
    """A network as what writes text: it reads the whole of it anew for every step."""

    def __init__(self, network: Any) -> None:
        from trimtab.formats.cache import CacheFormat

        self.network, self.context, self.most, self.cache = network.eval(), LENGTH, LENGTH, CacheFormat()
        self.tokens: dict[int, list[int]] = {}

    def outputs(self, tokens: Any, sequence: int = 0) -> Any:
        import torch

        whole = self.tokens.setdefault(sequence, [])
        whole += tokens
        with torch.no_grad():
            return self.network(torch.tensor([whole]))[0, -len(tokens) :]

    def extend(self, sequence: int, tokens: Any) -> Any:
        return self.outputs(tokens, sequence)[-1]

    def advance(self, pieces: Any) -> Any:
        import torch

        return torch.stack([self.extend(sequence, piece) for sequence, piece in pieces.items()])

    def score(self, pieces: Any) -> Any:
        import torch

        return torch.cat([self.outputs(piece, sequence) for sequence, piece in pieces.items()])

    def step(self, tokens: Any) -> Any:
        return self.advance({sequence: [token] for sequence, token in tokens.items()})

    def forget(self, sequence: int, length: int = 0) -> None:
        self.tokens[sequence] = self.tokens.get(sequence, [])[:length]


def drafted(target: Any, draft: Any, prompts: list[list[int]], vocabulary: int) -> tuple[Any, bool]:
    """What a draft came to, and whether the texts are the target's own."""
    from trimtab.core.method import Drafter, method
    from trimtab.engine.session import generate
    from trimtab.engine.speculation import Speculation, Tally, speculate

    policy = method("speculative-decoding", tokens=DRAFTED)
    assert isinstance(policy, Drafter)
    tally, same = Tally(), True
    for prompt in prompts:
        speculation = Speculation(Rereading(draft), policy, vocabulary=vocabulary)  # type: ignore[arg-type]
        speculation.tally = tally
        found = list(speculate(Rereading(target), speculation, prompt, LENGTH - PROMPT))  # type: ignore[arg-type]
        same &= found == list(generate(Rereading(target), prompt, LENGTH - PROMPT))  # type: ignore[arg-type]
    return tally, same


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights, order and granularities."""
    import torch

    from trimtab.elasticity import Elasticity
    from trimtab.space import Space
    from trimtab.tasks.fresh import text_task

    task, known = text_task(None, LENGTH)
    task.options = {}  # type: ignore[misc]
    bench = Elasticity(Space(space, "decoder", **known), task, batch=16, rate=3e-3, seed=seed, tested=64)
    sizes = [tuple(i for _ in range(BLOCKS)) for i in range(len(HIDDEN))]
    mixed = [(0, 0, 1, 1), (1, 1, 2, 2), (2, 2, 3, 3)]
    nested = bench.trained("matformer", 4 * STEPS)
    alone = {size: bench.alone(size, STEPS) for size in sizes}

    def loss(net: Any, genome: Any) -> float:
        scores = bench.jury.scores(net.bound(genome)[0], bench.jury.items)
        return float(scores.nll.sum() / scores.count.sum())

    def likely(net: Any, genome: Any) -> Any:
        with torch.no_grad():
            return net.bound(genome)[0].eval()(bench.jury.items.inputs["input_ids"]).argmax(-1)

    ours, theirs = [loss(nested, s) for s in sizes], [loss(alone[s], s) for s in sizes]
    above = []
    for genome in mixed:
        low, high = ours[genome[0]], ours[genome[-1]]
        share = 0.5  # half of the blocks have the larger size, so that the mixture has half of the difference
        above.append(loss(nested, genome) - (low + share * (high - low)))
    small, large = sizes[0], sizes[-1]
    prompts = [window[:PROMPT] for window in bench.jury.items.inputs["input_ids"][:TEXTS].tolist()]
    whole, words = nested.bound(large)[0], known["vocabulary"]
    inner, same = drafted(whole, nested.bound(small)[0], prompts, words)
    other, also = drafted(whole, alone[small].bound(small)[0], prompts, words)
    return {
        **{f"loss_{HIDDEN[i]}": value for i, value in enumerate(ours)},
        **{f"loss_alone_{HIDDEN[i]}": value for i, value in enumerate(theirs)},
        **{"behind_alone": sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(sizes)},
        **{"loss_smallest": ours[0], "loss_cut": loss(alone[large], small), "mix_above_line": sum(above) / len(above)},
        **{"accepted": inner.rate, "accepted_alone": other.rate, "same": float(same and also)},
        **{"per_step": inner.per_step, "per_step_alone": other.per_step},
        "agree": float((likely(nested, small) == likely(nested, large)).float().mean()),
        "agree_alone": float((likely(alone[small], small) == likely(alone[large], large)).float().mean()),
    }
