"""Search spaces as ordinary torch code in which some numbers and blocks are choices.

    def network(classes=10):
        width = Width(16, 24, 32)                         # one choice, wherever the name is used
        stage = [Inverted(width, kernel=Choice(3, 5, 7)) for _ in Depth(1, 2, 3)]
        return nn.Sequential(stem(width), *stage, nn.Linear(width, classes))

Called plainly, this gives the largest network. A `Space` calls it again and again with decisions of its own: every call
gives a plain network, and parameters that the same line of code makes are the same parameter of the super-network, of
which each network has a slice. So nothing about the network is written twice, and what comes out is ordinary torch.

A choice is known by where in the code it stands, and by the blocks of `Depth` and the options of `OneOf` around it; its
name is the variable or the argument that it is given to. What hangs on a choice must be made inside of a `Depth` or an
`OneOf`: a Python `if` or `range` over a choice would count differently from network to network.
"""

from __future__ import annotations

import ast
import importlib.util
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome, Kind, Knob

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Mix = Callable[[str, Sequence[Callable[..., Any]], tuple[Any, ...]], Any]
Where = tuple[Any, ...]  # scope, chain of calls, and how many times before in this scope
MOST = 4096  # options of all knobs together; each is tried once


def Choice(*options: T, name: str = "") -> T:
    """One of several values: a kernel's size, an activation, a number of heads.

    >>> Choice(3, 5, 7)
    7
    """
    return options[_decide("choice", options, name)]


def Width(*options: int, name: str = "") -> int:
    """A number of channels, the narrower inside the wider: its first channels."""
    return options[_decide("width", _rising("Width", options), name)]


def Heads(*options: int, name: str = "") -> int:
    """A number of attention heads, the first of those of wider attention."""
    return options[_decide("heads", _rising("Heads", options), name)]


def Depth(*options: int, name: str = "") -> Iterator[int]:
    """Goes from 0 to a number of blocks, the shallower network having the first blocks of the deeper."""
    build = _BUILD
    place = _decide("depth", _rising("Depth", options), name)
    for i in range(options[place]):
        if build is None:
            yield i
        else:
            with build.inside(i, frozenset(p for p, count in enumerate(options) if count > i)):
                yield i


def Resolution(*options: int, name: str = "") -> int:
    """The height that images come in, in pixels; their width goes with it. It changes the batch and no weights."""
    height = options[_decide("resolution", _rising("Resolution", options), name)]
    if _BUILD is not None:
        if _BUILD.resolution not in (None, height):
            raise UserError(
                f"images of {_BUILD.resolution} and of {height} pixels were asked for in one network; a space has one "
                "Resolution"
            )
        _BUILD.resolution = height
    return height


