"""`trimtab plan`: what a fit would try, and what it would cost, without doing it."""

from __future__ import annotations

from trimtab.cli import options as o


def command(
    model: o.Model,
    size: o.Size = None,
    memory: o.Memory = None,
    latency: o.Latency = None,
    quality: o.Quality = None,
    data: o.Data = None,
    effort: o.Effort = "standard",
    target: o.Target = "native",
    methods: o.Methods = "",
    allocator: o.Allocator = "milp",
    length: o.Length = 256,
    couple: o.Couple = True,
    padding: o.Padding = True,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Say what a fit would try: units, choices, smallest and largest size, and an estimate of the time."""
    from trimtab.core.budget import Budget
    from trimtab.fitting import preview

    budget = Budget.of(size, memory, latency, quality)
    found = preview(
        model,
        budget=budget,
        data=data,
        effort=effort,
        target=target,
        methods=tuple(m for m in methods.split(",") if m),
        allocator=allocator,
        length=length,
        couple=couple,
        padding=padding,
        seed=seed,
    )
    if json:
        o.print_json(found)
    else:
        from trimtab.report.text import print_preview

        print_preview(found)
