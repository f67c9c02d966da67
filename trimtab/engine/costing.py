"""What every network of a domain costs, exactly and at once: from a few of its networks to tables that add up.

A network's forward is followed once, without arithmetic, operation by operation, and each operation is laid to the
module that it runs in. What a module costs hangs on few choices; these are found by turning one choice at a time, and
its cost is tabled over them. A genome then costs the sum of some table entries, so that a search prices a million of
them in seconds. Random networks are followed to see that the sums are right; where they are not, each is followed.

Seconds are those of each distinct operation, measured here once, and of a few whole networks, which set what a call
costs beside its work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.core.errors import UserError
from trimtab.core.journal import write_atomic
from trimtab.core.knob import Domain, Genome
from trimtab.engine.elastic import called, sized
from trimtab.kernels.profile import cores, machine_name, threads_set, timed

if TYPE_CHECKING:
    from trimtab.engine.elastic import Maker

Progress = Callable[[str, int, int], None]
COSTS = ("parameters", "bytes", "flops", "seconds")
LARGEST_TABLE = 20_000  # entries of one module's table
CHECKED = 12  # random networks that the sums are compared with
CALIBRATED = 6  # whole networks that are measured
SECONDS = 0.02  # for which an operation is measured
FREE = (
    "view",
    "_unsafe_view",
    "reshape",
    "alias",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
    "t",
    "slice",
    "select",
    "split",
    "as_strided",
    "_reshape_alias",
)


@dataclass(frozen=True)
class Operation:
    """One call of torch: its name, and its arguments as text, tensors by type and shape."""

    name: str
    arguments: str
    flops: int


class _Recorder(TorchDispatchMode):
    """Keeps every operation with the module that it ran in, and how to run it again."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.found: list[tuple[str, Operation]] = []
        self.again: dict[Operation, tuple[Any, Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in FREE or func.namespace != "aten":
            return out
        plain = torch.utils._pytree.tree_map(_shape_of, (args, kwargs))
        operation = Operation(name, repr(plain), _flops(func, args, kwargs, out))
        self.found.append((self.path, operation))
        self.again.setdefault(operation, (func, *plain))
        return out


@dataclass(frozen=True)
class _Like:
    """A tensor's type, shape and strides."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def make(self) -> Tensor:
        """A tensor of this kind: small numbers, zeros where they are whole."""
        dtype = getattr(torch, self.dtype)
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) if 0 not in self.shape else 1
        flat = torch.randn(size).to(dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
        return flat.as_strided(self.shape, self.strides)


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Like(str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.stride()))
    return value


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-adds, each counted as two; torch's own counter leaves out attention on processors."""
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count

    packet = func.overloadpacket
    if packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*(tuple(a.shape) for a in args[:3])))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


def table_path(threads: int) -> Path:
    """Where seconds of operations of this machine with so many threads are kept."""
    said = (machine_name(), cores(), threads, torch.__version__)
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "trimtab" / f"operations-{digest}.json"


