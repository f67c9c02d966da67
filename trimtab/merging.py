"""Merging: many checkpoints in, one Hugging Face folder out, streamed from disk to disk.

    parents and base -> checked against one another, headers and configurations alone -> streamed -> configuration,
    tokenizer and model card -> renamed to its name

Everything that can be refused is refused before anything is written. What is written lies in a hidden folder beside the
output until it is complete.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import Journal, commit_folder, writing
from trimtab.core.method import Merger, Method, TaskMerger, did_you_mean, discover, method
from trimtab.core.recipe import (
    Parent,
    Recipe,
    Settings,
    Slice,
    block_lists,
    block_of,
    check_number,
    depth_of,
    first_setting,
)

if TYPE_CHECKING:
    from trimtab.engine.merge_stream import Job
    from trimtab.formats.checkpoint import Checkpoint, Entry
    from trimtab.formats.vocabulary import Union, Vocabulary

SHARD = 5_000_000_000
HELD = 1 << 30  # bytes of a restored model that are in memory at a time, at most a file
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FLOATS = ("F16", "BF16", "F32", "F64")
ADAPTER = "adapter_config.json"
VOCABULARIES = ("same", "union", "force")
# of a configuration, what makes equal weights another function; where it is named in the one and in the other
MEANING = (
    *("model_type", "architectures", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("n_head", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "num_experts_per_tok"),
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
Progress = Callable[[str, int, int], None]


def merge(
    models: Sequence[str | os.PathLike[str]] | Recipe,
    *,
    out: str | os.PathLike[str],
    method: Merger | str = "linear",
    base: str | os.PathLike[str] | None = None,
    weight: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    dtype: str | None = None,
    vocabulary: str = "same",
    seed: int = 0,
    apply_adapters: bool = False,
    keep_tasks: bool = False,
    shard_bytes: int = SHARD,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge checkpoints into a Hugging Face folder.

    Args:
        models: folders, hub names or names of pocket models; or a whole recipe, which the options up to `seed` are not
            to repeat.
        out: the folder to write.
        method: a merger, like `TIES(density=0.2)`, or its name.
        base: the model that the others were tuned from, for methods that need it.
        weight, density: one number a model, for methods that ask for it; by default the method's field of that name.
        dtype: `bf16`, `fp16` or `fp32`; by default the type of the base, or of the first model.
        vocabulary: `same` refuses models with vocabularies of different sizes, `union` gives the result the tokens of
            all, `force` cuts them to the smallest.
        seed: of everything random.
        apply_adapters: put parents that are adapters onto their models, or onto the base, while merging.
        keep_tasks: also write, to the folder `tasks` of the result, what each parent is made of again by `restore`.
        shard_bytes: the most bytes a file of weights.
        resume: go on with a merge to the same folder that was cut off.
        overwrite: replace what is in the folder.
        progress: is told what is done, how much of it, and how much there is.

    Returns:
        The report: `out`, `method`, `parents` with their hashes, `bytes`, `tensors`, `seconds`, and `tasks` where they
        are kept.

    Raises:
        UserError: bad input; nothing was written.
    """
    start = time.perf_counter()
    recipe = models if isinstance(models, Recipe) else None
    if recipe is None:
        assert not isinstance(models, Recipe)
        recipe = simple_recipe(models, method, base, weight, density, dtype, vocabulary, seed)
    if apply_adapters:
        recipe = dataclasses.replace(recipe, adapters=True)
    try:
        return Merge(recipe, Path(out), shard_bytes, overwrite, keep_tasks).go(
            resume, progress or (lambda *_: None), start
        )
    except UserError as error:
        if "disk is full" not in str(error):
            shutil.rmtree(adapters_beside(Path(out)), ignore_errors=True)
        raise


