"""Bad input ends in exit code 2 and a sentence that says what was asked, what was found and what to do; nothing is
left half-written.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, SMALL, Run, Said, add_tokenizer, command, tree
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
Cli = Callable[..., Said]


def refused(said: Said, *words: str, code: int = 2) -> str:
    """The sentence of a refusal, after the checks that hold for every one."""
    assert said.code == code, said
    assert said.out == ""
    assert said.err.startswith("trimtab: ") and said.err.endswith("\n")
    sentence = said.err.removeprefix("trimtab: ").strip()
    assert "\n" not in sentence and "Traceback" not in sentence and "a bug" not in sentence
    assert len(sentence) < 700
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"
    return sentence


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def fit(cli: Cli, text: Path, tmp_path: Path) -> Callable[..., Said]:
    """`trimtab fit MODEL` with small settings; the run's folder is `tmp_path / "run"`, and must not be there
    afterwards.
    """

    def call(
        model: str | Path,
        *options: str | Path,
        data: Path | str = text,
        budget: tuple[str, ...] = ("--size", str(SIZE) + "B"),
    ) -> Said:
        settings = ("--data", data, *budget, *SMALL, "--quiet", "--out", tmp_path / "run")
        said = cli("fit", model, *settings, *options)
        assert not (tmp_path / "run").exists(), "a refused fit left a folder"
        return said

    return call


# ---- weights


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def cut(model: Path) -> None:
    data = weights(model).read_bytes()
    weights(model).write_bytes(data[: len(data) // 2])


def garbled(model: Path) -> None:
    data = bytearray(weights(model).read_bytes())
    data[8:40] = b"\xff" * 32
    weights(model).write_bytes(bytes(data))


def emptied(model: Path) -> None:
    weights(model).write_bytes(b"")


def huge_header(model: Path) -> None:
    data = bytearray(weights(model).read_bytes())
    data[:8] = (1 << 62).to_bytes(8, "little")
    weights(model).write_bytes(bytes(data))


def removed(model: Path) -> None:
    weights(model).unlink()


def shard_missing(model: Path) -> None:
    tensors = load_file(weights(model))
    weights(model).unlink()
    first = dict(sorted(tensors.items())[:5])
    save_file(first, model / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def work(model: Path) -> None:
        tensors = load_file(weights(model))
        change(tensors)
        save_file(tensors, weights(model))

    return work


def set_to(value: float) -> Callable[[Path], None]:
    return changed(lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(77, value))


def config(**changes: Any) -> Callable[[Path], None]:
    def work(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return work


def no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def a_list(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": 5}')


def other_vocabulary(model: Path) -> None:
    config(vocab_size=1000)(model)
    changed(
        lambda t: t.update(
            {k: v[:1000].clone() for k, v in t.items() if k in ("lm_head.weight", "model.embed_tokens.weight")}
        )
    )(model)


BROKEN = [
    (cut, ["model.safetensors", "cut off"]),
    (garbled, ["model.safetensors", "download it again"]),
    (emptied, ["model.safetensors", "0 bytes"]),
    (huge_header, ["model.safetensors", "header"]),
    (removed, [".safetensors"]),
    (shard_missing, ["model-00002-of-00002.safetensors", "missing"]),
    (set_to(float("nan")), ["model.layers.1.mlp.up_proj.weight", "NaN", "finite"]),
    (set_to(float("inf")), ["model.layers.1.mlp.up_proj.weight", "infinite"]),
    (changed(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), ["lacks 1", "model.layers.0.mlp.up_proj.weight"]),
    (changed(lambda t: t.update({"model.norm.weight": torch.ones(63)})), ["model.norm.weight", "(63,)", "(64,)"]),
    (config(intermediate_size=96), ["up_proj", "(128, 64)", "(96, 64)"]),
    (config(num_hidden_layers=3), ["lacks", "model.layers.2."]),
    (config(hidden_size="sixty-four"), ["configuration"]),
    (
        config(architectures=["SecretForCausalLM"], auto_map={"AutoModel": "modeling.Secret"}),
        ["SecretForCausalLM", "ever run"],
    ),
    (config(architectures=None), ["architecture"]),
    (config(architectures=[{}]), ["architectures", "no list of names"]),
    (config(architectures={"a": 1}), ["architectures", "no list of names"]),
    (config(num_hidden_layers=10**9), ["1000000000 layers", "num_hidden_layers"]),
    (config(quantization_config={"quant_method": "awq"}), ["already quantised", "awq"]),
    (no_json, ["config.json", "not JSON"]),
    (a_list, ["config.json", "no object"]),
    (no_config, ["no config.json"]),
    (no_tokenizer, ["tokenizer.json"]),
    (broken_tokenizer, ["tokenizer", "does not load"]),
    (other_vocabulary, ["tokenizer", "1000", "another model"]),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN, ids=[f"{i}-{w[0]}" for i, (_, w) in enumerate(BROKEN)])
def test_damaged_model(damage: Callable[[Path], None], words: list[str], model: Path, fit: Callable[..., Said]) -> None:
    damage(model)
    before = tree(model)
    refused(fit(model), *words)
    assert tree(model) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_pickle_is_refused_and_never_opened(name: str, model: Path, fit: Callable[..., Said], tmp_path: Path) -> None:
    trap = tmp_path / "opened"
    weights(model).unlink()
    (model / name).write_bytes(
        b"\x80\x02cos\nsystem\nX" + len(f"touch {trap}").to_bytes(4, "little") + f"touch {trap}".encode() + b"\x85R."
    )
    refused(fit(model), "pickle", name, "convert")
    torch.save({"a": torch.ones(2)}, model / name)
    refused(fit(model), "pickle", name)
    assert not trap.exists()


def test_code_in_a_models_folder_is_not_run(model: Path, fit: Callable[..., Said], tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (model / "modeling.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config(auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}, model_type="secret")(model)
    refused(fit(model), "configuration")
    assert not trap.exists()


def test_experts_stored_apart_and_together(fit: Callable[..., Said], tmp_path: Path) -> None:
    """The cure that the refusal names works."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from trimtab.models.source import open_source

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 4096, "num_local_experts": 3}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, **depth))
    mixtral.save_pretrained(tmp_path / "apart")
    refused(fit(tmp_path / "apart"), "experts.0", "save_original_format=False")
    mixtral.save_pretrained(tmp_path / "together", save_original_format=False)
    read = open_source(str(tmp_path / "together")).materialise().state_dict()
    assert all(torch.equal(read[name], value) for name, value in mixtral.state_dict().items())


