"""`trimtab serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    artifact: Annotated[str, typer.Argument(help="an artifact, the folder of a run, or a model")],
    adapters: Annotated[
        str | None, typer.Option(help="folder of LoRA adapters, a folder each as PEFT saves it")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="of the engine's process, like 2GB")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="tokens of prompt and text together, at most")] = None,
    cache: Annotated[str, typer.Option(help="how keys and values are stored: fp16, kivi4 or kivi2")] = "fp16",
    host: Annotated[str, typer.Option(help="address to listen at; another than this machine's own needs a key")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: a free one")] = 8000,
    key: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_API_KEY", help="what clients must show; others see a command line")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_ADMIN_KEY", help="allow adapters to be loaded, to those who show it")
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=1024, help="requests that are answered at once, at most")] = 64,
    policy: Annotated[
        str, typer.Option(help="who begins when: `trimtab methods --family serve` lists those that there are")
    ] = "s-lora",
    force: Annotated[bool, typer.Option("--force", help="take adapters that were trained on another model")] = False,
    draft: Annotated[str | None, typer.Option(help="a smaller model that writes ahead; texts stay the same")] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="1 to 15 at a time; as many as the acceptance rate has it by default")
    ] = None,
    learn: Annotated[bool, typer.Option("--learn", help="the draft learns from what the model corrects")] = False,
    queue: Annotated[int, typer.Option(min=0, max=100_000, help="requests that may wait; more are refused")] = 256,
    drain: Annotated[float, typer.Option(min=0, max=3600, help="seconds that texts get to end when it stops")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="threads; all cores by default")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="a line a request on standard error")] = False,
    json: Annotated[bool, typer.Option("--json", help="say what fits as one JSON object once it is ready")] = False,
) -> None:
    """Serve it to many at once, in OpenAI's protocol."""
    import sys
    from pathlib import Path

    from trimtab.core.budget import parse_bytes
    from trimtab.core.errors import UserError
    from trimtab.server.parent import serve
    from trimtab.server.settings import Settings

    for name, shown in (("--key", key), ("--admin-key", admin_key)):
        if shown is not None and (not shown.isprintable() or not shown.strip() or " " in shown):
            raise UserError(f"{name} must be printable and hold no blanks; leave it out for none")
    if admin_key is not None and admin_key == key:
        raise UserError("--admin-key is the same as --key: everybody could load adapters; choose another")
    if adapters is not None and not Path(adapters).is_dir():
        raise UserError(f"--adapters {adapters} is no folder; it holds a folder for each adapter")
    if cache not in ("fp16", "kivi4", "kivi2"):
        raise UserError(f"--cache {cache} is not known to serve; choose fp16, kivi4 or kivi2")
    asked = {
        "--adapters": adapters,
        "--memory": memory and parse_bytes(memory, "memory"),
        "--context": context,
        "--cache": cache,
        "--users": users,
        "--policy": policy,
        "--draft": draft,
        "--draft-tokens": draft_tokens,
        "--queue": queue,
        "--threads": threads,
    }
    said = [part for name, value in asked.items() if value is not None for part in (name, str(value))]
    said += [name for name, given in (("--force", force), ("--learn", learn)) if given]
    engine = [sys.executable, "-m", "trimtab.server.worker", artifact, *said]
    settings = Settings(socket="", key=key, admin_key=admin_key, adapters=adapters, drain=drain, verbose=verbose)
    serve(settings, engine, host=host, port=port, model=artifact, json=json)
