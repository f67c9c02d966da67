"""Speculative decoding end to end: seconds with a draft over seconds without, the same prompts in turns, one process.

The target is the shipped language model, its feed-forward layers padded by channels without effect, so that a step
reads as much as that of a model of 33 million weights (`--width`) and the texts stay its own. A stream of prompts goes
on for 48 tokens each, first code, then prose, then tables, each from one document, by turns the likeliest token and
drawn at temperature 1; `adaptive-drafting` says how many are drafted. The drafts:

- `offline`: its first block, distilled on code before the stream;
- `online`: the same, which learns from what is corrected after each text (osd). Its seconds are counted apart, as
  `learning`, for a server takes them where nobody waits, and `ratio_with_learning` has them in;
- `nested`: the narrowest sub-network of the model after a short training by MatFormer, whose widest is the target then.

Greedy texts with a draft are compared with those without. Intervals are over the seeds, 95 %. A JSON line is printed
and appended to records/benchmarks/speculation.jsonl.

    python benchmarks/speculation.py             # six minutes, 2 GB of memory
    python benchmarks/speculation.py --small     # a minute or two, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import rounded

PROMPT, TEXT, BLOCKS, NESTED = 24, 48, 1, 1 / 8
MODES = {"greedy": 0.0, "sampled": 1.0}


def nested_models(seed: int, steps: int) -> tuple[Any, Any]:
    """The widest and the narrowest network of the shipped model, tuned by MatFormer."""
    from trimtab.elasticity import cut_model
    from trimtab.nas.matformer import MatFormer

    bench = cut_model("pocket-lm", seed, length=64, batch=4, rate=3e-4, decay=0.0)
    net = bench.trained("matformer", steps, sort=True)
    widths = MatFormer().offer(bench.domain)
    narrow = {name: (min(places),) for name, places in widths.items()}
    return net.extract(bench.domain.largest()), net.extract(bench.domain.largest(narrow))


class Race:
    """A target with and without drafts, text by text in turns; seconds, tallies and whether greedy texts are the same.

    Args:
        drafts: name -> module; `online` learns.
    """

    def __init__(self, target: Any, drafts: dict[str, Any], width: int) -> None:
        from trimtab.core.method import Drafter, method
        from trimtab.distill.osd import OSD
        from trimtab.engine.learning import INTERVAL, NAME, RANK, RATE, Learner
        from trimtab.engine.session import Runtime
        from trimtab.engine.speculation import Speculation, Tally, relative_cost
        from trimtab.tasks.drafts import padded

        room = PROMPT + TEXT
        runtime, policy = Runtime(padded(target, width)), method("adaptive-drafting")
        assert isinstance(policy, Drafter)
        self.plain, self.writer = runtime.open(room), runtime.open(room)
        self.learner: Any = None
        self.runs: dict[str, Any] = {}
        self.costs: dict[str, float] = {}
        for name, module in drafts.items():
            own = Runtime(module)
            bank = own.bank(RANK) if name == "online" else None
            draft = own.open(room, bank=bank)
            if bank is not None:
                self.learner = Learner(module, bank, OSD(), rate=RATE, interval=INTERVAL)
                draft.use(0, NAME)
            self.costs[name] = relative_cost(own, runtime)
            words, listener = target.config.vocab_size, self.learner if bank is not None else None
            self.runs[name] = Speculation(draft, policy, vocabulary=words, cost=self.costs[name], listener=listener)
        self.seconds = {(name, mode): 0.0 for name in ("plain", *drafts) for mode in MODES}
        self.tallies = {(name, mode): Tally() for name in drafts for mode in MODES}
        self.same = dict.fromkeys(drafts, 0)
        self.texts, self.learning = 0, 0.0

    def go(self, prompt: list[int], mode: str, seed: int) -> None:
        """One text."""
        from trimtab.engine.session import generate
        from trimtab.engine.speculation import speculate

        options: dict[str, Any] = {"temperature": MODES[mode], "seed": seed}
        start = time.perf_counter()
        expected = list(generate(self.plain, prompt, TEXT, **options))
        self.seconds["plain", mode] += time.perf_counter() - start
        for name, run in self.runs.items():
            run.tally = self.tallies[name, mode]
            start = time.perf_counter()
            text = list(speculate(self.writer, run, prompt, TEXT, **options))
            self.seconds[name, mode] += time.perf_counter() - start
            self.same[name] += mode == "greedy" and text == expected
        self.texts += mode == "greedy"
        if self.learner is not None:
            start = time.perf_counter()
            self.learner.work()
            self.learning += time.perf_counter() - start

    def found(self) -> dict[str, float]:
        """What came of it."""
        values: dict[str, float] = {}
        for (name, mode), tally in self.tallies.items():
            values[f"{name}_{mode}_acceptance"] = tally.rate
            values[f"{name}_{mode}_tokens_a_step"] = tally.per_step
            values[f"{name}_{mode}_ratio"] = self.seconds[name, mode] / self.seconds["plain", mode]
        for name, same in self.same.items():
            values |= {f"{name}_same": same / self.texts, f"{name}_cost": self.costs[name]}
        if self.learner is not None:
            plain, ours = (sum(self.seconds[name, mode] for mode in MODES) for name in ("plain", "online"))
            values["online_ratio_with_learning"] = (ours + self.learning) / plain
            values |= {"learning_seconds_a_text": self.learning / (2 * self.texts), "updates": self.learner.updates}
        return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one seed, few texts and steps; nothing is recorded")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the kernels")
    parser.add_argument("--width", type=int, default=6144, help="channels of a feed-forward layer of the target")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()

    import copy

    import torch

    from trimtab.catalogue import keep_benchmark
    from trimtab.core.claim import Check, judge
    from trimtab.kernels.native import native
    from trimtab.loading import load
    from trimtab.tasks.drafts import distilled, topics

    kernels = native()
    assert kernels is not None, "no kernels were compiled, so there is nothing to measure"
    kernels.set_threads(asked.threads)
    torch.set_num_threads(1)  # as in a server: torch's threads would wait on the cores that the kernels need next
    load_at_start, count, steps, seeds = os.getloadavg()[0], 20, 120, asked.seeds
    if asked.small:
        count, steps, seeds = 4, 20, 1
    loaded = load("pocket")
    rows = []
    for seed in range(seeds):
        stream = topics(loaded.tokenizer, seed, count, PROMPT, within=1)
        draft = distilled(loaded.model, loaded.tokenizer, seed, blocks=BLOCKS, steps=steps)
        whole, narrow = nested_models(seed, steps // 2)
        race = Race(loaded.model, {"offline": draft, "online": copy.deepcopy(draft)}, asked.width)
        nested = Race(whole, {"nested": narrow}, asked.width)
        for topic, prompts in stream.items():
            for i, prompt in enumerate(prompts):
                race.go(prompt, tuple(MODES)[i % 2], i)
                if i < count // 2:
                    nested.go(prompt, tuple(MODES)[i % 2], i)
            print(seed, topic, {name: rounded(value) for name, value in race.found().items()}, file=sys.stderr)
        rows.append({**race.found(), **nested.found()})
    summary = {}
    for name in rows[0]:
        judged = judge(Check(name, name, "<", 1.0), rows)
        summary[name] = [rounded(judged.left), rounded(judged.half_width)]
    gains = {f"gain_{mode}": (f"online_{mode}_acceptance", f"offline_{mode}_acceptance") for mode in MODES}
    for name, (ours, theirs) in gains.items():
        judged = judge(Check(name, ours, ">", theirs), rows)
        summary[name] = [rounded(judged.difference), rounded(judged.half_width)]
    row: dict[str, Any] = {
        **{"benchmark": "speculation", "width": asked.width, "threads": asked.threads, "prompt": PROMPT, "text": TEXT},
        **{"texts_a_topic": count, "steps": steps, "seeds": seeds, "mean_and_half_width": summary},
        **{"values": [{name: rounded(value) for name, value in row.items()} for row in rows]},
        "load_at_start": round(load_at_start, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
