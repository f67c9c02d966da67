"""A draft that learns while it serves: low-rank factors beside its linears are distilled from what the target
corrected, a piece of text at a time, and the draft that runs takes them over between two steps.

The draft's own weights stay as they are. What was learned is in memory alone: it follows the texts of the last minutes,
and of users' texts nothing is to be left behind.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.method import Objective
from trimtab.engine.adapters import Bank, half
from trimtab.engine.session import lent
from trimtab.formats.peft import Adapter
from trimtab.parts.lowrank_delta import LowRank, gaussian

NAME = "learned"  # of the factors in the draft's bank
RANK, RATE, INTERVAL = 16, 5e-3, 2  # where nobody says; AdamW's rate is for factors, not for whole weights
LONGEST, SHORTEST = 256, 32  # tokens of a piece
FLOOR = -6e4  # of a stored logit below the largest, for halves end there


@dataclass
class Piece:
    """A run of a text's tokens, the places in it after which the target corrected, and its logits there."""

    tokens: list[int]
    places: list[int]
    logits: np.ndarray

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.logits.nbytes + 8 * (len(self.tokens) + len(self.places))


class Learner:
    """Hears what the target corrects and trains factors of the draft on it. A loss that is no number ends that, and the
    draft goes on with the factors that it has.

    Args:
        module: the draft; gives `logits` for `input_ids`. Its weights are frozen.
        bank: of the draft, whose sequences use the adapter `NAME`.
        objective: the loss, of logits `[corrections, vocabulary]` of either.
        rate: of AdamW, which takes a step for each piece.
        interval: texts, or pieces of long ones, from one update of the draft that runs to the next.
        rank: of the factors.
        most: bytes of logits and tokens that wait to be learned from; the oldest go first.
        share: of the time of steps in between that learning takes where requests run.
        longest: seconds of a piece then, about.
        context: tokens of a piece, at most.
    """

    def __init__(
        self,
        module: nn.Module,
        bank: Bank,
        objective: Objective,
        *,
        rate: float,
        interval: int = 1,
        rank: int = RANK,
        most: int = 64 << 20,
        share: float = 0.1,
        longest: float = 0.05,
        context: int = LONGEST,
        seed: int = 0,
    ) -> None:
        module.requires_grad_(False)
        if any(parameter.is_meta for parameter in module.parameters()):
            raise UserError("the draft gave its weights to the kernels, so it cannot learn; load it again for that")
        self.module, self.bank, self.objective = module, bank, objective
        self.interval, self.most = interval, most
        self.share, self.longest, self.credit = share, longest, 0.0
        self.context = self.length = min(context, LONGEST)
        rng = torch.Generator().manual_seed(seed)
        self.factors: dict[str, LowRank] = {}
        for path, matrix in bank.matrices.items():
            least = min(rank, matrix.rows, matrix.cols)
            down, up = gaussian(least, matrix.cols, rng), torch.zeros(matrix.rows, least)
            self.factors[path] = LowRank(module.get_submodule(path), down, up, 1.0)
        trained = [p for factor in self.factors.values() for p in factor.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self.heard: dict[int, list[tuple[int, np.ndarray]]] = {}
        self.buffer: deque[Piece] = deque()
        self.nbytes = self.learned = self.updates = 0
        self.stopped = ""
        self._publish()

    # ---- what it hears

    def corrected(self, sequence: int, position: int, logits: np.ndarray) -> None:
        """Keep the target's logits after the first `position` tokens of a text, in halves."""
        kept = np.maximum(logits - logits.max(), FLOOR).astype(np.float16)
        while self.buffer and self.nbytes + kept.nbytes > self.most:
            self.nbytes -= self.buffer.popleft().nbytes
        if not self.stopped and self.nbytes + kept.nbytes <= self.most:
            self.heard.setdefault(sequence, []).append((position, kept))
            self.nbytes += kept.nbytes

    def ended(self, sequence: int, tokens: Sequence[int]) -> None:
        """Cut a text into pieces, each with what was corrected in it and half a piece or more before that."""
        heard = self.heard.pop(sequence, [])
        self.nbytes -= sum(logits.nbytes for _, logits in heard)
        found = [pair for pair in heard if pair[0] <= len(tokens)]  # a text may end among the tokens of a step
        pieces: list[Piece] = []
        while found:
            end = found[-1][0]
            start = max(0, end - self.length)
            mine = [pair for pair in found if pair[0] > start + (self.length // 2 if start else 0)]
            found = found[: len(found) - len(mine)]
            places = [position - start - 1 for position, _ in mine]
            pieces.append(Piece(list(tokens[start:end]), places, np.stack([rows for _, rows in mine])))
        self.buffer.extend(reversed(pieces))
        self.nbytes += sum(piece.nbytes for piece in pieces)

    # ---- what it makes of it

    def work(self, seconds: float = float("inf")) -> None:
        """Learn from what there is, for so long at most."""
        until = time.perf_counter() + seconds
        while self.buffer and time.perf_counter() < until:
            self.step()

    def between(self, seconds: float, idle: bool) -> None:
        """After a step of the target, which took so long: a piece where nobody waits, else one where the share of the
        time allows it.
        """
        self.credit = min(self.credit + self.share * seconds, self.longest)
        if self.buffer and (idle or self.credit > 0):
            spent = self.step()
            self.credit -= 0 if idle else spent

    def step(self) -> float:
        """Learn from a piece; the seconds that it took."""
        start, piece = time.perf_counter(), self.buffer.popleft()
        self.nbytes -= piece.nbytes
        if self._train(piece):
            self.learned += 1
            if self.learned % self.interval == 0 and self._publish():
                self.updates += 1
        spent = time.perf_counter() - start
        if spent > self.longest:
            self.length = max(min(SHORTEST, self.context), min(self.length, len(piece.tokens)) // 2)
        elif len(piece.tokens) >= self.length and spent < self.longest / 2:
            self.length = min(self.context, 2 * self.length)
        return spent

    def warm(self) -> None:
        """Take what a step needs, so that it is counted: a pass over the longest piece that changes nothing, and tells
        how long pieces may be.
        """
        start = time.perf_counter()
        logits = self._logits([0] * self.context)
        logits.sum().backward()  # type: ignore[no-untyped-call]
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                parameter.grad.zero_()
        self.optimiser.step()
        share = self.longest / (time.perf_counter() - start)
        self.length = max(min(SHORTEST, self.context), min(self.context, int(share * self.context)))

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        with lent(self.module, {path: factor.forward for path, factor in self.factors.items()}):
            return self.module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def _train(self, piece: Piece) -> bool:
        """Take a step on a piece, if its numbers are sound."""
        ours, theirs = self._logits(piece.tokens)[piece.places].float(), torch.from_numpy(piece.logits).float()
        width = min(ours.shape[1], theirs.shape[1])
        loss = self.objective.loss(ours[:, :width], theirs[:, :width], None)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not bool(loss.isfinite() & norm.isfinite()):
            self._stop(f"its loss was {float(loss.detach()):.3g} and its gradient's length {float(norm):.3g}")
            return False
        self.optimiser.step()
        return True

    def _publish(self) -> bool:
        """Give the draft that runs the factors as they are, if they can be held."""
        try:
            made = {path: (half(f.a.detach()), half(f.b.detach())) for path, f in self.factors.items()}
            self.bank.add(NAME, Adapter(made, "what the draft learned", {}))
        except UserError as error:
            self._stop(str(error))
            return False
        return True

    def _stop(self, why: str) -> None:
        print(f"the draft learns no more, and goes on as it was before: {why}", file=sys.stderr)
        self.stopped, self.nbytes = why, 0
        self.buffer.clear()
        self.heard.clear()
