"""Methods and their verbs: the whole interface between a paper and the engine.

A method is a frozen dataclass whose fields are its configuration, with a `card` and one verb. The keyword-only
parameters of the
verb name the statistics that it wants; the engine reads them from the signature and injects them, so that what a
method says it
needs can never differ from what it uses.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from trimtab.core.errors import UserError
from trimtab.core.level import Level

if TYPE_CHECKING:
    from random import Random

    from torch import Tensor, nn

    from trimtab.core.device import Cost, Device, Work
    from trimtab.core.knob import Domain, Genome, Offered
    from trimtab.core.table import Row
    from trimtab.formats.cache import Projection, Stored
    from trimtab.formats.packed import Packed

FACTS = frozenset(
    {"float", "int", "sparse", "factored", "rotated", "trainable", "adapted", "elastic", "packed", "shared", "codebook"}
    | {"norm-folded", "narrowed", "dropped"}
)
PROMISES = frozenset(
    {"function", "shape", "mergeable", "exact", "extract", "deterministic", "monotone", "resumable", "symmetric"}
)
FAMILIES = (
    *(
        "quant",
        "prune",
        "lowrank",
        "distill",
        "merge",
        "adapt",
        "optim",
        "nas",
        "moe",
        "attn",
        "arch",
        "kv",
        "serve",
        "dist",
    ),
    *("diffusion", "retrieve", "hw", "alloc"),
)


@dataclass(frozen=True)
class Card:
    """What a method says of itself.

    Fields:
        name: the name in plans and on the command line.
        catalogue: ids of the catalogue's rows that the method implements; empty for a baseline.
        paper: the paper's identifier (`arXiv:2210.17323`) or citation.
        claim: one sentence: what the method should show here.
        requires: facts that every site it touches must have.
        leaves: facts that it leaves on them; `float` is taken away by `int`, `codebook`, `sparse` and `factored`
            unless left again.
        keeps: promises that the conformance battery tests.
        levels: texts of levels that the method takes, coarse to fine: examples for `show`, and what the battery tries.
        kinds: kinds of site that it can touch.
        tolerance: for `keeps={"function"}`: the largest relative difference of outputs in fp32.
    """

    name: str
    catalogue: tuple[int, ...] = ()
    paper: str = ""
    claim: str = ""
    requires: frozenset[str] = frozenset()
    leaves: frozenset[str] = frozenset()
    keeps: frozenset[str] = frozenset()
    levels: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset({"linear", "head"})
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("requires", "leaves", "keeps", "kinds"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        unknown = (self.requires | self.leaves) - FACTS | (self.keeps - PROMISES)
        assert not unknown, f"card {self.name}: unknown facts or promises {sorted(unknown)}"


class Method(ABC):
    """Every method; a concrete one is a frozen dataclass, final, with a `card`."""

    card: ClassVar[Card]
    verb: ClassVar[str]

    @classmethod
    def family(cls) -> str:
        """The family is the folder that the method's file lies in."""
        return cls.__module__.split(".")[-2]

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Names of the statistics that the verb asks for: its keyword-only parameters."""
        parameters = inspect.signature(getattr(cls, cls.verb)).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def config(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        pairs = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return {f.name: value for f, value in pairs if f.default is dataclasses.MISSING or value != f.default}


class Solver(Method):
    """`solve(weight, level, *, stats) -> Packed`: a pure function of one weight; no model, device or I/O."""

    verb = "solve"

    @abstractmethod
    def solve(self, weight: Tensor, level: Any, **stats: Any) -> Packed:
        """The weight `[out, in]` (fp32; a convolution flattened to `[out, in/groups*kh*kw]`) at a level, in its
        stored form.
        """


@dataclass
class Scene:
    """What a rewriter works on: a model, its map, and the statistics of its sites.

    Fields:
        model: the module to change in place (parameters real where the rewrite may touch them).
        modelmap: the traced `ModelMap` of that model; paths are those of `model.named_modules()`.
        blocks: indices of the blocks to touch, whose weights are real; () where the model has none. A rewriter with
            `scope = "block"` is called once a block, in forward order, with the one index.
        levels: level for each site path that the plan names, of this step.
        stats: path -> {statistic: tensor}, those named by the verb's keyword-only parameters.
        edits: what a loader must replay to rebuild the changed structure from the original configuration (see
            `formats.structure`); rewriters append.
    """

    model: nn.Module
    modelmap: Any
    blocks: tuple[int, ...] = ()
    levels: Mapping[str, Level] = field(default_factory=dict)
    stats: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)


class Rewriter(Method):
    """`rewrite(scene, *, stats) -> None`: changes structure or folds and rotates, in place, over the sites that the
    levels name.

    The keyword-only parameters are mappings path -> tensor of the statistic of that name.
    """

    verb = "rewrite"
    scope: ClassVar[str] = "model"

    @abstractmethod
    def rewrite(self, scene: Scene, **stats: Any) -> None:
        """Change the scene's model in place; sites and levels are in `scene.levels`."""


