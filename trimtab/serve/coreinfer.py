"""CoreInfer: the neurons that a prompt uses most write the text behind it, and the others rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Selector
from trimtab.core.view import Prompted
from trimtab.parts.clusters import nearest, weighted_kmeans

GUIDES = ("stability", "similarity")


@dataclass(frozen=True)
class Groups:
    """Texts of a sample, sorted by their core neurons.

    Fields:
        centres: means of the groups' codes, `[groups, neurons]`; a text's code is 1 at its core neurons of one layer.
        cores: of each group, the core neurons of each layer.
    """

    centres: Tensor
    cores: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class CoreInfer(Selector):
    """Of each feed-forward layer the neurons stay that are core neurons of most of the prompt's tokens.

    The core neurons of a token are the share alpha of its activated neurons (a_n > 0) with the largest a_n; those of a
    sentence are the share beta of all neurons that are core neurons of most of its tokens. With `stability` the
    prompt's own stay. With `similarity` they are those of the group of texts, of a sample, whose core neurons in one
    layer are nearest to the prompt's: groups are k-means clusters of vectors that are 1 at a text's core neurons.

    Args:
        share: beta, of all neurons (authors' code: 0.4).
        token_share: alpha, of a token's activated neurons (authors' code: 0.2).
        guide: `stability`, for prompts that say what follows, or `similarity`, for short ones.
        signed: only what is above zero is activated, as in the paper; False: |a_n| counts, and all are activated.
        groups: clusters of the sample's texts (authors' code: at least 4, by the elbow).

    Raises:
        UserError: a share that is not above 0 and at most 1, another guide, or fewer than one group.

    Reference: Wang et al. 2024, arXiv:2410.18311, sections 3 and 4.
    Departures: neurons that are core neurons of equally many tokens are told apart by the sum of what counts of them,
        so that the share is met exactly, whatever the prompt. Alpha is of each token's own number of activated
        neurons, where the authors' code takes the tokens' mean. All layers are treated alike, where the code leaves the
        first six and the last five of 32 whole. The number of groups is given, codes have the share beta, and the
        layer that is looked at is at 25 of 32 of the depth, as in the code.

    >>> given = torch.tensor([[3.0, 2.0, -5.0, 1.0], [4.0, 0.5, 1.0, -1.0]])
    >>> CoreInfer(share=0.5, token_share=0.5).decide(Prompted((given,)))
    (tensor([0, 1]),)
    >>> CoreInfer(share=0.5, token_share=0.5, signed=False).decide(Prompted((given,)))
    (tensor([0, 2]),)
    """

    share: float = 0.4
    token_share: float = 0.2
    guide: str = "stability"
    signed: bool = True
    groups: int = 4

    card = Card(
        "coreinfer",
        catalogue=(302,),
        paper="arXiv:2410.18311",
        claim="Text goes on behind a prompt with 40 % of the neurons, chosen by the prompt, at a perplexity near that "
        "of all and below that of as many neurons chosen once for all texts.",
        requires=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
    )

    def decide(self, view: Prompted) -> tuple[Tensor, ...]:
        """The neurons that stay, ascending, of each layer."""
        self._check()
        tallies = [self.tally(given) for given in view.activations]
        if self.guide == "stability":
            return tuple(map(self.core, tallies))
        assert isinstance(view.prepared, Groups)
        code = self._code(tallies)
        group, _ = nearest(code[None], torch.ones_like(code), view.prepared.centres)
        return view.prepared.cores[int(group)]

    def prepare(self, texts: Iterable[Sequence[Tensor]]) -> Groups | None:
        """The groups of a sample; none where prompts are judged by themselves."""
        self._check()
        if self.guide == "stability":
            return None
        tallies = [[self.tally(given) for given in text] for text in texts]
        codes = torch.stack([self._code(text) for text in tallies])
        rng = torch.Generator().manual_seed(0)
        centres = weighted_kmeans(codes, torch.ones_like(codes), min(self.groups, len(codes)), rng=rng)
        group, _ = nearest(codes, torch.ones_like(codes[0]), centres)
        found = group.unique().tolist()
        cores = []
        for number in found:
            members = [text for text, at in zip(tallies, group.tolist(), strict=True) if at == number]
            cores.append(tuple(self.core(torch.stack(layer).sum(0)) for layer in zip(*members, strict=True)))
        return Groups(centres[found], tuple(cores))

    def tally(self, given: Tensor) -> Tensor:
        """Of how many tokens each neuron is a core neuron, and the sum of what counts of it, `[2, neurons]`."""
        level = given.float().clamp_min(0) if self.signed else given.float().abs()
        active = (level > 0).sum(-1, keepdim=True)
        most = (self.token_share * active).long().clamp_min(1)
        place = level.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        core = (place < most) & (level > 0)
        return torch.stack((core.sum(0).double(), level.double().sum(0)))

    def core(self, tally: Tensor) -> Tensor:
        """The core neurons of a tally, ascending."""
        count, total = tally
        order = total.argsort(descending=True, stable=True)
        order = order[count[order].argsort(descending=True, stable=True)]
        return order[: max(1, round(self.share * len(count)))].sort().values

    def _code(self, tallies: Sequence[Tensor]) -> Tensor:
        at = tallies[len(tallies) * 25 // 32]
        return torch.zeros(at.shape[-1]).index_fill_(0, self.core(at), 1.0)

    def _check(self) -> None:
        shares = (self.share, self.token_share)
        if not all(0 < s <= 1 for s in shares) or self.guide not in GUIDES or self.groups < 1:
            raise UserError(
                f"coreinfer was given share={self.share}, token_share={self.token_share}, guide={self.guide!r} and "
                f"groups={self.groups}; shares are above 0 and at most 1, the guide is {' or '.join(GUIDES)}, and "
                "there is at least one group"
            )
