"""CoreInfer: neurons that a prompt chooses, beside those that chance, all texts, other texts or each token choose."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.view import Prompted
from trimtab.engine.neurons import FeedForward, activations, clocked, feed_forwards, masked, narrowed, only
from trimtab.engine.session import lent, map_of
from trimtab.serve.coreinfer import CoreInfer
from trimtab.tasks.build import task_for

LENGTH, TEXTS, SAMPLE, SHARES, MAIN = 256, 4, 16, (0.2, 0.4, 0.6), 0.4
SMALL = {"steps": 120}  # of the two models that differ in their activation alone
ROUNDS, STEPS = 9, 4  # of the timing: turns, and tokens of a turn
Choice = Callable[[int], Sequence[Tensor]]

CLAIM = Claim(
    method="coreinfer",
    statement="Behind a prompt text goes on with a part of the neurons, chosen once by the prompt, at nearly the "
    "perplexity of all, better than with as many neurons drawn at random or chosen once for all texts; feed-forward "
    "layers take less time; the prompt's core neurons are those of what follows.",
    source="Wang et al. 2024, arXiv:2410.18311, abstract, sections 3 and 5",
    figure="a 10.3-fold and a 2.7-fold speed beside transformers and PowerInfer without a loss of accuracy",
    setting="The shipped language model, a SwiGLU whose neurons are never exactly zero: 4 test windows a seed, the "
    "first 128 tokens as prompt, the loss on the rest. 16 calibration windows for all texts and similarity. "
    "ReLU and SiLU: Llamas of 2 blocks and a width of 64 after 120 steps on bytes, equal but for the activation, 16 "
    "windows of 64. Time: one token through a feed-forward layer of random weights, 2,048 by 5,632, in turns with all "
    "neurons, by processor time, on a machine that others use.",
    metric="nats a token, of which the perplexity is the exponential, at shares of 20, 40 and 60 % (random: drawn "
    "anew for each text; oracle: each token's largest magnitudes; magnitude: by the sum of |a| in place of the paper's "
    "rule); rise: of the perplexity over that with all neurons, as a share; overlap: share of the core neurons of what "
    "follows that are chosen; relu, silu: nats over those with all; time: of the layer as a share of that with all",
    checks=(
        *(Check(f"at {s:.0%} below random", f"prompt_{s}", "<", f"random_{s}") for s in SHARES),
        *(Check(f"at {s:.0%} below chosen for all texts", f"prompt_{s}", "<", f"all_{s}") for s in SHARES),
        Check("at 40 % a rise of less than 5 %", "rise", "<", 0.05),
        Check("similarity below random", "similarity", "<", f"random_{MAIN}"),
        Check("similarity below chosen for all texts", "similarity", "<", f"all_{MAIN}"),
        Check("what follows shares more core neurons than another text", "overlap_own", ">", "overlap_other"),
        Check("and more than all texts", "overlap_own", ">", "overlap_all"),
        Check("with a ReLU below random", "relu_prompt", "<", "relu_random"),
        Check("with a ReLU a smaller rise than with a SiLU", "relu_prompt", "<", "silu_prompt"),
        Check("at 40 % the layer takes less than 60 % of the time", f"time_{MAIN}", "<", 0.6),
    ),
    seeds=(0, 1, 2, 3, 4),
)


class Texts:
    """Texts whose second half is read with a part of the neurons.

    Args:
        tokens: `[texts, length]`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FeedForward], tokens: Tensor) -> None:
        self.model, self.layers, self.tokens, self.half = model, layers, tokens, tokens.shape[1] // 2
        given = activations(model, layers, tokens)
        self.before = [tuple(layer[i, : self.half] for layer in given) for i in range(len(tokens))]
        self.after = [tuple(layer[i, self.half :] for layer in given) for i in range(len(tokens))]
        with torch.no_grad():
            self.caches = [model(input_ids=row[None, : self.half], use_cache=True).past_key_values for row in tokens]

    def nats(self, around: Callable[[int], Any]) -> float:
        """Mean nats a token of the second halves, each read within what `around` gives for it."""
        return statistics.mean(self._one(i, around(i)) for i in range(len(self.tokens)))

    def with_some(self, choose: Choice) -> float:
        """The same with the neurons that are chosen for each text."""
        return self.nats(lambda i: only(self.model, self.layers, choose(i)))

    @torch.no_grad()
    def _one(self, i: int, around: Any) -> float:
        row, cache = self.tokens[i : i + 1, self.half :], self.caches[i]
        with around:
            logits = self.model(input_ids=row, past_key_values=cache, use_cache=True).logits[0, :-1].float()
        cache.crop(-row.shape[1])
        return -float(logits.log_softmax(-1).gather(-1, row[0, 1:, None]).mean())

    def drawn(self, share: float, rng: torch.Generator) -> Choice:
        """As many neurons at random."""
        return lambda i: [torch.randperm(at.neurons, generator=rng)[: round(share * at.neurons)] for at in self.layers]

    def oracle(self, share: float) -> float:
        """Mean nats where each token has its own neurons of the largest magnitudes."""

        def keep(place: int, given: Tensor) -> Tensor:
            size = given.abs()
            return size >= size.topk(round(share * size.shape[-1]), -1).values[..., -1:]

        return self.nats(lambda i: masked(self.model, self.layers, keep))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of texts."""
    bench, rng = lab.bench("pocket-lm", seed), torch.Generator().manual_seed(seed)
    task, model = task_for(bench.source, length=LENGTH), bench.source.materialise()
    layers = feed_forwards(bench.modelmap)
    texts = Texts(model, layers, task.batch("test", TEXTS, seed).inputs["input_ids"])
    sample = activations(model, layers, task.batch("calibration", SAMPLE, seed).inputs["input_ids"])
    found = {"dense": texts.nats(lambda i: contextlib.nullcontext())}
    for share in SHARES:
        policy = CoreInfer(share=share)
        everyone = [policy.core(policy.tally(layer.flatten(0, 1))) for layer in sample]
        large = CoreInfer(share=share, token_share=1.0, signed=False)
        found |= {
            f"prompt_{share}": texts.with_some(lambda i, p=policy: p.decide(Prompted(texts.before[i]))),
            f"random_{share}": texts.with_some(texts.drawn(share, rng)),
            f"all_{share}": texts.with_some(lambda i, e=everyone: e),
            f"magnitude_{share}": texts.with_some(lambda i, p=large: p.decide(Prompted(texts.before[i]))),
            f"oracle_{share}": texts.oracle(share),
        }
        if share == MAIN:
            found |= overlaps(texts, policy, everyone)
    alike = CoreInfer(share=MAIN, guide="similarity")
    groups = alike.prepare(tuple(layer[i] for layer in sample) for i in range(SAMPLE))
    found["similarity"] = texts.with_some(lambda i: alike.decide(Prompted(texts.before[i], groups)))
    found["rise"] = math.exp(found[f"prompt_{MAIN}"] - found["dense"]) - 1
    return found | small(lab, seed, rng) | seconds(seed)


def overlaps(texts: Texts, policy: CoreInfer, everyone: list[Tensor]) -> dict[str, float]:
    """Of the core neurons of what follows, the share that the own prompt, another one and all texts choose."""
    chosen = [policy.decide(Prompted(given)) for given in texts.before]
    follow = [policy.decide(Prompted(given)) for given in texts.after]
    count = len(chosen)

    def shared(pairs: list[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
        hits = [float(torch.isin(b, a).float().mean()) for one, two in pairs for a, b in zip(one, two, strict=True)]
        return statistics.mean(hits)

    return {
        "overlap_own": shared(list(zip(chosen, follow, strict=True))),
        "overlap_other": shared([(chosen[(i + 1) % count], follow[i]) for i in range(count)]),
        "overlap_all": shared([(everyone, after) for after in follow]),
    }


def small(lab: Any, seed: int, rng: torch.Generator) -> dict[str, float]:
    """What 40 % of the neurons cost two small models that differ in their activation alone."""
    bench, found, policy = lab.pretraining(seed, **SMALL), {}, CoreInfer(share=MAIN)
    for name, change in (("relu", _rectify), ("silu", None)):
        model = bench.run("adamw", (4e-3,), change=change).model.eval()
        texts = Texts(model, feed_forwards(map_of(model)), bench.judging.inputs["input_ids"][seed::16][:16])
        dense = texts.nats(lambda i: contextlib.nullcontext())
        some = texts.with_some(lambda i, t=texts: policy.decide(Prompted(t.before[i])))
        found |= {f"{name}_dense": dense, f"{name}_prompt": some - dense}
        found[f"{name}_random"] = texts.with_some(texts.drawn(MAIN, rng)) - dense
        found[f"{name}_active"] = float(torch.cat([x.flatten() > 0 for x in texts.after[0]]).float().mean())
    return found


def _rectify(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.act_fn = nn.ReLU()


@torch.no_grad()
def seconds(seed: int) -> dict[str, float]:
    """Processor time of a feed-forward layer for one token, as a share of that with all neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1)).eval()
    layers = feed_forwards(map_of(model))
    chosen = {s: [torch.randperm(5632)[: round(s * 5632)].sort().values] for s in SHARES}
    ways: dict[float, Any] = {1.0: {}} | {s: narrowed(model, layers, some) for s, some in chosen.items()}
    took: dict[float, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, forwards in ways.items():
            with lent(model, forwards), clocked(model, layers, now=time.process_time) as clock:
                for _ in range(STEPS):
                    model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)
            took[way].append(clock.seconds)
    whole = statistics.median(took[1.0])
    return {f"time_{s}": statistics.median(took[s]) / whole for s in SHARES}
