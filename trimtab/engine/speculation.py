"""Speculative decoding: a draft writes a few tokens ahead, the target checks them all in one step, and what comes out
is what the target alone would write: the same tokens where it takes the likeliest, the same distribution where it
samples.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.method import Drafter
from trimtab.core.view import Drafting
from trimtab.engine.drawing import draw, drawn, probabilities
from trimtab.engine.session import Timing, Writer

if TYPE_CHECKING:
    from trimtab.engine.session import Kept, Runtime

PAST = 64  # steps of a text that a policy sees


@dataclass
class Text:
    """A text that goes on.

    Fields:
        tokens: all of it; the target has taken all but the last.
        left: tokens that it may still get.
        temperature, top_p, rng: see `engine.drawing.draw`.
    """

    tokens: list[int]
    left: int
    rng: np.random.Generator
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Went:
    """How a text went on in a step.

    Fields:
        tokens: those that were accepted, and one of the target's own.
        drafted: how many were proposed.
        logits: the target's, `[tokens, vocabulary]`, from which each was taken or checked; they hold until the
            next step.
    """

    tokens: list[int]
    drafted: int
    logits: np.ndarray

    @property
    def accepted(self) -> int:
        """How many of the proposed ones stay."""
        return len(self.tokens) - 1

    @property
    def corrected(self) -> bool:
        """The target's own token stands in the place of a proposed one."""
        return self.accepted < self.drafted


@dataclass
class Tally:
    """What drafting came to: steps of the target, tokens that were proposed, those of them that it looked at, which end
    with the first that it corrects, and those that it accepted.
    """

    steps: int = 0
    drafted: int = 0
    looked: int = 0
    accepted: int = 0

    def add(self, went: Went) -> None:
        """One more step of a text."""
        self.steps += 1
        self.drafted += went.drafted
        self.looked += went.accepted + went.corrected
        self.accepted += went.accepted

    @property
    def rate(self) -> float:
        """The acceptance rate: accepted of the tokens that the target looked at."""
        return self.accepted / max(1, self.looked)

    @property
    def per_step(self) -> float:
        """Tokens that a step of the target gave: one is its own."""
        return 1 + self.accepted / max(1, self.steps)


class Listener(Protocol):
    """Learns from what the target corrects."""

    def corrected(self, sequence: int, position: int, logits: np.ndarray) -> None:
        """The target's logits after the first `position` tokens of a text, where the draft had proposed another one."""

    def ended(self, sequence: int, tokens: Sequence[int]) -> None:
        """A text has ended, as these tokens."""


