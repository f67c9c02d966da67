"""Plans: an ordered list of steps, each a method and the levels it takes to sites; text and TOML forms that round-trip.

The text form reads left to right as the engine works: `awq @ 4b/g64 | gptq(damp=0.05) @ 4b/g64, lm_head=8b/g64`. Before
the `=` stands a selector: a role (`q`, `down`, `lm_head`), a path or a glob of paths (`model.layers.[0-3].*`); without
one the level is for every site that the method can touch. A later selector overrules an earlier one.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int, Level, Plus, parse_level, rows_cols
from trimtab.core.method import Method, Rewriter, Solver, did_you_mean, method
from trimtab.core.site import Site

NOT_FLOAT = frozenset({"int", "codebook", "sparse", "factored", "dropped"})


@dataclass(frozen=True)
class Step:
    """A method, and the level for each selector."""

    method: Method
    levels: tuple[tuple[str, Level], ...]

    def __str__(self) -> str:
        config = ", ".join(f"{k}={v!r}" for k, v in self.method.config().items())
        levels = ", ".join(str(level) if selector == "*" else f"{selector}={level}" for selector, level in self.levels)
        return f"{self.method.card.name}{f'({config})' if config else ''} @ {levels}"


@dataclass(frozen=True)
class Plan:
    """An ordered list of steps.

    >>> plan = Plan.parse("gptq(damp=0.05) @ 4b/g64, lm_head=8b/g64")
    >>> str(plan)
    'gptq(damp=0.05) @ 4b/g64, lm_head=8b/g64'
    >>> Plan.parse(str(plan)) == plan and Plan.from_toml(plan.to_toml()) == plan
    True
    """

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    @staticmethod
    def parse(text: str) -> Plan:
        """The plan that a text says.

        Raises:
            UserError: a step without `@`, an unknown method, field or level.
        """
        return Plan(tuple(_step(part.strip()) for part in text.split("|"))) if text.strip() else Plan(())

    def to_toml(self) -> str:
        """The plan as a TOML document: a table `[[step]]` for each step."""
        lines = []
        for step in self.steps:
            lines += ["[[step]]", f"method = {json.dumps(step.method.card.name)}"]
            if config := step.method.config():
                lines.append("config = {" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in config.items()) + "}")
            lines.append("levels = [")
            lines += [f"  [{json.dumps(selector)}, {json.dumps(str(level))}]," for selector, level in step.levels]
            lines += ["]", ""]
        return "\n".join(lines)

    @staticmethod
    def from_toml(text: str) -> Plan:
        """The plan that a TOML document says; see `to_toml`."""
        try:
            document = tomllib.loads(text)
            rows = [(row["method"], row.get("config", {}), row["levels"]) for row in document["step"]]
            return Plan(
                tuple(Step(_worker(n, c), tuple((s, parse_level(t)) for s, t in levels)) for n, c, levels in rows)
            )
        except UserError:
            raise
        except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the plan is no plan in TOML ({error}); it needs tables [[step]] with method, levels"
            ) from error

    def resolve(self, sites: Iterable[Site]) -> list[tuple[Method, dict[str, Level]]]:
        """For each step its method and the level of each site it touches; legality is checked by `check`.

        Raises:
            UserError: a selector that names no site that the method can touch.
        """
        sites = list(sites)
        return [(step.method, _levels(step, sites)) for step in self.steps]


_STEP = re.compile(r"(?P<name>[\w.-]+)\s*(?:\((?P<config>.*?)\))?\s*@\s*(?P<levels>.+)", re.DOTALL)


def _step(text: str) -> Step:
    match = _STEP.fullmatch(text)
    if not match:
        raise UserError(
            f"the step {text!r} was given; a step looks like `gptq @ 4b/g64` or `gptq(damp=0.05) @ 4b/g64, "
            "lm_head=8b/g64`"
        )
    levels = []
    for part in match["levels"].split(","):
        selector, _, level = part.rpartition("=")
        levels.append((selector.strip() or "*", parse_level(level)))
    return Step(_worker(match["name"], _fields(match["config"] or "", text)), tuple(levels))


def _worker(name: str, config: Mapping[str, Any]) -> Method:
    """A method that can stand in a plan."""
    found = method(name, **config)
    if not isinstance(found, Solver | Rewriter):
        cures = {"allocate": "; give it with --allocator", "merge": "; `trimtab merge --method` takes it"}
        cure = cures.get(found.verb, "")
        raise UserError(f"{name} cannot be a step of a plan: its verb is `{found.verb}`{cure}")
    return found


def parse_method(text: str) -> Method:
    """The method that a name with fields says.

    >>> parse_method("gptq(damp=0.05)").config()
    {'damp': 0.05}
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not match:
        raise UserError(f"the method {text!r} cannot be read; write `milp` or `evopress(generations=5)`")
    return method(match[1], **_fields(match[2] or "", text))