def table_of(threads: int, file: Path | None = None) -> dict[str, float]:
    """Seconds of operations that were measured on this machine before.

    Args:
        file: a table to read in place of the one that is kept.

    Raises:
        UserError: a file that is no such table, or one of another machine.
    """
    path = file or table_path(threads)
    if not path.is_file():
        if file is None:
            return {}
        raise UserError(f"there is no device profile {file}; `trimtab bench --device-profile SPACE` writes one")
    try:
        stored = json.loads(path.read_text("utf-8"))
        found, here = (stored["machine"], stored["threads"]), (machine_name(), threads)
        seconds = {str(k): float(v) for k, v in stored["seconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if file is None:
            return {}
        raise UserError(f"{file} is no device profile ({type(error).__name__}: {error})") from error
    if found != here:
        raise UserError(
            f"{path} is of another machine ({found[0]}, {found[1]} threads); this is {here[0]} with {here[1]}: measure "
            "it with `trimtab bench --device-profile SPACE`"
        )
    return seconds


def keep(seconds: Mapping[str, float], threads: int) -> Path:
    """Keep seconds of operations for the next search: whole or not at all."""
    path = table_path(threads)
    text = json.dumps({"machine": machine_name(), "threads": threads, "seconds": dict(seconds)})
    write_atomic(path, lambda p: p.write_text(text, "utf-8"))
    return path


def _origin(module: nn.Module, path: str) -> str:
    """What a module is called wherever it stands: a model's own name where blocks before it may be gone."""
    return str(getattr(module, "_origin", path))


class Costs:
    """What the networks of a domain cost on inputs of given shapes.

    Args:
        maker: makes the networks.
        inputs: of a forward, by name for a network of transformers, else in order; only shapes count.
        options: of a forward.
        seconds: also measure time here.
        threads: that time is measured with.
        within: what is offered of the maker's domain; genomes are then of this domain. None: all of it.
        device: file of a table of operations' seconds; None: the one that is kept for this machine.
        progress: told what is going on.

    Raises:
        UserError: a network's forward cannot be followed without values.
    """

    def __init__(
        self,
        maker: Maker,
        inputs: Mapping[str, Tensor],
        options: Mapping[str, Any] | None = None,
        seconds: bool = False,
        threads: int | None = None,
        progress: Progress | None = None,
        device: Path | None = None,
        within: Domain | None = None,
    ) -> None:
        self.maker, self.inputs, self.options = maker, dict(inputs), dict(options or {})
        self.domain: Domain = within or maker.domain
        pairs = zip(self.domain.knobs, maker.domain.knobs, strict=True)
        self._places = [[whole.options.index(option) for option in knob.options] for knob, whole in pairs]
        self.timed, self.threads = seconds, threads or torch.get_num_threads()
        self.progress = progress or (lambda what, done, total: None)
        self.measured: dict[str, float] = table_of(self.threads, device) if seconds else {}
        self.overhead = (1.0, 0.0)
        self._again: dict[Operation, Any] = {}
        self._followed: dict[Genome, dict[str, np.ndarray]] = {}
        self.exact = True
        self.hangs: dict[int, set[str]] = defaultdict(set)  # place of a knob -> modules whose cost hangs on it
        self._tabled()
        if seconds:
            self._calibrated()
            keep(self.measured, self.threads)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the costs."""
        return COSTS if self.timed else COSTS[:3]

    # ---- one network

    def _whole(self, places: Genome) -> Genome:
        """The places in the maker's own domain."""
        return tuple(mine[p] for mine, p in zip(self._places, places, strict=True))

    def _follow(self, places: Genome) -> dict[str, np.ndarray]:
        """Costs of a network by module: parameters, bytes, flops, operations' seconds, operations."""
        found = self._followed.get(places)
        if found is None:
            found = self._followed[places] = self._read(places, *self._operations(places))
        return found

    def _operations(self, places: Genome) -> tuple[nn.Module, dict[str, Any], list[tuple[str, Operation]]]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        module, origins = self.maker.build(self._whole(places))
        module.eval()
        recorder = _Recorder()
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is told once, below
        for path, child in module.named_modules():
            path, parent = _origin(child, path), _origin(module.get_submodule(path.rpartition(".")[0]), "")
            child.register_forward_pre_hook(lambda *_, p=path: setattr(recorder, "path", p))
            child.register_forward_hook(lambda *_, p=parent: setattr(recorder, "path", p))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                made: dict[int, Any] = {}
                for holder in module.modules():
                    for table in (holder._parameters, holder._buffers):
                        for name, tensor in table.items():
                            if tensor is not None:
                                if id(tensor) not in made:
                                    made[id(tensor)] = torch.empty_strided(
                                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                                    )
                                table[name] = made[id(tensor)]
                inputs = {k: mode.from_tensor(v) for k, v in sized(module, self.inputs).items()}
                with recorder:
                    called(module, inputs, self.options)
        except UserError:
            raise
        except Exception as error:  # the network is the user's own
            said = ", ".join(f"{k}={v}" for k, v in self.domain.setting(self.domain.canonical(places)).items())
            raise UserError(
                f"a network of {self.maker.name} ({said}) cannot be followed in {recorder.path or 'its forward'}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        self._again.update({k: v for k, v in recorder.again.items() if k not in self._again})
        return module, origins, recorder.found

    def _read(
        self, places: Genome, module: nn.Module, origins: Mapping[str, Any], operations: Iterable[tuple[str, Operation]]
    ) -> dict[str, np.ndarray]:
        stored = getattr(self.maker, "stored", lambda name, shape, genome: None)
        costs: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
        seen: set[int] = set()
        for path, holder in module.named_modules():
            at = _origin(holder, path)
            lasting = {k: v for k, v in holder._buffers.items() if k not in holder._non_persistent_buffers_set}
            for name, tensor in (*holder._parameters.items(), *lasting.items()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    origin = origins.get(f"{path}.{name}" if path else name)
                    size = (
                        stored(origin, tuple(tensor.shape), self._whole(places))
                        or tensor.numel() * tensor.element_size()
                    )
                    costs[at] += (tensor.numel() if name in holder._parameters else 0, size, 0, 0, 0)
        for path, operation in operations:
            seconds = self._seconds(operation) if self.timed else 0.0
            costs[path] += (0, 0, operation.flops, seconds, 1)
        return dict(costs)

    def _seconds(self, operation: Operation) -> float:
        """Seconds of an operation, measured once."""
        key = f"{operation.name}{operation.arguments}"
        if key not in self.measured:
            func, args, kwargs = self._again[operation]
            args, kwargs = torch.utils._pytree.tree_map(
                lambda v: v.make() if isinstance(v, _Like) else v, (args, kwargs)
            )
            with threads_set(self.threads), torch.no_grad():
                self.measured[key] = timed(lambda: func(*args, **kwargs), SECONDS, self.threads)[0]
            self.progress("measure operations", len(self.measured), len(self._again))
        return self.measured[key]

    # ---- tables

    def _tabled(self) -> None:
        """Find what each module's cost hangs on, and table it."""
        rng, knobs = Random(0), self.domain.knobs
        bases = [self._largest(), self.domain.smallest(), *(self._any(rng) for _ in range(2))]
        hangs: dict[str, set[int]] = defaultdict(set)
        total = sum(len(k.options) for k in knobs) * len(bases)
        done = 0
        for base in bases:
            before = self._follow(base)
            for i, knob in enumerate(knobs):
                for place in range(len(knob.options)):
                    after = self._follow((*base[:i], place, *base[i + 1 :]))
                    done += 1
                    self.progress("follow networks", done, total)
                    for path in before.keys() | after.keys():
                        if not np.array_equal(before.get(path, 0), after.get(path, 0)):
                            hangs[path].add(i)
        for path, knobs_of in hangs.items():
            for i in knobs_of:
                self.hangs[i].add(path)
        paths = {path for costs in self._followed.values() for path in costs}
        groups: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for path in paths:
            groups[tuple(sorted(hangs[path]))].add(path)
        sizes = {on: tuple(len(knobs[i].options) for i in on) for on in groups}
        if any(math.prod(size) > LARGEST_TABLE for size in sizes.values()):
            self.exact = False
            return
        tables = {on: np.full((*size, 5), np.nan) for on, size in sizes.items()}

        def enter(genome: Genome, costs: Mapping[str, np.ndarray]) -> None:
            for on, table in tables.items():
                key = tuple(genome[i] for i in on)
                if np.isnan(table[key][0]):
                    table[key] = sum((costs[p] for p in groups[on] if p in costs), np.zeros(5))

        for genome, costs in self._followed.items():
            enter(genome, costs)
        missing = {
            on: [key for key in itertools.product(*map(range, size)) if np.isnan(tables[on][key][0])]
            for on, size in sizes.items()
        }
        while any(missing.values()):
            chosen: dict[int, int] = {}
            for on in sorted(missing, key=lambda on: -len(missing[on])):
                fits = (k for k in missing[on] if all(chosen.get(i, p) == p for i, p in zip(on, k, strict=True)))
                key = next(fits, None)
                if key is not None:
                    chosen.update(zip(on, key, strict=True))
            genome = tuple(chosen.get(i, p) for i, p in enumerate(self._any(rng)))
            enter(genome, self._follow(genome))
            missing = {on: [k for k in keys if np.isnan(tables[on][k][0])] for on, keys in missing.items()}
            self.progress("follow networks", total, total + sum(map(len, missing.values())))
        self._tables = tables
        for _ in range(CHECKED):
            genome = self.domain.random(rng)
            exact = sum(self._follow(genome).values())
            if not np.allclose(self._sums(np.array([genome]))[0], exact, rtol=1e-6):
                self.exact = False

    def _largest(self) -> Genome:
        return tuple(len(k.options) - 1 for k in self.domain.knobs)

    def _any(self, rng: Random) -> Genome:
        return tuple(rng.randrange(len(k.options)) for k in self.domain.knobs)

    def _sums(self, genomes: np.ndarray) -> np.ndarray:
        """Costs `[genomes, 5]`."""
        total = np.zeros((len(genomes), 5))
        if self.exact:
            for on, table in self._tables.items():
                total += table[tuple(genomes[:, i] for i in on)] if on else table
        else:
            for row, genome in enumerate(genomes.tolist()):
                total[row] = sum(self._follow(tuple(genome)).values())
        return total

    def _calibrated(self) -> None:
        """Fit what a call costs beside its work to a few whole networks."""
        rng = Random(1)
        genomes = [self.domain.largest(), self.domain.smallest()]
        genomes += [self.domain.random(rng) for _ in range(CALIBRATED - 2)]
        sums, real = self._sums(np.array(genomes)), []
        for i, genome in enumerate(genomes):
            real.append(self.measure(genome))
            self.progress("measure networks", i + 1, len(genomes))
        work, calls = sums[:, 3], sums[:, 4]
        from scipy.optimize import nnls

        rows = np.stack([work, calls], 1) / np.array(real)[:, None]
        scale = rows.max(0)
        factor, call = nnls(rows / scale, np.ones(len(real)))[0] / scale
        self.overhead = float(factor), float(call)

    def measure(self, genome: Genome, seconds: float = 0.3) -> float:
        """Seconds of a forward of a network with weights drawn anew, measured here."""
        module = self.maker.build(self._whole(genome), meta=False)[0].eval()
        inputs = sized(module, self.inputs)
        with threads_set(self.threads), torch.no_grad():
            return timed(lambda: called(module, inputs, self.options), seconds, self.threads)[0]

    def price(self, genomes: Sequence[Genome] | np.ndarray) -> dict[str, np.ndarray]:
        """Costs of canonical genomes: name -> array; seconds where they are measured."""
        sums = self._sums(np.asarray(genomes, dtype=np.int64).reshape(len(genomes), len(self.domain.knobs)))
        found = dict(zip(COSTS[:3], sums.T[:3], strict=True))
        if self.timed:
            found["seconds"] = self.overhead[0] * sums[:, 3] + self.overhead[1] * sums[:, 4]
        return found

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float, float]]:
        """Smallest, median and largest of each cost: of the smallest and largest network, and of random ones."""
        rng = Random(2)
        drawn = [self.domain.random(rng) for _ in range(500 if self.exact else 20)]
        found = self.price([self.domain.smallest(), self.domain.largest(), *drawn])
        return {name: (float(v.min()), float(np.median(v[2:])), float(v.max())) for name, v in found.items()}
