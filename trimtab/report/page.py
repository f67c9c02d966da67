"""The report of a fit as one HTML file that needs nothing else: no server, no network, no script but its own.

Everything that a reader must know is in the markup, so the page reads without its script and prints; the script adds
what hovers and clicks. A content security policy names the script by its hash and allows no request, so that a name
inside a report can neither run nor call out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from trimtab.report.chart import front_section
from trimtab.report.heat import sites_section
from trimtab.report.say import (
    Json,
    finite,
    lower_is_better,
    metric_of,
    point_of,
    safe,
    say,
    say_duration,
    say_interval,
    say_percent,
    say_size,
    say_steps,
)


def write_page(report: Json, path: str | Path) -> Path:
    """Write the report, the object of `trimtab fit --json`, as one self-contained page.

    Args:
        report: `model`, `budget`, `original`, `best`, `uniform`, `healing`, `front`, `verdict`, `artifact`, `plan`,
            `seconds`, `peak_bytes`, `sites`, `machine`, `versions`, `data`, `timings`. What is missing or empty is left
            out.
        path: the file to write; its folder is made.
    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report), encoding="utf-8")
    return path


def page(report: Json) -> str:
    """The text of the page; see `write_page`.

    >>> "&lt;b&gt;" in page({"model": "<b>"}) and "<b>" not in page({"model": "<b>"})
    True
    """
    style, script = (files("trimtab.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    model = safe(report.get("model") or "model")
    sections = (_header, _comparison, front_section, sites_section, _plan, _where_time_went, _provenance)
    body = "\n".join(part for section in sections if (part := section(report)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{safe(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{model} · Trimtab</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def _limit(name: str, value: Any) -> str:
    """One limit of a budget in its unit."""
    number = finite(value)
    if number is None:
        return str(value)
    if name in ("size", "memory"):
        return say_size(number)
    if name == "latency":
        return f"{1000 * number:.3g} ms"
    return say_percent(number) if name == "quality" else say(number)


def _limits(report: Json) -> list[tuple[str, str]]:
    budget = report.get("budget")
    if isinstance(budget, Mapping):
        return [(name, _limit(name, value)) for name, value in budget.items() if value is not None]
    return [("budget", str(budget))] if budget else []


def _header(report: Json) -> str:
    best, original, uniform = (point_of(report, key) for key in ("best", "original", "uniform"))
    tiles = []
    if best:
        small, large = finite(best.get("bytes")), finite(original.get("bytes"))
        ratio = f"{large / small:.2f} times smaller than {say_size(large)}" if small and large else "on disk"
        tiles.append(("size", say_size(small), ratio))
        note = f"{metric_of(report)} {say(best.get('value'))}"
        note += f", was {say(original['value'])}" if "value" in original else ""
        tiles.append(("quality kept", say_percent(best.get("retained")), note))
    if best and uniform:
        ours, theirs = finite(best.get("retained")), finite(uniform.get("retained"))
        if ours is not None and theirs is not None:
            note = f"points over {say_percent(theirs)}, at {say_size(uniform.get('bytes'))}"
            tiles.append(("against the best uniform plan", f"{100 * (ours - theirs):+.2f}".replace("-", "−"), note))
    if finite(report.get("seconds")) is not None:
        peak = finite(report.get("peak_bytes"))
        tiles.append(
            ("took", say_duration(report["seconds"]), f"peak memory {say_size(peak)}" if peak else "on this machine")
        )
    budget = " · ".join(f"{name} {value}" if name != "budget" else value for name, value in _limits(report))
    cards = "".join(
        f'<div class="tile"><dt>{safe(name)}</dt><dd><b>{safe(value)}</b><span>{safe(note)}</span></dd></div>'
        for name, value, note in tiles
    )
    said = str(report.get("verdict") or "")
    verdict = f'<p class="verdict" id="verdict">{safe(said[:1].upper() + said[1:])}</p>' if said else ""
    job = "search" if "networks" in report else "fit"
    return f"""<header>
<p class="eyebrow">Trimtab {job}{f" · budget: <span>{safe(budget)}</span>" if budget else ""}</p>
<h1>{safe(report.get("model") or "model")}</h1>
{verdict}
{f'<dl class="tiles">{cards}</dl>' if cards else ""}
</header>"""


def _change(point: Json) -> str:
    """The interval of the paired difference from the original; nothing for the original itself."""
    span = point.get("difference")
    ends = [finite(end) for end in span] if isinstance(span, list | tuple) else []
    return f"{ends[0]:+.3g} to {ends[1]:+.3g}" if len(ends) == 2 and None not in ends and any(ends) else ""


COMPARED = (
    ("original", "Original"),
    ("best", "Best within the budget"),
    ("compiled", "The same in the compiled program"),
    ("unhealed", "The same before healing"),
    ("uniform", "Best uniform plan"),
)


def _rounding(report: Json) -> str:
    """What the compiled program's arithmetic does to the metric, or why it was not asked."""
    point = point_of(report, "compiled")
    ends = [finite(end) for end in point.get("to_exact") or ()]
    if len(ends) == 2 and None not in ends:
        return (
            f"The compiled program ({point.get('engine')}) rounds the inputs of integer weights to 8 bits: "
            f"{metric_of(report)} {ends[0]:+.3g} to {ends[1]:+.3g} beside exact arithmetic, 95 % paired."
        )
    return f"In exact arithmetic alone: {point['reason']}." if point.get("reason") else ""


def _healed(report: Json) -> str:
    """What healing trained, and what it changed or why it changed nothing."""
    found = report.get("healing")
    if not isinstance(found, Mapping):
        return ""
    if found.get("reason"):
        return f"Nothing was healed: {found['reason']}."
    trained, sites = finite(found.get("trained")), finite(found.get("sites"))
    text = f"Healed in {say(found.get('steps'))} steps"
    if trained is not None and sites is not None:
        text += f": {trained:,.0f} stored numbers of {sites:.0f} sites were trained towards the original's outputs"
    for name, words in (("loss", "their loss went from"), ("damage", "damage on the search data from")):
        ends = [finite(end) for end in found.get(name) or ()]
        if len(ends) == 2 and None not in ends:
            text += f", {words} {ends[0]:.3g} to {ends[1]:.3g}"
    if not found.get("kept"):
        return f"{text}. It was left out, as the damage did not fall."
    ends = [finite(end) for end in point_of(found, "before").get("healed") or ()]
    if len(ends) == 2 and None not in ends:
        text += f". On held-out data {metric_of(report)} changed by {ends[0]:+.3g} to {ends[1]:+.3g}, 95 % paired"
    return f"{text}. Codes, masks and bytes stayed as they were."


def _comparison(report: Json) -> str:
    rows = []
    base = finite(point_of(report, "original").get("bytes"))
    healing = report.get("healing")
    before = point_of(healing, "before") if isinstance(healing, Mapping) else {}
    for key, name in COMPARED:
        point = before if key == "unhealed" else point_of(report, key)
        if not point or point.get("reason"):
            continue
        count = finite(point.get("bytes"))
        share = f"{100 * count / base:.1f} %" if count and base else ""
        cells = (
            (say_size(count), share),
            (say(point.get("value")), say_interval(point)),
            (say_percent(point.get("retained")), _change(point)),
        )
        if key == "original" and "networks" in report:
            name = "Largest network"
        rows.append(
            f'<tr class="{key}"><th scope="row"><i class="mark {key}"></i>{name}</th>'
            + "".join(f"<td>{safe(large)}<small>{safe(small)}</small></td>" for large, small in cells)
            + "</tr>"
        )
    if not rows:
        return ""
    held_out = point_of(report, "best").get("split", "test") == "test"
    paired = any(_change(point_of(report, key)) for key in ("best", "uniform"))
    better = "lower is better" if lower_is_better(report) else "higher is better"
    return f"""<section aria-labelledby="h-compare">
<h2 id="h-compare">{"Measured on data that the search never saw" if held_out else "Measured"}</h2>
<div class="scroll"><table class="compare">
<thead><tr><th scope="col">Model</th><th scope="col">Bytes<small>of original</small></th>
<th scope="col">{safe(metric_of(report))}, 95 % interval<small>{better}</small></th>
<th scope="col">Kept<small>{"paired difference, 95 %" if paired else ""}</small></th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{"".join(f'<p class="lead">{safe(note)}</p>' for note in (_healed(report), _rounding(report)) if note)}
</section>"""


def _plan(report: Json) -> str:
    if not report.get("plan"):
        return ""
    artifact = (
        f'<p class="lead">Artifact: <code>{safe(report["artifact"])}</code></p>' if report.get("artifact") else ""
    )
    return f"""<section aria-labelledby="h-plan"><h2 id="h-plan">The plan</h2>
{artifact}<pre id="plan" tabindex="0">{safe(say_steps(report["plan"]))}</pre></section>"""


def _where_time_went(report: Json) -> str:
    timings = report.get("timings")
    pairs = (
        timings.items() if isinstance(timings, Mapping) else ((t.get("name"), t.get("seconds")) for t in timings or ())
    )
    known = [(str(name), s) for name, value in pairs if (s := finite(value)) is not None and s >= 0]
    whole = max(sum(s for _, s in known), finite(report.get("seconds")) or 0.0)
    if not known or not whole:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{safe(name)}</th><td class="bar"><i style="width:{100 * s / whole:.2f}%"></i></td>'
        f"<td>{say_duration(s)}</td><td>{100 * s / whole:.0f} %</td></tr>"
        for name, s in known
    )
    return f"""<section aria-labelledby="h-time"><h2 id="h-time">Where the time went</h2>
<table class="bars" id="timings"><tbody>{rows}</tbody></table></section>"""


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of a nested object, the names joined with dots; a list of plain values is one value."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return [pair for i, v in enumerate(value) for pair in _flat(v, f"{prefix}.{i}" if prefix else str(i))]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(map(str, value)))]
    name = prefix.rpartition(".")[2]
    if finite(value) is not None and (name in ("ram", "memory") or name.endswith("bytes")):
        return [(prefix.removesuffix("_bytes"), say_size(value))]
    if isinstance(value, float):
        return [(prefix, say(value))]
    return [] if value is None else [(prefix, str(value))]


_FACTS = (("machine", "Machine"), ("versions", "Versions"), ("data", "Data"))


def _provenance(report: Json) -> str:
    groups = []
    for key, name in (("gate", "Loaded in a fresh process"), ("forecast", "Forecast of the latency"), *_FACTS):
        if pairs := _flat(report.get(key) or {}, ""):
            lines = "".join(
                f"<div><dt>{safe((k or name).replace('_', ' '))}</dt><dd>{safe(v)}</dd></div>" for k, v in pairs
            )
            groups.append(f'<div class="facts {key}"><h3>{name}</h3><dl>{lines}</dl></div>')
    if limits := _limits(report):
        lines = "".join(f"<div><dt>{safe(k)}</dt><dd>{safe(v)}</dd></div>" for k, v in limits)
        groups.insert(0, f'<div class="facts"><h3>Budget</h3><dl>{lines}</dl></div>')
    if not groups:
        return ""
    return f"""<section aria-labelledby="h-facts"><h2 id="h-facts">Under what conditions</h2>
<div class="groups">{"".join(groups)}</div></section>"""
