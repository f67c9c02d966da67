"""A small language model with random weights at 4 bits, and random adapters for it: what policies of serving are tried
on, for none of them changes what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from trimtab.core.level import parse_level
from trimtab.core.method import Scheduler, Solver, method
from trimtab.core.traffic import Pages
from trimtab.engine.adapters import Bank, pooled_bytes
from trimtab.engine.books import Books
from trimtab.engine.serving import Order, Service
from trimtab.engine.session import Runtime, generate, map_of
from trimtab.formats.cache import BLOCK
from trimtab.formats.peft import Adapter
from trimtab.kernels.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.core.errors import UserError
    from trimtab.formats.packed import Packed

SIZES: dict[str, Any] = {
    **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 1024},
}


class Counter:
    """The model, ready to serve.

    Args:
        rank: of its adapters, on all linears.
        threads: of the kernels; None: as many as there are.
    """

    def __init__(self, rank: int = 8, seed: int = 0, threads: int | None = None) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        if threads is not None and (kernels := native()) is not None:
            kernels.set_threads(threads)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
        solver = method("rtn")
        assert isinstance(solver, Solver)
        level = parse_level("4b/g32")
        packed: dict[str, Callable[[], Packed]] = {}
        for site in map_of(model).sites:
            if site.kind in ("linear", "head"):
                made = solver.solve(model.get_submodule(site.path).weight, level)
                packed[f"{site.path}.weight"] = _held(made)
        self.runtime, self.rank = Runtime(model, packed, share=True), rank
        assert self.runtime.form is not None
        self.form = self.runtime.form
        self.sizes = {p: (m.rows, m.cols) for p, m in self.form.matrices.items() if m.kind == "linear"}
        self.adapter_bytes = pooled_bytes((rank, cols, rows) for rows, cols in self.sizes.values())
        self.pages = Pages(BLOCK, self.form.cache_bytes(BLOCK))

    def adapter(self, name: str) -> Adapter:
        """The random adapter of that name."""
        rng, factors = torch.Generator().manual_seed(sum(name.encode()) * 7919 % (1 << 31)), {}
        for path, (rows, cols) in self.sizes.items():
            down = torch.randn(self.rank, cols, generator=rng) / cols**0.5
            factors[path] = down, torch.randn(rows, self.rank, generator=rng) / self.rank**0.5
        return Adapter(factors, name, {})

    def service(
        self, policy: Scheduler, pool: int, adapters: Sequence[str] = (), *, places: int = 8, rows: int = 128
    ) -> Service:
        """A service with these adapters known, and none in the pool."""
        bank = self.runtime.bank()
        writer = self.runtime.open(1024, sequences=places, chunk=rows, bank=bank, paged=True)
        books = Books(policy, rows, places, pool, self.pages)
        fetcher = Fetching(self, bank)
        made = Service(writer, books, fetcher, context=1024, vocabulary=self.form.vocabulary, queue=1 << 20)
        for name in adapters:
            made.know(name, self.adapter_bytes)
        return made

    def alone(self, order: Order) -> list[int]:
        """What a request gives by itself."""
        bank = self.runtime.bank()
        if order.adapter is not None:
            bank.add(order.adapter, self.adapter(order.adapter))
        writer = self.runtime.open(1024, bank=bank)
        writer.use(0, order.adapter)
        return list(generate(writer, order.tokens, order.limit))


def _held(packed: Packed) -> Callable[[], Packed]:
    return lambda: packed


class Fetching:
    """Makes adapters in a thread, in the place of reading them."""

    def __init__(self, counter: Counter, bank: Bank) -> None:
        self.counter, self.bank = counter, bank
        self.pool = ThreadPoolExecutor(1)
        self.coming: dict[str, Future[None]] = {}

    def start(self, name: str) -> None:
        """Begin to make one."""
        self.coming[name] = self.pool.submit(lambda: self.bank.add(name, self.counter.adapter(name)))

    def finished(self) -> list[tuple[str, UserError | None]]:
        """Those made since the last call."""
        done = [name for name, future in self.coming.items() if future.done()]
        for name in done:
            self.coming.pop(name).result()
        return [(name, None) for name in done]

    def drop(self, name: str) -> None:
        """Take one out."""
        self.bank.remove(name)