def test_masked_model_without_a_mask_token(fit: Callable[..., Said], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 4096}
    bert = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4))
    bert.save_pretrained(tmp_path / "bert")
    add_tokenizer(tmp_path / "bert")
    refused(fit(tmp_path / "bert"), "mask token")


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BertForSequenceClassification"])
def test_kinds_of_model_that_cannot_be_taken(kind: str, model: Path, fit: Callable[..., Said]) -> None:
    config(architectures=[kind])(model)
    refused(fit(model), kind, "language models", "image classifiers")


# ---- names of models


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pokcet", ["'pokcet'", "did you mean 'pocket", "folder"]),
        ("./nowhere/at/all", ["nowhere", "folder"]),
        ("someone/some-model", ["someone/some-model", "hub", "network"]),
        ("nomodule:function", ["nomodule:function", "nomodule"]),
        ("json:nofunction", ["json:nofunction", "nofunction"]),
        ("os:getcwd", ["os:getcwd", "str", "nn.Module"]),
    ],
)
def test_no_such_model(name: str, words: list[str], fit: Callable[..., Said]) -> None:
    refused(fit(name), *words)


def test_file_in_place_of_a_folder(model: Path, fit: Callable[..., Said]) -> None:
    refused(fit(weights(model)), "is a file", "folder")


def test_artifact_in_place_of_a_model(run: Run, fit: Callable[..., Said]) -> None:
    refused(fit(run.artifact), "already compressed", "original")


# ---- data


DATA = [
    ("missing.txt", None, ["no data file", "missing.txt"]),
    ("empty.txt", b"", ["empty.txt", "empty"]),
    ("blank.txt", b" \n\n ", ["blank.txt", "empty"]),
    ("binary.txt", bytes(range(256)) * 100, ["binary.txt", "UTF-8"]),
    ("nul.txt", b"abc\0def" * 1000, ["nul.txt", "NUL"]),
    ("short.txt", b"hello world", ["short", "text"]),
    ("wrong.jsonl", b'{"no": "text"}\n', ["wrong.jsonl", "text"]),
    ("broken.jsonl", b'{"text": "a"}\n{"text"', ["broken.jsonl", "text"]),
    ("numbers.jsonl", b'{"text": 5}\n', ["numbers.jsonl", "text"]),
]


