"""The YAML that mergekit merges by, as a recipe of ours: what both have means the same, and anything else is refused.

Where mergekit computes in the type of the checkpoints, a merge here computes in fp32 and rounds once at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.method import did_you_mean, method
from trimtab.core.recipe import Parent, Recipe, Rule, Setting, Slice

# mergekit's name -> ours, and what it means beside; any other name is taken as one of our methods
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task-arithmetic", {}),
    "ties": ("ties", {"density": 1.0}),
    "dare_linear": ("dare", {"density": 1.0}),
    "dare_ties": ("dare", {"density": 1.0, "elect": True}),
    "passthrough": ("passthrough", {}),
}
FIELDS = {"lambda": "scale", "normalize": "normalise"}
# what mergekit takes for any method, used or not; `int8_mask` is how it keeps masks, and the numbers are the same
IDLE = frozenset({"int8_mask", "density", "rescale", "normalize", "lambda", "weight"})
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp32": "fp32"}
TOP = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"),
    "seed",
)
NOT_HERE = {"modules": "models of several modules", "tokenizer": "a table of tokens", "chat_template": "a template"}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UserError: the file is missing, no YAML, or asks for something that is unknown here, by name.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}; name a YAML file that exists") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no YAML that can be read ({reason}); correct it") from None
    return recipe_of(content, str(path))


def recipe_of(content: Any, where: str = "the recipe") -> Recipe:
    """The recipe that the content of a YAML file says; see `read_recipe`.

    >>> content = {"merge_method": "ties", "base_model": "B", "models": [{"model": "A", "parameters": {"weight": 1}}]}
    >>> recipe_of(content).slices[0].parents[0].model
    'A'
    """
    top = _table(content, where, TOP)
    for needed in ("merge_method",):
        if not isinstance(top.get(needed), str):
            raise UserError(f"{where} has no {needed}; name a method, like `merge_method: ties`")
    name, meant = METHODS.get(top["merge_method"], (top["merge_method"].replace("_", "-"), {}))
    base = _model(top["base_model"], where) if top.get("base_model") is not None else None
    settings: dict[str, Setting] = {**meant, **_settings(top.get("parameters"), where, name)}
    if ("models" in top) == ("slices" in top):
        given = "both" if "models" in top else "neither"
        raise UserError(f"{where} has {given} of `models` and `slices`; give one of the two")
    if "models" in top:
        rows = _rows(top["models"], f"{where}: models")
        parents = [_parent(row, f"{where}: models[{i}]", name, False) for i, row in enumerate(rows)]
        slices = [_slice(parents, {}, base, name)]
    else:
        slices = []
        for i, row in enumerate(_rows(top["slices"], f"{where}: slices")):
            here = f"{where}: slices[{i}]"
            table = _table(row, here, ("sources", "base_model", "parameters"))
            sources = _rows(table.get("sources"), f"{here}: sources")
            parents = [_parent(s, f"{here}: sources[{k}]", name, True) for k, s in enumerate(sources)]
            own = _model(table["base_model"], here) if table.get("base_model") is not None else None
            slices.append(_slice(parents, _settings(table.get("parameters"), here, name), own or base, name, own))
    tokens = top.get("tokenizer_source")
    return Recipe(
        name,
        tuple(slices),
        base,
        settings,
        _dtype(top.get("out_dtype") or top.get("dtype"), where),
        "union" if tokens == "union" else "same",
        None if tokens in (None, "union", "base") else _model(tokens, where),
        _seed(top.get("seed", 0), where),
    )


def _slice(
    parents: Sequence[Parent], settings: dict[str, Setting], base: str | None, name: str, own: str | None = None
) -> Slice:
    """A slice without the base among its parents; of two that are joined on a sphere, the base comes first."""
    others = [p for p in parents if p.model != base]
    origin = next((p for p in parents if p.model == base), None)
    if origin is not None and name in ("linear", "passthrough"):  # to these the base is one model among others
        others = list(parents)
    elif name == "slerp" and base is not None:
        others = [origin or Parent(base, parents[0].layers), *others]
    return Slice(tuple(others), own, origin.layers if origin else None, settings)


def _table(content: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} is no table of names and values; see docs/merging.md for an example")
    for key in content:
        if key in NOT_HERE and key not in known:
            raise UserError(f"{where} has {key!r} ({NOT_HERE[key]}), which merging here does not know; leave it out")
        if key not in known:
            raise UserError(
                f"{where} has an unknown key {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}"
            )
    return content


def _rows(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} must be a list with at least one entry")
    return content


def _model(content: Any, where: str) -> str:
    if isinstance(content, dict):
        raise UserError(f"{where} gives a model as a table; give its folder or hub name as text")
    if not isinstance(content, str) or not content:
        raise UserError(f"{where} gives {content!r} for a model; give its folder or hub name")
    return content


def _parent(content: Any, where: str, name: str, sliced: bool) -> Parent:
    keys = ("model", "parameters", "layer_range") if sliced else ("model", "parameters")
    table = _table(content, where, keys)
    layers = _range(table.get("layer_range"), where) if sliced else None
    return Parent(_model(table.get("model"), where), layers, _settings(table.get("parameters"), where, name))


def _range(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] < value[1]:
        return value[0], value[1]
    raise UserError(f"{where} has layer_range {value!r}; give the first and the one behind the last, like [0, 16]")


def _settings(content: Any, where: str, name: str) -> dict[str, Setting]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: parameters must be a table of names and values")
    found: dict[str, Setting] = {}
    known = {f.name for f in dataclasses.fields(method(name))}  # type: ignore[arg-type]
    for key, value in content.items():
        if key == "rescale" and name == "ties" and value:
            raise UserError(f"{where}: `rescale` is no part of TIES here; leave it out")
        if key in IDLE and FIELDS.get(str(key), key) not in known:
            continue
        found[FIELDS.get(str(key), str(key))] = _setting(value, f"{where}: {key}")
    return found


def _setting(value: Any, where: str) -> Setting:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        if value and all(isinstance(part, dict) for part in value):
            return tuple(_rule(part, where) for part in value)
        if not value or any(isinstance(part, list | dict) or part is None for part in value):
            raise UserError(f"{where} is {value!r}; give a number, a list of numbers, or a list of filters and values")
        return tuple(_scalar(part, where) for part in value)
    return _scalar(value, where)


def _rule(part: Mapping[str, Any], where: str) -> Rule:
    table = _table(dict(part), where, ("filter", "value"))
    if "value" not in table:
        raise UserError(f"{where} has a filter without a value; give `value:` beside `filter:`")
    name = table.get("filter")
    return Rule(_setting(table["value"], where), None if name is None else str(name))


def _scalar(value: Any, where: str) -> bool | int | float | str:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a text
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return value
    raise UserError(f"{where} is {value!r}; give a finite number")


def _dtype(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if value not in DTYPES:
        raise UserError(f"{where}: the type {value!r} is not known; give one of {', '.join(DTYPES)}")
    return DTYPES[value]


def _seed(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{where}: seed is {value!r}; give a whole number from 0 on")
    return value
