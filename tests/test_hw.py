"""What the machine can do, the profile that is kept of it, and what plans cost by it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from battery import device, work
from conftest import Said
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants

from trimtab import peers
from trimtab.core.device import Device, Heads, Kernel, Product, Work
from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Depth, Level, parse_level
from trimtab.core.modelmap import ModelMap, trace
from trimtab.core.table import Row
from trimtab.engine.pricing import forecast, seconds_of_rows, slower_here, work_of
from trimtab.engine.probe import Unit
from trimtab.hw.roofline import Roofline
from trimtab.kernels import bench, profile
from trimtab.kernels.profile import Point, fitted

Cli = Callable[..., Said]
LEVELS = ("fp32", "bf16", "4b/g64", "3b/row/sym", "nvfp4/h", "mxint8", "vq/d4/k256", "50%", "2:4", "r8", "4b/g64+r8")


# ---- the machine


@pytest.mark.parametrize("module", variants())
def test_limits_are_positive(module: ModuleType) -> None:
    for kind in ("int8", "fp32", "barrier", "call"):
        assert min(getattr(module, f"{kind}_rates")(0.01)) > 0
    assert all(rate > 0 for rate in module.bf16_rates(0.01))
    for size in (4096, 1 << 20, (1 << 22) + 4096):
        assert min(module.read_rates(size, 0.01)) > 0 and min(module.copy_rates(size, 0.01)) > 0


@pytest.mark.parametrize("module", variants())
def test_limits_refuse_what_would_take_long(module: ModuleType) -> None:
    for seconds in (0.0, -1.0, 0.9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            module.fp32_rates(seconds)
    for size in (0, 4095, (1 << 30) + 1):
        with pytest.raises(ValueError, match="bytes"):
            module.read_rates(size, 0.01)


@pytest.mark.parametrize("text", LEVELS)
def test_a_random_weight_is_sound_at_every_level(text: str) -> None:
    level = parse_level(text)
    for rows, cols in ((64, 128), (3, 72), (1, 20)):
        packed = bench.random_packed(level, rows, cols)
        assert packed.nbytes == level.bytes((rows, cols))
        assert packed.dense().shape == (rows, cols) and bool(packed.dense().isfinite().all())


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("text", ["fp32", "bf16", "4b/g64", "r8"])
def test_every_chain_runs(text: str, m: int) -> None:
    runs, call = bench.chain(bench.random_packed(parse_level(text), 64, 128), [0, 1, 0], m)
    call()
    assert runs in ("torch", "generic", "avx2", "avx512", "vnni")
    for _, run, *_ in (bench.heads_chain(4, 2, 16, 70, m, 2, 3), bench.pass_chain(33, m), bench.step_chain()):
        run()


# ---- the fit of a kernel's row


@settings(deadline=None)  # the first fit imports scipy
@given(
    fixed=st.floats(0, 1e-5), edge=st.floats(0, 1e-8), near=st.floats(0.05, 1.0), far=st.floats(0.05, 1.0),
    start=st.floats(0, 1e-7),
)  # fmt: skip
def test_a_row_that_the_model_describes_is_found_again(
    fixed: float, edge: float, near: float, far: float, start: float
) -> None:
    shapes = [(256, 256), (1024, 256), (256, 1024), (1024, 1024), (2048, 2048), (512, 4096)]
    close, away = [], []
    for rows, cols in shapes:
        beside, roof, out = fixed + edge * (rows + cols), rows * cols / 1e11, rows * cols / 4e10
        close.append(Point(roof, rows + cols, beside + roof / near, 2 * (beside + roof / near)))
        away.append(Point(out, rows + cols, beside + out / far + start * rows, 1.0, rows))
    row = fitted(Kernel("linear", "fp32", 1, "vnni", 0, 0, 1, 1), close, away)
    assert row.low == pytest.approx(1, abs=0.05) and row.high == pytest.approx(1, abs=0.05)
    for p in close:
        assert row.fixed + row.edge * p.edges + p.roof / row.near == pytest.approx(p.best, rel=0.05)


def test_what_waited_for_a_core_is_measured_again() -> None:
    seen = iter((2e-3, 1e-3, 1e-6, 1e-7))

    def measure() -> list[Kernel]:
        return [Kernel("linear", "fp32", 1, "vnni", next(seen), 0.0, 1.0, 1.0)]

    assert profile.waits(profile.patient(measure)) == 1e-6
    assert profile.waits(profile.patient(measure)) == 1e-7


# ---- the profile that is kept


def test_a_profile_round_trips_and_reads_no_other() -> None:
    one = device()
    assert Device.from_json(one.to_json()) == one
    data = json.loads(one.to_json())
    damaged = ["", "{", "[]", "null", "{}", json.dumps({**data, "format": 99})]
    damaged += [
        json.dumps({k: v for k, v in data.items() if k != gone}) for gone in ("kernels", "bandwidth", "limits", "name")
    ]
    wrong: list[dict[str, Any]] = [{"bandwidth": []}, {"bandwidth": [[1, 0]]}, {"kernels": [{"op": "linear"}]}]
    wrong += [{"limits": {}}, {"more": 1}, {"spill": []}]
    damaged += [json.dumps({**data, **change}) for change in wrong]
    for text in damaged:
        with pytest.raises(UserError, match="trimtab bench"):
            Device.from_json(text)


def test_bandwidth_and_spill_run_between_what_was_measured() -> None:
    one = device()
    sizes = [1 << n for n in range(10, 34)]
    reads, missing = [one.reads(n) for n in sizes], [one.missing(n) for n in sizes]
    assert reads == sorted(reads, reverse=True) and missing == sorted(missing)
    assert reads[0] == 4e11 and reads[-1] == one.from_memory == 4e10
    assert missing[0] == 0.0 and missing[-1] == 1.0 and one.missing(3 << 23) == pytest.approx(1 / 6)


def of_this_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Device:
    """A profile that says it is of this machine, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return device(name=profile.machine_name(), cores=profile.cores(), variant=profile.variant(), threads=1)