@pytest.mark.parametrize(("name", "content", "words"), DATA, ids=[d[0] for d in DATA])
def test_useless_data(
    name: str, content: bytes | None, words: list[str], tiny: Path, fit: Callable[..., Said], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(fit(tiny, data=tmp_path / name), *words)


IMAGES = torch.zeros(40, 1, 8, 8).numpy()
LABELS = (torch.arange(40) % 10).numpy()
ARRAYS = [
    ({"images": IMAGES}, ["images", "labels"]),
    ({"images": IMAGES, "labels": LABELS[:5]}, ["(40, 1, 8, 8)", "(5,)"]),
    ({"images": IMAGES[:, 0], "labels": LABELS}, ["(40, 8, 8)"]),
    ({"images": IMAGES[:4], "labels": LABELS[:4]}, ["n >= 10"]),
    ({"images": IMAGES, "labels": LABELS + 10}, ["class"]),
    ({"images": IMAGES, "labels": LABELS - 1}, ["class"]),
    ({"images": IMAGES * float("nan"), "labels": LABELS}, ["NaN"]),
    ({"images": IMAGES, "labels": LABELS / 2}, ["float", "whole numbers"]),
    ({"images": IMAGES.astype("object"), "labels": LABELS}, ["unpickling"]),
]


@pytest.mark.parametrize(("arrays", "words"), ARRAYS, ids=[str(i) for i in range(len(ARRAYS))])
def test_useless_images(arrays: dict[str, Any], words: list[str], fit: Callable[..., Said], tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "data.npz", **arrays)
    refused(fit("pocket-vit", data=tmp_path / "data.npz", budget=("--size", "300kB")), "data.npz", *words)


def test_images_of_another_size(fit: Callable[..., Said], tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "data.npz", images=IMAGES[:, :, :4, :3], labels=LABELS)
    refused(fit("pocket-vit", data=tmp_path / "data.npz", budget=("--size", "300kB")), "4*3", "8*8")


FUNCTIONS = [
    ("return 5", ["dict", "calibration"]),
    ("return {s: 5 for s in ('calibration', 'search', 'test')}", ["calibration", "(inputs, labels)"]),
    ("return {s: (torch.ones(3, 4), torch.ones(5).long()) for s in S}", ["3 inputs and 5 labels"]),
    ("return {s: (torch.ones(3, 4), torch.ones(3)) for s in S}", ["whole numbers"]),
    ("return {s: (torch.ones(3, 4), torch.ones(3).long() + 9) for s in S}", ["class 10", "0 to 1"]),
    ("return {s: (torch.ones(3, 5), torch.ones(3).long()) for s in S}", ["(1, 5)", "does not take"]),
    ("raise RuntimeError('no disk in drive')", ["no disk in drive"]),
]


@pytest.mark.parametrize(("body", "words"), FUNCTIONS, ids=[str(i) for i in range(len(FUNCTIONS))])
def test_functions_that_return_other_things(
    body: str, words: list[str], fit: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"import torch\nS = ('calibration', 'search', 'test')\ndef data():\n    {body}\n"
    (tmp_path / "oddmodule.py").write_text(f"{text}def net():\n    return torch.nn.Linear(4, 2)\n")
    monkeypatch.chdir(tmp_path)
    try:
        refused(fit("oddmodule:net", data="oddmodule:data", budget=("--size", "1kB")), "oddmodule:data", *words)
    finally:
        sys.modules.pop("oddmodule", None)


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "gtpq"], ["'gtpq'", "did you mean 'gptq'"]),
        (["--methods", "milp"], ["milp", "--allocator"]),
        (["--methods", "gptq,awq"], ["awq", "--plan"]),
        (["--allocator", "simplex"], ["'simplex'", "trimtab methods"]),
        (["--allocator", "gptq"], ["gptq is no allocator"]),
        (["--effort", "quik"], ["'quik'", "did you mean 'quick'"]),
        (["--target", "onnx"], ["'onnx'", "gguf"]),
        (["--length", "3"], ["--length", "8"]),
        (["--length", "many"], ["--length"]),
        (["--sise", "1MB"], ["--sise", "--size"]),
        (["--size", "2"], ["size '2'", "no unit", "60MB"]),
        (["--size", "big"], ["size 'big'", "60MB"]),
        (["--size", "5 parsecs"], ["'parsecs'", "60MB"]),
        (["--size=-1MB"], ["'-1MB'", "positive"]),
        (["--size", "0MB"], ["'0MB'", "positive"]),
        (["--size", "nanMB"], ["'nanMB'", "60MB"]),
        (["--size", "1e999MB"], ["'1e999MB'", "finite"]),
        (["--size", "1e99999999999999999999MB"], ["finite"]),
        (["--memory", "1ms"], ["memory '1ms'", "'ms'"]),
        (["--latency", "3MB"], ["latency '3MB'", "15ms"]),
        (["--quality", "150%"], ["quality '150%'", "100%"]),
        (["--quality", "good"], ["quality 'good'", "98%"]),
        (["--quality", "0%"], ["quality '0%'", "positive"]),
    ],
)
def test_impossible_options(options: list[str], words: list[str], tiny: Path, fit: Callable[..., Said]) -> None:
    refused(fit(tiny, *options), *words)


