"""Small programs of one operation, many times over, as a run loop would call it: what the profile of a machine times.

Where the compiled kernels have a run loop these are its programs; without one a weight is applied from Python; without
kernels torch runs it all in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.level import NM, Codebook, Dense, Float, Int, Level, Plus, Rank, Sparse
from trimtab.formats.packed import (
    Packed,
    pack_codebook,
    pack_dense,
    pack_float,
    pack_int,
    pack_nm,
    pack_plus,
    pack_rank,
    pack_sparse,
    store_scale,
)
from trimtab.kernels.native import native
from trimtab.kernels.weight import kernel_weight

Work = Callable[[], Any]
VOCABULARY = 16  # rows of the table that fills the buffers


def random_packed(level: Level, rows: int, cols: int, seed: int = 0) -> Packed:
    """A weight at a level with random codes and scales of a trained weight's size: no method is asked to find them."""
    rng = torch.Generator().manual_seed(seed)
    shape = (rows, cols)

    def codes(bits: int, *size: int) -> Tensor:
        return torch.randint(1 << bits, size or shape, generator=rng)

    def normal() -> Tensor:
        return torch.randn(shape, generator=rng) * 0.02

    match level:
        case Int() | Float():
            groups = 1 if level.group is None else ceil(cols / level.group)
            scale = store_scale(torch.full((rows, groups), 0.01), level.scale)[1]
            if isinstance(level, Float):
                return pack_float(codes(1 + level.e + level.m), scale, level, shape)
            zero = None if level.symmetric else codes(level.bits, rows, groups)
            return pack_int(codes(level.bits), scale, zero, level, shape)
        case Dense():
            return pack_dense(normal(), level)
        case Codebook():
            sizes = [k for k in (level.size, level.residual) if k]
            books = [torch.randn(k, level.dim, generator=rng) * 0.02 for k in sizes]
            vectors = ceil(cols / level.dim)
            return pack_codebook([codes(int(log2(k)), rows, vectors) for k in sizes], books, level, shape)
        case Sparse():
            kept = level.kept(shape) // rows
            order = torch.rand(shape, generator=rng).argsort(dim=1)
            return pack_sparse(normal(), order < kept, level, shape)
        case NM():
            groups = ceil(cols / level.m)
            order = torch.rand((rows, groups, level.m), generator=rng).argsort(dim=2)
            return pack_nm(normal(), (order < level.n).reshape(rows, -1)[:, :cols], level, shape)
        case Rank():
            left, right = (torch.randn(s, generator=rng) * 0.02 for s in ((rows, level.rank), (level.rank, cols)))
            return pack_rank(left, right, torch.zeros(rows) if level.bias else None, level, shape)
        case Plus():
            base, extra = (random_packed(part, rows, cols, seed) for part in (level.base, level.extra))
            return pack_plus(base, extra, level)
    raise AssertionError(level)


def weight_for(packed: Packed) -> Any | None:
    """The weight as the compiled kernels hold it; None where none of them runs it."""
    module = native()
    if module is not None and isinstance(packed.level, Dense) and hasattr(module, "dense_fp32"):
        from trimtab.kernels.dense.make import dense_weight

        return dense_weight(module, packed.tensors["weight"])
    return kernel_weight(packed)


def runs_here(level: Level) -> bool:
    """Whether a level is run as it is stored, by a kernel or by torch in fp32; all else is unpacked to fp32."""
    return level == Dense("fp32") or weight_for(random_packed(level, 64, 256)) is not None