def test_a_kept_profile_is_found_and_a_damaged_or_foreign_one_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = of_this_machine(monkeypatch, tmp_path)
    capsys.readouterr()
    assert profile.kept(1) is None and capsys.readouterr().err == ""
    path = profile.save(one)
    assert path.parent == tmp_path / "trimtab" and list(path.parent.iterdir()) == [path]
    assert profile.kept(1) == one and profile.kept(2) is None
    path.write_text(one.to_json()[:100])
    assert profile.kept(1) is None and "damaged" in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe")
    assert profile.kept(1) is None and "damaged" in capsys.readouterr().err
    path.write_text(dataclasses.replace(one, name="another").to_json())
    assert profile.kept(1) is None and "another machine" in capsys.readouterr().err


def test_a_machine_without_a_profile_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = of_this_machine(monkeypatch, tmp_path)
    calls = []
    monkeypatch.setattr(profile, "measure", lambda threads, **how: calls.append((threads, how)) or one)
    assert profile.here(1) == one and calls == [(1, {"quick": True, "levels": ()})]
    assert "no profile yet" in capsys.readouterr().err
    assert profile.here(1) == one and len(calls) == 1, "the second time it is read"
    assert capsys.readouterr().err == ""


def test_levels_that_a_kept_profile_lacks_are_measured_and_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile.save(of_this_machine(monkeypatch, tmp_path))
    asked = []

    def linear(device: Device, level: Level, quick: bool) -> list[Kernel]:
        asked.append(str(level))
        return [Kernel("linear", str(level), 1, "vnni", 0.0, 0.0, 1.0, 1.0)]

    monkeypatch.setattr(profile, "linear", linear)
    monkeypatch.setattr(profile, "runs_here", lambda level: str(level) != "vq/d4/k256")
    found = profile.here(1, ("4b/g64", "8b/row", "vq/d4/k256"))
    assert asked == ["8b/row"], "one was there, and one is run unpacked"
    assert found.kernel("linear", "8b/row") and profile.kept(1) == found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_measuring_gives_a_sound_profile_and_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    one = profile.measure(1, quick=True, levels=("4b/g64",))
    assert torch.get_num_threads() == before
    assert Device.from_json(one.to_json()) == one
    assert {k.op for k in one.kernels} == {"linear", "attention", "pass", "step"} and one.kernel("linear", "fp32")
    price = Roofline().price(work(parse_level("4b/g64")), one)
    assert 0 < price.low <= price.mid <= price.high < 1


# ---- work


