"""Tables of trained networks: every network of a small space with its accuracy and costs, so that a search is replayed.

NAS-Bench-Macro: 6,561 networks of eight layers, each nothing or one of two inverted bottlenecks. NAS-Bench-201: 15,625
cells of six edges with five operations, and their measured latency on some devices. Both lie in the shared data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome, Knob
from trimtab.core.method import Trial
from trimtab.parts.breeding import every
from trimtab.parts.fronts import front, hypervolume, table
from trimtab.parts.hashing import fingerprint
from trimtab.parts.protocol import improvement

Array = NDArray[np.float64]
OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")
EDGES = ("0-1", "0-2", "1-2", "0-3", "1-3", "2-3")
_NAMES = {"none": "none", "skip_connect": "skip", "nor_conv_1x1": "conv1", "nor_conv_3x3": "conv3"}
_NAMES["avg_pool_3x3"] = "pool"


@dataclass(frozen=True)
class Table:
    """A space of networks, all evaluated.

    Fields:
        name: what it is called.
        domain: its knobs.
        values: name -> value of every network, in the order of `breeding.every`; all of them are to be small.
        objectives: those that a search makes small.
        judged: name of the error that a search does not see.
    """

    name: str
    domain: Domain
    values: dict[str, Array]
    objectives: tuple[str, ...]
    judged: str

    @cached_property
    def _strides(self) -> NDArray[np.intp]:
        sizes = [len(knob.options) for knob in self.domain.knobs]
        return np.array([int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))])

    def index(self, genomes: Sequence[Genome]) -> NDArray[np.intp]:
        """Rows of genomes in the values."""
        return np.asarray(np.array(genomes).reshape(-1, len(self._strides)) @ self._strides)

    def evaluate(self, genome: Genome) -> dict[str, float]:
        """All values of a network, as an evaluation would give them."""
        row = int(self.index([genome])[0])
        return {name: float(value[row]) for name, value in self.values.items()}

    @cached_property
    def _range(self) -> tuple[Array, Array]:
        points = np.stack([self.values[name] for name in self.objectives], 1)
        return points.min(0), points.max(0)

    def judge(self, trials: Sequence[Trial]) -> float:
        """Volume of the front that was found, by the error that the search did not see in place of the one it saw, as a
        share of the volume of the whole table's front by that error.
        """
        unseen = (self.judged, *self.objectives[1:])
        points = np.stack([self.values[name] for name in unseen], 1)
        low, high = points.min(0), points.max(0)
        found = table(trials, unseen)[front(table(trials, self.objectives))]
        volumes = (hypervolume((p - low) / (high - low), np.ones(len(low))) for p in (found, points))
        return next(volumes) / next(volumes)

    def improvement(self, trials: Sequence[Trial], limits: Mapping[str, float] | None = None) -> float:
        """Percent by which the best of some trials by the error that the search saw is more accurate, by the error that
        it did not see, than the mean network of the table, both within limits (see `parts.protocol`).

        Raises:
            UserError: no trial is within the limits.
        """
        limits = limits or {}
        met = [trial for trial in trials if all(trial.values[name] <= limit for name, limit in limits.items())]
        if not met:
            raise UserError(f"none of {len(trials)} trials is within {dict(limits)}; give a search more of them")
        within = np.all([self.values[name] <= limit for name, limit in limits.items()], 0) if limits else slice(None)
        best = min(met, key=lambda trial: trial.values[self.objectives[0]])
        return improvement(100 - best.values[self.judged], 100 - self.values[self.judged][within])

    def cheap(self) -> dict[str, float]:
        """The limit that half of the networks meet, by the name of the second objective."""
        cost = self.objectives[1]
        return {cost: float(np.median(self.values[cost]))}

    @cached_property
    def volume(self) -> float:
        """Volume of the whole table's front, every objective scaled to 0..1 by its range."""
        return self._volume(np.stack([self.values[name] for name in self.objectives], 1))

    def _volume(self, points: Array) -> float:
        low, high = self._range
        return hypervolume((points - low) / (high - low), np.ones(len(low)))

    def share(self, trials: Sequence[Trial]) -> float:
        """Volume of the front of some trials, as a share of the whole table's."""
        return self._volume(table(trials, self.objectives)) / self.volume

    def shares(self, trials: Sequence[Trial]) -> list[float]:
        """The share after each trial; it is worked out anew only where the front grew."""
        found: list[float] = []
        best = np.empty((0, len(self.objectives)))
        for point in table(trials, self.objectives):
            if not (best <= point).all(1).any():
                best = np.vstack([best[~(point <= best).all(1)], point])
                found.append(self._volume(best) / self.volume)
            else:
                found.append(found[-1])
        return found


def needed(shares: Sequence[float], share: float) -> float:
    """How many evaluations a share took; one more than there were where it was not reached.

    >>> needed([0.5, 0.96, 0.97], 0.95), needed([0.5], 0.95)
    (2.0, 2.0)
    """
    return float(next((i + 1 for i, s in enumerate(shares) if s >= share), len(shares) + 1))