class Merger(Method):
    """`merge(tensors, base, *, ...) -> Tensor`: one tensor of every parent into one; pure, in fp32; the engine streams.

    `base: Tensor` in the signature says that the method needs the model that the parents were tuned from,
    `base: Tensor | None` that it does without. Keyword-only parameters name what the engine injects:

    - `weight`, `density`: a number a parent, as the recipe says for this tensor, else the method's field of that name;
    - `depth`: where the tensor's block lies, from 0 (the first) to 1 (the last); outside of blocks 0 for what is read
      before all of them and 1 for what is read behind;
    - `block`: the place of the tensor's block in the result, from 0 on, and how many blocks there are; outside of
      blocks the place is 0;
    - `rng`: a generator a parent, seeded by the run's seed, the tensor's name, the parent and the tile;
    - `gram`: inner products of the parents' tensors, fp64 `[parents, parents]`;
    - `threshold`: a number a parent: the least magnitude of change from the base among the `density` largest;
    - `peak`: a number a parent: the largest magnitude of change from the base.

    Every other field of a method may be a curve over depth or hang on the tensor's name: the engine calls the method
    that has the fields of the tensor at hand. With `tiled`, an element of the result depends on the parents at that
    element and on what is injected alone, so that a large tensor is merged piece by piece.
    """

    verb = "merge"
    tiled: ClassVar[bool] = True
    most: ClassVar[int | None] = None
    """How many parents it takes at most."""

    @abstractmethod
    def merge(self, tensors: list[Tensor], base: Any, **given: Any) -> Tensor:
        """The merged tensor, of the shape of the parents' tensors."""

    @classmethod
    def needs_base(cls) -> bool:
        """Whether the verb's signature asks for the base."""
        return "None" not in str(inspect.signature(cls.merge).parameters["base"].annotation)

    def at(self, **fields: Any) -> Self:
        """The same method with other fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


class TaskMerger(Merger):
    """A merger of which each parent can be had again: beside `merge`, `split` says what of a tensor is stored for that,
    and `restore` makes a parent's tensor of it.

    Parts are tensors by name. The engine stores floats in the result's type and gives them back in fp32; whole numbers
    come back as they are. Of a method that is `tiled`, parts of consecutive tiles of a tensor, whose lengths are
    multiples of 8, are put end to end. What the verb asks for is numbers a parent, and nothing that is collected.
    """

    @abstractmethod
    def split(
        self, tensors: list[Tensor], base: Any, **given: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """What all parents share of a tensor, and what is each one's own; given what `merge` is given."""

    @abstractmethod
    def restore(self, base: Any, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        """A parent's tensor, flat or in its shape; it depends on no field. `base: None` in the signature says that the
        parts do without the base.
        """

    @classmethod
    def restores_on_base(cls) -> bool:
        """Whether a parent's tensor is made with the base."""
        return inspect.signature(cls.restore).parameters["base"].annotation not in ("None", None)


class Joiner(Method):
    """`join(scenes, *, ...) -> nn.Module`: whole models into one, where no rule of one tensor at a time would do.

    Keyword-only parameters: `moments`, for each group of places that `places` names the second moments
    E[u u^T], u = [x_1, x_2, ..., 1], of what the modules at these places, one a model, read on the same data; double.
    """

    verb = "join"

    @abstractmethod
    def places(self, scenes: Sequence[Scene]) -> tuple[tuple[str, ...], ...]:
        """Paths of modules, one a model in a group, whose inputs are to be looked at side by side."""

    @abstractmethod
    def join(self, scenes: Sequence[Scene], **stats: Any) -> nn.Module:
        """The joined model; those of the scenes are left as they are."""


class Allocator(Method):
    """`allocate(rows, limits, *, ...) -> {unit: row}`: sees rows only, never a model.

    Keyword-only parameters may name `measure` (a callable {unit: choice} -> damage, end to end on the search data),
    `rng`, `pairs` (interaction damages) or statistics by unit.
    """

    verb = "allocate"

    @abstractmethod
    def allocate(self, rows: list[Row], limits: Mapping[str, float], **extra: Any) -> dict[str, Row]:
        """One row for each unit, such that the sum of every limited cost is within its limit."""


class Pricer(Method):
    """`price(work, device) -> Cost`: what a forward costs on a machine; sees shapes and a profile, never a model."""

    verb = "price"

    @abstractmethod
    def price(self, work: Work, device: Device) -> Cost:
        """Seconds with their spread, and the most bytes held."""


class Wrapper(Method):
    """`wrap(module, level, *, stats) -> module`: puts trainable parameters around or into a module, whose face it
    keeps.

    What comes back has the module's inputs and outputs. Its trainable parameters are exactly those that the method
    adds; where the card keeps `mergeable`, `merged()` gives the plain module of the same function.
    """

    verb = "wrap"

    @abstractmethod
    def wrap(self, module: nn.Module, level: Any, **stats: Any) -> nn.Module:
        """The wrapped module; the one that was given is not changed, and its weights are shared, not copied."""


class Optimiser(Method):
    """`init(param)`, `step(grad, state, param)` and `state_bytes(shape)`: an update rule of one tensor.

    `step` returns the direction, or a tensor and a factor that it is to be multiplied with: the driver
    (`trimtab.parts.stepping`, a `torch.optim.Optimizer`) applies `param <- (1 - lr * decay) param - lr * direction`.
    State tensors are updated in place and never made anew; numbers of the state are ints and floats, `step` among them.
    Keyword-only parameters: `rng`, a generator seeded by the run's seed, the parameter's place and its step; `seed`,
    the run's; `inputs` and `errors`, means over rows of what the linear of this weight read, and of the gradients that
    came back to it, or None where it is no linear's. A rule with `integers` trains linears whose weights are kept in 8
    bits alone, and has a field `rounding`.
    """

    verb = "step"
    integers: ClassVar[bool] = False

    @abstractmethod
    def init(self, param: Tensor) -> dict[str, Any]:
        """The state for a parameter: tensors and numbers."""

    @abstractmethod
    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor, **given: Any) -> Any:
        """The direction for a gradient, in the parameter's shape."""

    @abstractmethod
    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of the state's tensors for a parameter of this shape."""


