"""What a forward computes and reads, and three models of costs that are made of these counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from battery import device, work

from trimtab.core.device import Heads, Work
from trimtab.core.errors import UserError
from trimtab.core.level import parse_level
from trimtab.formats.cache import CacheFormat
from trimtab.hw.idealized_runtime import IdealizedRuntime, Run
from trimtab.hw.kinetics import Kinetics
from trimtab.hw.long_context_peak import LongContextPeak
from trimtab.parts.counting import counted

LEVEL = parse_level("4b/g64")


def long(tokens: int, **changes: int) -> Work:
    """A text read by a model of a few layers."""
    return work(LEVEL, tokens=tokens, **changes)


# ---- counts


def test_counts_are_those_of_the_shapes() -> None:
    found = counted(work(LEVEL, tokens=1, context=99, batch=2), device())
    assert found.weight_bytes == 4 * LEVEL.bytes((512, 512))
    assert found.cache_bytes == 4 * 2 * 100 * 2 * 4 * 64 * 2, "layers, sequences, tokens, both, heads, channels, bytes"
    assert found.operations == 4 * 2 * (LEVEL.flops((512, 512)) + 4 * 8 * 64 * 100)
    assert found.held_bytes == work(LEVEL, tokens=1, context=99, batch=2).held_bytes


@pytest.mark.parametrize("cache", ["fp32", "bf16", "kivi4", "kivi2", "kivi2/g64/r256"])
def test_another_cache_changes_what_is_read_of_it_alone(cache: str) -> None:
    one, stored = work(LEVEL, context=4095), CacheFormat.parse(cache)
    plain, found = counted(one, device()), counted(one, device(), cache)
    assert found.cache_bytes == 4 * stored.bytes(4, 64, 4096), "whole blocks, so the tokens that are there are all"
    assert found.cache_bytes - plain.cache_bytes == found.held_bytes - plain.held_bytes
    assert (found.operations, found.weight_bytes) == (plain.operations, plain.weight_bytes)


def test_a_level_that_no_kernel_runs_is_counted_unpacked() -> None:
    unpacked, plain = (counted(work(parse_level(text)), device()) for text in ("3b/g64", "fp32"))
    assert unpacked == replace(plain, held_bytes=unpacked.held_bytes)


def test_what_lies_around_pushes_a_part_out_of_the_caches() -> None:
    alone, among = (counted(replace(work(LEVEL), around=n), device()).reading for n in (0, 1 << 30))
    assert alone < among


# ---- the analysis of long texts


def test_effects_follow_the_bytes_of_the_cache() -> None:
    method = LongContextPeak(memory=1 << 30, link=1e10)
    short, twice = (method.effects(long(n), device()) for n in (1 << 15, 1 << 16))
    assert twice.cache_bytes == 2 * short.cache_bytes and twice.switch == 2 * short.switch
    assert short.users == ((1 << 30) - 4 * LEVEL.bytes((512, 512))) // short.cache_bytes
    assert twice.users in (short.users // 2, short.users // 2 - 1)
    assert twice.prefill > 2 * short.prefill, "attention grows with the square"
    slope = (twice.decode - short.decode) / (twice.cache_bytes - short.cache_bytes)
    assert slope == pytest.approx(1 / device().from_memory, rel=0.01)


def test_a_smaller_cache_is_better_in_all_but_prefill() -> None:
    method, packed = LongContextPeak(link=1e10), LongContextPeak(cache="kivi2", link=1e10)
    plain = method.effects(long(8192), device())
    fewer = replace(long(8192), attentions=(Heads(8, 1, 64),) * 4)
    for found in (packed.effects(long(8192), device()), method.effects(fewer, device())):
        assert found.users > plain.users and found.decode < plain.decode and found.switch < plain.switch
        assert found.prefill == pytest.approx(plain.prefill)


def test_nothing_is_priced_below_the_peak() -> None:
    for one in (long(1), long(64), long(4096)):
        counts = counted(one, device())
        assert LongContextPeak().price(one, device()).low == max(counts.arithmetic, counts.reading)


def test_effects_refuse_what_they_cannot_tell() -> None:
    with pytest.raises(UserError, match="set `link`"):
        LongContextPeak().effects(long(64), device())
    with pytest.raises(UserError, match="set `memory`"):
        LongContextPeak(memory=1000, link=1e10).effects(long(64), device())
    with pytest.raises(UserError, match="unknown cache"):
        LongContextPeak(cache="fp8").price(long(64), device())


# ---- Kinetics


def test_the_sum_lies_between_the_larger_part_and_twice_it() -> None:
    for one in (long(1), long(64, context=4096), work(LEVEL, batch=64)):
        counts, found = counted(one, device()), Kinetics().price(one, device()).mid
        assert max(counts.arithmetic, counts.reading) < found <= 2 * max(counts.arithmetic, counts.reading)


def test_an_intensity_weighs_the_bytes() -> None:
    one, counts = work(LEVEL, context=512), counted(work(LEVEL, context=512), device())
    found = Kinetics(intensity=100.0).price(one, device()).mid
    read = counts.weight_bytes + counts.cache_bytes
    assert found == pytest.approx(counts.arithmetic + 100 * read / device().limits["fp32"])
    with pytest.raises(UserError, match="0 or more"):
        Kinetics(intensity=-1.0).price(one, device())


# ---- idealized runtimes


def test_a_few_runs_give_the_others() -> None:
    true, one = IdealizedRuntime(1.7, 2.4), work(LEVEL)
    runs = [Run(p, o, true.runtime(one, device(), p, o).mid) for p, o in ((32, 1), (32, 24), (384, 1))]
    found = IdealizedRuntime.fitted(one, device(), runs)
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1)
    for p, o in ((1, 1), (100, 7), (512, 64)):
        said, measured = (m.runtime(one, device(), p, o) for m in (found, true))
        assert said.mid == pytest.approx(measured.mid) and said.bytes == measured.bytes


def test_runs_that_do_not_agree_give_a_spread() -> None:
    one, true = work(LEVEL), IdealizedRuntime(2.0, 2.0)
    runs = [
        Run(p, o, true.runtime(one, device(), p, o).mid * (1.2 if o > 1 and p > 100 else 1.0))
        for p, o in ((32, 1), (32, 24), (384, 1), (384, 24))
    ]
    found = IdealizedRuntime.fitted(one, device(), runs)
    assert found.low < 1 < found.high
    assert found.price(one, device()).low < found.price(one, device()).mid < found.price(one, device()).high


def test_a_fit_refuses_runs_that_say_too_little() -> None:
    one = work(LEVEL)
    for runs in ([], [Run(8, 1, 1.0), Run(8, 2, 2.0)], [Run(8, 1, 1.0), Run(16, 1, 2.0)]):
        with pytest.raises(UserError, match="two lengths"):
            IdealizedRuntime.fitted(one, device(), runs)
    with pytest.raises(UserError, match="took no time"):
        IdealizedRuntime.fitted(one, device(), [Run(8, 1, 0.0), Run(16, 2, 1.0)])
    with pytest.raises(UserError, match="at least one"):
        IdealizedRuntime().runtime(one, device(), 0, 4)
