"""EAS: growing what is trained against training from scratch."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Domain, Genome, Knob
from trimtab.core.method import Hunt, Trial
from trimtab.nas.eas import EAS, step_between
from trimtab.parts.growing import deeper, wider
from trimtab.parts.protocol import beside, improvement
from trimtab.tasks.digits import digits

WIDTHS, DEPTHS, TRIALS, STEPS = (4, 6, 8, 12, 16), (1, 2, 3), 16, 25
DOMAIN = Domain((Knob("depth", DEPTHS, "depth"), *(Knob(f"width {i}", WIDTHS, "width") for i in range(2))))

CLAIM = Claim(
    method="eas",
    statement="Growth keeps a network's function, and a search whose networks inherit weights finds a better one than "
    "the same search that trains each from scratch, at equal training.",
    source="Cai et al. 2018, arXiv:1707.04873, sections 3 and 5",
    figure="CIFAR-10: 4.23 % error without skip connections, on 5 GPUs",
    setting="Convolutional networks for 300 digits: two widths of 4 to 16 channels, 1 to 3 layers behind the pooling; "
    "16 networks of 25 steps each; beside them the largest, of 400 steps. Judged on images that none saw.",
    metric="error in percent; largest difference of outputs before and after growth; improvement on the mean of 16 "
    "random networks of 25 steps, in percent of its accuracy",
    checks=(
        Check("outputs after growth are those before, within 1e-5", "difference", "<=", 1e-5),
        Check("less error with inherited weights", "inherited", "<", "scratch"),
        Check("not above the largest network, trained with all the steps", "inherited", "<=", "largest"),
        *beside(),
    ),
    seeds=tuple(range(6)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed."""
    difference = [0.0]
    found = {kind: searched(seed, kind == "inherited", difference) for kind in ("inherited", "scratch")}
    torch.manual_seed(seed)
    largest = fresh(DOMAIN.largest())
    train(largest, seed, TRIALS * STEPS)
    drawn = randoms(seed)
    chosen = min(drawn, key=lambda errors: errors[0])[1]
    for name, error in (("", found["inherited"]), ("random_", chosen)):
        found[f"{name}improvement"] = improvement(100 - error, [100 - unseen for _, unseen in drawn])
    return found | {"difference": difference[0], "largest": wrong(largest, "test")}


def randoms(seed: int) -> list[tuple[float, float]]:
    """Errors of random networks on the images of the search and on those that none saw."""
    found, rng = [], Random(seed)
    for i in range(TRIALS):
        torch.manual_seed(seed + i)
        model = fresh(DOMAIN.random(rng))
        train(model, seed + i)
        found.append((wrong(model, "search"), wrong(model, "test")))
    return found


def searched(seed: int, inherit: bool, difference: list[float]) -> float:
    """The unseen error of the best network of a search."""
    trials: tuple[Trial, ...] = ()
    nets: dict[Genome, nn.Sequential] = {}
    while len(trials) < TRIALS:
        hunt = Hunt(DOMAIN, trials, ("error",), seed=seed)
        (new,) = EAS().ask(hunt, 1, rng=Random(f"{seed}/{len(trials)}"))
        parents = [t for t in trials if step_between(hunt, t.genome, new) is not None]
        torch.manual_seed(seed + len(trials))
        if inherit and parents:
            parent = min(parents, key=lambda trial: trial.values["error"])
            nets[new] = grow(nets[parent.genome], parent.genome, new, seed, difference)
        else:
            nets[new] = fresh(new)
        train(nets[new], seed + len(trials))
        trials += (Trial(new, {"error": wrong(nets[new], "search")}),)
    best = min(trials, key=lambda trial: trial.values["error"])
    return wrong(nets[best.genome], "test")


def fresh(genome: Genome) -> nn.Sequential:
    """A network: a convolution, a pooling, further convolutions, a mean over quarters, a linear layer."""
    setting = DOMAIN.setting(genome)
    first, second = setting["width 0"], setting["width 1"]
    parts: list[nn.Module] = [nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    for i in range(setting["depth"]):
        parts += [nn.Conv2d(first if i == 0 else second, second, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * second, 10))


def grow(model: nn.Sequential, old: Genome, new: Genome, seed: int, difference: list[float]) -> nn.Sequential:
    """The network grown by one step, of the same function."""
    images = digits("train")[0][:50]
    before = outputs(model, images)
    rng = torch.Generator().manual_seed(seed)
    result, setting = copy.deepcopy(model), DOMAIN.setting(new)
    convs = [i for i, part in enumerate(result) if isinstance(part, nn.Conv2d | nn.Linear)]
    layers: Any = [result[i] for i in convs]
    if new[0] != old[0]:
        result = nn.Sequential(*result[:-3], deeper(layers[-2]), nn.ReLU(), *result[-3:])
    elif new[1] != old[1]:
        result[convs[0]], result[convs[1]] = wider(layers[0], layers[1], setting["width 0"], rng)
    else:
        # every layer behind the first has this width: each in turn is grown together with the one that reads it
        for i in range(1, len(layers) - 1):
            layers[i], layers[i + 1] = wider(layers[i], layers[i + 1], setting["width 1"], rng)
        for place, layer in zip(convs, layers, strict=True):
            result[place] = layer
    difference[0] = max(difference[0], float((outputs(result, images) - before).abs().max()))
    with torch.no_grad():
        for parameter in result.parameters():  # so that copies part
            parameter += 0.01 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=rng)
    return result


@torch.no_grad()
def outputs(model: nn.Sequential, images: Tensor) -> Tensor:
    """Logits."""
    return model(images)


def train(model: nn.Sequential, seed: int, steps: int = STEPS) -> None:
    """Some steps on 300 digits."""
    images, labels = (part[:300] for part in digits("train"))
    model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        items = torch.randint(300, (32,), generator=rng)
        optimiser.zero_grad()
        functional.cross_entropy(model(images[items]), labels[items]).backward()
        optimiser.step()


def wrong(model: nn.Sequential, split: str) -> float:
    """Errors on a split, in percent."""
    images, labels = digits(split)
    return 100 - 100 * float((outputs(model, images).argmax(1) == labels).double().mean())