class Estimator(Method):
    """`estimate(model, losses, *, ...) -> (loss, gradients)`: a step's gradient, where it is not plain backward's.

    `losses` are callables, one a micro-batch; each gives the losses of its items `[items]`, of the model as it then is.
    The mean over all items is what is trained. The gradients come as pairs of a parameter's name and its gradient.
    With `streams` they come one by one, and what came before has been applied when the next is asked for: no two
    gradients need be there at once. A parameter for which nothing comes stays as it is.

    Keyword-only parameters: `rng`, a generator seeded by the run's seed and the step; `rate`, the step's learning rate.
    """

    verb = "estimate"
    streams: ClassVar[bool] = False

    @abstractmethod
    def estimate(
        self, model: nn.Module, losses: Sequence[Callable[[], Tensor]], **given: Any
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients of the parameters that require one, by name."""


class Objective(Method):
    """`loss(student, teacher, batch) -> scalar`: what a training minimises; keyword-only parameters name internals that
    it reads.
    """

    verb = "loss"

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any, **internals: Any) -> Tensor:
        """The mean loss of a batch, given logits `[n, classes]` of student and teacher and the labels `[n]`."""


class Policy(Method):
    """`decide(view) -> action`: a pure function of a frozen snapshot; the engine keeps the books and acts."""

    verb = "decide"

    @abstractmethod
    def decide(self, view: Any, **extra: Any) -> Any:
        """What to do next."""


class Scheduler(Policy):
    """`decide(view) -> Decision`: which requests a server begins in a tick, which adapters come and go, and how much of
    which prompt is read; see `core.traffic`.
    """


class Drafter(Policy):
    """`decide(view) -> int`: how many tokens a draft proposes before a step of the target; see `core.view.Drafting`."""


class Pager(Policy):
    """`decide(view) -> Exchange`: which neurons of a layer are in memory as a token goes through it; see
    `core.view.Held`.
    """


class Selector(Policy):
    """`decide(view) -> neurons`: which neurons of each feed-forward layer write on behind a prompt, whole numbers
    `[count]` a layer; see `core.view.Prompted`.
    """

    def prepare(self, texts: Iterable[Sequence[Tensor]]) -> Any:
        """What is worked out once, before the first prompt, from what the neurons give for some texts, `[tokens,
        neurons]` a layer. Texts are read as they are asked for.
        """
        return None


@dataclass(frozen=True)
class Trial:
    """A genome that was evaluated.

    Fields:
        genome: in canonical form.
        values: name -> number; of every objective of the search where the trial is whole.
        effort: share of a whole evaluation that was spent, for searches that stop early; values are those reached.
    """

    genome: Genome
    values: Mapping[str, float]
    effort: float = 1.0


@dataclass(frozen=True)
class Hunt:
    """A search as a searcher sees it: all that was evaluated so far, in the order of the journal.

    Fields:
        domain: the knobs.
        trials: so far.
        objectives: names of the values that are to be small; quality comes as an error.
        limits: name of a value -> its upper bound; what is above breaks the limit, by how much counts.
        pending: genomes that other processes are evaluating.
        seed: of the whole search; with the number of trials it seeds `rng`.
    """

    domain: Domain
    trials: tuple[Trial, ...] = ()
    objectives: tuple[str, ...] = ("error",)
    limits: Mapping[str, float] = field(default_factory=dict)
    pending: tuple[Genome, ...] = ()
    seed: int = 0


class Searcher(Method):
    """`ask(hunt, count, *, rng, ...) -> genomes`: what to evaluate next, a pure function of all that was evaluated.

    It keeps nothing between calls, so that a journal of trials is all of a search: a killed one goes on with the same
    proposals, and processes share one by its journal. Keyword-only parameters: `rng`, a `random.Random` seeded by the
    hunt's seed and its number of trials; `price`, a callable of genomes that gives exact or predicted costs without an
    evaluation, {name: array `[genomes]`}; `nodes`, a callable of genomes that gives what is known of each node of the
    untrained networks, array `[genomes, nodes]`; `identity`, a callable of a genome that gives a text, equal for
    candidates that compute the same function.
    """

    verb = "ask"

    @abstractmethod
    def ask(self, hunt: Hunt, count: int, **given: Any) -> list[Genome]:
        """At most `count` canonical genomes, none of them evaluated or pending; none where the domain is exhausted."""


@dataclass(frozen=True)
class Lesson:
    """A step of an elastic training as its curriculum sees it.

    Fields:
        domain: the knobs.
        offered: places of each knob that take part, as the method offered them.
        step, steps: the step, from 0 on, and how many there are.
    """

    domain: Domain
    offered: Offered
    step: int
    steps: int


@dataclass(frozen=True)
class Pupil:
    """One sub-network of a training step.

    Fields:
        genome: which.
        teacher: whose outputs it learns from: None: labels alone; a number: the sub-network at that place in the step,
            before its own, as it is now; "before": the largest network as it was when it was first asked for.
        labels: share of the loss that comes from labels where there is a teacher.
        weight: of its loss in the step's sum.
    """

    genome: Genome
    teacher: int | Literal["before"] | None = None
    labels: float = 0.0
    weight: float = 1.0


class Elastic(Method):
    """`offer(domain) -> {knob: places}`: which choices of a network become elastic; `teach` says how they are trained.

    The engine adds the gradients of a step's sub-networks, which share the largest network's weights, and steps once.
    """

    verb = "offer"

    @property
    def transforms(self) -> bool:
        """Whether smaller kernels are learnt functions of larger ones, see `parts.kernel_transform`."""
        return False

    @abstractmethod
    def offer(self, domain: Domain) -> Offered:
        """Places of the options of each knob that take part; a knob that is not named stays at its last option."""

    @abstractmethod
    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        """The sub-networks of a step."""

    def sorts(self, lesson: Lesson) -> bool:
        """Whether channels are put in the order of their importance before a step."""
        return False

    def rate(self, lesson: Lesson) -> tuple[float, float, float]:
        """The schedule of the learning rate that a step is in: where it begins and ends, as shares of the steps, and
        its largest rate, as a share of the training's.
        """
        return 0.0, 1.0, 1.0


class Relaxer(Method):
    """`choose(votes, *, ...) -> {name: place}`: which option each choice of blocks takes, after a training of all of
    them in one network.

    `mix` makes the block that stands for the options, and `weigh` says what the numbers of the choice minimise. The
    engine alternates steps of the weights, on one half of the data, and of the votes, on the other; a relaxer whose
    votes are trained as weights are, and with them, is not `bilevel`. A vote is a module with these:

    - `architecture()`: its parameters;
    - `weights()`: how much of each option there is, `[options]`, with a gradient for them;
    - `draw(rng, learning)`: is called before each step of the weights, or of the votes (`learning`);
    - `settle()`: is called after each step of the votes.

    Keyword-only parameters: `harm`, a callable of a vote's name and a place, or None for all options, that gives the
    loss on the votes' data without them; `take`, a callable of a name and a place, or None for no option, that fixes a
    choice in the network and trains on for a while.
    """

    verb = "choose"
    bilevel: ClassVar[bool] = True
    warmup: ClassVar[float] = 0.0
    """Share of the steps in which the votes do not move yet."""

    @abstractmethod
    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """The block for all options, its vote as `vote`; one is given where the same choice stands elsewhere too."""

    @abstractmethod
    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """What is minimised: from the loss, the blocks' seconds as the votes stand, and those where they began."""

    @abstractmethod
    def choose(self, votes: Mapping[str, Any], **given: Any) -> dict[str, int | None]:
        """The place of each choice; None for no option, where a sum goes on without it."""


class Architecture(Method):
    """`build(inputs, outputs) -> nn.Module`: a block of a network, for images `[n, inputs, h, w]`.

    It gives `[n, outputs, h', w']`. What comes back is plain torch with random weights: it takes ints and knows neither
    the method nor a space, so that it can be used alone and be an option of any search. Where the card keeps
    `mergeable`, its `merged()` gives the smaller module that computes the same once the training is over.
    """

    verb = "build"

    @abstractmethod
    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block between so many channels."""


class Cacher(Method):
    """`store(keys, values, *, ...) -> Stored`: what a cache keeps of a window of older tokens.

    It has no level: what a cache takes grows with the text, and so its format is chosen when a model is run, by a text
    like `kivi2/g32` or `think(prune=0.4)` (see `formats.cache`). Its field `residual` is how many tokens a window has.
    Keyword-only parameters, of the window:

    - `queries`: of its tokens, `[..., heads of keys, rows, channels]`, token by token, a row for each head that shares
      these keys;
    - `inputs`: what the projections read, `[..., tokens, width]`;
    - `place`: puts positions into keys, see `formats.cache.Place`;
    - `first`: the position of its first token;
    - `below`: what the layer below stored of the same tokens, or None;
    - `prepared`: what `prepare` gave for the layer.
    """

    verb = "store"

    @abstractmethod
    def store(self, keys: Tensor, values: Tensor, **stats: Any) -> Stored:
        """Keys and values `[..., heads, tokens, channels]` in their stored form."""

    def prepare(self, projection: Projection, **stats: Any) -> Any:
        """What is worked out once for a layer, before its first window.

        Keyword-only parameters: `gram`, of what the projections read in a sample of text, `[width, width]`.
        """
        return projection


@dataclass(frozen=True)
class Remembered:
    """The tokens that a cache holds, as a policy sees them that decides which of them stay.

    Fields:
        surprise: nats, -log p of each token when it was read, `[texts, tokens]`; of the first token, the most of its
            window.
        age: windows that were read since, `[texts, tokens]`, 0 for those of the last.
    """

    surprise: Tensor
    age: Tensor


_VERBS = (
    *(Solver, Rewriter, Merger, Joiner, Allocator, Pricer, Wrapper),
    *(Optimiser, Estimator, Objective, Policy, Cacher, Searcher, Elastic, Relaxer, Architecture),
)
VERBS: dict[str, type[Method]] = {cls.verb: cls for cls in _VERBS}


@cache
def discover() -> dict[str, type[Method]]:
    """Every method found: the modules of each family's folder, then the entry-point group `trimtab.methods`."""
    found: dict[str, type[Method]] = {}
    for family in FAMILIES:
        try:
            package = importlib.import_module(f"trimtab.{family}")
        except ModuleNotFoundError:
            continue
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for value in vars(module).values():
                if inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, Method):
                    found[value.card.name] = value
    for entry in entry_points(group="trimtab.methods"):
        cls = entry.load()
        found[cls.card.name] = cls
    return dict(sorted(found.items()))


