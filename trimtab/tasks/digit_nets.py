"""A small space of convolutional networks and training recipes for the digits, all of it trained once.

36 architectures and 6 recipes; each pair was trained once, and its errors lie in `records/benchmarks/digit-nets.jsonl`,
which `benchmarks/digit_nets.py` writes. So searches are replayed on networks trained here, without a data folder.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome, Knob
from trimtab.parts.breeding import every
from trimtab.tasks.digits import digits
from trimtab.tasks.nas_tables import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

ARCHITECTURE = (
    Knob("depth", (1, 2, 3), "depth"),
    Knob("width", (4, 8, 16), "width"),
    Knob("kernel", (1, 3), "width"),
    Knob("pool", ("late", "early"), "block"),
)
RECIPE = (
    Knob("optimiser", ("sgd", "adam"), "recipe"),
    Knob("rate", (0.002, 0.01, 0.05), "recipe"),
)
DOMAIN = Domain((*ARCHITECTURE, *RECIPE))
IMAGES, STEPS, BATCH = 300, 150, 32


def network(setting: dict[str, Any]) -> nn.Sequential:
    """The network of a setting: convolutions with ReLU, the first or the last behind a pooling, and a linear layer."""
    from torch import nn

    width, kernel, depth = setting["width"], setting["kernel"], setting["depth"]
    parts: list[nn.Module] = []
    for i in range(depth):
        if i == (0 if setting["pool"] == "early" else depth - 1):
            parts.append(nn.AvgPool2d(2))
        parts += [nn.Conv2d(1 if i == 0 else width, width, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*parts, nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(10))


def made(setting: dict[str, Any], seed: int) -> nn.Sequential:
    """The network with first weights of a seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(setting)
        model(torch.zeros(1, 1, 8, 8))
    return model


def trained(model: nn.Module, setting: dict[str, Any], seed: int, steps: int = STEPS) -> nn.Module:
    """The model trained by the setting's recipe on the first images of the training split, in place."""
    import torch

    images, labels = (part[:IMAGES] for part in digits("train"))
    rate, kind = setting["rate"], setting["optimiser"]
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, rate, momentum=0.9) if kind == "sgd" else torch.optim.Adam(parameters, rate)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        items = torch.randint(len(labels), (BATCH,), generator=rng)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images[items]), labels[items]).backward()
        optimiser.step()
    return model


def error(model: nn.Module, split: str) -> float:
    """Errors on a split, in percent."""
    import torch

    images, labels = digits(split)
    with torch.no_grad():
        return 100 - 100 * float((model(images).argmax(1) == labels).double().mean())


def costs(setting: dict[str, Any]) -> dict[str, float]:
    """Thousands of multiplications of an image, and of parameters, exactly."""
    import torch
    from torch import nn

    model, counted = made(setting, 0), [0]

    def count(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        counted[0] += weight.numel() * (out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1)

    for part in model:
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(count)
    model(torch.zeros(1, 1, 8, 8))
    return {"macs": counted[0] / 1e3, "params": sum(p.numel() for p in model.parameters()) / 1e3}


def stored() -> Path:
    """The file of the trained networks' errors."""
    from trimtab.catalogue import record_path

    return record_path("benchmarks", "digit-nets")


@functools.cache
def digit_nets() -> Table:
    """All trained networks: error on the search images, judged by the test images; thousands of multiplications.

    Raises:
        UserError: the record is not there.
    """
    if not stored().is_file():
        raise UserError(f"{stored()} is not there; benchmarks/digit_nets.py writes it in some minutes")
    row = json.loads(stored().read_text("utf-8").splitlines()[-1])
    genomes = list(every(DOMAIN))
    assert len(row["error"]) == len(genomes)
    spent = [costs(DOMAIN.setting(genome)) for genome in genomes[:: DOMAIN.count() // 36]]
    many = np.repeat([[cost["macs"], cost["params"]] for cost in spent], DOMAIN.count() // 36, axis=0)
    values = {
        "error": np.array(row["error"], dtype=float),
        "unseen": np.array(row["unseen"], dtype=float),
        "macs": many[:, 0],
        "params": many[:, 1],
    }
    return Table("digit-nets", DOMAIN, values, ("error", "macs"), "unseen")


def scores(genome: Genome, seed: int = 0) -> tuple[float, float]:
    """Errors on the search and the test images."""
    setting = DOMAIN.setting(genome)
    model = trained(made(setting, seed), setting, seed)
    return error(model, "search"), error(model, "test")
