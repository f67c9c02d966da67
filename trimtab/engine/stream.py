"""A model that passes by block after block: the weights of one block are resident, the hidden states of all items move
on.

The model's own forward says what goes into each block beside the hidden states (positions, masks, embeddings of
positions): it is run once with
its blocks bypassed, and what each was called with is kept. It is run a second time, the last block giving the finished
hidden states, for
everything behind the blocks. So no architecture needs a table, and any module whose blocks follow one another streams.
A model without repeated blocks is taken as one block.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.modelmap import trace
from trimtab.core.site import Site
from trimtab.formats.packed import Packed
from trimtab.formats.structure import Dropped, returned, sublayer_path

RESIDENT_BYTES = 1 << 30  # a model whose fp32 weights are below this stays in memory: reading it again would cost more
TRACED_TOKENS = 32  # the map does not depend on the length


def give_back_freed_memory() -> None:
    """Have the C library give blocks of a megabyte and more back to the system as soon as they are freed.

    glibc does so at first, but moves the threshold up to 32 MB as such blocks come and go; matrices below it then leave
    holes in a heap that never shrinks. A library without this switch is left as it is.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


class _Stop(Exception):
    """Raised inside a forward whose rest is not wanted."""


@dataclass
class Flow:
    """Items on their way through the blocks.

    Fields:
        inputs: keyword arguments of the model for each chunk of items.
        hidden: hidden states of each chunk, before the next block.
        calls: for each block and chunk, what the block is called with beside the hidden states.
    """

    inputs: list[dict[str, Tensor]]
    hidden: list[Any]
    calls: list[list[tuple[tuple, dict]]] = field(default_factory=list)