def method(name: str, **config: Any) -> Method:
    """The method of that name with that configuration.

    Raises:
        UserError: no such method, no such field, a value of another type than the field's default, or one that is not
            among those that the field's type names.

    >>> method("gptq", damp=0.05).config()
    {'damp': 0.05}
    """
    known = discover()
    if name not in known:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, known)}; `trimtab methods` lists all {len(known)}")
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = get_type_hints(cls) if config else {}
    for key, value in list(config.items()):
        if key not in fields:
            hint = f"its fields are {', '.join(fields)}" if fields else "it has none"
            raise UserError(f"method {name} has no field {key!r}; {hint}")
        default = fields[key].default
        if isinstance(default, tuple) and isinstance(value, list):  # TOML and JSON know lists alone
            value = config[key] = tuple(value)
        numeric = isinstance(default, int | float) and not isinstance(default, bool)
        fits = isinstance(value, int | float) if numeric else isinstance(value, type(default))
        if default not in (None, dataclasses.MISSING) and not fits:
            raise UserError(
                f"method {name}: {key}={value!r} was given, a {type(default).__name__} like {default!r} is needed"
            )
        kind = kinds[key]
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UserError(f"method {name}: {key}={value!r} was given; it is one of {', '.join(get_args(kind))}")
    return cls(**config)


def did_you_mean(name: str, known: Any) -> str:
    """`; did you mean 'x'?` where a known name is near, else nothing."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
