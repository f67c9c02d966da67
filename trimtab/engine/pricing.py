"""What a plan costs on a machine, before it is carried out: a model's shapes and levels as work, and rows with seconds.

The method that prices is found by its name, like every other; the profile of the machine comes from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trimtab.core.device import Cost, Device, Heads, Product, Work
from trimtab.core.level import Dense, Depth, Level, parse_level, rows_cols
from trimtab.core.method import Pricer, method
from trimtab.core.table import Row

if TYPE_CHECKING:
    from trimtab.core.modelmap import ModelMap
    from trimtab.core.site import Site
    from trimtab.engine.probe import Unit

MARGIN = 0.1  # of the original's seconds: less than that is within the error of a profile


@dataclass(frozen=True)
class Forecast:
    """What a plan costs: a prompt read (`prefill`), a token of every sequence written (`decode`), and the most bytes
    held in either.
    """

    prefill: Cost
    decode: Cost

    @property
    def bytes(self) -> int:
        """Most bytes held."""
        return max(self.prefill.bytes, self.decode.bytes)


def work_of(
    found: ModelMap, levels: Mapping[str, Level], dtype: str, *, batch: int = 1, tokens: int = 1, context: int = 0
) -> Work:
    """One forward of a model under a plan.

    Linears that read the same tensor at the same level are one product, as the kernels stack them.

    Args:
        found: the model's map.
        levels: path -> level of the sites that the plan touches; a sublayer's path at `drop` leaves it out.
        dtype: what the other weights are stored in.
        batch, tokens, context: see `Work`.
    """
    gone = tuple(p + "." for p, level in levels.items() if isinstance(level, Depth))
    left = [s for s in found.sites if s.shape and not s.path.startswith(gone)]
    dense = Dense(dtype)
    level_of = {s.path: levels.get(s.path, dense) for s in left}
    tied = {name.removesuffix(".weight") for group in found.tied for name in group}
    group_of = {p: group for group in found.siblings for p in group}
    products: dict[Any, Product] = {}
    for site in left:
        if site.kind == "embedding":
            continue
        rows, cols = rows_cols(site.shape)
        key = (group_of.get(site.path, site.path), level_of[site.path])
        before = products.get(key)
        products[key] = Product(level_of[site.path], rows + (before.rows if before else 0), cols, site.kind == "head")
    tables = [s for s in left if s.kind == "embedding" and s.path not in tied]
    kept = [a for a in found.attentions if a.q is None or not a.q.startswith(gone)]
    return Work(
        products=tuple(products.values()),
        attentions=tuple(Heads(a.heads, a.kv_heads, a.head_size) for a in kept),
        passes=tuple(_passes(found, gone)),
        batch=batch,
        tokens=tokens,
        context=context,
        idle_bytes=sum(level_of[s.path].bytes(s.shape) for s in tables),
    )


def _passes(found: ModelMap, gone: tuple[str, ...]) -> Iterable[int]:
    """Floats a token of what lies between the products: norms, the rotation and keeping of keys, activations."""
    yield from (n.width for n in found.norms if not n.path.startswith(gone))
    for a in found.attentions:
        if a.q is None or not a.q.startswith(gone):
            yield from (a.heads * a.head_size, a.kv_heads * a.head_size, a.kv_heads * a.head_size)
    yield from (rows_cols(s.shape)[0] for s in found.where("up") if not s.path.startswith(gone))


def forecast(
    found: ModelMap,
    levels: Mapping[str, Level],
    device: Device,
    *,
    dtype: str = "bf16",
    batch: int = 1,
    prompt: int = 128,
    context: int | None = None,
    chunk: int = 256,
    pricer: str = "roofline",
) -> Forecast:
    """What reading a prompt and writing a token of each sequence costs under a plan.

    Args:
        batch: sequences that are written at once; prompts are read one after the other, so this prices one.
        prompt: tokens of the prompt.
        context: tokens before the one that is written; by default the prompt's.
        chunk: tokens of a prompt that are taken together.
        pricer: the method that prices.
    """
    chosen = method(pricer)
    assert isinstance(chosen, Pricer)
    one = replace(work_of(found, levels, dtype), room=chunk)
    reads = [replace(one, tokens=min(chunk, prompt - start), context=start) for start in range(0, prompt, chunk)]
    write = replace(one, batch=batch, context=prompt if context is None else context)
    prefill = sum((chosen.price(work, device) for work in reads), Cost(0.0, 0.0, 0.0))
    return Forecast(prefill, chosen.price(write, device))


# ---- for a fit: seconds in the table of choices


def seconds_of_rows(
    units: Iterable[Unit], rows: Iterable[Row], device: Device, tokens: int, pricer: str = "roofline"
) -> list[Row]:
    """The rows with the seconds of their unit in one forward, so that a limit on latency is one of the allocator's.

    The sites of a unit that read one tensor are priced as one product; the set that decides between caches and memory
    is that of the whole model with every unit at the row's own level.

    Args:
        units: with their sites.
        rows: choices (`method@level`, or the original's type) of these units; rows of others are kept as they are.
        tokens: that the forward takes at once: those of the item whose latency is limited.

    Returns: rows in the order given.
    """
    chosen = method(pricer)
    assert isinstance(chosen, Pricer)
    by_name = {u.name: u for u in units}
    weights = sum(u.weights for u in by_name.values())
    price: dict[tuple[Any, str], float] = {}
    priced = []
    for row in rows:
        unit = by_name.get(row.unit)
        if unit is None:
            priced.append(row)
            continue
        shapes = tuple(sorted(_stacked(unit.sites)))
        level = row.choice.rpartition("@")[2]
        key = (shapes, level)
        if key not in price:
            work = Work(tuple(Product(parse_level(level), r, c, last) for r, c, last in shapes), tokens=tokens)
            bits = 8 * row.bytes / max(1, row.weights or unit.weights)
            whole = int(weights * bits / 8)
            price[key] = chosen.price(replace(work, around=max(0, whole - row.bytes)), device).mid if shapes else 0.0
        priced.append(replace(row, seconds=price[key]))
    return priced


def _stacked(sites: Iterable[Site]) -> list[tuple[int, int, bool]]:
    """Rows and columns of a unit's products, those of equal columns one below the other; no product of an embedding."""
    found: dict[tuple[int, bool], int] = {}
    for site in sites:
        if site.kind != "embedding":
            rows, cols = rows_cols(site.shape)
            key = (cols, site.kind == "head")
            found[key] = found.get(key, 0) + rows
    return [(rows, cols, last) for (cols, last), rows in found.items()]


def slower_here(rows: Iterable[Row], originals: Iterable[Row]) -> set[tuple[str, str]]:
    """(unit, choice) of the rows that take longer here than leaving the unit alone, which a fit to a latency refuses.

    Args:
        rows: with seconds, as `seconds_of_rows` gives them.
        originals: the rows of leaving each unit as it is, with seconds.
    """
    before = {r.unit: r.seconds for r in originals}
    return {(r.unit, r.choice) for r in rows if r.unit in before and r.seconds > (1 + MARGIN) * before[r.unit]}