def restore(
    folder: str | os.PathLike[str],
    task: str,
    *,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model of one task, made of what a merge with `keep_tasks` kept, as a Hugging Face folder.

    Args:
        folder: the merged model.
        task: the name of one of its tasks.
        out: the folder to write.
        base: the model that the tasks were tuned from, where it is no longer where it was.
        shard_bytes: the most bytes a file of weights.
        overwrite: replace what is in the folder.

    Returns:
        The report: `out`, `method`, `task`, `bytes`, `tensors`, `seconds`.

    Raises:
        UserError: no tasks were kept or none of that name, or the base is another one; nothing was written.
    """
    from trimtab.engine.merge_tasks import open_tasks
    from trimtab.formats.checkpoint import Checkpoint, write_safetensors
    from trimtab.formats.huggingface import copy_companions

    start, source, target = time.perf_counter(), Path(folder), Path(out)
    tasks = open_tasks(source)
    origin = open_model(os.fspath(base or tasks.base)) if tasks.method.restores_on_base() else None
    inputs = {os.fspath(folder): source.resolve()} | ({} if origin is None else {origin.name: origin.folder.resolve()})
    check_output(target, inputs, overwrite)
    work = target.absolute().parent / f".{target.name}.restoring"
    with writing(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            stream = tasks.restored(task, None if origin is None else origin.checkpoint)
            write_safetensors(stream, work / "model.safetensors", shard_bytes=min(shard_bytes, HELD))
            copy_companions(source, work)
            shutil.copyfile(source / "config.json", work / "config.json")
            made = Checkpoint(work)
            commit_folder(work, target.absolute())
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    report = {"out": str(out), "method": tasks.method.card.name, "task": task, "tensors": len(made.names())}
    return {**report, "bytes": made.bytes, "seconds": time.perf_counter() - start}


def check_output(out: Path, inputs: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse a folder for a result that is a file, holds other content, or lies in or around an input.

    Args:
        inputs: by name, folders that are read.
        overwrite: what it holds is to be replaced.
    """
    place = out.resolve()
    for name, real in inputs.items():
        if place == real or real.is_relative_to(place) or place.is_relative_to(real):
            raise UserError(f"the output {out} lies in or around the input {name}; name another folder")
    if out.is_file():
        raise UserError(f"{out} is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} already exists with other content; name another folder, or --overwrite it")


def adapters_beside(out: Path) -> Path:
    """Where adapters are applied for a merge to that folder, until it is complete."""
    return out.absolute().parent / f".{out.name}.adapters"


def simple_recipe(
    models: Sequence[str | os.PathLike[str]],
    merger: Merger | str,
    base: str | os.PathLike[str] | None = None,
    weight: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    dtype: str | None = None,
    vocabulary: str = "same",
    seed: int = 0,
) -> Recipe:
    """A recipe of whole models with one number a model."""
    made = _merger(merger.replace("_", "-"), {}) if isinstance(merger, str) else merger
    settings: list[dict[str, Any]] = [{} for _ in models]
    for name, numbers in (("weight", weight), ("density", density)):
        if numbers is None:
            continue
        if len(numbers) != len(models):
            raise UserError(f"{len(numbers)} numbers were given for {name}, and there are {len(models)} models")
        for own, number in zip(settings, numbers, strict=True):
            own[name] = number
    parents = tuple(Parent(os.fspath(m), None, own) for m, own in zip(models, settings, strict=True))
    origin = None if base is None else os.fspath(base)
    if origin is not None and not made.needs_base():
        raise UserError(
            f"a base was given, and {made.card.name} takes none: name it among the models, or choose a method that "
            "merges changes from a base, like task-arithmetic or ties"
        )
    return Recipe(made.card.name, (Slice(parents),), origin, made.config(), dtype, vocabulary, None, seed)


def asked_recipe(
    models: Sequence[str],
    base: str | None,
    merger: str,
    numbers: Mapping[str, str | float | None],
    dtype: str | None,
    vocabulary: str,
    seed: int,
) -> Recipe:
    """The recipe that a command line asks for: a YAML file's, or that of models and options.

    Args:
        merger: name of a method, with fields in brackets where some are not to be their defaults.
        numbers: `weight`, `density` (texts: one number for all models, or one for each) and `scale`; None: not given.

    Raises:
        UserError: options that a recipe in a file settles, or numbers that are none.
    """
    given = {name: value for name, value in numbers.items() if value is not None}
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        from trimtab.formats.mergekit import read_recipe

        if given or base is not None or merger != "linear":
            raise UserError(f"{models[0]} says how to merge; give --base, --method and numbers in it, not beside it")
        recipe = read_recipe(Path(models[0]))
        dtype = dtype or recipe.dtype
        vocabulary = recipe.vocabulary if vocabulary == "same" else vocabulary
        return dataclasses.replace(recipe, dtype=dtype, vocabulary=vocabulary, seed=seed or recipe.seed)
    made = asked_method(merger)
    if not isinstance(made, Merger):
        _merger(made.card.name, {})
    assert isinstance(made, Merger)
    lists: dict[str, list[float] | None] = {"weight": None, "density": None}
    known = {f.name for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            raise UserError(f"--{key} was given, and {made.card.name} has no {key}; its fields are {', '.join(known)}")
        found = [value] if isinstance(value, float) else _numbers(key, value)  # type: ignore[arg-type]
        if len(found) == 1:
            made = made.at(**{key: found[0]})
        else:
            lists[key] = found
    return simple_recipe(models, made, base, lists["weight"], lists["density"], dtype, vocabulary, seed)


def asked_method(text: str) -> Method:
    """A method by its name, underlines or hyphens in it, and its fields in brackets."""
    from trimtab.core.plan import parse_method

    name, bracket, fields = text.partition("(")
    return parse_method(name.replace("_", "-") + bracket + fields)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} {text!r} is no number and no list of numbers; write 0.5 or 0.5,0.3,0.2") from None


def _merger(name: str, config: Mapping[str, Any]) -> Merger:
    made = method(name, **config)
    if not isinstance(made, Merger):
        raise UserError(f"{name} does not merge: its verb is `{made.verb}`; `trimtab methods --family merge` lists all")
    return made


# ---- the models that take part


@dataclass
class Model:
    """A model that takes part: its folder, configuration and tensors; where some of these were changed for the merge,
    as by an adapter, also the folder that they come from.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    onto: Path | None = None
    adapter: bool = False

    @property
    def vocabulary(self) -> int | None:
        """Entries of the vocabulary, as the configuration says."""
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None

    def entry(self, name: str, rows: int | None = None) -> Entry:
        """Where a tensor lies; of more rows than so many, the first."""
        entry = self.checkpoint.entry(name)
        if rows is None or not entry.shape or entry.shape[0] <= rows:
            return entry
        width = (entry.stop - entry.start) // entry.shape[0]
        return dataclasses.replace(entry, shape=(rows, *entry.shape[1:]), stop=entry.start + rows * width)


def open_model(name: str, place: Path | None = None, base: str | None = None, apply: bool = False) -> Model:
    """A model's headers and configuration.

    Args:
        name: of a model, or `model+adapter` for a model with an adapter put onto it.
        place: a folder in which adapters are applied, each in one of its own; None: they are refused.
        base: the model that an adapter without one is applied to; None: the one that the adapter names.
        apply: take adapters that come without a model.

    Raises:
        UserError: there is none of that name, or it is an adapter that is not applied, quantised, or compressed.
    """
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.models.source import folder_of, read_config

    if (pair := model_and_adapter(name)) is not None:
        if place is None:
            raise UserError(f"{name} is a model with an adapter; only models that are merged can have one")
        return _applied(name, folder_of(pair[1]), open_model(pair[0]), place)
    folder = folder_of(name)
    if is_adapter(folder):
        origin = _adapted(folder / ADAPTER)
        if place is None or not apply:
            raise UserError(
                f"{name} is an adapter{f' for {origin}' if origin else ''} and no model; --apply-adapters puts it onto "
                "its model while merging"
            )
        if (onto := base or origin) is None:
            raise UserError(f"{name} is an adapter that does not name its model; give the model with --base")
        return _applied(name, folder, open_model(onto), place)
    if (folder / "trimtab.json").is_file():
        raise UserError(f"{name} is a compressed artifact; merge original models, and compress the result")
    config = read_config(folder)
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        kind = kind.get("quant_method", "unknown") if isinstance(kind, dict) else "unknown"
        raise UserError(f"{name} is quantised ({kind}); merge models in floating point, and quantise the result")
    checkpoint = Checkpoint(folder)
    for tensor in checkpoint.names():
        dtype = checkpoint.dtype(tensor)
        if dtype.startswith("F8") or (dtype in ("I8", "U8") and len(checkpoint.shape(tensor)) > 1):
            raise UserError(f"{name} is quantised: its {tensor} is stored in {dtype}; merge models in floating point")
    return Model(name, folder, config, checkpoint)


def model_and_adapter(name: str) -> tuple[str, str] | None:
    """The two parts of a name like `model+adapter`, as mergekit has them; None for any other.

    >>> model_and_adapter("owner/model+path/to/adapter")
    ('owner/model', 'path/to/adapter')
    """
    places = [i for i in range(1, len(name) - 1) if name[i] == "+"]
    if not places or Path(name).expanduser().exists():
        return None
    pairs = [(name[:i], name[i + 1 :]) for i in places]
    return next((pair for pair in pairs if Path(pair[0]).expanduser().is_dir()), pairs[-1])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def _applied(name: str, adapter: Path, base: Model, adapters: Path) -> Model:
    """A base with an adapter in it."""
    from trimtab.models.applied import apply_adapter

    files = sorted(file for file in adapter.iterdir() if file.is_file()) + base.checkpoint.files
    made = _once(adapters, files, lambda folder: apply_adapter(adapter, base.folder, folder))
    return Model(name, made.path, base.config, made, base.folder, adapter=True)


def with_whole_models(recipe: Recipe, place: Path) -> tuple[Recipe, dict[str, str]]:
    """A recipe whose adapters are whole models in a folder, to be merged again and again, and what each was called.

    Raises:
        UserError: see `open_model`.
    """
    from trimtab.formats.huggingface import copy_companions

    names = {}
    for name in recipe.models():
        model = open_model(name, place, recipe.base, recipe.adapters)
        if model.onto is not None:
            with writing(model.folder):
                (model.folder / "config.json").write_text(json.dumps(model.config), "utf-8")
            copy_companions(model.onto, model.folder)
            names[name] = str(model.folder)
    return renamed(recipe, names), {folder: name for name, folder in names.items()}


def renamed(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with other names for some of its models."""

    def new(name: str | None) -> str | None:
        return None if name is None else names.get(name, name)

    slices = [
        dataclasses.replace(
            part,
            base=new(part.base),
            parents=tuple(dataclasses.replace(p, model=names.get(p.model, p.model)) for p in part.parents),
        )
        for part in recipe.slices
    ]
    return dataclasses.replace(recipe, slices=tuple(slices), base=new(recipe.base))


def _once(place: Path, files: Sequence[Path], make: Callable[[Path], object]) -> Checkpoint:
    """A checkpoint made from files; one that was made of the same files before is taken as it is, to go on with."""
    from trimtab.formats.checkpoint import Checkpoint

    seen = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    folder, done = place / key, place / f"{key}.done"
    if not done.is_file():
        make(folder)
        with writing(done):
            done.touch()
    return Checkpoint(folder)


def _adapted(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def check_alike(models: Sequence[Model], vocabulary: str) -> int | None:
    """Refuse models that cannot be merged; the rows to which vocabularies are cut, None where they are equal.

    Raises:
        UserError: two of them differ in architecture, tied embeddings, vocabulary, names or shapes of tensors.
    """
    first = models[0]
    sizes = {m.name: m.vocabulary for m in models if m.vocabulary is not None}
    rows = min(sizes.values()) if len(set(sizes.values())) > 1 else None  # type: ignore[type-var]
    for other in models[1:]:
        for key in MEANING:
            ours, theirs = first.config.get(key), other.config.get(key)
            if ours == theirs or (key not in ("model_type", "architectures") and None in (ours, theirs)):
                continue
            what = "embeddings are tied in one and not in the other" if key == "tie_word_embeddings" else "they differ"
            raise UserError(
                f"{first.name} has {key} {ours!r} and {other.name} {theirs!r}: {what}, so they cannot be merged"
            )
    if rows is not None and vocabulary != "force":
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"the vocabularies differ in size ({said}); --vocabulary union gives the result the tokens of all; "
            "--vocabulary force cuts all to the smallest, which is right where the larger ones only have tokens added "
            "at the end"
        )
    return rows


def _check_shapes(jobs: Iterable[tuple[str, list[tuple[Model, str, Entry]]]]) -> None:
    for name, found in jobs:
        first_model, _, first = found[0]
        for model, stored, entry in found[1:]:
            if entry.shape != first.shape:
                raise UserError(
                    f"{name} has shape {first.shape} in {first_model.name}, and {stored} has {entry.shape} in "
                    f"{model.name}; only models of one architecture and size can be merged"
                )


# ---- a merge


class Merge:
    """A recipe, its models opened and checked against one another."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        shard_bytes: int = SHARD,
        overwrite: bool = False,
        keep_tasks: bool = False,
    ) -> None:
        """Open and check everything.

        Raises:
            UserError: bad input; nothing was written.
        """
        self.recipe, self.out, self.shard_bytes, self.overwrite = recipe, out, shard_bytes, overwrite
        if recipe.vocabulary not in VOCABULARIES:
            raise UserError(
                f"the vocabulary {recipe.vocabulary!r} was asked for, and known are {', '.join(VOCABULARIES)}"
            )
        if recipe.dtype not in (None, *STORED):
            raise UserError(
                f"unknown type {recipe.dtype!r}{did_you_mean(str(recipe.dtype), STORED)}; give bf16, fp16 or fp32"
            )
        self.method = _merger(recipe.method, {})
        self._check_fields()
        self._check_counts()
        self.tasks = self._task_names() if keep_tasks else ()
        place = adapters_beside(out)
        self.models = {name: open_model(name, place, recipe.base, recipe.adapters) for name in recipe.models()}
        self._check_places()
        self.union: tuple[list[Vocabulary], Union] | None = None
        if recipe.vocabulary == "union":
            self._unite()
        self.rows = check_alike(list(self.models.values()), recipe.vocabulary)
        self._read_behind: dict[str, frozenset[str]] = {}
        self.layers = sum(self._lengths())
        self.jobs = self._jobs()
        self.bytes = sum(job.bytes for job in self.jobs)

    # -- checks

    def _check_fields(self) -> None:
        fields = {f.name for f in dataclasses.fields(self.method)}  # type: ignore[arg-type]
        known = fields | (set(self.method.needs()) & {"weight", "density"})
        for settings in self._all_settings():
            for name in settings:
                if name not in known:
                    takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
                    raise UserError(
                        f"{self.recipe.method} has no parameter {name!r}{did_you_mean(name, known)}; {takes}"
                    )

    def _unite(self) -> None:
        """Give every model the rows of all tokens, where the tokens differ."""
        from trimtab.formats.overlay import overlay
        from trimtab.formats.vocabulary import TOKENIZER, read_vocabulary, spread, united

        order = sorted(self.models.values(), key=lambda m: m is not self._lead())
        vocabularies = [read_vocabulary(m.onto or m.folder, m.vocabulary) for m in order]
        union = united(vocabularies)
        if all(source == tuple(range(union.rows)) for source in union.sources):
            return
        self.union = vocabularies, union
        files = [file for m in order for file in (*m.checkpoint.files, (m.onto or m.folder) / TOKENIZER)]
        tall = [n for n in order[0].checkpoint.names() if order[0].checkpoint.shape(n)[:1] == (vocabularies[0].rows,)]
        for model, vocabulary in zip(order, vocabularies, strict=True):
            for name in tall:
                if model.checkpoint.shape(name)[0] != vocabulary.rows:
                    raise UserError(f"{name} of {model.name} has {model.checkpoint.shape(name)[0]} rows, and its "
                                    f"vocabulary {vocabulary.rows}; they are no pair")  # fmt: skip
        for i, model in enumerate(order):
            rows = ((name, spread([m.checkpoint.read(name) for m in order], union)[i]) for name in tall)
            checkpoint = _once(
                adapters_beside(self.out),
                [*model.checkpoint.files, *files],
                lambda folder, model=model, rows=rows: overlay(model.checkpoint, folder, rows),  # type: ignore[misc]
            )
            folder, config = checkpoint.path, {**model.config, "vocab_size": union.rows}
            self.models[model.name] = Model(
                model.name, folder, config, checkpoint, model.onto or model.folder, model.adapter
            )

    def _lead(self) -> Model:
        """The model that gives the result its configuration, types and tokenizer."""
        return self.models[self.recipe.base or self.recipe.slices[0].parents[0].model]

    def _all_settings(self) -> list[Settings]:
        slices = self.recipe.slices
        return [self.recipe.settings, *(s.settings for s in slices), *(p.settings for s in slices for p in s.parents)]

    def _check_counts(self) -> None:
        name = self.recipe.method
        for part in self.recipe.slices:
            count = len(part.parents)
            if self.method.needs_base() and (part.base or self.recipe.base) is None:
                raise UserError(f"{name} merges changes from a base, and none is named; give it with --base")
            least = 1 if self.method.needs_base() or self.method.most == 1 else 2
            if count < least:
                raise UserError(f"{count} models were given to {name}; it merges at least {least}")
            if self.method.most is not None and count > self.method.most:
                raise UserError(f"{count} models were given to {name}; it takes {self.method.most} at most")

    def _task_names(self) -> tuple[str, ...]:
        """What the tasks of the parents are called: the last parts of their names, where these differ."""
        if not isinstance(self.method, TaskMerger):
            known = ", ".join(name for name, cls in discover().items() if issubclass(cls, TaskMerger))
            raise UserError(f"{self.recipe.method} keeps nothing of single tasks; methods that do are {known}")
        parents = self.recipe.slices[0].parents
        if len(self.recipe.slices) > 1 or parents[0].layers or self.recipe.vocabulary != "same":
            raise UserError("tasks are kept of whole models with one vocabulary; leave --keep-tasks out")
        names = [Path(p.model).name for p in parents]
        return tuple(names if len(set(names)) == len(names) else (p.model for p in parents))

    def _check_places(self) -> None:
        places: dict[Path, str] = {}
        for name, model in self.models.items():
            real = model.folder.resolve()
            if real in places:
                raise UserError(f"{places[real]} and {name} are one model, {real}; name each model once")
            places[real] = name
        for part in self.recipe.slices:
            names = [p.model for p in part.parents]
            twice = [n for n in names if names.count(n) > 1]
            if twice:
                raise UserError(f"{twice[0]} is named twice among the models of one merge; name each model once")
            base = part.base or self.recipe.base
            if self.method.needs_base() and base in names:
                raise UserError(f"{base} is both the base and one of the models; its change from itself is nothing")
        onto = {f"what {m.name} is put onto": m.onto.resolve() for m in self.models.values() if m.onto is not None}
        check_output(self.out, {**onto, **{name: real for real, name in places.items()}}, self.overwrite)

    def _lengths(self) -> list[int]:
        """How many blocks each slice has."""
        found = []
        for part in self.recipe.slices:
            lengths = {p.model: self._range(p.model, p.layers) for p in part.parents}
            sizes = {stop - start for start, stop in lengths.values()}
            if len(sizes) > 1:
                said = ", ".join(f"{n} {b - a}" for n, (a, b) in lengths.items())
                raise UserError(f"a slice needs equally many blocks of each model; here are {said}")
            found.append(sizes.pop())
        return found

    def _range(self, name: str, layers: tuple[int, int] | None) -> tuple[int, int]:
        count = next(iter(block_lists(self.models[name].checkpoint.names()).values()), 0)
        start, stop = layers or (0, count)
        if stop > count:
            raise UserError(f"blocks {start} to {stop} of {name} were asked for, and it has {count}")
        return start, stop

    # -- what is to be done

    def _jobs(self) -> list[Job]:
        """A job for each tensor of the result, in the order in which the first parent stores them."""
        return [job for number in range(len(self.recipe.slices)) for job in self._slice_jobs(number)]

    def _slice_jobs(self, number: int) -> list[Job]:
        part, slices = self.recipe.slices[number], self.recipe.slices
        before = sum(self._lengths()[:number])
        base = part.base or (self.recipe.base if self.method.needs_base() else None)
        parents = [(self.models[p.model], p.settings, self._range(p.model, p.layers)[0]) for p in part.parents]
        lead = parents[0][0]
        start, stop = self._range(lead.name, part.parents[0].layers)
        main = next(iter(block_lists(lead.checkpoint.names())), None)
        base_start = self._range(base, part.base_layers or part.parents[0].layers)[0] if base else 0
        counts = block_lists(lead.checkpoint.names())
        names = sorted(lead.checkpoint.names(), key=lambda n: (lead.entry(n).file.name, lead.entry(n).start))
        jobs, shapes = [], []
        for name in names:
            found = block_of(name)
            if found and found[0] == main:
                index = found[1] - start
                if not 0 <= index < stop - start:
                    continue
                depth = depth_of(index, stop - start)
                places = [_at(name, offset + index) for _, _, offset in parents]
                target, origin = _at(name, before + index), _at(name, base_start + index)
                block = before + index
            else:
                if len(slices) > 1 and number != (len(slices) - 1 if name in self._behind(lead) else 0):
                    continue
                depth = depth_of(found[1], counts[found[0]]) if found else 0.0
                places, target, origin, block = [name] * len(parents), name, name, 0
            sources = [(m, p, self._entry(m, p)) for (m, _, _), p in zip(parents, places, strict=True)]
            root = [(self.models[base], origin, self._entry(self.models[base], origin))] if base else []
            shapes.append((target, [*sources, *root]))
            settings = [(own, part.settings, self.recipe.settings) for _, own, _ in parents]
            place = 1.0 if "depth" in self.method.needs() and not found and name in self._behind(lead) else depth
            entries, origins = [e for *_, e in sources], [e for *_, e in root]
            jobs.append(self._job(target, settings, places, depth, place, block, entries, origins))
        _check_shapes(shapes)
        for model, _, _ in parents[1:]:
            extra = [n for n in model.checkpoint.names() if n not in lead.checkpoint]
            if extra and not part.parents[0].layers:
                raise UserError(f"{model.name} has a tensor {extra[0]}, which {lead.name} lacks; they cannot be merged")
        return jobs

    def _behind(self, model: Model) -> frozenset[str]:
        """Tensors that are read behind all blocks, as the architecture has them: final norms and heads."""
        from trimtab.models.source import checkpoint_names

        if model.name not in self._read_behind:
            order = checkpoint_names(model.config, model.checkpoint, model.name)
            main = next(iter(block_lists(order)), None)
            last = max((i for i, n in enumerate(order) if (b := block_of(n)) and b[0] == main), default=-1)
            self._read_behind[model.name] = frozenset(order[last + 1 :])
        return self._read_behind[model.name]

    def _entry(self, model: Model, name: str) -> Entry:
        if name not in model.checkpoint:
            raise UserError(
                f"{model.name} has no tensor {name}, which another of the models has; only models of one architecture "
                "and size can be merged"
            )
        shape = model.checkpoint.shape(name)
        wide = self.rows is not None and shape and shape[0] == model.vocabulary
        return model.entry(name, self.rows if wide else None)

    def _job(
        self,
        name: str,
        settings: Sequence[tuple[Settings, ...]],
        places: Sequence[str],
        depth: float,
        place: float,
        block: int,
        sources: Sequence[Entry],
        base: Sequence[Entry],
    ) -> Job:
        from trimtab.engine.merge import Piece
        from trimtab.engine.merge_stream import Job

        origin = base[0] if base else None
        kinds = {e.dtype for e in (*sources, *base)}
        stored = (origin or sources[0]).dtype
        if not kinds <= set(FLOATS) or not sources[0].stop - sources[0].start:
            return Job(Piece(name, sources[0].shape, None), tuple(sources), origin, stored)
        common = settings[0][1:]
        config: dict[str, Any] = {}
        for f in dataclasses.fields(self.method):  # type: ignore[arg-type]
            if f.name not in ("weight", "density"):
                value = first_setting(f.name, common, name, depth)
                config |= {} if value is None else {f.name: value}
        numbers = {
            key: tuple(self._number(key, own, place, depth) for own, place in zip(settings, places, strict=True))
            for key in ("weight", "density")
        }
        piece = Piece(
            name,
            sources[0].shape,
            _merger(self.recipe.method, config),
            tuple(p.name for p in (self.models[m] for m in self._names(sources))),
            numbers["weight"],
            numbers["density"],
            place,
            self.recipe.seed,
            (block, self.layers),
        )
        lead = self._lead()
        if lead.onto is not None:  # what was changed of it is in fp32, and it need not be
            stored = _kind(lead.onto, name, stored)
        dtype = STORED[self.recipe.dtype] if self.recipe.dtype else stored
        return Job(piece, tuple(sources), origin, dtype)

    def _names(self, sources: Sequence[Entry]) -> list[str]:
        owner = {model.folder.resolve(): name for name, model in self.models.items()}
        return [owner[s.file.parent.resolve()] for s in sources]

    def _number(self, key: str, settings: Sequence[Settings], tensor: str, depth: float) -> float:
        value = first_setting(key, settings, tensor, depth)
        value = getattr(self.method, key, 1.0) if value is None else value
        if key == "density":
            return check_number(value, f"density of {tensor}", 0, 1, low_open=True)
        return check_number(value, f"weight of {tensor}", -1e6, 1e6)

    # -- doing it

    def go(self, resume: bool, tell: Progress, start: float) -> dict[str, Any]:
        """Stream it, write what goes along, and give the folder its name; the report."""
        from trimtab.engine.merge_stream import stream

        work = self.out.absolute().parent / f".{self.out.name}.merging"
        content = work / "model"
        if work.exists() and not resume:
            with writing(work):
                shutil.rmtree(work)
        journal = Journal(work, resume, self._header())
        if "report" in journal.done and not content.is_dir() and self.out.is_dir():
            shutil.rmtree(work)
            return journal.done["report"]
        try:
            journal.begin()
            with writing(content):
                content.mkdir(exist_ok=True)
            digests = stream(content, self.jobs, self.shard_bytes, journal, tell)
            tell("merging, MB", self.bytes >> 20, self.bytes >> 20)
            report = self._report(digests)
            if self.tasks:
                from trimtab.engine.merge_tasks import FOLDER, write_tasks

                said = {"method": report["method"], "settings": report["settings"], "base": self.recipe.base}
                report["tasks"] = write_tasks(content / FOLDER, self.jobs, self.tasks, digests, said)
            self._write_along(content, report)
            journal.append("report", {**report, "seconds": time.perf_counter() - start})
        except UserError as error:
            if "disk is full" not in str(error):
                shutil.rmtree(work, ignore_errors=True)
            raise
        with writing(self.out):
            shutil.rmtree(adapters_beside(self.out), ignore_errors=True)
            if self.out.exists():
                os.replace(self.out, work / "replaced")
            commit_folder(content, self.out.absolute())
            shutil.rmtree(work)
        return {**report, "seconds": time.perf_counter() - start}

    def _header(self) -> dict[str, Any]:
        """What makes two runs the same: the recipe, and the files that it is about."""
        files = []
        for model in self.models.values():
            for file in model.checkpoint.files:
                info = file.stat()
                files.append([str(file.resolve()), info.st_size, info.st_mtime_ns])
        recipe = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        return {"merge": recipe, "files": files, "shard_bytes": self.shard_bytes, "tasks": list(self.tasks)}

    def _report(self, digests: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        total: dict[str, Any] = {name: hashlib.sha256() for name in self.models}
        for job in sorted(self.jobs, key=lambda j: j.piece.name):
            owners = self._names(job.entries)
            for owner, digest in zip(owners, digests[job.piece.name], strict=True):
                total[owner].update(f"{job.piece.name} {digest}\n".encode())
        parents = [
            {"name": name, "base": name in {self.recipe.base, *(s.base for s in self.recipe.slices)},
             "tensors_sha256": total[name].hexdigest(), "adapter": model.adapter}
            for name, model in self.models.items()
        ]  # fmt: skip
        return {
            "out": str(self.out),
            "method": self.recipe.method,
            "settings": json.loads(json.dumps(dict(self.recipe.settings), default=dataclasses.asdict)),
            "parents": parents,
            "tensors": len(self.jobs),
            "bytes": self.bytes,
            "blocks": self.layers,
        }

    def _write_along(self, folder: Path, report: Mapping[str, Any]) -> None:
        from trimtab.formats.huggingface import copy_companions, merge_card
        from trimtab.formats.vocabulary import write_union

        lead = self._lead()
        config = dict(lead.config)
        for key in LAYER_COUNTS:
            if key in config:
                config[key] = self.layers
        if self.layers != lead.config.get("num_hidden_layers", self.layers):
            config.pop("layer_types", None)  # one a block, which transformers works out anew
        if self.rows is not None:
            config["vocab_size"] = self.rows
        if self.recipe.dtype:
            names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
            config.pop("torch_dtype", None)
            config["dtype"] = names[self.recipe.dtype]
        tokens = open_model(self.recipe.tokenizer).folder if self.recipe.tokenizer else lead.folder
        copy_companions(tokens if self.recipe.tokenizer else lead.onto or tokens, folder)
        if self.union:
            write_union(*self.union, folder)
        with writing(folder):
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            recipe = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
            (folder / "README.md").write_text(merge_card(report, recipe), "utf-8")


@functools.cache
def _types(folder: Path) -> dict[str, str]:
    from trimtab.formats.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    return {name: checkpoint.dtype(name) for name in checkpoint.names()}


def _kind(folder: Path, name: str, default: str) -> str:
    """The type that a tensor has in a checkpoint."""
    return _types(folder).get(name, default)


def _at(name: str, index: int) -> str:
    """The same tensor of another block."""
    found = block_of(name)
    assert found
    return f"{found[0]}.{index}.{found[2]}"
