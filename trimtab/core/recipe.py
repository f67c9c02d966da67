"""Recipes: which models are merged into one, how, and with which numbers for which tensor.

A setting is a number, a curve over depth (numbers at equal distances from the first block to the last, straight lines
between), or rules tried in order: each a setting, and a part that a tensor's name must have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import UserError

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Rule:
    """A setting for the tensors whose names contain `filter`; None: for all."""

    value: Any
    filter: str | None = None


Setting = Scalar | tuple[Scalar, ...] | tuple[Rule, ...]
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Parent:
    """A model that takes part, the range of its blocks (None: all), and its own settings."""

    model: str
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive blocks of the result, made of equally many of each parent; the base's are those of the first parent.

    Fields:
        parents: the models, in order.
        base: the model that they were tuned from; None: the recipe's.
        base_layers: range of the base's blocks; None: all.
        settings: for this slice, where a parent has none of its own.
    """

    parents: tuple[Parent, ...]
    base: str | None = None
    base_layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What `trimtab merge` carries out.

    Fields:
        method: name of a merger.
        slices: from the first block of the result to the last; a merge of whole models is one slice.
        base: the model that the parents were tuned from.
        settings: of the method, where neither parent nor slice has its own.
        dtype: type of the result, like `bf16`; None: that of the base, or of the first parent.
        vocabulary: what to do about vocabularies of different sizes: `same` refuses, `union` gives the result the
            tokens of all, `force` cuts every one to the smallest.
        tokenizer: the model whose tokenizer the result gets; None: the base's, or the first parent's.
        seed: of everything random.
        adapters: parents may be adapters, which are put onto their models, or onto the base.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    settings: Settings = field(default_factory=dict)
    dtype: str | None = None
    vocabulary: str = "same"
    tokenizer: str | None = None
    seed: int = 0
    adapters: bool = False

    def models(self) -> list[str]:
        """Every model that takes part, each once, the base first."""
        bases = [b for b in (self.base, *(s.base for s in self.slices)) if b]
        return list(dict.fromkeys([*bases, *(p.model for s in self.slices for p in s.parents)]))


def value_at(setting: Any, name: str, depth: float) -> Any:
    """The value of a setting for a tensor, or None where no rule is for its name.

    >>> value_at((0.0, 0.5, 1.0), "model.layers.1.mlp.up_proj.weight", 0.25)
    0.25
    >>> rules = (Rule(0.1, "mlp"), Rule((0.0, 1.0)))
    >>> value_at(rules, "layers.1.mlp.weight", 1.0), value_at(rules, "layers.1.attn.weight", 1.0)
    (0.1, 1.0)
    """
    if isinstance(setting, Rule):
        setting = (setting,)
    if not isinstance(setting, tuple):
        return setting
    if setting and all(isinstance(part, Rule) for part in setting):
        fits = (r for r in setting if r.filter in (None, "*") or r.filter in name)
        rule = next(fits, None)
        return None if rule is None else value_at(rule.value, name, depth)
    place = depth * (len(setting) - 1)
    at = min(int(place), len(setting) - 1)
    if any(isinstance(v, bool | str) for v in setting):
        return setting[at]
    share = place - at
    return (1 - share) * setting[at] + share * setting[min(at + 1, len(setting) - 1)]


_BLOCK = re.compile(r"(?P<before>.*?)\.(?P<index>\d+)\.(?P<after>.*)")


def block_of(name: str) -> tuple[str, int, str] | None:
    """Path of the list of blocks, index and rest of a tensor's name; None for a tensor of no block.

    >>> block_of("model.layers.3.mlp.experts.0.w1.weight")
    ('model.layers', 3, 'mlp.experts.0.w1.weight')
    """
    match = _BLOCK.fullmatch(name)
    return (match["before"], int(match["index"]), match["after"]) if match else None


def block_lists(names: Iterable[str]) -> dict[str, int]:
    """How many blocks each list of blocks has, the list with most tensors first."""
    tensors: Counter[str] = Counter()
    last: dict[str, int] = {}
    for name in names:
        if found := block_of(name):
            tensors[found[0]] += 1
            last[found[0]] = max(last.get(found[0], 0), found[1])
    return {path: last[path] + 1 for path, _ in tensors.most_common()}


def depth_of(index: int, count: int) -> float:
    """Where a block lies: 0 the first, 1 the last and where there is but one."""
    return index / (count - 1) if count > 1 else 1.0


def check_number(value: Any, what: str, low: float, high: float, low_open: bool = False) -> float:
    """A number of a recipe within its limits.

    Raises:
        UserError: it is none, not finite, or outside.
    """
    brackets = f"{'(' if low_open else '['}{low:g}, {high:g}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (low_open and value == low):
        raise UserError(f"{what} is {value!r}; give a number in {brackets}")
    return float(value)


def first_setting(name: str, sources: Sequence[Settings], tensor: str, depth: float) -> Any:
    """The value of the first of some settings that says anything of a tensor; None where none does."""
    found = (value_at(s[name], tensor, depth) for s in sources if name in s)
    return next((v for v in found if v is not None), None)
