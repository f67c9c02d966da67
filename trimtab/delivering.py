"""What a search hands over: the evidence, and a network in a folder of its own, loaded in a fresh process first."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import commit_folder, write_atomic, writing
from trimtab.core.knob import Genome
from trimtab.core.method import Trial

if TYPE_CHECKING:
    from torch import nn

    from trimtab.engine.pressing import Pressed
    from trimtab.formats.packed import Packed
    from trimtab.searching import Search

TESTED = 100  # times `task.multiple` items, for the verdict
RANDOM = 8  # networks of the same budget that the result is held against
TOLERANCE = 1e-5  # largest difference of an output, as a share of the largest, once the network is loaded elsewhere

LOADS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file
given = load_file(sys.argv[2])
expected = given.pop("output")
if sys.argv[3] == "torch":
    from network import network
    run = lambda: network()(*given.values())
elif sys.argv[3] == "transformers":
    import transformers
    config = transformers.AutoConfig.from_pretrained(sys.argv[1])
    model = getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1]).eval()
    run = lambda: model(**given).logits
else:
    from trimtab import load
    model = load(sys.argv[1], kernels=False).model
    run = lambda: model(**given).logits
with torch.no_grad():
    found = run()
print(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)), "trimtab" in sys.modules)
"""


@dataclass
class Found:
    """What a search gives: the evidence, the plain network, and its folder."""

    report: dict[str, Any]
    model: nn.Module
    folder: Path


