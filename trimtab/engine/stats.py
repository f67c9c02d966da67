"""Statistics of sites, all that a step asks for in one pass over a block; linears that read one tensor share what is
collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.core.site import Site

INPUT_STATS = frozenset({"gram", "mean", "absmean"})


def rows_of(x: Tensor, module: nn.Module, path: str) -> Tensor:
    """A module's input as rows `[n, in]` fp32; a convolution's is unfolded into patches."""
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise NotImplementedError(
                f"{path}: statistics of a convolution with padding {module.padding_mode}/{module.padding}"
            )
        patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1]).float()
    return x.reshape(-1, x.shape[-1]).float()


class Collector:
    """Sums of what the sites asked for, over every forward while it is attached."""

    def __init__(
        self, sites: Iterable[Site], siblings: Iterable[tuple[str, ...]], wanted: Mapping[str, Iterable[str]]
    ) -> None:
        self.wanted = {s.path: INPUT_STATS & set(wanted.get(s.path, ())) for s in sites}
        self.sites = {s.path: s for s in sites if self.wanted[s.path] and gathers(s)}
        self.leader = {p: g[0] if g[0] in self.sites else p for g in siblings for p in g if p in self.sites}
        for path, leader in list(self.leader.items()):
            self.wanted[leader] = self.wanted[leader] | self.wanted[path]
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.rows: dict[str, int] = {}

    def _hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = rows_of(args[0].detach(), module, site.path)
            sums = self.sums.setdefault(site.path, {})
            self.rows[site.path] = self.rows.get(site.path, 0) + len(x)
            for name in self.wanted[site.path]:
                if name == "gram":
                    sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
                else:
                    part = x.sum(0) if name == "mean" else x.abs().sum(0)
                    sums[name] = sums[name].add_(part) if name in sums else part

        return hook

    def attached(self, model: nn.Module) -> Any:
        """A context in which forwards of the model are counted."""
        import contextlib

        @contextlib.contextmanager
        def attach() -> Any:
            leaders = [s for p, s in self.sites.items() if self.leader.get(p, p) == p]
            handles = [model.get_submodule(s.path).register_forward_pre_hook(self._hook(s)) for s in leaders]
            try:
                yield self
            finally:
                for handle in handles:
                    handle.remove()

        return attach()

    def result(self) -> dict[str, dict[str, Tensor]]:
        """path -> statistic -> tensor, means over rows; the sums are used up.

        Grams are handed out transposed, the same matrix column by column: who turns both sides of one copies one less.
        """
        means = {p: {k: v.div_(self.rows[p]) for k, v in sums.items()} for p, sums in self.sums.items()}
        for stats in means.values():
            stats |= {k: v.mT for k, v in stats.items() if k == "gram"}
        self.sums = {}
        return {p: means[leader] for p in self.sites if (leader := self.leader.get(p, p)) in means}


def collect(stream: Any, wanted: Mapping[str, Iterable[str]], run: Callable[[], Any]) -> dict[str, dict[str, Tensor]]:
    """What a stream's sites ask for by path, over the forwards of `run`, which is left out where none asks for any."""
    collector = Collector([stream.sites[p] for p in wanted if p in stream.sites], stream.map.siblings, wanted)
    if collector.sites:
        with collector.attached(stream.model):
            run()
    return collector.result()


def gathers(site: Site) -> bool:
    """Whether input statistics can be collected at the site: not for embeddings, nor grouped convolutions, whose
    patches mix groups.
    """
    return site.kind in ("linear", "head") or (site.kind == "conv" and site.groups == 1 and len(site.shape) == 4)
