"""`trimtab run`: write text, or name classes, with an artifact or a model."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options as o


def command(
    artifact: Annotated[str, typer.Argument(help="an artifact, the folder of a run, or a model")],
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="at most so many new tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: the likeliest token each time")] = 0.0,
    seed: o.Seed = 0,
    context: Annotated[int | None, typer.Option(min=2, help="tokens of prompt and text to hold, at most")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="threads; all cores by default")] = None,
    model: Annotated[
        str | None, typer.Option(help="module:function, for an artifact of a Python function's model")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed/--unpacked", help="keep weights packed in memory: least memory")
    ] = True,
    cache: Annotated[
        str,
        typer.Option(help="how keys and values are stored: fp16, bf16, fp32, kivi4, kivi2, or like think(prune=0.4)"),
    ] = "fp16",
    adapter: Annotated[str | None, typer.Option(help="folder of a LoRA adapter as PEFT saves it")] = None,
    force: Annotated[bool, typer.Option("--force", help="take an adapter that was trained on another model")] = False,
    draft: Annotated[
        str | None,
        typer.Option(help="a smaller model with the same tokenizer that writes ahead: the same text, sooner"),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="1 to 15 at a time; as many as the acceptance rate has it by default")
    ] = None,
    neurons: Annotated[
        str, typer.Option(help="write with a part of the neurons, chosen from the prompt, like coreinfer(share=0.4)")
    ] = "",
    flash: Annotated[
        str | None,
        typer.Option(help="keep feed-forward weights on disk, and of them so much in memory, like 64MB; needs ReLU"),
    ] = None,
    flash_rank: Annotated[
        int, typer.Option(min=0, help="rank of predictors of the neurons that a token needs; 0: exact, and more memory")
    ] = 0,
    json: o.Json = False,
) -> None:
    """Load and run it here."""
    import sys
    import time

    import torch

    from trimtab.core.budget import parse_bytes
    from trimtab.core.errors import UserError
    from trimtab.flashing import load_flash, read_of
    from trimtab.kernels.native import native
    from trimtab.loading import drafter, load, refuse_beside_neurons

    policy = drafter(draft, draft_tokens)
    if flash_rank and flash is None:
        raise UserError("--flash-rank was given without --flash; say with --flash how much memory there is")
    if flash is not None and (neurons or adapter is not None or draft is not None):
        raise UserError("--flash was given beside --neurons, --adapter or --draft; leave one of the two out")
    if neurons and (adapter is not None or draft is not None):
        refuse_beside_neurons("an adapter" if adapter is not None else "a draft")
    start = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
        if (kernels := native()) is not None:
            kernels.set_threads(threads)
    if flash is None:
        loaded = load(artifact, model=model, packed=packed, cache=cache, neurons=neurons)
    else:
        loaded = load_flash(artifact, parse_bytes(flash, "flash"), rank=flash_rank)
        loaded.cache = cache
    loaded.share, loaded.context = packed, context
    for note in loaded.notes:
        print(note, file=sys.stderr)
    if adapter is not None:
        loaded.add_adapter("adapter", adapter, force=force)
    if draft is not None and policy is not None:
        ahead = load(draft, packed=packed)
        ahead.share, ahead.context = packed, context
        loaded.use_draft(ahead, policy)
    ready = time.perf_counter()
    text = ""
    name = None if adapter is None else "adapter"
    for piece in loaded.stream(prompt, tokens, temperature=temperature, seed=seed, adapter=name):
        if not json:
            print(piece if text else prompt + piece, end="", flush=True)
        text += piece
    done = loaded.timing
    assert done is not None
    prefill = done.prompt / max(done.prefill, 1e-9)
    speed: dict[str, object] = {
        "prompt_tokens": done.prompt,
        "tokens": done.tokens,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": (done.tokens - 1) / done.decode if done.decode else None,
        "engine": loaded.engine,
    }
    if (tally := loaded.tally) is not None:
        counts = {"steps": tally.steps, "drafted": tally.drafted, "accepted": tally.accepted}
        speed["draft"] = counts | {"tokens_per_step": tally.per_step}
    if flash is not None:
        speed["flash"] = read = read_of(loaded)
    if (part := loaded.part) is not None:
        speed["neurons"] = part
    if json:
        seconds = time.perf_counter() - ready
        o.print_json({"prompt": prompt, "text": text, "load_seconds": ready - start, "seconds": seconds, **speed})
        return
    print()
    rest = f", {done.tokens - 1} more at {(done.tokens - 1) / done.decode:.1f}/s" if done.decode else ""
    first = f"{done.prompt} tokens of prompt at {prefill:.1f}/s"
    if tally is not None:
        rest += f", {tally.per_step:.2f} a step as {tally.accepted} of {tally.drafted} drafted ones were accepted"
    if flash is not None:
        size, reads = read["bytes_per_token"] / 1e3, read["reads_per_token"]
        rest += (
            f", {read['hit_share']:.0%} of the neurons in memory, the rest {size:.1f} kB and {reads:.0f} reads a token"
        )
    print(f"{first}{rest}; {loaded.engine}", file=sys.stderr)
    if part is not None:
        layers = ", ".join(f"{kept} of {whole}" for kept, whole in zip(part["kept"], part["of"], strict=True))
        spent = (
            f"{1e3 * part['written_seconds'] / max(done.tokens - 1, 1):.2f} ms a token, {part['share_of_decode']:.0%}"
        )
        print(f"neurons that wrote on, layer by layer: {layers}; they took {spent} of the time", file=sys.stderr)