class Stream:
    """A source's model, with the weights of one block in memory at a time.

    Args:
        source: what `open_source` gives: skeleton, read, names.
        modelmap: the traced map of the skeleton.
        extra: keyword arguments of every forward (`use_cache=False` for language models).
        resident: keep all weights in memory; None decides by size.
    """

    def __init__(
        self, source: Any, modelmap: Any, extra: Mapping[str, Any] | None = None, resident: bool | None = None
    ) -> None:
        self.source, self.map, self.extra = source, modelmap, dict(extra or {})
        self.model: nn.Module = source.skeleton()
        self.sites: dict[str, Site] = own_sites(modelmap)
        self.paths: tuple[str, ...] = tuple(modelmap.blocks) or ("",)
        self.whole = not modelmap.blocks
        self.packed: MutableMapping[str, Packed] = {}
        self.biases: dict[str, Tensor | None] = {}  # as they were before a packed weight corrected the mean
        self.resident = 4 * modelmap.parameters < RESIDENT_BYTES if resident is None else resident
        self._owners = _owners(self.model, set(source.names))
        self._named = {self._stored(s): s for s in self.sites.values()}
        self._inside = {n for p in self.paths for n in self._owners if self.whole or n.startswith(p + ".")}
        self.swaps: dict[str, Packed] = {}  # of sites whose weights are not in memory while they are swapped
        if not self.resident:
            give_back_freed_memory()
        self._load([n for n in self._owners if self.resident or self._is_buffer(n)])
        self._handles = [] if self.resident else self._load_when_used()

    # ---- weights

    def _load(self, names: Iterable[str]) -> None:
        """Load tensors by the source's names; of a site that earlier steps changed the changed weight."""
        names = list(names)
        changed = {n: s for n in names if (s := self._named.get(n)) and (s.path in self.swaps or s.path in self.packed)}
        for name in names:
            if name in changed:
                continue
            value = self.source.read(name)
            value = value.to(torch.float32) if value.is_floating_point() else value
            shared = nn.Parameter(value, requires_grad=False)  # one for all its owners: tied weights stay tied
            for module, key in self._owners[name]:
                if key in module._parameters:
                    module._parameters[key] = shared
                else:
                    module._buffers[key] = value
        for site in changed.values():  # behind their biases, which a packed weight may correct
            self._place(site, self.swaps.get(site.path) or self.packed[site.path])

    def _is_buffer(self, name: str) -> bool:
        module, key = self._owners[name][0]
        return key not in module._parameters

    def _load_when_used(self) -> list[Any]:
        """Have what lies outside the blocks loaded by its module's forward and freed behind it."""
        names: dict[nn.Module, list[str]] = {}
        for name, owners in self._owners.items():
            for module, _ in owners:
                if name not in self._inside and not self._is_buffer(name):
                    names.setdefault(module, []).append(name)
        handles: list[Any] = []
        for module, mine in names.items():

            def load(m: nn.Module, args: Any, mine: list[str] = mine) -> None:
                self._load(mine)

            def free(m: nn.Module, args: Any, output: Any, mine: list[str] = mine) -> None:
                self._free(mine)

            handles += [module.register_forward_pre_hook(load), module.register_forward_hook(free)]
        return handles

    def _free(self, names: Iterable[str]) -> None:
        for name in names:
            for module, key in self._owners[name]:
                if (old := module._parameters.get(key)) is not None:
                    module._parameters[key] = nn.Parameter(old.to("meta"), requires_grad=False)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, as far as earlier steps changed them changed."""
        block = self.model.get_submodule(self.paths[index])
        if self.resident:
            yield block
            return
        mine = [n for n in self._inside if n.startswith(self.paths[index] + ".")]
        self._load(mine)
        try:
            yield block
        finally:
            self._free(mine)

    def weight(self, site: Site) -> Tensor:
        """The weight as methods see it, `[out, in]` fp32; a convolution's kernel flattened."""
        w = self.model.get_parameter(f"{site.path}.weight").detach()
        if w.is_meta:
            packed = self.packed.get(site.path)
            w = self.source.read(self._stored(site)).float() if packed is None else self._shaped(site, packed.dense())
        return w.T.contiguous() if site.transposed else w.reshape(w.shape[0], -1)

    def _stored(self, site: Site) -> str:
        """Name under which the source knows a site's weight."""
        group = next((g for g in self.map.tied if f"{site.path}.weight" in g), (f"{site.path}.weight",))
        return next(n for n in group if n in self._owners)

    @staticmethod
    def _shaped(site: Site, dense: Tensor) -> Tensor:
        return dense.T.contiguous() if site.transposed else dense.reshape(site.shape)

    def _place(self, site: Site, packed: Packed) -> None:
        self._set(site, packed.dense(), packed.bias())

    def _set(self, site: Site, dense: Tensor, shift: Tensor | None) -> None:
        parameter = nn.Parameter(self._shaped(site, dense), requires_grad=False)
        for module in self._tied(site):
            module._parameters["weight"] = parameter
        if shift is not None:
            module = self.model.get_submodule(site.path)
            old = self.biases.setdefault(f"{site.path}.bias", module._parameters.get("bias"))
            module._parameters["bias"] = nn.Parameter(shift if old is None else old + shift, requires_grad=False)

    def _tied(self, site: Site) -> list[nn.Module]:
        name = f"{site.path}.weight"
        group = next((g for g in self.map.tied if name in g), (name,))
        return [self.model.get_submodule(n.rpartition(".")[0]) for n in group]

    def put(self, site: Site, packed: Packed) -> None:
        """Change a site's weight for good: the step has been applied."""
        self.packed[site.path] = packed
        if not self.model.get_parameter(f"{site.path}.weight").is_meta:
            self._place(site, packed)

    @contextlib.contextmanager
    def swapped(self, changes: Mapping[str, Packed | None]) -> Iterator[None]:
        """Sites changed for a moment: path -> packed weight; a sublayer's path -> None drops it."""
        old: list[Callable[[], None]] = []
        try:
            for path, packed in changes.items():
                if packed is None:
                    parent, _, key = path.rpartition(".")
                    owner, module = self.model.get_submodule(parent), self.model.get_submodule(path)
                    old.append(partial(setattr, owner, key, module))
                    setattr(owner, key, Dropped(returned(module)))
                else:
                    site = self.sites[path]
                    if self.model.get_parameter(f"{path}.weight").is_meta:
                        self.swaps[path] = packed
                        old.append(partial(self.swaps.__delitem__, path))
                        continue
                    modules = self._tied(site)
                    before = modules[0]._parameters["weight"]
                    bias = self.model.get_submodule(path)._parameters.get("bias")
                    old.append(partial(self._restore, modules, before, path, bias))
                    self._place(site, packed)
            yield
        finally:
            for undo in reversed(old):
                undo()

    def _restore(self, modules: list[nn.Module], weight: Any, path: str, bias: Any) -> None:
        for module in modules:
            module._parameters["weight"] = weight
        module = self.model.get_submodule(path)
        if "bias" in module._parameters:
            module._parameters["bias"] = bias

    def current(self, name: str) -> Tensor:
        """A tensor as it stands in the model, rewrites included; a bias without what a packed weight adds to it."""
        if (before := self.biases.get(name)) is not None:
            return before.detach()
        module, key = self._owners[name][0]
        value: Tensor | None = module._parameters.get(key)
        value = module._buffers[key] if value is None else value
        assert value is not None
        return value.detach()

    def whole_model(self) -> nn.Module:
        """The model with all its weights in memory, as far as earlier steps changed them changed."""
        if not self.resident:
            for handle in self._handles:
                handle.remove()
            self._load(n for n in self._owners if not self._is_buffer(n))
            self.resident = True
        return self.model

    def over(self, model: nn.Module, batch: Any) -> Stream:
        """A stream over this one's model after its structure was changed in place."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not any(tensor is other for other in tensors.values()):  # tied ones go by their first name
                tensors[name] = tensor
        source = replace(self.source, skeleton=lambda: model, read=lambda n: tensors[n].detach(), names=tuple(tensors))
        changed = Stream(source, traced(source, batch), self.extra, resident=True)
        for path in [p for p in self.packed if p not in changed.sites]:
            del self.packed[path]
        changed.packed, changed.biases = self.packed, self.biases
        return changed

    # ---- passing items through

    def _call(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model(**inputs, **self.extra) if _by_name(self.source) else self.model(*inputs.values())

    @torch.no_grad()
    def once(self, inputs: Mapping[str, Tensor]) -> Any:
        """One plain forward of a model that is in memory."""
        return self._call(inputs)

    @torch.no_grad()
    def begin(self, inputs: Mapping[str, Tensor], chunk: int) -> Flow:
        """Everything before the first block, for all items, in chunks of `chunk` items."""
        n = len(next(iter(inputs.values())))
        chunks = [{k: v[i : i + chunk] for k, v in inputs.items()} for i in range(0, n, chunk)]
        if self.whole:
            return Flow(chunks, list(chunks), [[((), {}) for _ in chunks]])
        flow = Flow(chunks, [], [[] for _ in self.paths])

        def capture(index: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index == 0:
                    flow.hidden.append(hidden)
                flow.calls[index].append((args, {k: None if k == "past_key_values" else v for k, v in kwargs.items()}))
                if index == len(self.paths) - 1:
                    raise _Stop
                return hidden

            return forward

        with self._patched(capture):
            for part in chunks:
                with contextlib.suppress(_Stop):
                    self._call(part)
        return flow

    @contextlib.contextmanager
    def _patched(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        blocks = [self.model.get_submodule(p) for p in self.paths]
        for i, block in enumerate(blocks):
            block.forward = forward(i)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @torch.no_grad()
    def forward(self, index: int, flow: Flow, hidden: Sequence[Any] | None = None) -> list[Any]:
        """Hidden states after block `index`, whose weights are loaded."""
        hidden = flow.hidden if hidden is None else hidden
        if self.whole:
            return [self._call(part) for part in flow.inputs]
        block = self.model.get_submodule(self.paths[index])
        outputs = []
        for state, (args, kwargs) in zip(hidden, flow.calls[index], strict=True):
            out = block(state, *args, **kwargs)
            outputs.append(out[0] if isinstance(out, tuple) else out)
        return outputs

    @torch.no_grad()
    def finish(self, flow: Flow, hidden: Sequence[Any] | None = None) -> Iterator[tuple[int, Any]]:
        """Everything behind the last block: (chunk's index, the model's output)."""
        hidden = flow.hidden if hidden is None else hidden
        if self.whole:
            yield from enumerate(hidden)
            return
        for i, (part, state) in enumerate(zip(flow.inputs, hidden, strict=True)):
            last = len(self.paths) - 1

            def bypass(index: int, state: Any = state, last: int = last) -> Callable[..., Any]:
                return lambda h, *a, **k: state if index == last else h

            with self._patched(bypass):
                output = self._call(part)
            yield i, output


def _by_name(source: Any) -> bool:
    """Whether a source's model takes its inputs by name, as those of transformers do."""
    return bool(source.config.get("architectures"))