def test_size_below_the_smallest_plan_names_it(tiny: Path, fit: Callable[..., Said]) -> None:
    sentence = refused(fit(tiny, budget=("--size", "300kB")), "300 kB", "smallest", "ask for at least")
    least = sentence.rpartition("at least ")[2].replace(" ", "")
    assert "kB" in least and 300 < float(least.removesuffix("kB")) < SIZE / 1000


def test_no_budget_at_all(tiny: Path, fit: Callable[..., Said]) -> None:
    refused(fit(tiny, budget=()), "budget", "--size")


# ---- plans


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("gptq", ["'gptq'", "gptq @ 4b/g64"]),
        ("gtpq @ 4b/g64", ["'gtpq'", "did you mean 'gptq'"]),
        ("gptq @ 4q", ["'4q'", "4b/g64"]),
        ("gptq @ 9b/g64", ["'9b/g64'"]),
        ("gptq @ 4b/g0", ["'4b/g0'"]),
        ("gptq @ 4b/g32, lm_haed=8b/row", ["'lm_haed'", "did you mean 'lm_head'"]),
        ("gptq @ embed=4b/g32", ["'embed'", "embedding"]),
        ("gptq(dampp=1) @ 4b/g32", ["'dampp'", "damp"]),
        ("gptq(damp='much') @ 4b/g32", ["damp='much'", "float"]),
        ("gptq(damp) @ 4b/g32", ["damp"]),
        ("gptq @ r16", ["gptq", "r16"]),
        ("gptq @ 4b/g32 | rtn @ 4b/g32", ["`rtn`", "`gptq`", "float", "put `rtn` before it"]),
        ("wanda @ 50% | gptq @ 4b/g32", ["`gptq`", "`wanda`", "float", "sparse"]),
        ("milp @ 4b/g32", ["milp"]),
        ("| gptq @ 4b/g32", ["''"]),
        ("nofile.toml", ["nofile.toml"]),
    ],
)
def test_illegal_plans(plan: str, words: list[str], tiny: Path, fit: Callable[..., Said]) -> None:
    refused(fit(tiny, "--plan", plan, budget=()), *words)


