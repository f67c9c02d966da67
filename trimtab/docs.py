"""Write the documentation's pages of methods from what is there already: cards, signatures, docstrings and records.

    python -m trimtab.docs [OUT]        by default docs/methods

A verdict on a page is that of the newest row of the method's record, and stale where it was measured with other code
than the present; nothing of it is written by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from trimtab import catalogue
from trimtab.catalogue import newest_record
from trimtab.core.method import FAMILIES, Method, discover

HEADINGS = {name: name for name in ("Fields", "Returns", "Raises", "Reference", "Departures")} | {"Args": "Fields"}
_SECTION = re.compile(rf"(?P<name>{'|'.join(HEADINGS)}):\s*(?P<rest>.*)")
_ITEM = re.compile(r"(?P<name>[\w, ]+?):\s+(?P<rest>.+)")
_SPECIAL = re.compile(r"(`[^`]*`)|([\\*_\[\]<>|#])")


def main(arguments: Iterable[str] = ()) -> int:
    """Write all pages anew; returns how many."""
    out = Path(next(iter(arguments), "docs/methods"))
    for old in out.glob("*/*.md"):
        old.unlink()
    found = discover()
    listed = {row["name"]: row for row in catalogue.rows()}
    for name, cls in found.items():
        path = out / cls.family() / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(method_page(cls, listed[name]), encoding="utf-8")
    (out / "index.md").write_text(index_page(found, listed), encoding="utf-8")
    return len(found) + 1


def plain(text: object) -> str:
    """Text that Markdown shows as it stands; what is between backticks stays code.

    >>> plain("W[:, j] * `a_b`")
    'W\\\\[:, j\\\\] \\\\* `a_b`'
    """
    return _SPECIAL.sub(lambda m: m[1] or f"\\{m[2]}", str(text))


def _codes(values: Iterable[object]) -> str:
    return ", ".join(f"`{v}`" for v in values) or "–"


def _paper(text: str) -> str:
    match = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", text)
    return f"[{text}](https://arxiv.org/abs/{match[1]})" if match else plain(text) or "–"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else plain(value)


def index_page(found: Mapping[str, type[Method]], listed: Mapping[str, Mapping[str, Any]]) -> str:
    """Every method in one table a family, and the count of verdicts above; `listed` holds the rows of the catalogue."""
    counts = Counter(row["verdict"] for row in listed.values())
    lines = ["# Methods", "", f"{len(found)} methods. Verdicts of their claims, as computed from the records:", ""]
    lines += [f"- {plain(verdict)}: {count}" for verdict, count in sorted(counts.items())]
    if stale := sum(row["stale"] for row in listed.values()):
        lines += ["", f"Stale, as not of the present code: {stale}."]
    for family in FAMILIES:
        rows = [(name, cls) for name, cls in found.items() if cls.family() == family]
        if rows:
            lines += [
                "",
                f"## {family}",
                "",
                "| method | what it should show | levels | verdict |",
                "|---|---|---|---|",
            ]
        for name, cls in rows:
            verdict = plain(listed[name]["verdict"]) + (" (stale)" if listed[name]["stale"] else "")
            claim, levels = plain(cls.card.claim), _codes(cls.card.levels)
            lines.append(f"| [{name}]({family}/{name}.md) | {claim} | {levels} | {verdict} |")
    return "\n".join(lines) + "\n"


def method_page(cls: type[Method], listed: Mapping[str, Any]) -> str:
    """One method: its card, its docstring, and the evidence for its claim; `listed` is its row of the catalogue."""
    card = cls.card
    facts = [
        ("family", f"`{cls.family()}`"),
        ("verb", f"`{cls.verb}`"),
        ("paper", _paper(card.paper)),
        ("rows of the catalogue", _codes(card.catalogue)),
        ("statistics it asks for", _codes(cls.needs())),
        ("requires", _codes(sorted(card.requires))),
        ("leaves", _codes(sorted(card.leaves))),
        ("keeps", _codes(sorted(card.keeps))),
        ("kinds of site", _codes(sorted(card.kinds))),
        ("levels, for example", _codes(card.levels)),
    ]
    defaults = [(f.name, f.default) for f in fields(cls) if f.default is not MISSING]  # type: ignore[arg-type]
    if defaults:
        facts.append(("defaults", _codes(f"{name}={value!r}" for name, value in defaults)))
    lines = [f"# {cls.__name__}", "", *prose(inspect.getdoc(cls) or ""), "", "## Card", ""]
    lines += [f"| in plans | `{card.name}` |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]
    row = newest_record(cls.family(), card.name)
    return "\n".join([*lines, "", "## Evidence", "", *evidence(row, listed["record"], listed["stale"])]) + "\n"


def prose(text: str) -> list[str]:
    """A docstring as Markdown: sections become headings, their items a list, examples code."""
    lines: list[str] = []
    where = None
    code = False
    for line in text.splitlines():
        if code != (line.startswith(">>>") or (code and line != "")):
            code = not code
            lines += ["## Example", "", "```python"] if code else ["```"]
        if code:
            lines.append(line)
        elif match := _SECTION.fullmatch(line):
            where = HEADINGS[match["name"]]
            lines += ["", f"## {where}", "", plain(match["rest"])]
        elif where in ("Fields", "Returns", "Raises") and line.startswith("    "):
            body = line[4:]
            item = _ITEM.fullmatch(body)
            if item and not body.startswith(" "):
                lines.append(f"- `{item['name']}`: {plain(item['rest'])}")
            else:
                lines.append(f"  {plain(body.strip())}")
        else:
            where = where if line.startswith("    ") else None
            lines.append(plain(line.strip()))
    return [*lines, "```"] if code else lines


def evidence(row: Mapping[str, Any] | None, file: str, stale: bool) -> list[str]:
    """The newest row of the record: claim, setting, computed checks, machine."""
    if row is None:
        return ["No run of its claim is recorded."]
    lines = [f"Verdict: **{plain(row['verdict'])}**, from `{file}`.", ""]
    if stale:
        lines += [f"Stale: not of the present code. `trimtab claim {row['method']}` measures it anew.", ""]
    if row.get("reason"):
        lines += [f"Why: {plain(row['reason'])}.", ""]
    said = (("Statement", "statement"), ("Source", "source"), ("The paper's figure", "figure"), ("Setting", "setting"))
    lines += [f"- {name}: {plain(row[key])}" for name, key in (*said, ("Metric", "metric")) if row.get(key)]
    if checks := row.get("checks"):
        lines += ["", "| check | left | right | difference (95 %) | holds |", "|---|---|---|---|---|"]
        lines += [
            f"| {plain(c['say'])} | {_number(c['left'])} | {_number(c['right'])} "
            f"| {_number(c['difference'])} ± {_number(c['half_width'])} | {'yes' if c['held'] else 'no'} |"
            for c in checks
        ]
    shown = [name for name in ("seeds", "machine", "versions", "date") if row.get(name)]
    return [*lines, "", *(f"- {name}: {plain(_line(row[name]))}" for name in shown)]


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_line(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    print(f"{main(sys.argv[1:])} pages")
