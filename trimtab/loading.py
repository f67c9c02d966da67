"""Load a model or an artifact to run it here."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from trimtab.core.method import Drafter, Selector
    from trimtab.engine.adapters import Bank
    from trimtab.engine.program import Form
    from trimtab.engine.session import Kept, Runtime, Timing, Writer
    from trimtab.engine.speculation import Speculation, Tally
    from trimtab.formats.packed import Packed
    from trimtab.models.artifact import Contents


SAMPLE = (32, 256)  # texts that caches prepare themselves on, and tokens of each


@dataclass
class Loaded:
    """A model ready to run.

    Fields:
        make: makes the module, see `model`.
        find_tokenizer: loads its tokenizer, see `tokenizer`.
        task: what it is for.
        name: where it came from.
        packed: parameter name -> reader of the packed weight, for those that it stores packed.
        share: to write text, the module's weights give way to those of the kernels, so that they are in memory once.
        context: tokens that a text may have; None: as many as the model can.
        cache: how keys and values are stored, see `formats.cache`.
        timing: how long the last text took.
        notes: sentences on what loading could not keep as it was.
        proved: is told the form of the program that writes its text, once that has proved itself.
        runtime: what opens sessions of it; None: made from the module when it is needed.
        bank: its adapters, or None.
        hashes: those of its weights, and of the model that it was fitted from: an adapter of either fits.
        folder: where its configuration and tokenizer are, or None.
        draft: a model that writes ahead, and how far, see `use_draft`; None: no one does.
        tally: what the draft of the last text came to.
        neurons: chooses from each prompt the neurons that write on, see `engine.neurons`; None: all do.
    """

    make: Callable[[], nn.Module]
    find_tokenizer: Callable[[], Any]
    task: str
    name: str
    packed: Mapping[str, Callable[[], Packed]] = field(default_factory=dict)
    share: bool = False
    context: int | None = None
    cache: str = "fp16"
    timing: Timing | None = None
    notes: tuple[str, ...] = ()
    proved: Callable[[Form], object] = lambda form: None
    runtime: Runtime | Kept | None = None
    bank: Bank | None = None
    hashes: Callable[[], Collection[str]] = tuple
    folder: Path | None = None
    draft: tuple[Loaded, Drafter] | None = None
    tally: Tally | None = None
    neurons: Selector | None = None
    _writer: Writer | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The module, in eval mode, fp32."""
        return self.make()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return self.find_tokenizer()

    def stream(
        self,
        prompt: str,
        tokens: int = 64,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """Text that goes on from the prompt, piece by piece, through one of the adapters or none.

        Raises:
            UserError: the model writes no text, the prompt is empty or too long, or there is no such adapter.
        """
        from trimtab.engine.session import Kept, Timing, generate
        from trimtab.engine.speculation import speculate

        if isinstance(self.runtime, Kept):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: self.tokenizer)  # which takes as long; an error comes again where it is used
                self.runtime.prepare()
        ids = self._prompt(prompt)
        limit = min(self.limit(len(ids) + tokens), len(ids) + tokens)
        stop = frozenset({self.tokenizer.eos_token_id} - {None})
        new: list[int] = []
        shown = known = 0  # tokens whose text is out; the last are decoded again, for a word to know its neighbour
        self.timing = Timing()
        writer = self.writer(limit)
        writer.use(0, adapter)
        options = {"stop": stop, "temperature": temperature, "seed": seed, "timing": self.timing}
        if self.draft is None:
            written = generate(writer, ids, limit - len(ids), **options)  # type: ignore[arg-type]
        else:
            ahead = self._speculation(limit)
            self.tally = ahead.tally
            written = speculate(writer, ahead, ids, limit - len(ids), **options)  # type: ignore[arg-type]
        for token in written:
            new.append(token)
            said, text = self.tokenizer.decode(new[shown:known]), self.tokenizer.decode(new[shown:])
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                shown, known = known, len(new)

    def generate(self, prompt: str, tokens: int = 64, **options: Any) -> str:
        """The text that goes on from the prompt; see `stream` for the options."""
        return "".join(self.stream(prompt, tokens, **options))

    def add_adapter(self, name: str, folder: str | Path, *, force: bool = False) -> None:
        """Take in a LoRA adapter in PEFT's format, for texts to be written through; never merged into the weights.

        Args:
            force: take it in although it was trained on another model.

        Raises:
            UserError: it is no such adapter, or one of another model.
        """
        from trimtab.formats.peft import read_adapter
        from trimtab.models.adapter import check_base

        if self.task != "causal-lm":
            raise UserError(f"{self.name} is for {self.task}; adapters are for causal language models")
        if self.neurons is not None:
            refuse_beside_neurons("an adapter")
        adapter = read_adapter(folder)
        if not force:
            check_base(Path(folder), self.hashes)
        if self.bank is None:
            self.bank, self._writer = self.opened().bank(), None
        self.bank.add(name, adapter)

    def use_draft(self, draft: Loaded, policy: Drafter) -> None:
        """From now on another model writes a few tokens ahead, and this one checks them together: its own text, in
        fewer steps.

        Args:
            draft: a smaller model with the same tokenizer.
            policy: how many tokens it writes ahead.

        Raises:
            UserError: it is no language model, or has another tokenizer.
        """
        from trimtab.engine.speculation import check_vocabulary

        if self.neurons is not None:
            refuse_beside_neurons("a draft")
        for loaded in (self, draft):
            if loaded.task != "causal-lm" or loaded.tokenizer is None:
                raise UserError(
                    f"{loaded.name} is for {loaded.task} or has no tokenizer; a draft and the model that it writes for "
                    "are causal language models with one"
                )
        check_vocabulary(draft.tokenizer.get_vocab(), self.tokenizer.get_vocab(), draft.name)
        self.draft = draft, policy

    def _speculation(self, context: int) -> Speculation:
        from trimtab.engine.speculation import Speculation, relative_cost

        assert self.draft is not None
        draft, policy = self.draft
        writer, own = draft.writer(draft.limit(context)), self.opened()
        vocabulary = own.form.vocabulary if own.form is not None else int(self.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        return Speculation(writer, policy, vocabulary=vocabulary, cost=relative_cost(draft.opened(), own))

    def writer(self, context: int) -> Writer:
        """What writes text of up to so many tokens; made when it is first asked for, and again for a longer text."""
        runtime = self.opened()
        if self._writer is None or self._writer.context < context:
            whole = self.limit(context)
            self._writer = None  # its cache makes room for the longer one
            room = self.context or min(whole, -(-context // 256) * 256)
            given: dict[str, Any] = {} if self._compiled else {"sample": self._sample, "neurons": self.neurons}
            self._writer = runtime.open(room, cache=self.cache, bank=self.bank, **given)
        return self._writer

    def opened(self) -> Runtime | Kept:
        """What opens sessions of it."""
        from trimtab.engine.session import Runtime

        if self.runtime is None:
            plain = not self._compiled
            self.runtime = Runtime(self.model, self.packed, self.share, plain, proved=self.proved)
        return self.runtime

    @property
    def part(self) -> dict[str, Any] | None:
        """Which part of the neurons wrote the last text: `kept` and `of` of each layer, and what the feed-forward
        layers took; None where all did.
        """
        from trimtab.engine.neurons import NeuronSession

        if not isinstance(self._writer, NeuronSession) or self.timing is None:
            return None
        chosen, seconds = self._writer.chosen[0], self._writer.written.seconds
        return {
            "kept": [len(some) for some in chosen],
            "of": [at.neurons for at in self._writer.layers],
            "prompt_seconds": self._writer.read.seconds,
            "written_seconds": seconds,
            "share_of_decode": seconds / self.timing.decode if self.timing.decode else 0.0,
        }

    @property
    def _compiled(self) -> bool:
        from trimtab.formats.cache import CacheFormat

        return CacheFormat.parse(self.cache).compiled and self.neurons is None

    def _sample(self) -> Any:
        """Tokens `[texts, length]` of text that Python brings along, for methods that prepare themselves on some."""
        from trimtab.tasks.text import stdlib_documents, token_blocks

        length = self.limit(SAMPLE[1])
        return token_blocks(self.tokenizer, stdlib_documents("train"), length, limit=SAMPLE[0]).tokens

    @property
    def engine(self) -> str:
        """What wrote the last text: the kernels and their threads, or torch and its."""
        import torch

        return self.runtime.engine if self.runtime is not None else f"torch, {torch.get_num_threads()} threads"

    def limit(self, asked: int) -> int:
        """Tokens that a text may have; where neither model nor user set a limit, as many as asked for."""
        from trimtab.engine.session import Kept

        kept = self.runtime.form if isinstance(self.runtime, Kept) else None
        own = kept.limit if kept else getattr(self.model.config, "max_position_embeddings", None)
        own = own or asked
        return min(own, self.context or own)

    def _prompt(self, prompt: str) -> list[int]:
        if self.task != "causal-lm" or self.tokenizer is None:
            raise UserError(f"{self.name} is for {self.task}; only a causal language model writes text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is no UTF-8 at character {error.start + 1}; give it as UTF-8 text") from error
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ([start] if start is not None else []) + ids
        if not ids:
            raise UserError(
                "the prompt is empty, and the tokenizer has no start token; give at least one word with --prompt"
            )
        limit = self.limit(len(ids) + 1)
        if len(ids) + 1 > limit:
            raise UserError(f"the prompt has {len(ids)} tokens, and the model's context is {limit}; shorten the prompt")
        return ids


def load(
    path: str | Path,
    *,
    model: str | None = None,
    packed: bool = False,
    kernels: bool = True,
    cache: str = "fp16",
    neurons: str = "",
) -> Loaded:
    """An artifact of `fit`, a model that others quantised, or any model that `fit` takes, ready to run.

    Args:
        path: an artifact's folder, a GGUF file, a folder quantised by GPTQ, AWQ or compressed-tensors, or the name of a
            model.
        model: for an artifact of a Python function's model: that function, `module:function`.
        packed: keep packed linears packed in memory, and share what the kernels hold: least memory.
        kernels: of a model that writes no text, run sparse linears and convolutions on the compiled kernels where those
            are at least as fast, in fp32 as torch does; False: all on torch, which is what `fit` measured.
        cache: to write text, how keys and values are stored: `fp16`, `bf16`, `fp32`, packed by KIVI as `kivi4` or
            `kivi2` with a fraction of the bytes, or as a method keeps them, like `think(prune=0.4)`, on torch.
        neurons: to write text, what chooses from a prompt the neurons that write on, like `coreinfer(share=0.4)`, on
            torch; empty: all do.

    Raises:
        UserError: there is nothing of that name, it is damaged, or there is no such cache or choice of neurons.
    """
    from trimtab.formats.cache import CacheFormat

    CacheFormat.parse(cache)
    chosen = selector(neurons) if neurons else None
    loaded = _load(path, model, packed, kernels)
    loaded.cache, loaded.neurons = cache, chosen
    if not loaded._compiled:
        loaded.runtime = None  # the kernels hold no such cache, and always run with all neurons
    return loaded


def _load(path: str | Path, model: str | None, packed: bool, kernels: bool) -> Loaded:
    from trimtab.engine.kept import keep, kept
    from trimtab.engine.program import Weights
    from trimtab.engine.session import Kept
    from trimtab.kernels.native import native
    from trimtab.models.artifact import ContentsStore, build, is_artifact, open_artifact, use_kernels
    from trimtab.models.quantised import is_quantised, open_quantised
    from trimtab.models.source import open_source

    if not is_artifact(path):
        if (Path(path) / "report.json").is_file() and is_artifact(Path(path) / "artifact"):
            return _load(Path(path) / "artifact", model, packed, kernels)
        if is_quantised(path):
            opened = open_quantised(path)
            module = build(opened.contents, opened.skeleton, packed=packed)
            task = opened.contents.manifest["task"]
            loaded = _loaded(module, opened.tokenizer(), task, str(path), opened.contents.packed, packed)
            loaded.notes = tuple(opened.notes)
            loaded.folder = Path(path) if Path(path).is_dir() else None
            return loaded
        source = open_source(str(path))
        tokenizer = source.tokenizer() if source.task != "classification" and source.folder else None
        hashed = {"hashes": lambda: (source.hash,), "folder": source.folder}
        return _loaded(source.materialise(), tokenizer, source.task, source.name, **hashed)
    contents = open_artifact(path)
    _check_memory(contents, packed)
    task = contents.manifest["task"]
    key = _key(contents) if task == "causal-lm" and packed and not model else None
    if key and (form := kept(key)) is not None:
        runtime = Kept(form, Weights(native(), ContentsStore(contents), form.matrices))
        make, tokenizer = partial(build, contents, packed=packed), partial(_tokenizer, contents.folder)
        known = partial(_hashes, contents)
        rest = {"runtime": runtime, "hashes": known, "folder": contents.folder}
        return Loaded(make, tokenizer, task, str(path), contents.packed, packed, **rest)  # type: ignore[arg-type]
    module = build(contents, open_source(model).skeleton if model else None, packed=packed)
    if kernels and task != "causal-lm":
        use_kernels(module, contents)
    loaded = _loaded(module, _tokenizer(contents.folder), task, str(path), packed=contents.packed, share=packed)
    loaded.hashes, loaded.folder = partial(_hashes, contents), contents.folder
    if key:
        loaded.proved = partial(keep, key)
    return loaded


def _loaded(module: nn.Module, tokenizer: Any, *rest: Any, **options: Any) -> Loaded:
    return Loaded(lambda: module, lambda: tokenizer, *rest, **options)


def _hashes(contents: Contents) -> set[str]:
    """What an adapter says of its base when it was trained on an artifact, or on what that was fitted from."""
    from trimtab.formats.checkpoint import Checkpoint

    return {Checkpoint(contents.folder).hash()[:16], contents.manifest["source"].get("hash")} - {None}


def _key(contents: Contents) -> str | None:
    """What the form of an artifact's program is kept under; None where no program runs here."""
    from trimtab.engine import kept
    from trimtab.kernels.native import native
    from trimtab.models.artifact import MANIFEST

    files = [contents.folder / name for name in (MANIFEST, "config.json")]
    kernels = native()
    if kernels is None or not all(file.is_file() for file in files):
        return None
    return kept.key(kernels, [file.read_text("utf-8") for file in files])


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_memory(contents: Contents, packed: bool) -> None:
    from trimtab.engine import memory
    from trimtab.engine.session import said_bytes
    from trimtab.models.artifact import folder_bytes

    needed, free = folder_bytes(contents.folder), memory.free_bytes()
    if not packed:
        needed += sum(4 * prod(row["shape"]) for row in contents.manifest["packed"].values())
    if free is not None and needed > free:
        cure = "free some, or fit the model to fewer" if packed else "load it with packed=True, or `run --packed`"
        raise UserError(f"{contents.folder} needs {said_bytes(needed)}, and {said_bytes(free)} are free; {cure}")


def drafter(tokens: int | None) -> Drafter:
    """The policy that drafts so many tokens at a time; None: as many as the acceptance rate has it."""
    from trimtab.core.method import Drafter, method

    policy = method("adaptive-drafting") if tokens is None else method("speculative-decoding", tokens=tokens)
    assert isinstance(policy, Drafter)
    return policy


def refuse_beside_neurons(what: str) -> None:
    """Say that something does not go together with a choice of neurons."""
    raise UserError(
        f"{what} was asked for beside a choice of neurons; texts written with a part of the neurons go through neither "
        "adapters nor drafts, so leave one of the two out"
    )


def selector(text: str) -> Selector:
    """The policy that chooses neurons, by its name with its fields.

    Raises:
        UserError: there is none of that name, or its fields cannot be.
    """
    import torch

    from trimtab.core.method import Selector, discover
    from trimtab.core.plan import parse_method
    from trimtab.core.view import Prompted

    policy = parse_method(text)
    if not isinstance(policy, Selector):
        known = ", ".join(name for name, cls in discover().items() if issubclass(cls, Selector))
        raise UserError(f"{policy.card.name} was asked to choose neurons, which it does not; these do: {known}")
    toy = (torch.tensor([[1.0, 2.0]]),)  # what fields cannot be is told before anything is loaded
    policy.decide(Prompted(toy, policy.prepare([toy])))
    return policy


def read_report(run: str | Path) -> dict[str, Any]:
    """The evidence of a finished run.

    Raises:
        UserError: the folder holds no finished run.
    """
    path = Path(run) / "report.json"
    if not path.is_file():
        unfinished = (Path(run) / "journal.jsonl").is_file()
        cure = (
            "an unfinished run; go on with `trimtab fit ... --resume`"
            if unfinished
            else "no run; `trimtab fit` makes one"
        )
        raise UserError(f"{run} holds {cure}")
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; `trimtab fit ... --resume` writes it again") from error
    known = {"best", "original", "front", "plan"} <= set(report) if isinstance(report, dict) else False
    if not known or not {"sites", "networks"} & set(report):
        raise UserError(f"{path} is no report of a fit; `trimtab fit ... --resume` writes it again")
    return report
