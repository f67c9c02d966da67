"""What a fit measures and hands over: candidates tried, the chosen one checked in a fresh process, and the verdict
with intervals.

The search reads the `search` split alone. `test` is read once for the original, the chosen plan and the best uniform
plan, on the same items,
so that intervals are paired.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trimtab.core.budget import say_bytes
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.journal import write_atomic
from trimtab.core.table import Row

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engine.apply import Applied
    from trimtab.formats.packed import Packed
    from trimtab.job import Candidate, Job
    from trimtab.tasks.base import Scores

TIGHTENINGS = 4
GATE = 1e-3  # largest difference, as a share of the largest logit, between the fresh process and the model in memory
GATE_ITEMS, GATE_TOKENS = 2, 24
BISECTIONS = 9
HASTE = 0.5  # least share of a latency to plan for: predictions are not that far off, but a busy machine can seem so


def machine() -> dict[str, Any]:
    """Processor, cores, threads and memory of this machine."""
    import os

    import torch

    from trimtab.kernels.profile import machine_name, memory_bytes

    return {
        "cpu": machine_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on."""
    import torch
    import transformers

    from trimtab import __version__

    return {
        "trimtab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def scores_to_json(scores: Scores) -> dict[str, list[float]]:
    """Scores as lists; JSON keeps every digit of a double."""
    return {k: getattr(scores, k).tolist() for k in ("nll", "hits", "count", "kl")}


def scores_from_json(stored: dict[str, list[float]]) -> Scores:
    """Scores from lists."""
    import torch

    from trimtab.tasks.base import Scores

    return Scores(*(torch.tensor(stored[k], dtype=torch.float64) for k in ("nll", "hits", "count", "kl")))


def in_new_process(check: str, folder: Path, probe: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """What `trimtab.models.<check>` prints of an artifact and of the tensors in a file, which is then removed.

    Raises:
        UserError: the process failed.
    """
    import torch

    command = [sys.executable, "-m", f"trimtab.models.{check}", str(folder), str(probe), *options]
    done = subprocess.run([*command, "--threads", str(torch.get_num_threads())], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            "the artifact does not load in a fresh process, so it is not handed over: "
            f"{done.stderr.strip().splitlines()[-1:] or 'killed'}"
        )
    probe.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def stored_tensors(job: Job, applied: Applied) -> Iterator[tuple[str, Tensor | Packed]]:
    """Every tensor of the artifact, sorted by name: packed where a step solved it, else in the source's type."""
    from trimtab.formats.packed import DTYPES

    stream = applied.stream
    changed = bool(applied.edits) or applied.rewrote
    for name in sorted(stream.source.names):
        path = name.removesuffix(".weight")
        if path in applied.packed and name.endswith(".weight"):
            yield name, stream.packed[path]
            continue
        value = stream.current(name) if changed else stream.source.read(name)
        yield name, value.to(DTYPES[job.source.dtype]) if changed and value.is_floating_point() else value


class Evidence:
    """Gathers the evidence of a job."""

    def __init__(self, job: Job) -> None:
        self.job, self.journal = job, job.journal
        self.points: dict[str, dict[str, Any]] = {}

    # ---- scores and points

    def scores(self, name: str, split: str, stream: Callable[[], Any]) -> Scores:
        """Scores of a model on a split, committed."""
        step = f"scores/{name}/{split}"
        return scores_from_json(
            self.journal.step(
                step, lambda: scores_to_json(self.job.timed("measuring", lambda: self.job.scores(stream(), split)))
            )
        )

    def point(self, name: str, bytes_: int, ours: Scores, original: Scores, split: str, **more: Any) -> dict[str, Any]:
        """A point of the front or the verdict: bytes, the metric with its interval, and the share kept of the
        original's.
        """
        from trimtab.tasks.base import bootstrap

        task, amounts = self.job.task, self.job.batch(split).amounts
        value, base = (task.overall(s, amounts) for s in (ours, original))
        (low, high), _, (d_low, d_high) = bootstrap(task, ours, original, amounts)
        return {
            **{"name": name, "bytes": bytes_, "metric": task.metric, "value": value, "low": low, "high": high},
            **{"retained": task.retained(value, base), "difference": [d_low, d_high], "split": split},
            **({"damage": ours.damage()} if split == "search" else {}),  # only there outputs are compared
            **more,
        }

    def tried(self, candidate: Candidate, name: str, fixed: int) -> tuple[Any, Scores, int]:
        """A candidate applied and scored on the search data: (applied, scores, predicted bytes)."""
        applied: list[Any] = []

        def stream() -> Any:
            applied.append(self.job.timed("applying", lambda: self.job.apply(candidate, name)))
            return applied[0].stream

        scores = self.scores(name, "search", stream)
        return (applied[0] if applied else None), scores, fixed + sum(r.bytes for r in candidate.rows.values())

    # ---- the artifact

    def write(self, applied: Applied, plan: str, folder: Path) -> int:
        """Write the artifact; its bytes."""
        from trimtab.models.artifact import write_artifact

        job = self.job
        shapes = {
            f"{p}.weight": (
                list(
                    applied.stream.sites[p].shape[::-1]
                    if applied.stream.sites[p].transposed
                    else applied.stream.sites[p].shape
                ),
                applied.stream.sites[p].transposed,
            )
            for p in applied.packed
        }
        manifest = {
            **{"task": job.source.task, "dtype": job.source.dtype, "plan": plan, "edits": applied.edits},
            "source": {"name": job.source.name, "hash": job.source.hash},
        }
        return write_artifact(folder, stored_tensors(job, applied), shapes, manifest, job.source.sidecars())

    def gate(self, applied: Applied, folder: Path) -> dict[str, Any]:
        """Load the artifact in a fresh process and compare its outputs with the model in memory, prefill and token by
        token.

        Raises:
            UserError: they differ by more than the gate allows: the artifact is not handed over.
        """
        from trimtab.engine.measure import through
        from trimtab.engine.run import main_output
        from trimtab.formats.checkpoint import write_safetensors

        job, stream = self.job, applied.stream
        batch = job.batch("search").take(0, GATE_ITEMS)
        timed = batch.take(0, 1).inputs
        inputs = {k: v[:, :GATE_TOKENS] if job.source.task != "classification" else v for k, v in batch.inputs.items()}
        flow = through(stream, replace(batch, inputs=inputs), GATE_ITEMS)
        ours = next(main_output(out) for _, out in stream.finish(flow))
        probe = folder.with_name("gate.safetensors")
        stored = {
            f"{kind}.{k}": v.contiguous()
            for kind, items in (("input", inputs), ("time", timed))
            for k, v in items.items()
        }
        write_safetensors({**stored, "output": ours.float().contiguous()}, probe)
        options = ["--context", str(job.request.context), "--batch", str(job.request.batch)]
        options += ["--packed"] if job.request.budget.memory else []
        options += ["--model", job.source.name] if job.source.folder is None else []
        result = in_new_process("fresh", folder, probe, options)
        worst = max(result["prefill"], result.get("decode", 0.0))
        if not worst <= GATE:
            raise UserError(
                f"a fresh process gives other outputs than the model in memory (by {worst:.2g} of the largest, "
                f"allowed {GATE:g}); the artifact is not handed over"
            )
        return result

    def compiled(self, folder: Path, size: int, exact: Scores, original: Scores) -> dict[str, Any]:
        """The result's point as `trimtab run` runs it, in the compiled program with inputs of 8 bits; where no program
        runs it, the `reason`.

        Args:
            exact: scores of the result in exact arithmetic; `to_exact` is the interval of the paired difference.
        """
        from trimtab.formats.checkpoint import write_safetensors
        from trimtab.tasks.base import bootstrap

        job, items, batch = self.job, folder.with_name("items.safetensors"), self.job.batch("test")
        if job.task.name != "causal-lm":
            return {"reason": "only causal language models run as a compiled program"}

        def score() -> dict[str, Any]:
            write_safetensors({**batch.inputs, "labels": batch.labels.contiguous()}, items)
            return job.timed("measuring", lambda: in_new_process("compiled", folder, items))

        found = self.journal.step("scores/compiled/test", score)
        if "reason" in found:
            return found
        ours = scores_from_json(found["scores"])
        _, _, to_exact = bootstrap(job.task, ours, exact, batch.amounts)
        more = {"to_exact": list(to_exact), "engine": found["engine"], "reason": None}
        return self.point("compiled", size, ours, original, "test", **more)

    # ---- the run

    def gather(self) -> dict[str, Any]:
        """Search, choose, verify, judge, and write the report."""
        job = self.job
        began = time.perf_counter()
        if job.request.plan is not None:
            candidate = job.planned()
            return self.finish(candidate, None, 0, began, [])
        if job.original_meets():
            from trimtab.job import Candidate

            return self.finish(Candidate("original", [], {}), None, 0, began, [])
        job.check_feasible()
        rows, drops = job.timed("probing", job.table)
        fixed = job.fixed_bytes(job.units)
        original = self.scores("original", "search", lambda: job._probe_stream)
        candidate, limit = self.choose(rows, drops, fixed, original)
        uniform, front = self.compare(rows, drops, fixed, limit, candidate, original)
        if uniform is not None and uniform[1] < self.points["fitted"]["damage"]:
            candidate = uniform[0]
        return self.finish(candidate, uniform[0] if uniform else None, fixed, began, front, rows, drops)

    def choose(self, rows: list[Row], drops: dict[str, float], fixed: int, original: Scores) -> tuple[Candidate, float]:
        """The fitted candidate and the limit on its units' bytes."""
        job, budget = self.job, self.job.request.budget
        if not budget.limits():
            raise UserError("a fit needs a budget: give at least one of --size, --memory, --latency, --quality")
        if budget.size is None and budget.memory is None and budget.quality is not None:
            return self.smallest(rows, drops, fixed, original)
        limit = job.byte_limit(fixed, rows)
        candidate = job.best_for(rows, drops, limit)
        _, scores, size = self.tried(candidate, "fitted", fixed)
        self.points["fitted"] = self.point("fitted", size, scores, original, "search", plan=candidate.plan)
        return candidate, limit

    def smallest(
        self, rows: list[Row], drops: dict[str, float], fixed: int, original: Scores
    ) -> tuple[Candidate, float]:
        """The smallest candidate whose interval on the search data keeps the asked share of the metric, by bisection
        over its bytes.

        Raises:
            BudgetError: not even the finest plan keeps it.
        """
        job, wanted = self.job, self.job.request.budget.quality
        assert wanted is not None
        units: dict[str, list[int]] = {}
        for row in rows:
            units.setdefault(row.unit, []).append(row.bytes)
        low, high = float(sum(map(min, units.values()))), float(sum(map(max, units.values())))
        base = job.task.overall(original, job.batch("search").amounts)
        kept: tuple[Candidate, float, dict[str, Any]] | None = None
        for turn in range(BISECTIONS):
            limit = high if turn == 0 else (low * high) ** 0.5
            try:
                candidate = job.best_for(rows, drops, limit)
            except BudgetError:  # so few bytes are not to be had in the time
                if turn == 0:
                    raise
                low = limit
                continue
            _, scores, size = self.tried(candidate, f"bisect-{turn}", fixed)
            point = self.point("fitted", size, scores, original, "search", plan=candidate.plan)
            worst = base + point["difference"][0 if job.task.higher else 1]
            if job.task.retained(worst, base) >= wanted:
                kept, high = (candidate, limit, point), limit
            elif turn == 0:
                raise BudgetError(
                    f"quality {wanted:.1%} was asked for, and the finest plan keeps {point['retained']:.1%}; ask for "
                    "less, or try --effort thorough"
                )
            else:
                low = limit
            if high / low < 1.01:
                break
        assert kept is not None
        self.points["fitted"] = kept[2]
        return kept[0], kept[1]

    def compare(
        self, rows: list[Row], drops: dict[str, float], fixed: int, limit: float, candidate: Candidate, original: Scores
    ) -> tuple[tuple[Candidate, float] | None, list[dict[str, Any]]]:
        """The best uniform candidate within the limit with its damage, and the front: both measured on the search
        data.
        """
        job = self.job
        front = [self.point("original", job.source.bytes, original, original, "search"), self.points["fitted"]]
        best: tuple[Candidate, float] | None = None
        for i, uniform in enumerate(job.uniform(rows, limit)[:3]):
            _, scores, size = self.tried(uniform, f"uniform-{i}", fixed)
            front.append(
                self.point(uniform.name, size, scores, original, "search", plan=uniform.plan, family="uniform")
            )
            if best is None or scores.damage() < best[1]:
                best = (uniform, scores.damage())
        for share in job.menu["front"]:
            try:
                other = job.best_for(rows, drops, share * limit)
            except BudgetError:
                continue
            _, scores, size = self.tried(other, f"front-{share}", fixed)
            front.append(self.point(f"fitted at {say_bytes(size)}", size, scores, original, "search", plan=other.plan))
        return best, front

    def finish(
        self,
        candidate: Candidate,
        uniform: Candidate | None,
        fixed: int,
        began: float,
        front: list[dict[str, Any]],
        rows: list[Row] | None = None,
        drops: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Apply the chosen candidate, tighten until its artifact fits, verify it, heal it where that is asked for,
        judge it on the test data, report.
        """
        from trimtab.healing import heal, said
        from trimtab.tasks.base import bootstrap

        job, budget, folder = self.job, self.job.request.budget, self.job.out / "artifact"
        gate: dict[str, Any] = {}
        size, haste = 0, 1.0
        for turn in range(TIGHTENINGS):
            name = f"result-{turn}"
            applied = job.timed("applying", partial(job.apply, candidate, name))
            write = partial(self.write, applied, candidate.plan, folder)
            size = self.journal.step(f"{name}/artifact", partial(job.timed, "writing", write))
            if not folder.exists():
                write()
            over, late = max(0, size - budget.size) if budget.size is not None else 0, 0.0
            if not over:
                check = partial(self.gate, applied, folder)
                gate = self.journal.step(f"{name}/gate", partial(job.timed, "verifying", check))
                over = max(0, gate["peak_bytes"] - budget.memory) if budget.memory is not None else 0
                late = gate["seconds"] / budget.latency if budget.latency is not None else 0.0
            done = turn == TIGHTENINGS - 1 or not (over or late > 1)
            if done or rows is None or candidate.name != "fitted":
                break
            haste = max(HASTE, haste / max(1.0, late))
            limit = job.byte_limit(fixed, rows) - (turn + 1) * over
            try:
                candidate = job.best_for(rows, drops, limit, candidate.dropped, haste)
            except BudgetError:
                break
        if budget.size is not None and size > budget.size:
            raise BudgetError(
                f"size {say_bytes(budget.size)} was asked for, and the nearest plan takes {say_bytes(size)}; ask for "
                "at least that"
            )
        original = self.scores("original", "test", job.stream)
        ours = unhealed = self.scores("result", "test", lambda: applied.stream)
        healing, before = None, None
        if job.request.heal:
            healing = job.timed("healing", partial(heal, self, applied, folder))
            if healing["kept"]:
                size = self.journal.step("healed/artifact", partial(self.write, applied, candidate.plan, folder))
                gate = self.journal.step("healed/gate", partial(self.gate, applied, folder))
                ours = self.scores("healed", "test", lambda: applied.stream)
                before = self.point("before healing", size, unhealed, original, "test", plan=candidate.plan)
                before["healed"] = list(bootstrap(job.task, ours, unhealed, job.batch("test").amounts)[2])
            healing["before"] = before
        best = self.point(candidate.name, size, ours, original, "test", plan=candidate.plan)
        report: dict[str, Any] = {
            **{"model": job.source.name, "task": job.task.name, "budget": budget.limits(), "best": best},
            "original": self.point("original", job.source.bytes, original, original, "test"),
            "uniform": None,
            "compiled": self.compiled(folder, size, ours, original),
        }
        verdicts = []
        if uniform is not None:
            theirs = self.scores("uniform", "test", lambda: job.apply(uniform, "uniform-test").stream)
            size_uniform = fixed + sum(r.bytes for r in uniform.rows.values())
            report["uniform"] = self.point(uniform.name, size_uniform, theirs, original, "test", plan=uniform.plan)
            verdicts.append(self.versus(unhealed, theirs, candidate is uniform))
        if healing is not None:
            verdicts.append(said(healing, before))
        missed = self.missed(best, gate)
        verdicts += missed or ["every limit of the budget is met"] if budget.limits() else []
        sites = self.site_rows(candidate, applied)
        report |= {
            **{
                "front": front,
                "verdict": "; ".join(verdicts) or "measured",
                "met": not missed,
                "artifact": str(folder),
                "plan": candidate.plan,
            },
            **{
                "gate": gate,
                "forecast": self.forecast(candidate, rows),
                "healing": healing,
                "sites": sites,
                "machine": machine(),
                "versions": versions(),
                "effort": job.request.effort,
                "seed": job.request.seed,
            },
            "data": {
                "hash": job.task.data_hash(),
                "model_hash": job.source.hash,
                "source": job.request.data or "built in",
                "items": {s: len(job.batch(s)) for s in ("calibration", "search", "test")},
            },
        }
        from trimtab.engine.measure import peak_bytes

        report |= {
            "seconds": time.perf_counter() - began,
            "peak_bytes": peak_bytes(),
            "timings": {k: round(v, 3) for k, v in job.timings.items()},
        }
        self.save(report)
        return report

    def versus(self, ours: Scores, theirs: Scores, same: bool) -> str:
        """In words whether the result beats the best uniform plan on the test data; computed from the paired
        interval.
        """
        from trimtab.tasks.base import bootstrap

        if same:
            return "the best uniform plan is the result: no mixed plan did better on the search data"
        _, _, (low, high) = bootstrap(self.job.task, ours, theirs, self.job.batch("test").amounts)
        better = low > 0 if self.job.task.higher else high < 0
        worse = high < 0 if self.job.task.higher else low > 0
        word = "beats" if better else "is worse than" if worse else "cannot be told from"
        span = f"{self.job.task.metric} {low:+.3g} to {high:+.3g}, 95 % paired"
        return f"{word} the best uniform plan of the same size or less ({span})"

    def missed(self, best: dict[str, Any], gate: dict[str, Any]) -> list[str]:
        """Limits of the budget that the measured result does not meet, in words."""
        budget, found = self.job.request.budget, []
        if budget.quality is not None and best["retained"] < budget.quality:
            found.append(
                f"quality {budget.quality:.1%} was asked for, and {best['retained']:.1%} is kept on held-out data"
            )
        if budget.latency is not None and gate["seconds"] > budget.latency:
            found.append(
                f"latency {1e3 * budget.latency:.3g} ms was asked for, and {1e3 * gate['seconds']:.3g} ms was measured"
            )
        if budget.memory is not None and gate["peak_bytes"] > budget.memory:
            found.append(
                f"memory {say_bytes(budget.memory)} was asked for, and {say_bytes(gate['peak_bytes'])} was measured"
            )
        return found

    def forecast(self, candidate: Candidate, rows: list[Row] | None) -> dict[str, Any] | None:
        """What the search knew of seconds: those of the result, and the choices left out as slower than the original;
        None where the latency was not limited.
        """
        job = self.job
        if job.request.budget.latency is None or not candidate.rows:
            return None
        seconds = sum(r.seconds for r in candidate.rows.values()) + job.pace.beside(rows or [], candidate.dropped)
        kept = {c for u in job.units for c in u.choices}
        slower = sorted({c for u in job.offered for c in u.choices} - kept)
        return {"seconds": seconds, "how": job.pace.said, "slower_here": slower}

    def site_rows(self, candidate: Candidate, applied: Applied) -> list[dict[str, Any]]:
        """One row for each site: its level, bytes and damage, for the report's heat map."""
        from trimtab.core.level import Dense

        damage = (
            {s.path: candidate.rows[u.name].damage for u in self.job.units for s in u.sites if u.name in candidate.rows}
            if candidate.rows
            else {}
        )
        dense = Dense(self.job.source.dtype)
        rows = []
        for site in applied.stream.sites.values():
            level = applied.levels.get(site.path, dense)
            matrix = applied.stream.packed[site.path].shape if site.path in applied.packed else site.shape
            size = level.bytes(matrix)
            rows.append(
                {
                    **{
                        "path": site.path,
                        "role": site.role,
                        "block": site.block,
                        "method": applied.methods.get(site.path),
                    },
                    **{"level": str(level), "bytes": size, "bits": 8 * size / max(1, site.weights)},
                    **{"damage": damage.get(site.path), "weights": site.weights, "shape": list(site.shape)},
                }
            )
        return rows

    def save(self, report: dict[str, Any]) -> None:
        """Write `report.json`, `report.html` and `plan.toml` into the run's folder."""
        from trimtab.core.plan import Plan
        from trimtab.report.page import write_page

        out = self.job.out
        write_atomic(out / "report.json", lambda p: p.write_text(json.dumps(report, indent=1)))
        write_atomic(out / "plan.toml", lambda p: p.write_text(Plan.parse(report["plan"]).to_toml()))
        write_page(report, out / "report.html")


def for_allocator(job: Job, rows: list[Row], wanted: list[str]) -> dict[str, Any]:
    """What allocators ask for beside rows: `measure`, `cosine`, `outliers`.

    Raises:
        UserError: a statistic that a fit does not collect.
    """
    from trimtab.engine.apply import sublayer_cosines
    from trimtab.parts.scores import outlier_score

    extra: dict[str, Any] = {}
    for name in wanted:
        if name == "measure":
            extra[name] = job.database.measure
        elif name == "cosine":
            batch = job.batch("calibration")
            extra[name] = {p: float(v) for p, v in sublayer_cosines(job._probe_stream, batch, job.task.chunk).items()}
        elif name == "outliers":
            weight = job._probe_stream.weight
            extra[name] = {u.name: max(outlier_score(weight(s)) for s in u.sites) for u in job.units}
        elif name in ("trace", "pairs"):
            continue
        else:
            raise UserError(
                f"allocator {job.request.allocator} asks for {name}, which a fit does not collect; choose another "
                "with --allocator"
            )
    return extra
