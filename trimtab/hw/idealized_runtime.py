"""Idealized runtime: a prompt's time and a written token's, fitted on a few runs that nothing disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.core.device import Cost, Device, Work
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Pricer
from trimtab.parts.counting import counted


@dataclass(frozen=True)
class Run:
    """One run of a model: a prompt is read, and tokens are written one after the other.

    Fields:
        prompt: tokens of the prompt.
        outputs: tokens written, the first of which comes with the prompt.
        seconds: of all of it.
    """

    prompt: int
    outputs: int
    seconds: float = 0.0


@dataclass(frozen=True)
class IdealizedRuntime(Pricer):
    """Price a run of a language model as if nothing else ran, by two parts that a few isolated runs tell:

        runtime(p, o) = f(p) + g (o - 1)
        f, g: computing (operations / peak) + reading (weights + cache) / bandwidth of one forward

    with the forward of p tokens for f, where computing outweighs, and of one token for g, where reading does. `fitted`
    finds the two numbers of a model.

    Fields:
        computing, reading: times as long as at the peak; the defaults are a machine that always reaches it.
        low, high: measured to fitted seconds of the best and of the worst run that was fitted.

    Args of `price`:
        work: one forward; device: a profile, as `trimtab bench` measures it.

    Raises:
        UserError: the profile has neither a level of the work nor fp32.

    Reference: Narayanan et al. 2023, "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer
        APIs", arXiv:2305.02440, sections 3 and 4.
    Departures: the paper reads f off a table of some 30 measured prompts and takes one g for all lengths; here both
        have one form in the counted work, so that two lengths of prompts are enough and a written token costs more
        after a longer text. What a call costs beside its work goes into the two numbers. The variants that count
        accelerators are left out.

    >>> from trimtab.core.device import Kernel, Product
    >>> from trimtab.core.level import Dense
    >>> flat, row = ((1 << 20, 4e10), (1 << 28, 4e10)), Kernel("linear", "bf16", 1, "vnni", 0.0, 0.0, 0.5, 0.5)
    >>> device = Device("a", 2, 1 << 33, 2, "vnni", {"l3": 1 << 25}, flat, ((1 << 24, 0.0),), {"fp32": 1e12}, (row,))
    >>> work, true = Work((Product(Dense("bf16"), 1000, 1000),)), IdealizedRuntime(2.0, 4.0)
    >>> runs = [Run(p, o, true.runtime(work, device, p, o).mid) for p, o in ((8, 1), (8, 16), (512, 1))]
    >>> found = IdealizedRuntime.fitted(work, device, runs)
    >>> round(found.computing, 3), round(found.reading, 3), round(found.high, 3)
    (2.0, 4.0, 1.0)
    """

    computing: float = 1.0
    reading: float = 1.0
    low: float = 1.0
    high: float = 1.0

    card = Card(
        "idealized-runtime",
        catalogue=(373,),
        paper="arXiv:2305.02440",
        claim="A few isolated runs give a model's time for any prompt and text, and rank models as isolation does.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"linear", "head", "embedding"}),
    )

    def price(self, work: Work, device: Device) -> Cost:
        """Seconds of one forward, and the most bytes that it holds."""
        counts = counted(work, device)
        mid = self.computing * counts.arithmetic + self.reading * counts.reading
        return Cost(mid * min(1.0, self.low), mid, mid * max(1.0, self.high), counts.held_bytes)

    def runtime(self, work: Work, device: Device, prompt: int, outputs: int) -> Cost:
        """Seconds of a whole run, and the most bytes that it holds.

        Args:
            work: a forward of the model; its tokens and context are not looked at.
            prompt, outputs: tokens read and written, at least one of either.
        """
        forwards = _forwards(work, Run(prompt, outputs))
        return sum((self.price(forward, device) for forward in forwards), Cost(0.0, 0.0, 0.0))

    @staticmethod
    def fitted(work: Work, device: Device, runs: Sequence[Run]) -> IdealizedRuntime:
        """The method with a model's numbers: of the least squared relative error, neither below zero.

        Args:
            work: a forward of the model.
            runs: isolated ones, of two lengths of prompts and two of texts at least.

        Raises:
            UserError: there are too few runs to tell the two numbers, or one took no time.
        """
        import numpy as np
        from scipy.optimize import nnls

        if len({r.prompt for r in runs}) < 2 or len({r.outputs for r in runs}) < 2:
            said = ", ".join(f"{r.prompt} read and {r.outputs} written" for r in runs) or "none"
            raise UserError(
                f"a fit needs runs of two lengths of prompts and two of texts, and has {said}; measure more"
            )
        if not all(r.seconds > 0 for r in runs):
            raise UserError("a run that took no time says nothing; measure it again")
        terms = np.zeros((len(runs), 2))
        for row, run in zip(terms, runs, strict=True):
            for forward in _forwards(work, run):
                counts = counted(forward, device)
                row += (counts.arithmetic, counts.reading)
        seconds = np.array([run.seconds for run in runs])
        relative = terms / seconds[:, None]
        scale = np.linalg.norm(relative, axis=0)
        scale[scale == 0] = 1.0
        found = nnls(relative / scale, np.ones(len(runs)))[0] / scale
        ratios = seconds / np.maximum(terms @ found, 1e-300)
        first, second = map(float, found)
        return IdealizedRuntime(first, second, low=float(ratios.min()), high=float(ratios.max()))


def _forwards(work: Work, run: Run) -> list[Work]:
    if run.prompt < 1 or run.outputs < 1:
        raise UserError(
            f"a run of {run.prompt} tokens read and {run.outputs} written was asked for; give at least one of either"
        )
    read = replace(work, tokens=run.prompt, context=0)
    return [read, *(replace(work, tokens=1, context=run.prompt + i) for i in range(run.outputs - 1))]
