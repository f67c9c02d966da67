"""Speculative decoding: what is written with a draft, and how many tokens a step of the target gives."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

PROMPT, TEXT, COUNT, GAMMAS = 24, 48, 4, (2, 4, 8)

CLAIM = Claim(
    method="speculative-decoding",
    statement="What is written does not change, and a step of the target gives as many tokens as the acceptance rate "
    "has it, more than one.",
    source="Leviathan et al. 2023, arXiv:2211.17192, sections 2.3 and 3.1, equation 1",
    figure="T5-XXL 2.3 to 3.4 times faster with T5-small as the draft, at acceptance rates of 0.53 to 0.75",
    setting=f"The shipped language model and as its draft the same at 2b/g32. {3 * COUNT} prompts of {PROMPT} tokens "
    f"of code, prose and tables go on for {TEXT} tokens, the likeliest and drawn at temperature 1, with "
    f"{', '.join(map(str, GAMMAS))} drafted at a time.",
    metric="tokens a step of the target (greedy, sampled), and (1 - alpha^(gamma + 1)) / (1 - alpha) of the measured "
    "alpha; share of greedy texts that are the target's own",
    checks=(
        Check("greedy texts are the target's own", "same", ">=", 1.0),
        Check("with four drafted a step gives 1.5 tokens and more, greedy", "greedy_4", ">", 1.5),
        Check("and sampled", "sampled_4", ">", 1.5),
        Check("equation 1 tells the tokens a step within a tenth, greedy", "off_greedy", "<", 0.1),
        Check("and sampled", "off_sampled", "<", 0.1),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of prompts."""
    from trimtab.core.method import Drafter, method
    from trimtab.engine.session import Runtime, generate
    from trimtab.engine.speculation import Speculation, speculate
    from trimtab.loading import load
    from trimtab.tasks.drafts import rounded, topics

    loaded, room = load("pocket"), PROMPT + TEXT
    target, words = Runtime(loaded.model), loaded.model.config.vocab_size  # type: ignore[union-attr]
    plain, writer, draft = target.open(room), target.open(room), rounded(loaded.model, "2b/g32").open(room)
    prompts = [p for part in topics(loaded.tokenizer, seed, COUNT, PROMPT).values() for p in part]
    expected = [list(generate(plain, prompt, TEXT)) for prompt in prompts]
    values: dict[str, float] = {}
    off: dict[str, list[float]] = {"greedy": [], "sampled": []}
    same = 0
    for gamma in GAMMAS:
        policy = method("speculative-decoding", tokens=gamma)
        assert isinstance(policy, Drafter)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            speculation = Speculation(draft, policy, vocabulary=int(words))  # type: ignore[arg-type]
            for i, prompt in enumerate(prompts):
                text = list(speculate(writer, speculation, prompt, TEXT, temperature=temperature, seed=i))
                same += name == "greedy" and text == expected[i]
            alpha = speculation.tally.rate
            predicted = sum(alpha**i for i in range(gamma + 1))
            off[name].append(abs(speculation.tally.per_step / predicted - 1))
            values |= {f"{name}_{gamma}": speculation.tally.per_step, f"alpha_{name}_{gamma}": alpha}
    return {
        **values,
        **{f"off_{name}": max(found) for name, found in off.items()},
        "same": same / (len(GAMMAS) * len(prompts)),
    }
