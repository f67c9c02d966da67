"""From a source and the user's data to a task with its three splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.tasks.base import Task
from trimtab.tasks.causal_lm import CausalLM, Embedding, MaskedLM
from trimtab.tasks.classification import Classification
from trimtab.tasks.pictures import folders, read_pictures

if TYPE_CHECKING:
    from trimtab.models.source import Source

SPLITS = ("calibration", "search", "test")
SHARES = {"calibration": 0.6, "search": 0.2, "test": 0.2}  # of the user's own text or images
WINDOWS = {"calibration": 512, "search": 256, "test": 1024}  # at most so many are cut


def task_for(
    source: Source, data: str | None = None, length: int = 256, fresh_head: bool = False, training: int | None = None
) -> Task:
    """The task of a model on the user's data; without data on text that Python brings along, or on the data of a
    pocket model.

    Args:
        data: text file (`.txt`, `.md`, `.py`, ... or `.jsonl` with a `text` field), `.npz` with `images` and `labels`,
            a folder with one folder of images a class, or `module:function` that returns {split: (inputs, labels)}.
        length: tokens in a window of text.
        fresh_head: the classes are the data's, whatever a classifier knows: its folders, or numbers from 0.
        training: most windows of the calibration split, where it is trained on; None: as many as calibration takes.

    Raises:
        UserError: the data are missing, empty, binary, too short, or of another kind than the model wants.
    """
    if source.task == "classification":
        return _classes(source, data, fresh_head)
    tokenizer = source.tokenizer()
    limit = source.config.get("max_position_embeddings") or source.config.get("n_positions") or length
    length = min(length, int(limit))
    vocabulary = int(source.config.get("vocab_size", 0))
    windows, sizes = {}, {}
    for split, documents in _texts(data).items():
        most = training if training and split == "calibration" else WINDOWS[split]
        windows[split], sizes[split] = _windows(documents, tokenizer, length, most, vocabulary)
    if source.task == "masked-lm":
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of {source.name} has no mask token, which a masked language model is measured with"
            )
        return MaskedLM(windows, sizes, tokenizer.mask_token_id)
    return (CausalLM if source.task == "causal-lm" else Embedding)(windows, sizes)


def _windows(documents: list[str], tokenizer: Any, length: int, limit: int, vocabulary: int) -> Any:
    from trimtab.tasks.text import token_blocks

    blocks = token_blocks(tokenizer, documents, length, limit=limit)
    if vocabulary and int(blocks.tokens.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {int(blocks.tokens.max())}, and the model knows {vocabulary}: this tokenizer "
            "belongs to another model; "
            f"put the model's own tokenizer files into its folder"
        )
    return blocks.tokens, blocks.bytes


def _texts(data: str | None) -> dict[str, list[str]]:
    if data is None:
        import hashlib

        from trimtab.tasks.text import stdlib_documents

        def spread(split: str) -> list[str]:  # in the order of a hash: the first windows come from all over the library
            documents = stdlib_documents(split)
            return [d.text for d in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest())]

        return {"calibration": spread("train"), "search": spread("search"), "test": spread("test")}
    text = read_text(Path(data).expanduser())
    cuts, start = {}, 0
    for split in SPLITS:
        stop = len(text) if split == "test" else start + int(SHARES[split] * len(text))
        cuts[split], start = [text[start:stop]], stop
    return cuts


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: the file is missing, empty, or no UTF-8 text.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}; give a text file with --data")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte {error.start}); give plain text or JSON lines with --data"
        ) from error
    if "\0" in text[:65536]:
        raise UserError(f"{path} holds NUL bytes: it is binary; give plain text or JSON lines with --data")
    if path.suffix == ".jsonl":
        try:
            text = "\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: every line must be a JSON object with a field `text` ({error})") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give some text with --data, at least a few thousand words")
    return text


def _classes(source: Source, data: str | None, fresh: bool) -> Classification:
    import torch

    from trimtab.models.pocket import POCKET

    key = "pixel_values"
    if data is None:
        if source.name not in POCKET:
            raise UserError(
                f"{source.name} names classes of its inputs, so it needs labelled data: give an .npz with images and "
                "labels, or module:function, with --data"
            )
        from trimtab.tasks.digits import digits

        pairs = {
            ours: digits(theirs) for ours, theirs in (("calibration", "train"), ("search", "search"), ("test", "test"))
        }
        own = {split: ({key: images}, labels) for split, (images, labels) in pairs.items()}
        return _named(own) if fresh else Classification(own)
    if ":" in data and not Path(data).exists():
        from trimtab.models.source import call_entry

        made = call_entry(data)
        if not isinstance(made, dict) or set(SPLITS) - set(made):
            raise UserError(f"{data} must return a dict with the splits {', '.join(SPLITS)}, each (inputs, labels)")
        return _checked({s: made[s] for s in SPLITS}, key, source, data, fresh)
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(
            f"there is no data file {path}; give an .npz with arrays `images` and `labels`, a folder with one folder "
            "of images a class, or module:function, with --data"
        )
    images, labels = read_pictures(path, source, fresh) if path.is_dir() else _npz(path)
    n = len(labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    cuts = (0, int(0.6 * n), int(0.8 * n), n)
    splits = {s: (images[order[a:b]], labels[order[a:b]]) for s, a, b in zip(SPLITS, cuts, cuts[1:], strict=False)}
    return _checked(splits, key, source, str(path), fresh, tuple(folders(path)) if fresh and path.is_dir() else ())


def _checked(
    splits: dict[str, Any], key: str, source: Source, where: str, fresh: bool, names: tuple[str, ...] = ()
) -> Classification:
    """Labelled splits, after checks that the model, or a fresh head, can take them."""
    import torch

    checked: dict[str, tuple[dict[str, Any], Any]] = {}
    given: Any
    labels: Any
    for split, pair in splits.items():
        given, labels = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        inputs: dict[str, Any] = given if isinstance(given, dict) else {key: given}
        if not all(isinstance(t, torch.Tensor) and t.dim() for t in (*inputs.values(), labels)):
            raise UserError(f"{where}: {split} must be (inputs, labels), both tensors with an item in each row")
        if not len(labels) or any(len(t) != len(labels) for t in inputs.values()):
            lengths = ", ".join(str(len(t)) for t in inputs.values())
            raise UserError(f"{where}: {split} has {lengths} inputs and {len(labels)} labels; give as many of each")
        if labels.dim() != 1 or labels.is_floating_point() or int(labels.min()) < 0:
            raise UserError(f"{where}: the labels of {split} must be whole numbers, one a class, from 0")
        if not all(bool(t.isfinite().all()) for t in inputs.values()):
            raise UserError(f"{where}: the inputs of {split} hold NaN or infinite values; remove these items")
        checked[split] = inputs, labels.long()
    if fresh:
        return _named(checked, names)
    classes = _classes_of(source, {k: v[:1] for k, v in checked["search"][0].items()}, where)
    largest = max(int(labels.max()) for _, labels in checked.values())
    if largest >= classes:
        raise UserError(
            f"{where} has an item of class {largest}, and {source.name} knows classes 0 to {classes - 1}; give data "
            "labelled for this model, or let `trimtab adapt` or `train` give it another head with --fresh-head"
        )
    return Classification(checked)


def _named(splits: dict[str, Any], names: tuple[str, ...] = ()) -> Classification:
    """Splits whose classes have names, their numbers unless told otherwise.

    Raises:
        UserError: there is but one class, or a number has no item to train on.
    """
    seen = set(splits["calibration"][1].tolist())
    classes = len(names) or 1 + max(int(labels.max()) for _, labels in splits.values())
    if missing := sorted(set(range(classes)) - seen):
        name = names[missing[0]] if names else missing[0]
        raise UserError(
            f"no item of class {name} is among the {len(splits['calibration'][1])} to train on, and a fresh head of "
            f"{classes} classes needs some of each; give more of them, or number classes from 0 without gaps"
        )
    if classes < 2:
        raise UserError("the data are all of one class, and a fresh head tells classes apart; give two or more")
    return Classification(splits, names or tuple(map(str, range(classes))))


def _classes_of(source: Source, one: dict[str, Any], where: str) -> int:
    """How many classes a model names: from its configuration, or else by asking it once."""
    import torch

    if source.config:
        return int(
            source.config.get("classes") or len(source.config.get("id2label") or "01")
        )  # transformers' own default
    try:
        with torch.no_grad():
            output = source.materialise()(*one.values())
        return int(output.shape[-1])
    except Exception as error:  # the model is the user's own code
        shapes = ", ".join(str(tuple(v.shape)) for v in one.values())
        raise UserError(
            f"{source.name} does not take an item of {where}, of shape {shapes}: {str(error)[:200] or type(error)}"
        ) from error


def _npz(path: Path) -> Any:
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise UserError(
            f"{path} has no arrays `images` and `labels` that load without unpickling ({str(error)[:120]})"
        ) from error
    if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels) or len(labels) < 10:
        raise UserError(
            f"{path}: images {images.shape} and labels {labels.shape} were found; [n, channels, height, width] and "
            "[n] with n >= 10 are needed"
        )
    if labels.dtype.kind not in "iu" or images.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: labels of type {labels.dtype} and images of type {images.dtype} were found; whole numbers and "
            "numbers are needed"
        )
    return torch.from_numpy(images.astype("float32")), torch.from_numpy(labels.astype("int64"))