def chain(packed: Packed, order: Sequence[int], m: int) -> tuple[str, Work]:
    """What runs products of `m` inputs with copies of a weight, one after the other in that order; and the call."""
    rows, cols = packed.shape
    weights: dict[int, Any] = {i: weight_for(packed) for i in set(order)}
    module = native()
    if module is None or weights[order[0]] is None:
        inputs, dense = torch.randn(m, cols), {i: packed.dense().clone() for i in set(order)}
        return "torch", lambda: [torch.nn.functional.linear(inputs, dense[i]) for i in order]
    runs = module.__name__.rpartition("_")[2]
    if not hasattr(module, "Program"):
        array = np.random.default_rng(0).standard_normal((m, cols), np.float32)
        return runs, lambda: [weights[i].apply(array) for i in order]
    program = module.Program(rows=m, outputs=1, sequences=1, context=m)
    x, y = program.buffer(cols), program.buffer(rows)
    program.embed(x, _table(module, cols))
    for i in order:
        program.linear(x, y, weights[i])
    return runs, _started(program, x, cols, m)


def heads_chain(
    heads: int, kv_heads: int, size: int, context: int, tokens: int, batch: int, layers: int
) -> tuple[str, Work]:
    """What runs attention of `tokens` new tokens over `context` older ones for each of `batch` sequences, in `layers`
    layers with caches of their own; and the call.
    """
    module = native()
    if module is None or not hasattr(module, "Program"):
        shapes = ((heads, tokens), *[(kv_heads, context + tokens)] * 2)
        held = [[torch.randn(batch, h, n, size) for h, n in shapes] for _ in range(layers)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return "torch", lambda: [attend(q, k, v, enable_gqa=True) for q, k, v in held]
    some = max(tokens, 64)  # the caches are filled in runs of so many
    program = module.Program(rows=max(some, batch * tokens), outputs=batch, sequences=batch, context=context + some)
    q, k, v, out = (program.buffer(n * size) for n in (heads, kv_heads, kv_heads, heads))
    for buffer in (q, k, v):
        program.embed(buffer, _table(module, buffer.width))
    for _ in range(layers):
        cache = program.cache(kv_heads, size)
        program.append(k, v, cache)
        program.attend(q, out, cache, size**-0.5)
    work = _started(program, out, heads * size, tokens, context, batch, fill=some)
    return module.__name__.rpartition("_")[2], work


def pass_chain(width: int, m: int) -> tuple[str, Work, int]:
    """What normalises `m` rows of a width, the call, and how often it does in it."""
    module, repeats = native(), 16
    if module is None or not hasattr(module, "Program"):
        x = torch.randn(m, width)
        return "torch", lambda: [torch.nn.functional.rms_norm(x, (width,)) for _ in range(repeats)], repeats
    program = module.Program(rows=m, outputs=1, sequences=1, context=m)
    x, y = program.buffer(width), program.buffer(width)
    program.embed(x, _table(module, width))
    for _ in range(repeats):
        program.norm(x, y, eps=1e-6)
    return module.__name__.rpartition("_")[2], _started(program, y, width, m), repeats


def step_chain() -> tuple[str, Work]:
    """What starts a forward, and the call of one with next to nothing in it."""
    module = native()
    if module is None or not hasattr(module, "Program"):
        x = torch.ones(1, 16)
        return "torch", lambda: torch.nn.functional.linear(x, x)
    program = module.Program(rows=1, outputs=1, sequences=1, context=1)
    x = program.buffer(16)
    program.embed(x, _table(module, 16))
    return module.__name__.rpartition("_")[2], _started(program, x, 16, 1)


def _table(module: Any, width: int) -> Any:
    return module.dense_fp32(np.random.default_rng(0).standard_normal((VOCABULARY, width), np.float32))


def _started(program: Any, last: Any, width: int, tokens: int, start: int = 0, batch: int = 1, fill: int = 0) -> Work:
    """The call that runs a program's `tokens` new tokens after `start` older ones of each sequence."""
    head = program.buffer(width, picked=True)
    program.select(last, head)
    numbers = np.arange(max(batch * tokens, fill), dtype=np.int32) % VOCABULARY
    each, one = np.arange(batch, dtype=np.int32), np.ones(batch, np.int32)
    for sequence in each:
        for first in range(0, start, fill or 1):
            program.run(head, numbers[:fill], *(np.array([n], np.int32) for n in (sequence, first, fill)))
    return lambda: program.run(head, numbers[: batch * tokens], each, start * one, tokens * one)