def traced(source: Any, batch: Any) -> Any:
    """The map of a source's model, traced on one item, of text its first tokens."""
    inputs = {k: v[:1, :TRACED_TOKENS] if k == "input_ids" else v[:1] for k, v in batch.inputs.items()}
    return trace(source.skeleton(), inputs if _by_name(source) else tuple(inputs.values()))


def plan_sites(modelmap: Any) -> list[Site]:
    """Every site that a plan may name: weights, each storage once, then stacks of experts, sublayers and blocks."""
    weights = {s.path for s in modelmap.sites}
    inner = [s for s in modelmap.sublayers if s.kind != "block"]
    experts = [s for s in modelmap.sites if s.kind == "experts"]
    places = [Site(sublayer_path(modelmap, s), "sublayer", (), s.block, s.kind) for s in inner]
    places += [Site(path, "block", (), i, "block") for i, path in enumerate(modelmap.blocks)]
    return [*own_sites(modelmap).values(), *experts, *(p for p in places if p.path not in weights)]


def own_sites(modelmap: Any) -> dict[str, Site]:
    """Sites of single weights by path, each storage once: of tied sites the first stands for all."""
    later = {name.removesuffix(".weight") for group in modelmap.tied for name in group[1:] if name.endswith(".weight")}
    return {s.path: s for s in modelmap.sites if s.path not in later and s.kind != "experts"}


def _owners(model: nn.Module, known: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Stored name -> the (module, key) pairs that share it."""
    first: dict[int, str] = {}
    tensor: Tensor | None
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name in known:
            first.setdefault(id(tensor), name)
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and id(tensor) in first:
                owners.setdefault(first[id(tensor)], []).append((module, key))
    return owners