def OneOf(*makers: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """One of several blocks, each with parameters of its own; called with what a block is made from."""
    build = _BUILD
    place = _decide("block", makers, name)
    if build is None:
        return makers[place]
    return build.maker(makers[place], place) if build.mix is None else build.mixed(makers)


def pieces(module: nn.Module, *, inputs: Sequence[int] = (), outputs: Sequence[int] = ()) -> nn.Module:
    """Say that a layer's inputs or outputs are several widths end to end, as behind a concatenation or in a fused q, k
    and v; each piece is narrowed by itself. Returns the module.
    """
    module._pieces = {0: tuple(outputs), 1: tuple(inputs)}  # type: ignore[assignment]
    return module


@dataclass
class Build:
    """One call of a space's function.

    Fields:
        places: name -> place of each knob's option; others stand at their last.
        meta: parameters are made without memory.
        mix: is given a name, a maker for each option of an `OneOf`, and what they are called with, and gives the block
            that stands for all of them; None: one option is made.
        knobs: found on the way, in order.
        made: identity of a parameter or buffer -> where it was made.
        resolution: height of the network's images; None: as they are.
    """

    names: dict[Where, str]
    places: Mapping[str, int]
    meta: bool = True
    mix: Mix | None = None
    knobs: dict[str, Knob] = field(default_factory=dict)
    made: dict[int, Where] = field(default_factory=dict)
    resolution: int | None = None
    scope: list[tuple[str, Any, tuple[tuple[str, frozenset[int]], ...]]] = field(default_factory=list)
    _counts: Counter[Where] = field(default_factory=Counter)
    _alive: list[Any] = field(default_factory=list)
    _last: str = ""

    def where(self, frame: FrameType | None) -> Where:
        """Where in code and scope something is made."""
        chain = []
        while frame is not None and frame.f_code is not _CALL:
            if frame.f_code.co_filename != __file__:
                chain.append(_site(frame.f_code, frame.f_lasti))
            frame = frame.f_back
        scope = tuple((name, part) for name, part, _ in self.scope)
        key = (scope, hash(tuple(chain)))
        self._counts[key] += 1
        return (*key, self._counts[key])

    def decide(self, kind: Kind, options: tuple[Any, ...], name: str) -> int:
        """The place of a knob's option in this network."""
        frame = sys._getframe(3)
        if kind == "depth" and frame.f_code.co_filename == __file__:
            frame = frame.f_back  # type: ignore[assignment]
        where = self.where(frame)
        if where not in self.names:
            self.names[where] = self._named(name or _label(frame) or kind)
        name = self.names[where]
        shown = tuple(getattr(o, "__name__", str(o)) if callable(o) else o for o in options)
        when = tuple(condition for _, _, conditions in self.scope for condition in conditions)
        knob = self.knobs.setdefault(name, Knob(name, shown, kind, when))
        if knob.options != shown:
            raise UserError(
                f"the choice {name} has the options {shown} in one network and {knob.options} in another; give it the "
                "same wherever it stands, or make it inside of the OneOf that it hangs on"
            )
        self._last = name
        return min(self.places.get(name, len(options) - 1), len(options) - 1)

    def _named(self, label: str) -> str:
        base = f"{self.scope[-1][0]}.{self.scope[-1][1]}.{label}" if self.scope else label
        taken = set(self.names.values())
        return next(n for i in range(1, MOST) if (n := base if i == 1 else f"{base}{i}") not in taken)

    @contextmanager
    def inside(self, part: Any, places: frozenset[int], name: str = "") -> Iterator[None]:
        """What is made meanwhile hangs on the last knob being at one of these places."""
        name = name or self._last
        always = len(places) == len(self.knobs[name].options)
        self.scope.append((name, part, () if always else ((name, places),)))
        depth = len(self.scope)
        try:
            yield
        finally:
            del self.scope[depth - 1 :]
            self._last = name

    def maker(self, make: Callable[..., Any], place: int) -> Callable[..., Any]:
        name = self._last

        def made(*args: Any, **kwargs: Any) -> Any:
            with self.inside(getattr(make, "__name__", place), frozenset({place}), name):
                return make(*args, **kwargs)

        return made

    def mixed(self, makers: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
        """What makes the block that stands for all options, each made inside of its own scope."""
        name, mix = self._last, self.mix
        assert mix is not None
        options = [self.maker(make, place) for place, make in enumerate(makers)]
        return lambda *args: mix(name, options, args)

    def registered(self, module: nn.Module, name: str, value: Any) -> Any:
        """Hook of torch for every parameter and buffer that a module is given."""
        import torch

        if value is None or id(value) in self.made:
            return None
        kept = value
        if self.meta and isinstance(value, torch.nn.Parameter) and not value.is_meta:
            kept = torch.nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        self.made[id(kept)] = self.where(sys._getframe(1))
        self._alive.append(kept)
        return None if kept is value else kept


_BUILD: Build | None = None


def _decide(kind: Kind, options: tuple[Any, ...], name: str) -> int:
    if not options:
        raise UserError(f"a {kind} with no options was asked for; give it some, like {kind.capitalize()}(1, 2)")
    return len(options) - 1 if _BUILD is None else _BUILD.decide(kind, options, name)


def _rising(what: str, options: tuple[int, ...]) -> tuple[int, ...]:
    least = 0 if what == "Depth" else 1
    if list(options) != sorted(set(options)) or not all(isinstance(o, int) and o >= least for o in options):
        raise UserError(
            f"{what}{options} was asked for; its options are whole numbers from {least}, each larger than the last"
        )
    return options


def _call(build: Build, function: Callable[[], nn.Module]) -> nn.Module:
    """Call a space's function with a build's decisions."""
    from torch import nn
    from torch.nn.modules import module as hooks

    global _BUILD
    before, _BUILD = _BUILD, build
    handles = [
        hooks.register_module_parameter_registration_hook(build.registered),
        hooks.register_module_buffer_registration_hook(build.registered),
    ]
    try:
        made = function()
        if build.resolution is not None and isinstance(made, nn.Module):
            made._resolution = build.resolution  # type: ignore[assignment]
        return made
    finally:
        _BUILD = before
        for handle in handles:
            handle.remove()


_CALL: CodeType = _call.__code__


@lru_cache(maxsize=32)
def _given(file: str) -> dict[tuple[int, int], str]:
    """Calls of a source by line and column, each with the name of what it is given to."""
    found: dict[tuple[int, int], str] = {}
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return found
    for parent in ast.walk(tree):
        targets = parent.targets[:1] if isinstance(parent, ast.Assign) else [getattr(parent, "target", None)]
        values: list[Any] = [getattr(parent, "iter", getattr(parent, "value", None))]
        if isinstance(values[0], ast.Tuple) and isinstance(targets[0], ast.Tuple):
            targets, values = targets[0].elts, values[0].elts
        for target, value in zip(targets, values, strict=False):
            if isinstance(value, ast.Call):
                name = parent.arg if isinstance(parent, ast.keyword) else _name(target)
                found[value.lineno, value.col_offset] = name or ""
    return found


def _name(target: Any) -> str:
    """A variable's or an attribute's own name."""
    if isinstance(target, ast.Attribute):
        return target.attr
    return target.id if isinstance(target, ast.Name) and target.id != "_" else ""


@lru_cache(maxsize=65536)
def _site(code: CodeType, instruction: int) -> tuple[Any, ...]:
    """Where in the source an instruction stands: its own number changes as Python adapts to what runs often."""
    return code.co_filename, code.co_qualname, *list(code.co_positions())[instruction // 2]


def _label(frame: FrameType) -> str:
    """What a call's value is given to in the source: a variable, an argument; nothing where that cannot be told."""
    _, _, line, _, column, _ = _site(frame.f_code, frame.f_lasti)
    return _given(frame.f_code.co_filename).get((line or 0, column or 0), "")


class Space:
    """A space's function, its knobs, and the networks that it makes.

    Args:
        function: makes the network; its keyword arguments are fixed by `arguments`.
        name: as it is told.

    Raises:
        UserError: the function fails, returns no module, or its choices do not fit together.
    """

    def __init__(self, function: Callable[..., nn.Module], name: str = "", **arguments: Any) -> None:
        self.name = name or getattr(function, "__name__", "space")
        self._function, self.arguments = function, arguments
        self._names: dict[Where, str] = {}
        self.domain = self._explored()

    def network(self, genome: Genome | None = None, meta: bool = False) -> nn.Module:
        """The plain network of a genome, by default of the largest, with weights drawn anew."""
        return self.build(self.domain.largest() if genome is None else genome, meta)[0]

    def build(self, genome: Genome, meta: bool = True) -> tuple[nn.Module, dict[str, Where]]:
        """The network of a genome, and where each of its parameters and buffers was made."""
        places = {knob.name: place for knob, place in zip(self.domain.knobs, genome, strict=True)}
        return self._built(places, meta)[:2]

    def mixed(self, mix: Mix) -> nn.Module:
        """The network in which each block of an `OneOf` is what `mix` makes of all options; all else at its largest."""
        return _call(Build(self._names, {}, meta=False, mix=mix), lambda: self._function(**self.arguments))

    def _built(self, places: Mapping[str, int], meta: bool = True) -> tuple[nn.Module, dict[str, Where], Build]:
        from torch import nn

        build = Build(self._names, places, meta)
        try:
            module = _call(build, lambda: self._function(**self.arguments))
        except UserError:
            raise
        except Exception as error:  # the function is the user's own
            raise UserError(
                f"the space {self.name} fails at {_said(build.knobs, places)}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(module, nn.Module):
            raise UserError(f"the space {self.name} returned a {type(module).__name__}; it must return an nn.Module")
        found = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in build.made:
                raise UserError(
                    f"{name} of the space {self.name} was made by copying a module, so that its choices cannot be "
                    "followed; make each block by calling its class"
                )
            found[name] = build.made[id(tensor)]
        return module, found, build

    def _explored(self) -> Domain:
        """Every knob that some network has, found by trying each option once."""
        found: dict[str, Knob] = {}
        order: list[str] = []
        tried: set[tuple[str, int]] = set()
        queue: list[dict[str, int]] = [{}]
        while queue:
            places = queue.pop()
            before = 0  # how many knobs stand before the one at hand
            for name, knob in self._built(places)[2].knobs.items():
                known = found.setdefault(name, knob)
                if known is knob:
                    order.insert(before, name)
                before = order.index(name) + 1
                if known.options != knob.options:
                    raise UserError(
                        f"the choice {name} has the options {knob.options} in one network and {known.options} in "
                        "another; give it the same wherever it stands"
                    )
                for place in range(len(knob.options)):
                    if (name, place) not in tried:
                        tried.add((name, place))
                        if place != places.get(name, len(knob.options) - 1):
                            queue.append({**places, name: place})
            if len(tried) > MOST:
                raise UserError(f"the space {self.name} has more than {MOST} options; give it fewer choices")
        if not found:
            raise UserError(f"the space {self.name} has no choices; put Choice, Width, Depth or OneOf into it")
        return Domain(tuple(found[name] for name in order))


def _said(knobs: Mapping[str, Knob], places: Mapping[str, int]) -> str:
    """The choices of a network that failed, as far as it came."""
    said = [f"{k.name}={k.options[min(places.get(k.name, 9**9), len(k.options) - 1)]}" for k in knobs.values()]
    return ", ".join(said[-6:]) or "its first choice"


def open_space(name: str, **arguments: Any) -> Space:
    """A space by name, see `open_function`."""
    function, said = open_function(name)
    return Space(function, said, **arguments)


def open_function(name: str) -> tuple[Callable[..., nn.Module], str]:
    """A space's function by name, and what to call it: one that comes with Trimtab (`mobile-cnn`), `file.py`,
    `file.py:function` or `module:function`; the function is `network` unless named.

    Raises:
        UserError: there is no such space.
    """
    target, _, function = name.rpartition(":") if ":" in name else (name, "", "network")
    shipped = Path(__file__).parent / "spaces"
    file = shipped / f"{target.replace('-', '_')}.py"
    if not file.is_file():
        file = Path(target)
    try:
        if file.is_file():
            spec = importlib.util.spec_from_file_location(f"space_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        elif ":" in name:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(target)
        else:
            known = ", ".join(sorted(p.stem.replace("_", "-") for p in shipped.glob("[a-z]*.py")))
            raise UserError(f"there is no space {name!r}; there are {known}, or give a Python file, like space.py")
        made = getattr(module, function)
    except UserError:
        raise
    except Exception as error:  # the code is the user's own
        raise UserError(f"the space {name} cannot be opened: {type(error).__name__}: {error}") from error
    return made, name