def mapped(tied: bool = False) -> tuple[ModelMap, Any]:
    """A Llama of two blocks, on meta, and its map."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    return trace(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}), model


def test_work_counts_every_weight_once() -> None:
    for tied in (False, True):
        found, model = mapped(tied)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        made = work_of(found, {}, "bf16")
        assert made.weight_bytes + made.idle_bytes == 2 * matrices
        assert len(made.products) == 2 * 4 + 1, "q, k and v are one product, and gate and up"
        assert [p.last for p in made.products] == [False] * 8 + [True]
        assert made.attentions == (Heads(4, 2, 16),) * 2


def test_work_follows_levels_and_dropped_sublayers() -> None:
    found, _ = mapped()
    linears = [s for s in found.sites if s.kind == "linear"]
    four = {s.path: parse_level("4b/g64") for s in linears}
    made = work_of(found, four, "bf16")
    shapes = [(p.rows, p.cols) for p in made.products if not p.last]
    assert made.weight_bytes == sum(parse_level("4b/g64").bytes(s) for s in shapes) + 2 * 96 * 64
    mixed = work_of(found, {**four, str(found.attentions[0].k): parse_level("8b/row")}, "bf16")
    assert len(mixed.products) == len(made.products) + 1, "k is a product of its own at a level of its own"
    less = work_of(found, {**four, "model.layers.0.self_attn": Depth(0), "model.layers.1.mlp": Depth(0)}, "bf16")
    assert len(less.products) == len(made.products) - 4 and len(less.attentions) == 1
    assert len(less.passes) < len(made.passes)


def test_a_forecast_reads_the_prompt_in_chunks_and_holds_the_cache() -> None:
    found, _ = mapped()
    short, long = (forecast(found, {}, device(), dtype="fp32", prompt=n) for n in (256, 512))
    assert short.prefill.mid < long.prefill.mid < 3 * short.prefill.mid
    one, eight = (forecast(found, {}, device(), dtype="fp32", batch=b, prompt=256) for b in (1, 8))
    assert one.decode.mid < eight.decode.mid < 8 * one.decode.mid and one.prefill == eight.prefill
    of_a_token = 2 * 2 * 2 * 2 * 16  # two layers, keys and values, two bytes, two heads of 16
    assert eight.bytes - one.bytes == 7 * 320 * of_a_token, "of 7 more sequences, to the next 64 tokens"


# ---- for a fit


def test_rows_get_seconds_and_slower_choices_are_named() -> None:
    found, _ = mapped()
    sites = {s.path: s for s in found.sites}
    qkv = tuple(sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    units = [Unit("a+2", qkv, ()), Unit("table", (sites["model.embed_tokens"],), ())]
    weights = units[0].weights
    slow = [Kernel("linear", "8b/row", m, "torch", 1e-3, 0.0, 0.5, 0.5) for m in (1, 64)]
    machine = device(kernels=(*device().kernels, *slow))
    rows = [
        Row("a+2", "gptq@4b/g64", weights // 2, 0.0, 0.1, weights),
        Row("a+2", "gptq(damp=0.1)@8b/row", weights, 0.0, 0.01, weights),
        Row("a+2", "fp32", 4 * weights, 0.0, 0.0, weights),
        Row("table", "rtn@4b/g64", 8, 0.0, 0.0, 16),
        Row("other", "fp32", 8, 0.5, 0.0, 2),
    ]
    priced = seconds_of_rows(units, rows, machine, tokens=1)
    assert [dataclasses.replace(p, seconds=r.seconds) for p, r in zip(priced, rows, strict=True)] == rows
    assert 0 < priced[0].seconds < priced[2].seconds < priced[1].seconds
    assert priced[3].seconds == 0.0, "a table is looked up, not multiplied"
    assert priced[4] == rows[4]
    assert slower_here(priced, [priced[2]]) == {("a+2", "gptq(damp=0.1)@8b/row")}
    assert seconds_of_rows(units, rows, machine, tokens=64)[0].seconds > priced[0].seconds


def test_the_rest_of_a_model_pushes_a_part_out_of_the_caches() -> None:
    part = (Product(Dense("fp32"), 512, 512),)
    alone, among = (Roofline().price(Work(part, around=n), device()) for n in (0, 1 << 30))
    assert alone.mid < among.mid


# ---- the command


def test_bench_prints_json_and_keeps_the_profile(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = of_this_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(profile, "measure", lambda *options: one)
    said = cli("bench", "--threads", "1", "--json")
    assert said.code == 0 and said.json()["name"] == one.name and Path(said.json()["kept"]).is_file()
    said = cli("bench", "--threads", "1", "-q")
    assert said.code == 0 and "int8" in said.out and "4b/g64" in said.out and "kept in" in said.out
    assert profile.kept(1) == one
    assert cli("bench", "--levels", "9q").code == 2 and cli("bench", "--threads", "0").code == 2


def test_a_peer_that_is_not_there_is_one_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: False)
    said = cli("bench", "--against", "llama.cpp")
    assert said.code == 2 and "pip install llama-cpp-python" in said.err and said.err.count("\n") == 1
    monkeypatch.setattr(peers, "installed", lambda name: True)
    assert "name an artifact" in cli("bench", "--against", "llama.cpp").err
    assert "choose from torch, llama.cpp" in cli("bench", "--against", "vllm").err


def test_linears_beside_torch() -> None:
    rows = peers.linears(1, shape=(64, 128), inputs=(1, 4))
    assert {r["what"] for r in rows} >= {"torch bf16", "torch int8"} and {r["inputs"] for r in rows} == {1, 4}
    assert all(r["microseconds"] > 0 for r in rows)


def test_an_artifact_beside_torch(run: Any) -> None:
    ours, theirs, ratio = peers.models(run.artifact, "torch", 1, tokens=8, turns=1)
    assert (ours["what"], theirs["what"], ratio["what"]) == ("trimtab", "torch", "ratio")
    assert ratio["tokens_per_second"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