@pytest.mark.parametrize(
    "content", ["", "[[step]]\nmethod = 5\nlevels = 3", "not toml at all [", '[[step]]\nmethod = "gptq"']
)
def test_broken_plan_files(content: str, tiny: Path, fit: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(content)
    refused(fit(tiny, "--plan", tmp_path / "plan.toml", budget=()), "TOML" if content else "step")


def test_groups_that_do_not_divide(tiny: Path, fit: Callable[..., Said]) -> None:
    refused(fit(tiny, "--plan", "rtn @ 4b/g48", "--no-padding", budget=()), "48 columns", "64", "padding")


# ---- where the run goes


def other_content(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("the only copy")


def a_file(folder: Path) -> None:
    folder.write_text("the only copy")


def a_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "journal.jsonl").write_text('{"step": "start", "value": {"model": "other"}}\n')


def a_torn_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(b'{"step": "start", "value"\n\xff\xfe\n')


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (other_content, [], ["already exists with other content", "--out"]),
        (other_content, ["--resume"], ["already exists with other content", "--out"]),
        (a_file, [], ["is a file"]),
        (a_run, [], ["already holds a run", "--resume"]),
        (a_run, ["--resume"], ["another job", "model", "'other'"]),
        (a_torn_run, ["--resume"], ["journal.jsonl", "damaged"]),
        (lambda folder: None, ["--resume"], ["holds no run", "--resume"]),
    ],
)
def test_folder_that_will_not_do(
    make: Callable[[Path], None], options: list[str], words: list[str], tiny: Path, text: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(out)
    before = tree(tmp_path)
    refused(cli("fit", tiny, "--data", text, "--size", f"{SIZE}B", *SMALL, "--quiet", "--out", out, *options), *words)
    assert tree(tmp_path) == before


def test_folder_below_a_file(tiny: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "run"
    refused(cli("fit", tiny, "--data", text, "--size", f"{SIZE}B", *SMALL, "-q", "--out", out), str(out), "no folder")


def test_resume_with_other_options(run: Run, tiny: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    before = tree(folder)
    start = ("fit", tiny, "--data", text, *SMALL, "-q", "--out", folder, "--resume")
    refused(cli(*start, "--size", "700kB"), "another job", "budget", "700000")
    refused(cli(*start, "--size", f"{SIZE}B", "--seed", "3"), "another job", "seed", "3 asked")
    assert tree(folder) == before


def test_resume_after_the_weights_changed(run: Run, tiny: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    """The same folder with other weights in it is another model."""
    backup = weights(tiny).read_bytes()
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    try:
        set_to(0.5)(tiny)
        line = ("fit", tiny, "--data", text, *SMALL, "-q", "--out", folder, "--resume", "--size", f"{SIZE}B")
        refused(cli(*line), "another job", "hash")
    finally:
        weights(tiny).write_bytes(backup)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as on a full disk: writing fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PLAN = ("--plan", "gptq @ 4b/g32/sym")


def test_full_disk_stops_a_fit_which_then_goes_on(
    symmetric: Run, tiny: Path, text: Path, cli: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = ("fit", tiny, "--data", text, *SMALL, "-q", *PLAN, "--out", run)
    with largest_file(100_000):  # the blocks' steps fit, the head's does not
        refused(cli(*line), "disk is full", "--resume")
    with largest_file(300_000):  # all steps fit, the artifact does not
        refused(cli(*line, "--resume"), "disk is full", "--resume")
    assert not (run / "artifact").exists() and not (run / "report.json").exists()
    assert [p for p in run.rglob("*") if ".part" in str(p) or ".tmp" in str(p)] == []
    assert cli(*line, "--resume").code == 0
    assert tree(run / "artifact") == tree(symmetric.artifact)


def test_full_disk_stops_an_export(run: Run, cli: Cli, tmp_path: Path) -> None:
    for to, out in (("hf", "folder"), ("gguf", "model.gguf")):
        with largest_file(100_000):
            refused(cli("export", run.artifact, "--to", to, "--out", tmp_path / out), "disk")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written: for root, who may write everywhere, an immutable or read-only mounted one."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    undo = None
    if os.access(folder, os.W_OK):
        if os.system(f"mount -t tmpfs -o ro none {folder} 2>/dev/null") == 0:
            undo = f"umount {folder}"
        elif os.system(f"chattr +i {folder} 2>/dev/null") == 0:
            undo = f"chattr -i {folder}"
        else:
            pytest.skip("root may write everywhere here, and neither mount nor chattr is allowed")
    yield folder
    if undo:
        os.system(undo)
    folder.chmod(0o755)


def test_read_only_folder(unwritable: Path, run: Run, tiny: Path, text: Path, cli: Cli) -> None:
    out = unwritable / "run"
    refused(cli("fit", tiny, "--data", text, *SMALL, "-q", *PLAN, "--out", out), str(out), "cannot be written")
    refused(cli("export", run.artifact, "--to", "hf", "--out", out), str(unwritable))


# ---- the other commands


def test_run_refuses(run: Run, cli: Cli, tmp_path: Path) -> None:
    refused(cli("run", tmp_path / "nothing", "--prompt", "x"), "nothing")
    refused(cli("run", run.artifact, "--prompt", "def " * 300), "context is 256", "shorten")
    refused(cli("run", "pocket-vit", "--prompt", "x"), "classification")
    refused(cli("run", run.artifact, "--temperature", "hot"), "--temperature")


def test_damaged_artifacts(run: Run, cli: Cli, tmp_path: Path) -> None:
    def broken(change: Callable[[Path], None]) -> Path:
        shutil.rmtree(tmp_path / "artifact", ignore_errors=True)
        folder = Path(shutil.copytree(run.artifact, tmp_path / "artifact"))
        change(folder)
        return folder

    def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            content = json.loads((folder / "trimtab.json").read_text())
            change(content)
            (folder / "trimtab.json").write_text(json.dumps(content))

        return work

    name = next(iter(json.loads((run.artifact / "trimtab.json").read_text())["packed"]))
    cases: list[tuple[Callable[[Path], None], list[str]]] = [
        (lambda f: (f / "trimtab.json").unlink(), []),
        (lambda f: (f / "trimtab.json").write_text("{"), ["trimtab.json", "damaged"]),
        (lambda f: (f / "trimtab.json").write_text("[]"), ["trimtab.json", "damaged"]),
        (lambda f: (f / "trimtab.json").write_bytes(b"\xff\xfe"), ["trimtab.json", "damaged"]),
        (cut, ["model.safetensors", "cut off"]),
        (removed, ["safetensors"]),
        (manifest(lambda m: m.update(format=99)), ["format 99"]),
        (manifest(lambda m: m["packed"][name].update(level="5b/g32")), [name, "damaged"]),
        (manifest(lambda m: m["packed"][name].update(level="nonsense")), ["trimtab.json", name, "damaged"]),
        (manifest(lambda m: m["packed"][name].update(level="drop")), ["trimtab.json", name, "damaged"]),
        (manifest(lambda m: m["packed"][name].update(shape=[3, 5])), [name, "damaged"]),
        (manifest(lambda m: m["packed"][name].pop("shape")), [name, "damaged"]),
        (manifest(lambda m: m["packed"].update({"model.nothing.weight": m["packed"][name]})), ["model.nothing.weight"]),
        (manifest(lambda m: m["packed"].pop(name)), [name]),
        (manifest(lambda m: m.update(packed={name: 5})), [name, "damaged"]),
        (manifest(lambda m: m.update(edits=[{"do": "mischief"}])), ["mischief", "no edit"]),
        (manifest(lambda m: m.update(edits=7)), ["trimtab.json"]),
        (manifest(lambda m: m.pop("task")), ["trimtab.json", "task"]),
    ]
    for i, (change, words) in enumerate(cases):
        said = cli("run", broken(change), "--prompt", "def", "--tokens", "1")
        try:
            refused(said, *words)
        except AssertionError as error:
            raise AssertionError(f"case {i}: {error}") from error


def test_report_of_nothing(cli: Cli, tmp_path: Path) -> None:
    refused(cli("report", tmp_path), "no run", "trimtab fit")
    (tmp_path / "journal.jsonl").write_text("{}\n")
    refused(cli("report", tmp_path), "unfinished", "--resume")
    (tmp_path / "report.json").write_text("{")
    refused(cli("report", tmp_path), "report.json", "damaged")


def test_methods_and_claims_that_are_none(cli: Cli) -> None:
    refused(cli("show", "gtpq"), "did you mean 'gptq'")
    refused(cli("methods", "--family", "quantt"), "did you mean 'quant'")
    refused(cli("claim", "rtn"), "rtn has no claim")
    refused(cli("claim"), "method", "--all")


# ---- as real processes


def test_refusal_of_a_real_process(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused(command("fit", tiny, "--data", text, "--size", "300kB", *SMALL, "--out", out), "smallest")
    assert not out.exists()


def test_hub_without_a_network(tmp_path: Path) -> None:
    empty = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    said = command("fit", "owner/never-downloaded", "--size", "1MB", "--out", tmp_path / "run", env=empty)
    refused(said, "owner/never-downloaded", "network")
    assert not (tmp_path / "run").exists()


def test_tokenizer_of_another_model_by_its_ids(tiny: Path, tmp_path: Path, fit: Callable[..., Said]) -> None:
    """A tokenizer that knows fewer tokens than the model is no fault: many models pad their vocabulary."""
    add_tokenizer(tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert max(tokens.values()) < json.loads((tiny / "config.json").read_text())["vocab_size"]
