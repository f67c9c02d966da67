"""OSD: a draft that learns from its corrections, beside the same draft frozen, on prompts whose topic changes."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.distill.osd import OSD

PROMPT, TEXT, TURN, THIRD, DRAFTED = 24, 40, 27, 9, 4
BLOCKS, STEPS, WINDOWS, RATE = 1, 120, 8, 5e-3

CLAIM = Claim(
    method="osd",
    statement="A draft that learns from what the target corrects is accepted more often than the same draft frozen, "
    "and recovers after each change of topic; the texts stay the target's own.",
    source="Liu et al. 2023, arXiv:2310.07177, abstract",
    figure="the acceptance rate rises by 0.1 to 0.65, which takes 1.42 to 2.17 times off the latency",
    setting="The shipped language model as the target; its first block of six as the draft, distilled before on "
    f"{STEPS * WINDOWS} windows of code that the target knows. {3 * TURN} prompts of {PROMPT} tokens: {TURN} each from "
    f"a document of code, one of English prose and one of tables of numbers, which go on for {TEXT} tokens, {DRAFTED} "
    "drafted at a time, the likeliest each time. Factors of rank 16 beside the draft's linears are trained, a step of "
    f"AdamW at {RATE} for each text, and taken over after every two.",
    metric="acceptance rate, of the drafted tokens that the target looked at: over all texts (online, frozen), in the "
    "first and the last third of each topic; tokens a step of the target; share of texts that are the target's own",
    checks=(
        Check("online learning is accepted more often", "online", ">", "frozen"),
        Check("by 0.1, the least that the paper reports", "gain", ">=", 0.1),
        Check("and gives more tokens a step", "online_per_step", ">", "frozen_per_step"),
        Check("in prose it gains more in the last third than in the first", "prose_last", ">", "prose_first"),
        Check("in tables it gains more in the last third than in the first", "tables_last", ">", "tables_first"),
        Check("the texts are the target's own", "same", ">=", 1.0),
    ),
    seeds=(1, 2, 3),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draft and one stream of prompts."""
    import copy

    from trimtab.core.method import Drafter, method
    from trimtab.engine.learning import NAME, Learner
    from trimtab.engine.session import Runtime, generate
    from trimtab.engine.speculation import Speculation, Tally, speculate
    from trimtab.loading import load
    from trimtab.tasks.drafts import distilled, topics

    loaded, method_ = load("pocket"), OSD(interval=2, rate=RATE)
    target, room = loaded.model, PROMPT + TEXT
    stream = topics(loaded.tokenizer, seed, TURN, PROMPT, within=1)
    draft = distilled(target, loaded.tokenizer, seed, blocks=BLOCKS, steps=STEPS, windows=WINDOWS)
    runtime, words, policy = Runtime(target), target.config.vocab_size, method("speculative-decoding", tokens=DRAFTED)
    assert isinstance(policy, Drafter)
    plain, writer = runtime.open(room), runtime.open(room)
    own = Runtime(copy.deepcopy(draft))
    bank = own.bank(16)
    learner = Learner(own.model, bank, method_, rate=method_.rate, interval=method_.interval)
    learning = own.open(room, bank=bank)
    learning.use(0, NAME)
    drafts = {
        "online": Speculation(learning, policy, vocabulary=words, listener=learner),
        "frozen": Speculation(Runtime(draft).open(room), policy, vocabulary=words),
    }
    tallies: dict[tuple[str, str, int], Tally] = {}
    same = texts = 0
    for topic, prompts in stream.items():
        for i, prompt in enumerate(prompts):
            expected = list(generate(plain, prompt, TEXT))
            for name, speculation in drafts.items():
                speculation.tally = tallies.setdefault((name, topic, i // THIRD), Tally())
                same += list(speculate(writer, speculation, prompt, TEXT)) == expected
                texts += 1
            learner.work()

    def total(name: str, topic: str = "", third: int | None = None) -> Tally:
        parts = [t for (n, p, i), t in tallies.items() if n == name and topic in ("", p) and third in (None, i)]
        return Tally(*(sum(getattr(t, f) for t in parts) for f in ("steps", "drafted", "looked", "accepted")))

    def gain(topic: str, third: int) -> float:
        return total("online", topic, third).rate - total("frozen", topic, third).rate

    ours, theirs = total("online"), total("frozen")
    return {
        **{"online": ours.rate, "frozen": theirs.rate, "gain": ours.rate - theirs.rate, "same": same / texts},
        **{"online_per_step": ours.per_step, "frozen_per_step": theirs.per_step, "updates": learner.updates},
        **{f"{topic}_{place}": gain(topic, third) for topic in stream for place, third in (("first", 0), ("last", 2))},
        **{f"{name}_{topic}": total(name, topic).rate for name in drafts for topic in stream},
    }