def _fields(config: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({config})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise UserError(
            f"{text!r} has fields that cannot be read; write them as `damp=0.05, order='activation'`"
        ) from error


def _levels(step: Step, sites: list[Site]) -> dict[str, Level]:
    card = step.method.card
    chosen: dict[str, Level] = {}
    fit = [s for s in sites if s.kind in card.kinds]
    for selector, level in step.levels:
        hit = [s for s in fit if selector in ("*", s.path, s.role) or fnmatchcase(s.path, selector)]
        if not hit:
            names = {s.role for s in sites} | {s.path for s in sites}
            found = [s for s in sites if selector in (s.path, s.role) or fnmatchcase(s.path, selector)]
            why = (
                f"it names {found[0].kind} sites, which {card.name} does not touch"
                if found
                else "no site has that role or path"
            )
            raise UserError(f"step `{card.name}`: {selector!r} was asked for, but {why}{did_you_mean(selector, names)}")
        chosen |= {s.path: level for s in hit}
    return chosen


def grouping(level: Level) -> int | None:
    """Columns that share a scale at this level, where the level has groups."""
    if isinstance(level, Plus):
        return grouping(level.base)
    return level.group if isinstance(level, Int | Float) else None


def check(
    resolved: list[tuple[Method, dict[str, Level]]], sites: Iterable[Site], padding: bool = True
) -> dict[str, frozenset[str]]:
    """Walk the steps over each site's facts before any work is done; the facts that they leave.

    Raises:
        UserError: a step requires a fact that an earlier step took away (names both steps and the cure), a level of a
            kind the method does not take, or, with `padding=False`, a group that does not divide a site's columns.
    """
    by_path = {s.path: s for s in sites}
    facts = {path: frozenset({"float"}) for path in by_path}
    last: dict[str, str] = {}
    for chosen, levels in resolved:
        card = chosen.card
        known = {type(parse_level(text)) for text in card.levels}
        for path, level in levels.items():
            if known and type(level) not in known:
                takes = ", ".join(card.levels)
                raise UserError(f"step `{card.name}` was asked to take {path} to {level}; it takes levels like {takes}")
            missing = card.requires - facts[path]
            if missing:
                raise UserError(
                    f"step `{card.name}` needs {path} to be {', '.join(sorted(missing))}, and the earlier step "
                    f"`{last.get(path, 'none')}` left it "
                    f"{', '.join(sorted(facts[path])) or 'nothing'}: put `{card.name}` before it, or leave one of "
                    "them out"
                )
            group = grouping(level)
            if not padding and isinstance(chosen, Solver) and group and rows_cols(by_path[path].shape)[1] % group:
                raise UserError(
                    f"{level} groups {group} columns, and {path} has {rows_cols(by_path[path].shape)[1]}: "
                    f"choose a group that divides them, or allow padding"
                )
            left = facts[path] | card.leaves
            facts[path] = left - {"float"} if card.leaves & NOT_FLOAT and "float" not in card.leaves else left
            last[path] = card.name
    return facts


def exact_plan(steps: Iterable[tuple[Method, Mapping[str, Level]]]) -> Plan:
    """The plan that names every site by its path."""
    return Plan(tuple(Step(m, tuple(levels.items())) for m, levels in steps if levels))
