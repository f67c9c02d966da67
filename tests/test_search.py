"""`trimtab search`: prices, networks as source, end to end, killed and resumed, and what is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Said
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.method import Elastic, Lesson
from trimtab.core.plan import parse_method
from trimtab.engine.costing import Costs
from trimtab.engine.cuts import Cuts
from trimtab.engine.elastic import Supernet, called
from trimtab.engine.stream import traced
from trimtab.engine.teaching import Course
from trimtab.engine.train import Recipe
from trimtab.formats.network_code import write_network
from trimtab.models.source import open_source
from trimtab.searching import describe, search
from trimtab.space import Choice, Space, open_space
from trimtab.tasks.build import task_for

Cli = Callable[..., Said]
QUICK: dict[str, Any] = {"steps": 20, "batch": 32, "evaluations": 12, "threads": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- prices


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("mobile-cnn", {"images": torch.zeros(1, 3, 16, 16)}),
        ("mobile-cnn:resized", {"images": torch.zeros(1, 3, 32, 32)}),
        ("vit", {"images": torch.zeros(1, 3, 32, 32)}),
        ("tiny-llm", {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}),
    ],
)
def test_prices_are_exact(name: str, inputs: dict[str, torch.Tensor]) -> None:
    costs = Costs(open_space(name), inputs)
    assert costs.exact
    rng = random.Random(0)
    genomes = [costs.domain.random(rng) for _ in range(4)]
    found = costs.price(genomes)
    for i, genome in enumerate(genomes):
        network = costs.maker.build(genome, meta=False)[0].eval()
        assert found["parameters"][i] == sum(p.numel() for p in network.parameters())
        lasting = {id(t): t for t in network.state_dict(keep_vars=True).values()}
        assert found["bytes"][i] == sum(t.numel() * t.element_size() for t in lasting.values())
        backend = torch.nn.attention.SDPBackend.MATH  # torch's counter knows no other attention on a processor
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(backend):
            called(network, inputs, {})
        assert found["flops"][i] == counter.get_total_flops()


def test_seconds_are_near_what_is_measured() -> None:
    costs = Costs(open_space("mobile-cnn"), {"images": torch.zeros(1, 3, 32, 32)}, seconds=True, threads=1)
    ends = [costs.domain.smallest(), costs.domain.largest()]
    small, large = costs.price(ends)["seconds"]
    assert 0 < small < large
    measured = [costs.measure(genome) for genome in ends]
    assert np.allclose([small, large], measured, rtol=0.5), "this is no benchmark: a busy machine may be that far off"


# ---- curricula


def test_the_rate_of_ofa_begins_anew_in_every_phase() -> None:
    ofa, whole = parse_method("ofa(rates=(1.0, 0.5, 0.25, 1.0))"), Recipe(steps=1000, rate=0.1)
    course = Course(steps=1000, rate=0.1, warmup=0.0, method=ofa)  # type: ignore[arg-type]
    starts = [0, 300, 510, 755]
    assert [course.rate_at(step) for step in starts] == pytest.approx([0.1, 0.05, 0.025, 0.1])
    assert [course.rate_at(step - 1) for step in starts[1:]] == pytest.approx([0.01, 0.005, 0.0025], rel=0.02)
    plain = Course(steps=1000, rate=0.1, method=parse_method("sandwich"))  # type: ignore[arg-type]
    assert [plain.rate_at(s) for s in range(1000)] == [whole.rate_at(s) for s in range(1000)]


def test_ofa_draws_resolutions_from_the_first_phase_on_and_smallest_depths_last() -> None:
    ofa, domain = parse_method("ofa"), open_space("mobile-cnn:resized").domain
    assert isinstance(ofa, Elastic)

    def seen(step: int) -> dict[Any, set[int]]:
        lesson = Lesson(domain, ofa.offer(domain), step, 1000)
        drawn = [domain.setting(p.genome) for i in range(60) for p in ofa.teach(lesson, random.Random(i))]
        kinds = {k.name: k.kind for k in domain.knobs}
        return {kind: {o for s in drawn for n, o in s.items() if kinds[n] == kind} for kind in set(kinds.values())}

    heights = {16, 20, 24, 28, 32}
    assert seen(0) == {"resolution": heights, "choice": {5}, "depth": {3}, "width": {4}}
    assert seen(400) == {"resolution": heights, "choice": {3, 5}, "depth": {3}, "width": {4}}
    assert seen(520) == {"resolution": heights, "choice": {3, 5}, "depth": {2, 3}, "width": {4}}
    assert seen(700) == {"resolution": heights, "choice": {3, 5}, "depth": {1, 2, 3}, "width": {4}}
    assert seen(999) == {"resolution": heights, "choice": {3, 5}, "depth": {1, 2, 3}, "width": {2, 3, 4}}


# ---- networks as source


class Odd(nn.Module):
    """Parameters and buffers of its own, functions, reused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.blocks = nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU(approximate="tanh"))
        self.pool = nn.AvgPool1d(3, 1, 1, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(self.blocks(self.blocks(x))) * self.scale + self.shift
        return nn.functional.layer_norm(y, (4,)).clamp(min=-1.0, max=float("inf"))


def test_a_network_is_written_as_source_that_needs_torch_alone(tmp_path: Path) -> None:
    model, x = Odd(), torch.randn(3, 4)
    write_network(model, tmp_path, "An odd network.")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from network import network; "
        "print(network()(torch.tensor(eval(sys.argv[2]))).tolist(), 'trimtab' in sys.modules)"
    )
    line = [sys.executable, "-I", "-c", code, str(tmp_path), str(x.tolist())]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    values, ours = done.stdout.rsplit(maxsplit=1)
    assert torch.equal(torch.tensor(json.loads(values)), model(torch.tensor(x.tolist()))) and ours == "False"


