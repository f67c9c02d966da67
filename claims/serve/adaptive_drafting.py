"""Drafting by the acceptance rate, beside fixed numbers of tokens, with a good draft and a poorer one."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

PROMPT, TEXT, COUNT, COST = 24, 64, 4, 0.2
LEVELS, FIXED = {"good": "3b/g32", "poor": "2b/row"}, (1, 2, 4, 8)

CLAIM = Claim(
    method="adaptive-drafting",
    statement="Fewer tokens are thrown away than with a fixed number, for as much text in the time.",
    source="Leviathan et al. 2023, arXiv:2211.17192, section 3.5 and theorem 3.8",
    setting="The shipped language model and as its drafts the same at "
    f"{' and at '.join(LEVELS.values())}, which it accepts nearly always and less often. {3 * COUNT} prompts of "
    f"{PROMPT} tokens of code, prose and tables go on for {TEXT} tokens, the likeliest each time. Time is counted, not "
    f"taken: a step of the target is 1 and one of the draft {COST}.",
    metric="tokens for a step's time (speed); drafted tokens that were thrown away for each written one (waste)",
    checks=(
        Check("as fast as the best fixed number with the good draft, within 5 %", "good", ">=", "good_best_95"),
        Check("as fast as the best fixed number with the poor draft, within 5 %", "poor", ">=", "poor_best_95"),
        Check("over both drafts faster than the best fixed number for both", "mean", ">", "mean_best"),
        Check("less is thrown away than with four at a time", "waste", "<", "waste_4"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of prompts."""
    from trimtab.core.method import Drafter, method
    from trimtab.engine.session import Runtime
    from trimtab.engine.speculation import Speculation, speculate
    from trimtab.loading import load
    from trimtab.tasks.drafts import rounded, topics

    loaded, room = load("pocket"), PROMPT + TEXT
    writer, words = Runtime(loaded.model).open(room), int(loaded.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    prompts = [p for part in topics(loaded.tokenizer, seed, COUNT, PROMPT).values() for p in part]
    policies = {f"fixed_{n}": method("speculative-decoding", tokens=n) for n in FIXED}
    policies["ours"] = method("adaptive-drafting")
    speed: dict[tuple[str, str], float] = {}
    waste = dict.fromkeys(policies, 0.0)
    rates = {}
    for kind, level in LEVELS.items():
        draft = rounded(loaded.model, level).open(room)
        for name, policy in policies.items():
            assert isinstance(policy, Drafter)
            speculation = Speculation(draft, policy, vocabulary=words, cost=COST)
            written = sum(len(list(speculate(writer, speculation, prompt, TEXT))) - 1 for prompt in prompts)
            tally = speculation.tally
            speed[kind, name] = written / (tally.steps + COST * tally.drafted)
            waste[name] += (tally.drafted - tally.accepted) / written / len(LEVELS)
            rates[kind] = tally.rate

    def best(kind: str) -> float:
        return max(speed[kind, f"fixed_{n}"] for n in FIXED)

    def mean(name: str) -> float:
        return sum(speed[kind, name] for kind in LEVELS) / len(LEVELS)

    return {
        **{kind: speed[kind, "ours"] for kind in LEVELS},
        **{f"{kind}_best_95": 0.95 * best(kind) for kind in LEVELS},
        **{"mean": mean("ours"), "mean_best": max(mean(f"fixed_{n}") for n in FIXED)},
        **{f"waste{name.removeprefix('fixed').removeprefix('ours')}": value for name, value in waste.items()},
        **{f"alpha_{kind}": rate for kind, rate in rates.items()},
        **{f"{kind}_{n}": speed[kind, f"fixed_{n}"] for kind in LEVELS for n in FIXED},
    }