def judge(
    logits: np.ndarray,
    proposed: Sequence[int],
    shares: Sequence[np.ndarray],
    rng: np.random.Generator,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[int]:
    """The tokens that a text goes on by: the first of the proposed ones, and one of the target's own.

    A token x, drawn from q, is accepted with probability min(1, p(x) / q(x)); at the first that is not, the target's
    own is drawn from max(0, p - q), scaled to a sum of 1. At temperature 0 both put everything on one token.

    Args:
        logits: the target's, `[proposed + 1, vocabulary]`.
        shares: q of each proposed token; not looked at where the temperature is 0.

    Reference: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.

    >>> rows = np.log(np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]))
    >>> judge(rows, [1, 1], [], np.random.default_rng(0))
    [1, 0]
    """
    for i, token in enumerate(proposed):
        if temperature <= 0:
            if (best := int(logits[i].argmax())) != token:
                return [*proposed[:i], best]
            continue
        p, q = probabilities(logits[i], temperature, top_p), shares[i]
        if rng.random() * q[token] >= p[token]:
            rest = np.maximum(p - q, 0.0)
            return [*proposed[:i], drawn(rest if rest.any() else p, rng)]
    return [*proposed, draw(logits[len(proposed)], rng, temperature, top_p)]


class Speculation:
    """A draft, and how far it has read each of the texts.

    Args:
        draft: writes ahead; with a sequence for each of the target's.
        policy: says how many tokens it proposes.
        vocabulary: the target's, of which the draft's may be a little more or less.
        cost: of a step of the draft, as a share of the target's.
        listener: is told of corrections; None: nobody is.
    """

    def __init__(
        self,
        draft: Writer,
        policy: Drafter,
        *,
        vocabulary: int,
        cost: float = 0.1,
        listener: Listener | None = None,
    ) -> None:
        self.draft, self.policy, self.vocabulary, self.cost, self.listener = draft, policy, vocabulary, cost, listener
        self.held: dict[int, int] = {}
        self.past: dict[int, deque[tuple[int, int]]] = {}
        self.tally = Tally()

    def step(self, target: Writer, texts: Mapping[int, Text], spare: int) -> dict[int, Went]:
        """One step of the target, in which each of these texts goes on by one token or more.

        Args:
            spare: rows of the step besides one for each text.
        """
        spare = min(spare, target.most - len(texts))
        counts = {}
        for sequence, text in texts.items():
            counts[sequence] = self._count(target, sequence, text, spare)
            spare -= counts[sequence]
        proposed, shares = self._propose({s: texts[s] for s, count in counts.items() if count}, counts)
        pieces = {sequence: [text.tokens[-1], *proposed.get(sequence, ())] for sequence, text in texts.items()}
        logits, first, found = target.score(pieces).numpy(), 0, {}
        for sequence, text in texts.items():
            rows = logits[first : first + len(pieces[sequence])]
            first += len(rows)
            ahead = proposed.get(sequence, [])
            tokens = judge(rows, ahead, shares.get(sequence, ()), text.rng, text.temperature, text.top_p)
            found[sequence] = self._settle(target, sequence, text, Went(tokens, len(ahead), rows[: len(tokens)]))
        return found

    def forget(self, sequence: int, tokens: Sequence[int] = ()) -> None:
        """A text has ended; what it was is told to who listens."""
        self.past.pop(sequence, None)
        if self.held.pop(sequence, 0):
            self.draft.forget(sequence)
        if self.listener and tokens:
            self.listener.ended(sequence, tokens)

    def _count(self, target: Writer, sequence: int, text: Text, spare: int) -> int:
        length, window = len(text.tokens), target.cache.window
        room = min(spare, text.left - 1, target.context - length, self.draft.context - length)
        if window:  # what is packed stays packed, so that no window may end among tokens that can be refused
            room = min(room, window - 1 - (length - 1) % window)
        if room <= 0:
            return 0
        return min(room, self.policy.decide(Drafting(room, tuple(self.past.get(sequence, ())), self.cost)))

    def _propose(
        self, texts: Mapping[int, Text], counts: Mapping[int, int]
    ) -> tuple[dict[int, list[int]], dict[int, list[np.ndarray]]]:
        proposed: dict[int, list[int]] = {sequence: [] for sequence in texts}
        shares: dict[int, list[np.ndarray]] = {sequence: [] for sequence in texts}
        pieces: dict[int, list[int]] = {}
        for sequence, text in texts.items():
            unread = text.tokens[self.held.get(sequence, 0) :]
            if len(unread) > 2:  # a prompt, or what was written while nothing was drafted
                self.draft.extend(sequence, unread[:-1])
                unread = unread[-1:]
            pieces[sequence] = unread
        while pieces:
            logits = self.draft.advance(pieces).numpy()[:, : self.vocabulary]
            going, pieces = list(pieces), {}
            for sequence, row in zip(going, logits, strict=True):
                text = texts[sequence]
                if text.temperature <= 0:
                    token = int(row.argmax())
                else:
                    q = probabilities(row, text.temperature, text.top_p)
                    token = drawn(q, text.rng)
                    shares[sequence].append(np.pad(q, (0, self.vocabulary - len(q))))
                proposed[sequence].append(token)
                if len(proposed[sequence]) < counts[sequence]:
                    pieces[sequence] = [token]
        for sequence, text in texts.items():
            self.held[sequence] = len(text.tokens) + len(proposed[sequence]) - 1
        return proposed, shares

    def _settle(self, target: Writer, sequence: int, text: Text, went: Went) -> Went:
        length = len(text.tokens) + went.accepted
        if went.corrected:
            target.forget(sequence, length)
            if self.held[sequence] > length:
                self.held[sequence] = length
                self.draft.forget(sequence, length)
            if self.listener:
                self.listener.corrected(sequence, length, went.logits[-1])
        self.past.setdefault(sequence, deque(maxlen=PAST)).append((went.drafted, went.accepted))
        self.tally.add(went)
        return went


def speculate(
    target: Writer,
    speculation: Speculation,
    tokens: Sequence[int],
    limit: int,
    *,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Tokens one after the other, as `engine.session.generate` gives them, several of which may come of one step."""
    timing = timing or Timing()
    timing.prompt = len(tokens)
    target.forget(0)
    speculation.forget(0)
    text = Text(list(tokens), limit, np.random.default_rng(seed), temperature)
    start = time.perf_counter()
    came = [draw(target.extend(0, tokens).numpy(), text.rng, temperature)]
    timing.prefill = time.perf_counter() - start
    try:
        while True:
            for token in came:
                text.tokens.append(token)
                text.left -= 1
                timing.tokens += 1
                if token in stop:
                    return
                yield token
                if not text.left:
                    return
            start = time.perf_counter()
            came = speculation.step(target, {0: text}, text.left)[0].tokens
            timing.decode += time.perf_counter() - start
    finally:
        speculation.forget(0, text.tokens)


def relative_cost(draft: Runtime | Kept, target: Runtime | Kept) -> float:
    """What a step of the draft costs as a share of the target's, where both are read from memory once a step."""
    if draft.form is None or target.form is None:
        return 0.1
    sizes = [runtime.weights.nbytes(runtime.form.sites) for runtime in (draft, target) if runtime.form]
    return sizes[0] / max(1, sizes[1])


def check_vocabulary(draft: Mapping[str, int], target: Mapping[str, int], name: str) -> None:
    """Refuse a draft that writes other tokens than the target.

    Raises:
        UserError: it says how many differ.
    """
    if draft == target:
        return
    other = len(draft.items() ^ target.items())
    raise UserError(
        f"the draft {name} has {len(draft)} tokens and the model {len(target)}, and {other} of them are not in both; "
        "give a draft with the model's own tokenizer"
    )