def folder_of(data: Path | None) -> Path:
    """The folder of the tables in the shared data.

    Raises:
        UserError: there is none.
    """
    if data is None or not (data / "nas").is_dir():
        raise UserError("the tables of trained networks lie in the shared data; name its folder in TRIMTAB_DATA")
    return data / "nas"


@functools.cache
def macro(data: Path | None) -> Table:
    """NAS-Bench-Macro: error of the first seed, judged by the mean of the two others; millions of multiplications.

    Raises:
        UserError: the table is not there.
    """
    stored = json.loads((folder_of(data) / "nas-bench-macro-cifar10.json").read_text("utf-8"))
    domain = Domain(tuple(Knob(f"layer {i}", ("none", "mb3", "mb6"), "block") for i in range(8)))
    rows = [stored["".join(map(str, genome))] for genome in every(domain)]
    seeds = np.array([row["test_acc"] for row in rows], dtype=float)
    values = {
        "error": 100 - seeds[:, 0],
        "unseen": 100 - seeds[:, 1:].mean(1),
        "flops": np.array([row["flops"] for row in rows]) / 1e6,
        "params": np.array([row["params"] for row in rows]) / 1e6,
    }
    return Table("macro", domain, values, ("error", "flops"), "unseen")


@functools.cache
def bench201(data: Path | None, device: str = "gold_6226", images: str = "cifar10") -> Table:
    """NAS-Bench-201: error on the validation data, judged by the test data; measured milliseconds on a device.

    Raises:
        UserError: the table, the device or the images are not there.
    """
    with np.load(folder_of(data) / "nasbench201.npz") as stored:
        devices = sorted(name[3:] for name in stored.files if name.startswith("ms_"))
        kinds = sorted({name[4:].rpartition("-")[0] for name in stored.files if name.startswith("acc_")})
        if device not in devices or images not in kinds:
            raise UserError(f"{images} on {device} was asked for; there are {', '.join(kinds)} on {', '.join(devices)}")
        cells, seconds = stored["arch"], stored[f"ms_{device}"].astype(float)
        seen, unseen = (100 - stored[f"acc_{images}-{part}"].astype(float) for part in ("val", "test"))
    domain = Domain(tuple(Knob(edge, OPERATIONS, "block") for edge in EDGES))
    place = {tuple(_places(cell)): i for i, cell in enumerate(cells)}
    order = np.array([place[genome] for genome in every(domain)])
    values = {"error": seen[order], "unseen": unseen[order], "ms": seconds[order]}
    return Table(f"nb201/{device}", domain, values, ("error", "ms"), "unseen")


def cell_hash(genome: Genome, draw: int = 0) -> str:
    """What a cell of NAS-Bench-201 computes of two fixed images: every operation of a kind has the same fixed weights,
    so that cells which are the same graph, drawn otherwise, agree. `draw` is of images and weights.

    >>> conv, skip = OPERATIONS.index("conv3"), OPERATIONS.index("skip")
    >>> same = (conv, 0, 0, 0, skip, 0), (0, conv, 0, 0, 0, skip), (0, 0, 0, conv, 0, 0)
    >>> len(set(map(cell_hash, same)))
    1
    >>> cell_hash((0, 0, 0, conv, 0, 0)) == cell_hash((0, 0, 0, skip, 0, 0))
    False
    """
    nodes = [_canonical(draw)]
    for node in range(1, 4):
        edges = [(int(edge[0]), place) for edge, place in zip(EDGES, genome, strict=True) if edge[-1] == str(node)]
        nodes.append(np.asarray(sum(_operation(OPERATIONS[place], nodes[source], draw) for source, place in edges)))
    return fingerprint([nodes[-1]])


@functools.cache
def _canonical(draw: int) -> Array:
    return np.random.default_rng(draw).normal(size=(2, 4, 6, 6))


@functools.cache
def _weights(kernel: int, draw: int) -> Array:
    return np.random.default_rng((kernel, draw)).normal(size=(kernel * kernel, 4, 4)) / (2 * kernel)


def _operation(name: str, x: Array, draw: int) -> Array:
    """An operation on images `[n, channels, h, w]`."""
    if name in ("none", "skip"):
        return x * (name == "skip")
    kernel = 1 if name == "conv1" else 3
    edge, (h, w) = kernel // 2, x.shape[2:]
    padded = np.pad(np.maximum(x, 0) if name != "pool" else x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    shifted = [padded[:, :, i : i + h, j : j + w] for i in range(kernel) for j in range(kernel)]
    if name == "pool":
        return np.asarray(sum(shifted) / 9)
    return np.asarray(
        sum(np.einsum("oc,nchw->nohw", m, s) for m, s in zip(_weights(kernel, draw), shifted, strict=True))
    )


def _places(cell: str) -> list[int]:
    edges = [edge.split("~")[0] for node in cell.split("+") for edge in node.strip("|").split("|")]
    return [OPERATIONS.index(_NAMES[edge]) for edge in edges]
