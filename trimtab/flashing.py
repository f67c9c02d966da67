"""Open a model that keeps its feed-forward weights on disk and reads of them what a token needs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.engine.neurons import FeedForward
    from trimtab.loading import Loaded
    from trimtab.models.source import Source

SAMPLE = (16, 256)  # texts that show which neurons tokens need, and tokens of each
VERSION = "1"  # of the files


def load_flash(name: str, room: int, *, rank: int = 0, window: int = 1 << 30, cold: bool = False) -> Loaded:
    """A plain causal language model ready to run with its feed-forward weights on disk.

    The first time, they are written as bundles into the user's cache, `trimtab/flash`; a file is whole or not there.

    Args:
        room: bytes for feed-forward weights in memory.
        rank: of predictors of the neurons that a token needs; 0: exact, the rows that decide are kept in memory.
        window: tokens whose neurons stay in memory, as far as there is room.
        cold: leave nothing of the file in the system's cache.

    Raises:
        UserError: the model is packed, writes no text or has no ReLU, or the room is too small.
    """
    from trimtab.core.method import Pager, method
    from trimtab.engine.flash import Flash
    from trimtab.engine.neurons import feed_forwards
    from trimtab.engine.session import map_of
    from trimtab.formats.bundles import Bundles
    from trimtab.loading import Loaded
    from trimtab.models.artifact import is_artifact
    from trimtab.models.quantised import is_quantised
    from trimtab.models.source import open_source

    policy = method("llm-in-a-flash", window=window)
    assert isinstance(policy, Pager)
    if is_artifact(name) or (Path(name) / "report.json").is_file() or is_quantised(name):
        raise UserError(f"--flash was asked for, and the weights of {name} are packed; give the original model")
    source = open_source(name)
    if source.task != "causal-lm":
        raise UserError(f"--flash was asked for, and {name} is for {source.task}; give a causal language model")
    found = map_of(source.skeleton())
    layers = feed_forwards(found)
    file = bundle_file(source, rank)
    if not file.is_file():
        write(file, source, found, layers, rank, lambda text: print(text, file=sys.stderr))
    model = without(source, layers)
    runtime = Flash(model, layers, Bundles(file, cold=cold), policy, room)
    loaded = Loaded(lambda: model, source.tokenizer, source.task, source.name, folder=source.folder)
    loaded.runtime = runtime  # type: ignore[assignment]
    return loaded


def read_of(loaded: Loaded) -> dict[str, Any]:
    """What such a model has read so far: numbers a token, bytes in memory, and those that came from the disk itself and
    not from the system's cache, None where that is not known.
    """
    from trimtab.engine.flash import Flash

    runtime: Any = loaded.runtime
    assert isinstance(runtime, Flash)
    return runtime.tally.report() | {"held_bytes": runtime.held_bytes, "from_disk_bytes": runtime.file.from_disk}


def bundle_file(source: Source, rank: int) -> Path:
    """Where the bundles of a model lie."""
    from trimtab.engine.kept import folder

    key = hashlib.sha256("\0".join([VERSION, source.hash, str(rank), str(sorted(source.config.items()))]).encode())
    return folder().parent / "flash" / f"{key.hexdigest()[:32]}.safetensors"


def write(
    file: Path, source: Source, found: Any, layers: tuple[FeedForward, ...], rank: int, said: Callable[[str], object]
) -> None:
    """Write the bundles of a model: a sample of text goes through it block by block, and then its layers are stored one
    by one.
    """
    import torch

    from trimtab.core.journal import writing
    from trimtab.engine.flash import Watch, write_flash
    from trimtab.engine.measure import through
    from trimtab.engine.stream import Stream
    from trimtab.tasks.base import Batch
    from trimtab.tasks.text import stdlib_documents, token_blocks

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    limit = source.config.get("max_position_embeddings") or SAMPLE[1]
    blocks = token_blocks(source.tokenizer(), stdlib_documents("train"), min(SAMPLE[1], limit), limit=SAMPLE[0])
    batch = Batch({"input_ids": blocks.tokens}, blocks.tokens, blocks.bytes)
    said(f"{source.name}: feed-forward weights are written as bundles once, into {file}")
    stream = Stream(source, found, {"use_cache": False})
    watch = Watch(stream.model, layers, rank)
    with torch.no_grad():
        through(stream, batch, 4)
    watch.close()
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    write_flash(file, watch, partial(_matrix, source, found), types.get(source.dtype, torch.float32), said)


def without(source: Source, layers: tuple[FeedForward, ...]) -> nn.Module:
    """The model without the matrices of its feed-forward layers, fp32."""
    import torch

    from trimtab.models.source import fill

    model = source.skeleton()
    for path in (p for at in layers for p in (*at.paths, at.down)):
        model.get_submodule(path).weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    fill(model, source.names, source.read)
    return model


def _matrix(source: Source, found: Any, path: str) -> Tensor:
    weight = source.read(f"{path}.weight")
    return weight.T if found.site(path).transposed else weight