class Delivery:
    """The last step of a search, which has its trained super-network and a chosen genome."""

    def __init__(self, search: Search) -> None:
        self.search, self.request, self.task, self.out = search, search.request, search.task, search.out
        self.maker, self.supernet, self.source = search.maker, search.supernet, search.source
        self.costs, self.jury, self.whole, self.said = search.costs, search.jury, search.whole, search.said

    def judged(self, trials: tuple[Trial, ...], chosen: Genome, others: Mapping[str, Genome]) -> Found:
        from trimtab.engine.measure import peak_bytes
        from trimtab.evidence import machine, versions
        from trimtab.report.page import write_page
        from trimtab.tasks.base import bootstrap

        test = self.search.batch("test", TESTED * self.task.multiple)
        scores, points = {}, {}
        models = {}
        for name, genome in {"best": chosen, **others}.items():
            models[name] = self.supernet.extract(self.whole(genome))
            self.jury.gather(models[name])
            scores[name] = self.jury.scores(models[name], test)
        whole = self.task.overall(scores["largest"], test.amounts)
        for name, genome in {"best": chosen, **others}.items():
            span, _, difference = bootstrap(self.task, scores[name], scores["largest"], test.amounts)
            value = self.task.overall(scores[name], test.amounts)
            points[name] = {
                **{
                    "name": name,
                    "plan": self.said(self.whole(genome)),
                    "metric": self.task.metric,
                    "value": value,
                },
                **{"low": span[0], "high": span[1], "difference": list(difference), "split": "test"},
                **{"retained": self.task.retained(value, whole), **self._costs_of(genome)},
            }
        verdict = self._verdict(scores, points, test)
        rng = Random(self.request.seed + 1)
        folder, gate = self.write(models["best"], self.whole(chosen))
        model = models["best"]
        priced = points["best"].get("seconds")
        measured = self.costs.measure(chosen) if priced is not None else None
        report = {
            **{
                "space": self.maker.name,
                "model": self.maker.name,
                "task": self.task.name,
                "networks": self.search.offered.count(),
            },
            **{
                "budget": self.request.budget.limits()
                | {k: v for k, v in self.request.limits.items() if k in ("flops", "parameters")}
            },
            **{
                "method": self.request.method,
                "searcher": self.request.searcher,
                "steps": self.request.steps,
            },
            **{"original": points["largest"], "best": points["best"], "uniform": points.get("uniform")},
            **{
                "setting": self.search.domain.setting(self.whole(chosen)),
                "random": self._random(rng, points["best"], test),
            },
            **{"front": self._front(trials), "cost": self.search.main, "trials": len(trials), "verdict": verdict},
            **{"latency": {"priced": priced, "measured": measured}, "ranges": self.costs.ranges},
            **{"met": True, "artifact": str(folder), "gate": gate, "plan": points["best"]["plan"]},
            **{"machine": machine(), "versions": versions(), "data": {"hash": self.task.data_hash()}},
            **{
                "timings": self.search.timings,
                "seconds": time.perf_counter() - self.search.started,
                "peak_bytes": peak_bytes(),
            },
        }
        write_atomic(
            self.out / "report.json", lambda p: p.write_text(json.dumps(report, indent=1, default=str), "utf-8")
        )
        write_page(report, self.out / "report.html")
        return Found(report, model, folder)

    def _costs_of(self, genome: Genome) -> dict[str, float]:
        return {name: float(v[0]) for name, v in self.search.price([genome]).items()}

    def _verdict(self, scores: Mapping[str, Any], points: Mapping[str, Any], test: Any) -> str:
        """The outcome in words, from paired intervals."""
        from trimtab.tasks.base import bootstrap

        best, cost = points["best"], self.search.main
        share = best[cost] / points["largest"][cost]
        said = f"keeps {best['retained']:.1%} of the largest network's {self.task.metric} at {share:.0%} of its {cost}"
        if "uniform" not in scores:
            return f"{said}; no uniform network is within the limits"
        if points["uniform"]["plan"] == best["plan"]:
            return f"{said}; it is the best uniform network within the limits"
        low, high = bootstrap(self.task, scores["best"], scores["uniform"], test.amounts)[2]
        better = low > 0 if self.task.higher else high < 0
        worse = high < 0 if self.task.higher else low > 0
        outcome = "better than" if better else "worse than" if worse else "not told apart from"
        span = f"{low:+.4g} to {high:+.4g} {self.task.metric}"
        return f"{said}; {outcome} the best uniform network within the limits ({span})"

    def _front(self, trials: tuple[Trial, ...]) -> list[dict[str, Any]]:
        """The scored sub-networks that no other beats in both error and cost, on the search items, cheapest first."""
        kept: list[Trial] = []
        for trial in sorted(trials, key=lambda t: (t.values[self.search.main], t.values["error"])):
            if not kept or trial.values["error"] < kept[-1].values["error"]:
                kept.append(trial)
        return [
            {
                **{
                    "name": f"network {i + 1}",
                    "plan": self.said(self.whole(t.genome)),
                    "split": "search",
                },
                **{
                    "metric": self.task.metric,
                    "value": 1 - t.values["error"] if self.task.higher else t.values["error"],
                },
                **{k: v for k, v in t.values.items() if k != "error"},
            }
            for i, t in enumerate(kept)
        ]

    def _random(self, rng: Random, best: Mapping[str, Any], test: Any) -> dict[str, Any]:
        """The mean of random networks of about the result's cost, over the same weights and items, and by how much of
        it the result is better (Yang et al. 2020, arXiv:1912.12522, section 3.1).
        """
        genomes = sorted({self.search.offered.random(rng) for _ in range(2000 if self.costs.exact else 100)})
        costs = self.search.price(genomes)[self.search.main]
        near = [
            g
            for g, c in zip(genomes, costs, strict=True)
            if 0.85 * best[self.search.main] <= c <= best[self.search.main]
        ]
        drawn = rng.sample(near, min(RANDOM, len(near)))
        values = []
        for i, genome in enumerate(drawn):
            module = self.supernet.extract(self.whole(genome))
            self.jury.gather(module)
            values.append(self.task.overall(self.jury.scores(module, test), test.amounts))
            self.search.progress("measure random networks", i + 1, len(drawn))
        if not values:
            return {"networks": 0, "mean": None, "improvement": None}
        mean = sum(values) / len(values)
        sign = 1 if self.task.higher else -1
        return {"networks": len(values), "mean": mean, "improvement": sign * (best["value"] - mean) / mean}

    def write(self, model: nn.Module, genome: Genome) -> tuple[Path, dict[str, Any]]:
        """Write the network into a folder, load it in a fresh process, and compare its outputs."""
        import torch

        from trimtab.engine.elastic import called, sized
        from trimtab.formats.checkpoint import write_safetensors

        folder, temporary = self.out / "model", self.out / ".model.part"
        model.eval()
        with writing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        needs = self._store(model, genome, temporary)
        inputs = sized(model, self.search.batch("test", 4).inputs)
        with torch.no_grad():
            output = called(model, inputs, self.task.options)
        tensors = {**inputs, "output": getattr(output, "logits", output)}
        probe = self.out / ".probe.safetensors"
        write_safetensors({k: v.contiguous() for k, v in tensors.items()}, probe)
        asked = [sys.executable, "-c", LOADS, str(temporary), str(probe), needs]
        done = subprocess.run(asked, capture_output=True, text=True)
        probe.unlink()
        if done.returncode:
            raise UserError(
                "the network does not load in a fresh process, so it is not handed over: "
                f"{done.stderr.strip().splitlines()[-1:] or 'killed'}"
            )
        difference, ours = done.stdout.split()[-2:]
        if not float(difference) <= TOLERANCE or (needs != "trimtab" and ours != "False"):
            raise UserError(f"the network differs by {difference} once it is loaded elsewhere; it is not handed over")
        shutil.rmtree(temporary / "__pycache__", ignore_errors=True)
        commit_folder(temporary, folder)
        size = sum(p.stat().st_size for p in folder.iterdir())
        return folder, {"needs": needs, "difference": float(difference), "bytes": size}

    def _packed(self, maker: Pressed, genome: Genome) -> dict[str, Packed]:
        """The network's packed matrices, by the names that its own modules give them."""
        network = self.supernet.network(genome)
        paths = {id(module): path for path, module in network.module.named_modules()}
        found = {}
        for place in network.parameters:
            packed = maker.pack(place.shared, self.supernet.part(place), genome)
            if packed is not None:
                found[f"{paths[id(place.holder)]}.{place.name}"] = packed
        return found

    def _store(self, model: Any, genome: Genome, folder: Path) -> str:
        """Write a network: what its folder needs to be loaded, `torch`, `transformers` or, where its blocks differ in
        ways that no configuration says, `trimtab`.
        """
        from trimtab.engine.cuts import Cuts
        from trimtab.engine.pressing import Pressed
        from trimtab.formats.network_code import write_network

        source, maker = self.source, self.maker
        sidecars = source.sidecars() if source is not None else []
        if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
            write_network(model, folder, f"A network of {maker.name}: {self.said(genome)}.")
            return "torch"
        if isinstance(maker, Cuts | Pressed):
            from trimtab.formats.structure import flipped, plain_config_changes
            from trimtab.models.artifact import write_artifact

            edits = maker.edits(genome)
            changes = plain_config_changes(model, edits)
            packed = self._packed(maker, genome) if isinstance(maker, Pressed) else {}
            if changes is None or packed:
                manifest = {
                    **{"task": self.task.name, "dtype": "fp32", "plan": "", "edits": edits},
                    "source": {"name": maker.name, "hash": source.hash if source is not None else ""},
                }
                once = {t.data_ptr(): n for n, t in reversed(model.state_dict().items())}  # tied weights have one name
                state = {n: packed.get(n, t.detach()) for n, t in sorted(model.state_dict().items())}
                state = {n: state[n] for n in state if n in once.values()}
                turned = {n: flipped(model.get_submodule(n.removesuffix(".weight"))) for n in packed}
                shapes = {n: (list(model.get_parameter(n).shape), turned[n]) for n in packed}
                write_artifact(folder, iter(state.items()), shapes, manifest, sidecars)
                return "trimtab"
            model.config = type(model.config).from_dict({**model.config.to_dict(), **changes})
        model.save_pretrained(folder)
        for path in sidecars:
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        return "transformers"
