"""The map of what was done to each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from trimtab.report.say import Json, finite, safe, say, say_size

# Upper ends of the colour classes of the heat map, in bits a weight; a class more holds what is above the last.
BIT_CLASSES = (0.0, 1.6, 2.6, 3.6, 4.6, 6.6, 8.6)


def sites_section(report: Json) -> str:
    """A cell for each site, coloured by bits a weight: blocks down, roles across, what is outside the blocks above."""
    sites = [s for s in report.get("sites") or () if isinstance(s, Mapping)]
    if not sites:
        return ""
    inside = [s for s in sites if isinstance(s.get("block"), int)]
    roles = list(dict.fromkeys(str(s.get("role") or "other") for s in inside))
    first = next(iter(sites))
    rows = []
    if outside := [s for s in sites if s.get("block") is None or not isinstance(s["block"], int)]:
        cells = "".join(
            f'<span class="named">{safe(s.get("role") or "other")} {_cell(s, s is first)}</span>' for s in outside
        )
        rows.append(
            f'<tr><th scope="row">outside</th><td class="outside" colspan="{max(1, len(roles))}">{cells}</td></tr>'
        )
    for block in sorted({s["block"] for s in inside}):
        columns = (
            "".join(
                _cell(s, s is first) for s in inside if s["block"] == block and str(s.get("role") or "other") == role
            )
            for role in roles
        )
        rows.append(f'<tr><th scope="row">{block}</th>{"".join(f"<td>{c}</td>" for c in columns)}</tr>')
    head = "".join(f'<th scope="col">{safe(role)}</th>' for role in roles)
    key = "".join(
        f'<span><i class="cell b{i}"></i>{text}</span>' for i, text in enumerate(_class_names()) if i in _classes(sites)
    )
    lines = "".join(
        f"<tr><th scope='row'>{safe(s.get('path', ''))}</th><td>{safe(_dims(s))}</td><td>{safe(_choice(s))}</td>"
        f"<td>{say_size(s.get('bytes'))}</td><td>{say(_bits(s))}</td><td>{say(s.get('damage'))}</td></tr>"
        for s in sites
    )
    return f"""<section aria-labelledby="h-sites">
<h2 id="h-sites">What was done where</h2>
<p class="lead">Bits stored a weight, scales and indices counted; blocks down, roles across.</p>
<div class="scroll"><table class="heat" id="heat"><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>
{"".join(rows)}</tbody></table></div>
<p class="keys">{key}<span>bits a weight</span></p>
<details><summary>Every site as a table</summary><div class="scroll"><table class="compare sites">
<thead><tr><th scope="col">Site</th><th scope="col">Shape</th><th scope="col">Choice</th><th scope="col">Bytes</th>
<th scope="col">Bits</th><th scope="col">Damage<small>nats a prediction</small></th></tr></thead>
<tbody>{lines}</tbody></table></div></details>
</section>"""


def _bits(site: Json) -> float | None:
    bits = finite(site.get("bits"))
    if bits is None and finite(site.get("bytes")) is not None and finite(site.get("weights")):
        return 8 * site["bytes"] / site["weights"]
    return bits


def _class(bits: float | None) -> int:
    return next((i for i, end in enumerate(BIT_CLASSES) if (bits or 0.0) <= end), len(BIT_CLASSES))


def _classes(sites: Sequence[Json]) -> set[int]:
    return {_class(_bits(s)) for s in sites}


def _class_names() -> list[str]:
    names = ["nothing stored", f"up to {BIT_CLASSES[1]:g}"]
    names += [f"{a:g}–{b:g}" for a, b in pairwise(BIT_CLASSES[1:])]
    return [*names, f"over {BIT_CLASSES[-1]:g}"]


def _choice(site: Json) -> str:
    return "@".join(str(site[key]) for key in ("method", "level") if site.get(key))


def _dims(site: Json) -> str:
    shape = site.get("shape")
    return (
        " × ".join(map(str, shape)) if isinstance(shape, Sequence) and not isinstance(shape, str) else str(shape or "")
    )


def _cell(site: Json, first: bool) -> str:
    bits = _bits(site)
    shown = "–" if not bits else f"{bits:.1f}"
    facts = [_choice(site), say_size(site.get("bytes")), f"{say(bits)} bits a weight"]
    if finite(site.get("damage")) is not None:
        facts.append(f"damage {say(site['damage'])} nats")
    if _dims(site):
        facts.append(_dims(site))
    tip, path = " · ".join(filter(None, facts)), str(site.get("path", ""))
    return (
        f'<span class="cell site b{_class(bits)}" tabindex="{0 if first else -1}" role="img" '
        f'aria-label="{safe(f"{path}: {tip}")}" data-name="{safe(path)}" data-tip="{safe(tip)}">{shown}</span>'
    )
