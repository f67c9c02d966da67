"""A recurrent controller of choices: it draws genomes knob by knob, each draw seeing those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.knob import Domain, Genome


class Controller(nn.Module):
    """An LSTM over a domain's knobs: the place that one knob took is what is read at the next.

        p(place of knob i | those before) = softmax(bound tanh(W_i h_i / temperature))

    Args:
        domain: the knobs.
        hidden: size of the state.
        bound, temperature: of the logits.
    """

    def __init__(self, domain: Domain, hidden: int, bound: float = 2.5, temperature: float = 5.0) -> None:
        super().__init__()
        self._domain, self._bound, self._temperature = domain, bound, temperature
        sizes = [len(knob.options) for knob in domain.knobs]
        self._first = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        self._read, self._cell = nn.Embedding(1 + sum(sizes), hidden), nn.LSTMCell(hidden, hidden)
        self._heads = nn.ModuleList(nn.Linear(hidden, size, bias=False) for size in sizes)
        self._recall = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def _steps(self, count: int, places: Tensor | None, rng: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Places `[count, knobs]`, given or drawn; the logarithms of their chances `[count, knobs]`; entropies of the
        same; the last state is left in `state`.
        """
        read = torch.zeros(count, dtype=torch.long)
        state: tuple[Tensor, Tensor] | None = None
        taken, chances, entropies = [], [], []
        for i, head in enumerate(self._heads):
            state = self._cell(self._read(read), state)
            logits = functional.log_softmax(self._bound * torch.tanh(head(state[0]) / self._temperature), 1)
            drawn = torch.multinomial(logits.exp(), 1, generator=rng)[:, 0] if places is None else places[:, i]
            taken.append(drawn)
            chances.append(logits.gather(1, drawn[:, None])[:, 0])
            entropies.append(-(logits.exp() * logits).sum(1))
            read = self._first[i] + drawn
        assert state is not None
        # the last choice has been read, too, so that the state can know all of them
        self.state = self._cell(self._read(read), state)[0]
        return torch.stack(taken, 1), torch.stack(chances, 1), torch.stack(entropies, 1)

    def draw(self, count: int, rng: torch.Generator) -> list[Genome]:
        """Canonical genomes."""
        with torch.no_grad():
            places = self._steps(count, None, rng)[0]
        return [self._domain.canonical(row) for row in places.tolist()]

    def scored(self, genomes: Sequence[Genome]) -> tuple[Tensor, Tensor]:
        """Logarithms of the genomes' chances, and entropies on the way there, `[genomes]`; of knobs that matter."""
        active = torch.tensor([self._domain.active(genome) for genome in genomes])
        _, chances, entropies = self._steps(len(genomes), torch.tensor(genomes), None)
        return (chances * active).sum(1), (entropies * active).sum(1)

    def states(self, genomes: Sequence[Genome]) -> Tensor:
        """The state behind all choices of each genome, `[genomes, hidden]`."""
        self._steps(len(genomes), torch.tensor(genomes), None)
        return self.state

    def forgotten(self, genomes: Sequence[Genome]) -> Tensor:
        """How badly the choices can be read off the state behind them: mean cross entropy over the knobs."""
        state, places = self.states(genomes), torch.tensor(genomes)
        losses = [functional.cross_entropy(recall(state), places[:, i]) for i, recall in enumerate(self._recall)]
        return torch.stack(losses).mean()
