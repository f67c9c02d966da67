"""One set of weights for every network of a space: each network has a slice of every weight, and nothing is copied.

A network is built without memory, once, and its parameters are then views into the shared weights: the first channels,
the middle of a kernel. What a training step does to a view it does to the shared weight; what is taken out is a copy of
the views in the very same module, so that it computes bit for bit what the shared weights do. Where smaller kernels are
learnt functions of larger ones, a network has their values, and their gradients go on to what they were made from.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Member
from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome
from trimtab.core.modelmap import trace
from trimtab.formats.cutting import out_dim, units_of
from trimtab.formats.structure import flipped
from trimtab.parts.kernel_transform import smaller_kernel

if TYPE_CHECKING:
    from typing import Protocol

    class Maker(Protocol):
        """What makes the networks of a domain, see `trimtab.space.Space`."""

        name: str
        domain: Domain

        def build(self, genome: Genome, meta: bool = True) -> tuple[nn.Module, dict[str, Any]]: ...


KEPT = 256  # networks whose modules are kept
Index = tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where a network's tensor lies: the module and name that hold it, the part of which shared tensor it is, and by
    which matrices (name, and the size that it leaves) a smaller kernel is made of that part, from the largest on.
    """

    holder: nn.Module
    name: str
    shared: str
    index: Index | None
    chain: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def of(self, whole: Tensor) -> Tensor:
        """The part of the shared tensor; a view but where several pieces are put together."""
        if self.index is None:
            return whole
        if all(isinstance(i, slice) for i in self.index):
            return whole[self.index]
        for dim, part in enumerate(self.index):
            whole = (
                whole.narrow(dim, part.start, part.stop - part.start)
                if isinstance(part, slice)
                else whole.index_select(dim, part)
            )
        return whole

    def turned(self, part: Tensor, matrices: Iterable[Tensor]) -> Tensor:
        """What the chain makes of the part."""
        for matrix, (_, size) in zip(matrices, self.chain, strict=True):
            part = smaller_kernel(part, size, matrix)
        return part

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add to the part of the shared tensor."""
        if self.index is None:
            whole.add_(part)
        elif all(isinstance(i, slice) for i in self.index):
            whole[self.index].add_(part)
        else:
            grid = torch.meshgrid(
                *(torch.arange(i.start, i.stop) if isinstance(i, slice) else i for i in self.index), indexing="ij"
            )
            whole.index_put_(grid, part, accumulate=True)


@dataclass
class Network:
    """A network of the space over the shared weights."""

    module: nn.Module
    parameters: list[Place]
    buffers: list[Place]
    tied: list[tuple[nn.Module, str, int]] = field(default_factory=list)


class Supernet(nn.Module):
    """The shared weights of a space; its parameters are those of the largest network, and of every other block.

    Args:
        maker: makes the networks, see `trimtab.space.Space`.
        seed: of the weights.
        transforms: smaller kernels are made of the middles of larger ones by matrices that are trained, too: from each
            size of a layer's kernel to the next, the identity at first.

    Raises:
        UserError: parameters that cannot be slices of one another; the message names them and their shapes.
    """

    def __init__(self, maker: Maker, seed: int = 0, transforms: bool = False) -> None:
        super().__init__()
        self.maker, self.domain = maker, maker.domain
        self._names: dict[Any, str] = {}  # where a tensor is made -> its name
        self._pieces: dict[str, dict[int, tuple[int, ...]]] = {}
        self._networks: OrderedDict[Genome, Network] = OrderedDict()
        self._tensors: dict[str, Tensor] = {}
        self._kernels: dict[Any, set[tuple[int, ...]]] = {}  # where a convolution is made -> sizes of its kernel
        self._matrices: dict[str, dict[tuple[int, ...], str]] = {}  # a kernel's size -> the matrix that leaves it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for genome in self._covering():
                self._take(genome)
        for where, sizes in self._kernels.items() if transforms else ():
            for size in sorted(sizes, reverse=True)[1:]:
                name = f"{self._names[where]}.{'x'.join(map(str, size))}"
                self._matrices.setdefault(self._names[where], {})[size] = name
                self._tensors[name] = nn.Parameter(torch.eye(math.prod(size)))
        for name, tensor in self._tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "/"), tensor)
            else:
                self.register_buffer(name.replace(".", "/"), tensor)

    def _covering(self) -> Iterable[Genome]:
        """Genomes that between them hold every parameter in its largest shape."""
        largest = self.domain.largest()
        yield largest
        setting = dict(zip((k.name for k in self.domain.knobs), largest, strict=True))
        places = {k.name: i for i, k in enumerate(self.domain.knobs)}
        for i, knob in enumerate(self.domain.knobs):
            for place in range(len(knob.options)) if knob.kind in ("block", "choice") else ():
                wanted = {**setting, **{name: max(allowed) for name, allowed in knob.when}, knob.name: place}
                genome = tuple(wanted[k.name] for k in self.domain.knobs)
                if place != largest[i] or any(genome[places[n]] != largest[places[n]] for n, _ in knob.when):
                    yield self.domain.canonical(genome)

    def _take(self, genome: Genome) -> None:
        """Take into the shared weights what a network has more than those before."""
        module, made = self.maker.build(genome, meta=False)
        for path, name, tensor in _tensors(module):
            where = made[_joined(path, name)]
            known = self._names.get(where)
            holder = module.get_submodule(path)
            if isinstance(holder, nn.modules.conv._ConvNd) and tensor.dim() > 2:
                self._kernels.setdefault(where, set()).add(tuple(tensor.shape[2:]))
            if known is None:
                known = _joined(path, name)
                while known in self._tensors:
                    known += "~"
                self._names[where] = known
                self._tensors[known] = _whole(tensor)
                self._pieces[known] = getattr(holder, "_pieces", {})
                continue
            old = self._tensors[known]
            if old.dim() != tensor.dim():
                raise UserError(
                    f"{known} has the shape {list(tensor.shape)} in one network of {self.maker.name} and "
                    f"{list(old.shape)} in another; make them by different lines of code, or inside of an OneOf"
                )
            if any(a > b for a, b in zip(tensor.shape, old.shape, strict=True)):
                shape = [max(pair) for pair in zip(tensor.shape, old.shape, strict=True)]
                if shape != list(tensor.shape):
                    raise UserError(
                        f"no network of {self.maker.name} has all of {known}, whose shapes go up to {shape}; let its "
                        "largest options stand last in every choice"
                    )
                self._tensors[known] = _whole(tensor)
                self._pieces[known] = getattr(holder, "_pieces", {})

    # ---- networks

    def network(self, genome: Genome) -> Network:
        """The network of a genome over the shared weights; only its module is made, and kept."""
        found = self._networks.get(genome)
        if found is None:
            found = self._made(genome)
            if len(self._networks) >= KEPT:
                self._networks.popitem(last=False)
        else:
            del self._networks[genome]
        self._networks[genome] = found
        return found

    def _made(self, genome: Genome) -> Network:
        module, made = self.maker.build(genome)
        seen: dict[int, int] = {}
        network = Network(module, [], [])
        for path, holder in module.named_modules():
            own = [*holder._parameters.items(), *holder._buffers.items()]
            for name, tensor in own:
                if tensor is None or (name in holder._buffers and name in holder._non_persistent_buffers_set):
                    continue
                if id(tensor) in seen:
                    network.tied.append((holder, name, seen[id(tensor)]))
                    continue
                shared = self._names.get(made[_joined(path, name)])
                if shared is None:
                    raise UserError(
                        f"{path}.{name} of {self.maker.name} is in no network that was tried; make it inside of the "
                        "OneOf or Depth that it hangs on"
                    )
                chain = self._chain(shared, tuple(tensor.shape[2:]))
                index = self._index(shared, tensor, holder, path, name, bool(chain))
                place = Place(holder, name, shared, index, chain)
                if name in holder._parameters:
                    seen[id(tensor)] = len(network.parameters)
                    network.parameters.append(place)
                else:
                    network.buffers.append(place)
        return network

    def _chain(self, shared: str, size: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The matrices between the largest kernel and one of a size, each with the size that it leaves."""
        steps, here = self._matrices.get(shared, {}), tuple(self._tensors[shared].shape[2:])
        found = []
        for left, name in steps.items() if size in steps else ():
            if all(a <= b <= c for a, b, c in zip(size, left, here, strict=True)):
                found.append((name, left))
                here = left
        return tuple(found)

    def _index(
        self, shared: str, tensor: Tensor, holder: nn.Module, path: str, name: str, made: bool = False
    ) -> Index | None:
        """The part of a shared tensor that a network has; all of a kernel where the network's is made from it."""
        whole = self._tensors[shared].shape
        part = (*tensor.shape[:2], *whole[2:]) if made else tuple(tensor.shape)
        if tuple(whole) == part:
            return None
        if len(whole) != len(part) or any(a > b for a, b in zip(part, whole, strict=True)):
            raise UserError(
                f"{path or self.maker.name}: a tensor of shape {list(part)} is to be a part of {shared}, which has "
                f"{list(whole)}; the choices that lead there do not fit together"
            )
        if name in getattr(holder, "_slices", {}):
            return holder._slices[name]  # type: ignore[index,return-value]
        most, here = self._pieces[shared], getattr(holder, "_pieces", {})
        centred = isinstance(holder, nn.modules.conv._ConvNd)
        index: list[slice | Tensor] = []
        for dim, (size, full) in enumerate(zip(part, whole, strict=True)):
            if most.get(dim) and here.get(dim):
                if sum(here[dim]) != size or sum(most[dim]) != full or len(here[dim]) != len(most[dim]):
                    raise UserError(
                        f"{path}: pieces {here[dim]} were named for {size} channels, and {most[dim]} for the largest "
                        f"network's {full}; they must add up, and be as many"
                    )
                starts = [sum(most[dim][:i]) for i in range(len(most[dim]))]
                index.append(torch.cat([torch.arange(s, s + n) for s, n in zip(starts, here[dim], strict=True)]))
            else:
                first = (full - size) // 2 if centred and dim > 1 else 0
                index.append(slice(first, first + size))
        return tuple(index)

    # ---- what is done with them

    def bound(self, genome: Genome, leaves: bool = False, statistics: bool = True) -> tuple[nn.Module, list[Tensor]]:
        """The module of a genome, its parameters being views into the shared weights.

        Args:
            leaves: each is a leaf of its own that gathers a gradient, see `gather`.
            statistics: buffers are views too; otherwise copies, so that a forward in training mode leaves the shared
                ones as they are.

        Returns:
            The module, which the next call for this genome gives again, and its parameters in the network's order.
        """
        network, pressed = self.network(genome), getattr(self.maker, "dense", None)
        views = []
        for place in network.parameters:
            whole = self._tensors[place.shared]
            view = self._value(place, detached=leaves)
            if pressed is not None and not leaves:
                view = pressed(place.shared, view, genome)
            if leaves and whole.requires_grad:
                view.requires_grad_(True)
            place.holder._parameters[place.name] = view  # type: ignore[assignment]
            views.append(view)
        for place in network.buffers:
            view = place.of(self._tensors[place.shared])
            place.holder._buffers[place.name] = view if statistics else view.clone()
        for holder, name, number in network.tied:
            holder._parameters[name] = views[number]  # type: ignore[assignment]
        return network.module, views

    def part(self, place: Place) -> Tensor:
        """A network's part of a shared weight."""
        return self._value(place, detached=True)

    def _value(self, place: Place, detached: bool) -> Tensor:
        tensors = [self._tensors[name] for name in (place.shared, *(name for name, _ in place.chain))]
        whole, *matrices = [t.detach() for t in tensors] if detached else tensors
        return place.turned(place.of(whole), matrices)

    def gather(self, genome: Genome, views: Iterable[Tensor], factor: float = 1.0) -> None:
        """Add the gradients of a genome's leaves to those of the shared weights."""
        for place, view in zip(self.network(genome).parameters, views, strict=True):
            if view.grad is None:
                continue
            grad = view.grad if factor == 1 else view.grad * factor
            if place.chain:
                grad = self._through(place, grad)
            place.add(self._gradient(place.shared), grad)
            view.grad = None

    def _gradient(self, name: str) -> Tensor:
        whole = self._tensors[name]
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        return whole.grad

    @torch.enable_grad()
    def _through(self, place: Place, grad: Tensor) -> Tensor:
        """The gradient of the part that a kernel was made of, from the kernel's; those of the matrices are added."""
        part = place.of(self._tensors[place.shared].detach()).requires_grad_(True)
        matrices = [self._tensors[name].detach().requires_grad_(True) for name, _ in place.chain]
        first, *others = torch.autograd.grad(place.turned(part, matrices), [part, *matrices], grad)
        for (name, _), other in zip(place.chain, others, strict=True):
            self._gradient(name).add_(other)
        return first

    @torch.no_grad()
    def sort(self, inputs: Mapping[str, Tensor] | tuple[Tensor, ...]) -> int:
        """Put channels that narrower networks lack in the order of their importance, the largest network's function
        kept: a unit's importance is the sum of |w| over the weights that read it.

        Args:
            inputs: of a forward that is followed to find which channels hang together.

        Returns:
            How many groups of channels were sorted.
        """
        largest = self.domain.largest()
        module = self.extract(largest).eval()
        if isinstance(inputs, Mapping):
            inputs = sized(module, inputs)
        if isinstance(inputs, Mapping) and not inputs.keys() <= inspect.signature(module.forward).parameters.keys():
            inputs = tuple(inputs.values())
        paths = {id(m): p for p, m in self.network(largest).module.named_modules()}
        shared = {_joined(paths[id(p.holder)], p.name): p.shared for p in self._places(largest)}
        narrowed = self._narrowed()
        sorted_groups = 0
        for group in trace(module, inputs).coupled:
            readers = [m for m in group.members if m.side == "in"]
            if group.padded or not readers or not any(self._cut(m, module, shared, narrowed) for m in group.members):
                continue
            score = sum(units_of(module, group, m).abs().sum(1) for m in readers)
            order = torch.as_tensor(score).argsort(descending=True, stable=True).tolist()
            for member in group.members:
                to, of = (torch.tensor(group.indices(member, units)) for units in (list(range(group.width)), order))
                for name, dim in _touched(module, member):
                    if name in shared:
                        tensor = self._tensors[shared[name]]
                        tensor.index_copy_(dim, to, tensor.index_select(dim, of))
            sorted_groups += 1
        return sorted_groups

    def _places(self, genome: Genome) -> Iterator[Place]:
        network = self.network(genome)
        yield from network.parameters
        yield from network.buffers

    def _narrowed(self) -> set[tuple[str, int]]:
        """Shared tensors and their dimensions of which the network of smallest widths has a part alone."""
        widths = {knob.name: (0,) for knob in self.domain.knobs if knob.kind in ("width", "heads")}
        return {
            (place.shared, dim)
            for place in self._places(self.domain.largest(widths))
            for dim, part in enumerate(place.index or ())
            if not isinstance(part, slice) or part.stop - part.start < self._tensors[place.shared].shape[dim]
        }

    @staticmethod
    def _cut(member: Member, module: nn.Module, shared: Mapping[str, str], narrowed: set[tuple[str, int]]) -> bool:
        return any((shared.get(name, ""), dim) in narrowed for name, dim in _touched(module, member))

    def extract(self, genome: Genome) -> nn.Module:
        """The plain network of a genome with weights of its own."""
        module, _ = self.bound(genome)
        return _plain(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The largest network's outputs."""
        return self.bound(self.domain.largest())[0](*args, **kwargs)


def sized(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs as a network takes them: images at the height that it was chosen with, see `trimtab.space.Resolution`.

    Raises:
        UserError: there are no images among them.
    """
    height = getattr(module, "_resolution", None)
    if height is None:
        return dict(inputs)
    images = {n: v for n, v in inputs.items() if v.dim() == 4 and v.is_floating_point()}
    if not images:
        found = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items())
        raise UserError(f"a Resolution is for images [n, channels, height, width], and the inputs are {found}")
    return {**inputs, **{n: _resized(v, height) for n, v in images.items()}}


def _resized(images: Tensor, height: int) -> Tensor:
    if images.shape[2] == height:
        return images
    size = (height, max(1, round(images.shape[3] * height / images.shape[2])))
    return nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def called(module: nn.Module, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """A network's output: its inputs by name where its forward knows the names, else in order."""
    inputs = {name: _laid_out(value) for name, value in sized(module, inputs).items()}
    if inputs.keys() <= inspect.signature(module.forward).parameters.keys():
        return module(**inputs, **options)
    return module(*inputs.values())


def _joined(path: str, name: str) -> str:
    """The full name of a module's tensor."""
    return f"{path}.{name}" if path else name


def _laid_out(value: Tensor) -> Tensor:
    """Batches of images channels last, in which convolutions channel by channel train twice as fast."""
    batch = value.dim() == 4 and len(value) > 1 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if batch else value


def _touched(module: nn.Module, member: Member) -> Iterator[tuple[str, int]]:
    """Names of the tensors that a member's units lie in, and along which dimension."""
    if member.side == "param":
        yield member.path, member.dim
        return
    holder = module.get_submodule(member.path)
    turned = flipped(holder)
    if member.side == "in":
        yield f"{member.path}.weight", 0 if turned else 1
        return
    yield f"{member.path}.weight", 1 if turned else out_dim(holder)
    for name in ("bias", "running_mean", "running_var"):
        if getattr(holder, name, None) is not None:
            yield f"{member.path}.{name}", 0


def _plain(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are views: with tensors of its own, ties kept."""
    own: dict[int, Any] = {}
    for holder in module.modules():
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if tensor is not None and id(tensor) not in own:
                value = tensor.detach().clone(memory_format=torch.contiguous_format)
                own[id(tensor)] = nn.Parameter(value) if name in holder._parameters else value
    return copy.deepcopy(module, own)


def _whole(tensor: Tensor) -> Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Path, name and tensor of every parameter and lasting buffer, each once."""
    seen: set[int] = set()
    for path, holder in module.named_modules():
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            lasting = name not in holder._non_persistent_buffers_set
            if tensor is not None and lasting and id(tensor) not in seen:
                seen.add(id(tensor))
                yield path, name, tensor
