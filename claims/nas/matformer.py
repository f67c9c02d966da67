"""MatFormer: nested language models against those trained alone, truncated ones, and mixtures between."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

STEPS, HIDDEN, BLOCKS, LENGTH, BYTES = 100, (32, 64, 128, 256), 4, 64, 128
WRITTEN, PROMPT = 32, 16

CLAIM = Claim(
    method="matformer",
    statement="Each nested model is about as good as one of its size trained alone; mixtures that were never trained "
    "lie on the line between; a nested draft agrees with the whole model more than an independent one, and more of "
    "what it drafts is accepted.",
    source="Devvrit et al. 2023, arXiv:2310.07707, figures 2 and 3, sections 4.1 and 4.1.1",
    figure="speculative decoding by nested models is up to 6 % faster than by independent ones of the same sizes",
    setting=f"A decoder of {BLOCKS} blocks of width 64 on the bytes of Python's standard library, windows of {LENGTH}, "
    f"16 a step: {STEPS} steps for each of four sizes alone, and {4 * STEPS} for the nested model, which is as much in "
    f"all; an independent draft of the smallest size gets {4 * STEPS} of its own as well. Acceptance is on {WRITTEN} "
    f"texts that the whole nested model draws after {PROMPT} bytes of test text.",
    metric="nats a byte on test text (loss); share of the most likely bytes that are the whole model's (agree); share "
    "of drawn bytes that are accepted, the sum of min(p, q) (accepted)",
    checks=(
        Check("nested models are within 0.05 nats of those trained alone, on average", "behind_alone", "<", 0.05),
        Check("a plain model cut to the smallest size is worse than the nested one", "loss_smallest", "<", "loss_cut"),
        Check("mixtures are at most 0.02 nats above the line between their neighbours", "mix_above_line", "<", 0.02),
        Check(
            "the smallest nested model agrees more with its whole than one trained alone does with the largest alone",
            "agree",
            ">",
            "agree_alone",
        ),
        Check("more of a nested draft is accepted than of one trained alone", "accepted", ">", "accepted_alone"),
        Check("and than of one that is trained as long as the nested model", "accepted", ">", "accepted_long"),
    ),
)


def text() -> Any:
    """The bytes of Python's standard library in windows, those beyond ASCII as one."""
    import torch

    from trimtab.tasks.causal_lm import CausalLM
    from trimtab.tasks.text import stdlib_text

    windows = {}
    for split, theirs in (("calibration", "train"), ("test", "test")):
        raw = torch.frombuffer(bytearray(stdlib_text(theirs).encode()), dtype=torch.uint8).long().clamp_max(BYTES - 1)
        windows[split] = raw[: len(raw) // LENGTH * LENGTH].view(-1, LENGTH)
    task = CausalLM(windows, {split: torch.full((len(found),), LENGTH - 1) for split, found in windows.items()})
    task.options = {}  # type: ignore[misc]
    return task


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


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights, order and granularities."""
    import torch

    from trimtab.elasticity import Elasticity
    from trimtab.space import Space

    maker = Space(space, "decoder", vocabulary=BYTES, length=LENGTH)
    bench = Elasticity(maker, text(), batch=16, rate=3e-3, seed=seed, tested=64)
    sizes = [tuple(i for _ in range(BLOCKS)) for i in range(len(HIDDEN))]
    mixed = [(0, 0, 1, 1), (1, 1, 2, 2), (2, 2, 3, 3)]
    small, large = sizes[0], sizes[-1]
    nested, long = bench.trained("matformer", 4 * STEPS), bench.alone(small, 4 * STEPS)
    alone = {size: bench.alone(size, STEPS) for size in sizes}

    def loss(net: Any, genome: Any) -> float:
        scores = bench.jury.scores(net.bound(genome)[0], bench.jury.items)
        return float(scores.nll.sum() / scores.count.sum())

    @torch.no_grad()
    def shares(net: Any, genome: Any, texts: Any) -> Any:
        return net.bound(genome)[0].eval()(texts).softmax(-1)

    test = bench.jury.items.inputs["input_ids"]
    written, rng = test[:WRITTEN, :PROMPT], torch.Generator().manual_seed(seed)
    while written.shape[1] < LENGTH:
        last = shares(nested, large, written)[:, -1]
        written = torch.cat([written, last.multinomial(1, generator=rng)], 1)
    wanted = shares(nested, large, written)[:, PROMPT - 1 :]

    def accepted(net: Any) -> float:
        return float(torch.minimum(shares(net, small, written)[:, PROMPT - 1 :], wanted).sum(-1).mean())

    def agree(draft: Any, target: Any) -> float:
        return float((shares(draft, small, test).argmax(-1) == shares(target, large, test).argmax(-1)).float().mean())

    ours, theirs = [loss(nested, s) for s in sizes], [loss(alone[s], s) for s in sizes]
    # half of a mixture's blocks have the larger size, so that it has half of the difference
    above = [loss(nested, genome) - (ours[genome[0]] + ours[genome[-1]]) / 2 for genome in mixed]
    return {
        **{f"loss_{HIDDEN[i]}": value for i, value in enumerate(ours)},
        **{f"loss_alone_{HIDDEN[i]}": value for i, value in enumerate(theirs)},
        **{"behind_alone": sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(sizes)},
        **{"loss_smallest": ours[0], "loss_cut": loss(alone[large], small), "mix_above_line": sum(above) / len(above)},
        **{"agree": agree(nested, nested), "agree_alone": agree(alone[small], alone[large])},
        **{"accepted": accepted(nested), "accepted_alone": accepted(alone[small]), "accepted_long": accepted(long)},
        "loss_long": loss(long, small),
    }