def test_networks_that_source_cannot_say_are_refused(tmp_path: Path) -> None:
    class Values(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="hangs on values"):
        write_network(Values(), tmp_path, "")
    with pytest.raises(UserError, match="TransformerEncoderLayer"):
        write_network(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), tmp_path, "")
    assert not list(tmp_path.iterdir())


# ---- trained models made elastic


@pytest.mark.parametrize("name", ["pocket", "pocket-vit", "pocket-cnn"])
def test_a_trained_model_is_its_own_largest_network(name: str) -> None:
    source = open_source(name)
    task = task_for(source, None, 32)
    some = task.batch("calibration", 2)
    model = source.materialise()
    cuts = Cuts(name, model, traced(source, some), some.inputs, task.options)
    supernet = Supernet(cuts)
    rng = random.Random(0)

    def logits(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output = called(module.eval(), some.inputs, task.options)
        return getattr(output, "logits", output)

    plain = logits(model)
    assert torch.equal(logits(supernet.bound(cuts.domain.largest())[0]), plain)
    assert supernet.sort({k: v[:1] for k, v in some.inputs.items()})
    assert torch.allclose(logits(supernet.bound(cuts.domain.largest())[0]), plain, atol=1e-3)
    sizes = set()
    for _ in range(10):
        genome = cuts.domain.random(rng)
        network = supernet.extract(genome)
        assert torch.equal(logits(supernet.bound(genome)[0]), logits(network))
        sizes.add(sum(p.numel() for p in network.parameters()))
    assert len(sizes) > 5 and max(sizes) < sum(p.numel() for p in model.parameters())


# ---- the whole of it


def test_it_finds_a_plain_network_within_the_budget(tmp_path: Path) -> None:
    found = search("mobile-cnn", budget=Budget.of(size="200kB"), out=tmp_path / "run", **QUICK)
    report = found.report
    assert report["best"]["bytes"] <= 200_000 < report["original"]["bytes"]
    assert report["trials"] == QUICK["evaluations"] and report["front"]
    values = [(p["bytes"], -p["value"]) for p in report["front"]]
    assert values == sorted(values) and len({v for _, v in values}) == len(values)
    assert report["uniform"]["bytes"] <= 200_000 and report["random"]["networks"] > 0
    assert report["gate"]["needs"] == "torch" and report["gate"]["difference"] < 1e-6
    assert {p.name for p in found.folder.iterdir()} == {"network.py", "model.safetensors"}
    assert sum(p.numel() for p in found.model.parameters()) == report["best"]["parameters"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best"] == report["best"]


def test_the_network_says_what_resolution_it_was_chosen_for(tmp_path: Path) -> None:
    found = search("mobile-cnn:resized", flops=300_000, method="sandwich", out=tmp_path / "run", **QUICK)
    height = found.report["setting"]["resolution"]
    assert height in (4, 5, 6, 7, 8) and found.report["best"]["flops"] <= 300_000
    source = (found.folder / "network.py").read_text()
    assert f"resolution={height}" in source and f"\n    resolution = {height}  #" in source
    line = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import network as n"]
    line[-1] += "; print(n.network().resolution, 'trimtab' in sys.modules)"
    done = subprocess.run([*line, str(found.folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(height), "False"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found.model(torch.zeros(1, 1, height, height))
    assert counter.get_total_flops() == found.report["best"]["flops"], "counted at the height that it is for"


def test_a_space_of_transformers_gives_a_folder_of_transformers(tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = {**QUICK, "steps": 4, "batch": 4, "evaluations": 4, "length": 32}
    found = search("tiny-llm", str(text), parameters=700_000, method="ofa", out=tmp_path / "run", **options)
    assert found.report["gate"]["needs"] == "transformers"
    plain = AutoModelForCausalLM.from_pretrained(found.folder)
    assert sum(p.numel() for p in plain.parameters()) == found.report["best"]["parameters"] <= 700_000
    assert plain.config.num_hidden_layers == found.report["setting"]["layers"]


def test_from_a_trained_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    from trimtab import load

    options = {**QUICK, "steps": 6, "batch": 4, "evaluations": 8, "length": 32}
    whole = describe(data=str(text), model=str(tiny), length=32)
    most = sum(whole["ranges"]["parameters"][1:]) / 2
    found = search(
        None, str(text), model=str(tiny), parameters=most, method="llama-nas", out=tmp_path / "run", **options
    )
    report = found.report
    assert report["best"]["parameters"] <= most and report["gate"]["needs"] in ("transformers", "trimtab")
    again = load(str(found.folder), kernels=False).model
    tokens = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, found.model(tokens).logits, atol=1e-5)


def test_from_a_model_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    (tmp_path / "timm_net.py").write_text(TIMM)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {**QUICK, "steps": 3, "batch": 4, "evaluations": 6}
    whole = describe(data="timm_net:images", model="timm_net:network")
    most = sum(whole["ranges"]["parameters"][1:]) / 2
    found = search(None, "timm_net:images", model="timm_net:network", parameters=most, out=tmp_path / "run", **options)
    assert found.report["best"]["parameters"] <= most and found.report["gate"]["needs"] == "torch"
    assert sum(p.numel() for p in found.model.parameters()) == found.report["best"]["parameters"]


def test_levels_and_widths_share_one_allocation(tiny: Path, text: Path, tmp_path: Path) -> None:
    from trimtab import load

    options = {**QUICK, "steps": 4, "batch": 4, "evaluations": 12, "length": 32, "levels": ("8b/row", "4b/g32")}
    budget = Budget.of(size="2.15MB")
    found = search(None, str(text), model=str(tiny), method="instatune", budget=budget, out=tmp_path / "run", **options)
    report = found.report
    levels = {option for name, option in report["setting"].items() if name.endswith(".level")}
    assert levels <= {"fp32", "8b/row", "4b/g32"} and levels & {"8b/row", "4b/g32"}
    assert report["best"]["bytes"] <= 2_150_000 < report["original"]["bytes"]
    tokens = torch.arange(20)[None] + 5
    stored = (found.folder / "model.safetensors").stat().st_size
    assert stored <= report["best"]["bytes"] + 20_000, "what is stored is what was priced, and a header"
    with torch.no_grad():
        again = load(str(found.folder), kernels=False).model(tokens).logits
        assert torch.allclose(again, found.model(tokens).logits, atol=1e-4)


TIMM = """
import torch

def network():
    import timm
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=4, channels=(8, 16, 24, 32), stem_width=8)

def images():
    rng = torch.Generator().manual_seed(0)
    return {s: (torch.randn(n, 3, 32, 32, generator=rng), torch.randint(4, (n,), generator=rng))
            for s, n in (("calibration", 40), ("search", 20), ("test", 20))}
"""

SMALL_SPACE = """
from torch import nn
from trimtab.space import Depth, Width

def network(channels=1, classes=10):
    width = Width(16, 24, 32)
    layers = [nn.Flatten(), nn.Linear(64 * channels, width), nn.BatchNorm1d(width), nn.ReLU()]
    for _ in Depth(1, 2, name="blocks"):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))
"""


def test_killed_and_resumed_it_ends_with_the_same_network(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL_SPACE)
    code = "import sys; from trimtab.cli import main; main(sys.argv[1:])"
    line = ["search", str(tmp_path / "small.py"), "--size", "14kB", "--steps", "400", "--batch", "16", "-q"]
    start = [sys.executable, "-c", code, *line, "--evaluations", "6", "--threads", "1", "--out"]
    for stage in ("training/checkpoint-*", "trials/trials.jsonl"):
        resume = ["--resume"] if (tmp_path / "cut").exists() else []
        process = subprocess.Popen([*start, str(tmp_path / "cut"), *resume])
        while not list((tmp_path / "cut").glob(stage)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "report.json").exists(), "it was over before it was killed"
    subprocess.run([*start, str(tmp_path / "cut"), "--resume"], check=True)
    subprocess.run([*start, str(tmp_path / "whole")], check=True)
    ends = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert ends[0] == ends[1]


def test_a_description_is_short(cli: Cli) -> None:
    said = cli("search", "mobile-cnn", "--describe", "--threads", "1", "-q")
    assert said.code == 0 and len(said.out.splitlines()) <= 25
    assert "17,173,512 networks, 21 choices" in said.out and "9 of them, 6 hang on others" in said.out
    assert all(name in said.out for name in ("parameters", "bytes", "flops", "seconds", "median"))


def test_what_is_refused(cli: Cli, tmp_path: Path) -> None:
    out = str(tmp_path / "run")

    def refused(code: int, *arguments: str) -> str:
        said = cli("search", *arguments, "--out", out, "--threads", "1", "-q")
        assert said.code == code and len(said.err.splitlines()) == 1 and not Path(out).exists(), said
        return said.err

    assert "nearest takes" in refused(3, "mobile-cnn", "--size", "1kB")
    assert "no space 'mobil'" in refused(2, "mobil")
    assert "name one, and not both" in refused(2, "mobile-cnn", "--from", "pocket")
    assert "trains no elastic network" in refused(2, "mobile-cnn", "--method", "linas")
    assert "proposes no networks" in refused(2, "mobile-cnn", "--searcher", "ofa")
    assert "no statistics of nodes" in refused(2, "mobile-cnn", "--searcher", "parzc"), "before anything is trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        assert "pip install 'trimtab[search]'" in refused(2, "mobile-cnn", "--searcher", "optuna-tpe")
    assert "levels are offered" in refused(2, "mobile-cnn", "--levels", "4b/g64")
    assert "no device profile" in refused(2, "mobile-cnn", "--latency", "5ms", "--device", str(tmp_path / "none.json"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"machine": "another", "threads": 1, "seconds": {}}))
    assert "another machine" in refused(2, "mobile-cnn", "--latency", "5ms", "--device", str(other))
    assert "labels" in refused(2, "mobile-cnn", "--data", str(_npz(tmp_path / "bad.npz", labels=-1)))


def test_spaces_that_cannot_be_followed_name_the_place(cli: Cli, tmp_path: Path) -> None:
    head = "import torch\nfrom torch import nn\nfrom trimtab.space import Width\n\n"
    values = "class Net(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
    values += "        self.a, self.b = nn.Linear(64, width), nn.Linear(width, 10)\n"
    values += "    def forward(self, x):\n        y = self.a(x.flatten(1))\n"
    values += "        return self.b(y if float(y.detach().sum()) > 0 else -y)\n\n"
    unfit = values.replace("nn.Linear(width, 10)", "nn.Linear(8, 10)").replace(
        "if float(y.detach().sum()) > 0 else -y", ""
    )
    for body, words in ((values, "cannot be followed"), (unfit, "cannot be followed in b")):
        file = tmp_path / "space.py"
        file.write_text(head + body + "def network():\n    return Net(Width(4, 8, 16))\n")
        said = cli("search", str(file), "--size", "1MB", "--steps", "1", "-q", "--out", str(tmp_path / "run"))
        assert said.code == 2 and words in said.err and "width=" in said.err and len(said.err.splitlines()) == 1, said


def _npz(path: Path, labels: int) -> Path:
    images = np.zeros((20, 1, 8, 8), dtype=np.float32)
    np.savez(path, images=images, labels=np.full(20, labels))
    return path


def test_a_resumed_run_with_another_space_is_refused(tmp_path: Path) -> None:
    options = {**QUICK, "steps": 2, "evaluations": 2}
    search("mobile-cnn", out=tmp_path / "run", budget=Budget.of(size="200kB"), **options)
    with pytest.raises(UserError, match="knobs"):
        search("vit", out=tmp_path / "run", budget=Budget.of(size="200kB"), resume=True, **options)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is no number"):
        search("mobile-cnn", budget=Budget.of(size="200kB"), out=tmp_path / "run", **{**QUICK, "rate": 1e18})
    assert not (tmp_path / "run" / "model").exists()


def test_choices_that_never_matter_are_no_trouble(tmp_path: Path) -> None:
    space = Space(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, Choice(2))), "one")
    assert space.domain.count() == 1
    with pytest.raises(BudgetError):
        search("mobile-cnn", budget=Budget.of(size="200kB"), flops=1.0, out=tmp_path / "run", **QUICK)
