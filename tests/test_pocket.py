"""The shipped models are what their figures say, load in stock libraries and never saw their test data."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trimtab.core.errors import UserError
from trimtab.models.pocket import POCKET
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig
from trimtab.tasks.digits import digits, split_indices
from trimtab.tasks.text import Document, split_of, start_token, stdlib_documents, token_blocks, tokenize_bytes

LM, CNN, VIT = POCKET["pocket-lm"], POCKET["pocket-cnn"], POCKET["pocket-vit"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(LM)


def test_all_shipped_files_together_stay_below_16_megabytes():
    files = [f for folder in set(POCKET.values()) for f in folder.iterdir()]
    assert {LM / "model.safetensors", CNN / "model.safetensors", VIT / "model.safetensors"} <= set(files)
    assert sum(f.stat().st_size for f in files) < 16e6


@pytest.mark.parametrize("name", ["pocket-lm", "pocket-cnn", "pocket-vit"])
def test_figures_belong_to_the_shipped_weights(name):
    figures = json.loads((POCKET[name] / "figures.json").read_text())
    weights = (POCKET[name] / "model.safetensors").read_bytes()
    assert figures["model"] == name
    assert figures["weight_sha256"] == hashlib.sha256(weights).hexdigest()
    assert figures["weight_bytes"] == len(weights)
    rows = (POCKET[name] / "train-log.jsonl").read_text().splitlines()
    assert 10 <= len(rows) <= 300 and json.loads(rows[-1])["loss"] < json.loads(rows[0])["loss"]


def test_names_and_text_load_without_torch():
    code = "import sys, trimtab.models.pocket, trimtab.tasks.text, trimtab.tasks.digits; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- the language model


def test_lm_beats_xz_on_the_first_blocks_of_test(tokenizer):
    """Subset: the first 16 blocks of 512 tokens (about 27 kB) of the test modules in the order of their paths."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 6e6
    documents = stdlib_documents("test")
    blocks = token_blocks(tokenizer, documents, 512, limit=16)
    with torch.no_grad():
        means = [model(input_ids=rows, labels=rows).loss.item() for rows in blocks.tokens.split(8)]
    nats = sum(means) * 8 * 511
    covered = int(blocks.bytes.sum())
    text = "".join(d.text for d in documents).encode()[:covered]
    assert len(text) == covered > 16_000
    assert nats / math.log(2) / 8 < len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_lm_beats_xz_on_all_of_test_where_it_was_trained():
    test = json.loads((LM / "figures.json").read_text())["test"]
    assert test["bits_per_byte"] < test["xz_bits_per_byte"]


def test_lm_continues_code_with_and_without_its_cache(tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    prompt = tokenizer("import os\nimport sys\n\n\ndef main(argv):\n    ", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    plain, cached = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=1)
        for cache in (False, True)
    )
    assert torch.equal(plain, cached)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_tokenizer_covers_any_text_and_counts_its_bytes(tokenizer, text):
    ids, sizes = tokenize_bytes(tokenizer, text)
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == tokenizer.eos_token_id
    assert len(ids) == len(sizes) and sum(sizes) == len(text.encode()) and sizes[-1] == 0


def test_blocks_cover_a_prefix_of_the_text_each_byte_once(tokenizer):
    texts = ["x = 1\n" * 40, "naïve = 'café ☕'\n" * 30]
    blocks = token_blocks(tokenizer, [texts[0], Document("b.py", texts[1])], 16)
    assert blocks.tokens.shape == (len(blocks), 16) and bool((blocks.tokens[:, 0] == tokenizer.bos_token_id).all())
    covered = "".join(texts).encode()[: int(blocks.bytes.sum())].decode()
    assert tokenizer.decode(blocks.tokens[:, 1:].flatten(), skip_special_tokens=True) == covered
    head = token_blocks(tokenizer, texts, 16, limit=2)
    assert torch.equal(head.tokens, blocks.tokens[:2]) and torch.equal(head.bytes, blocks.bytes[:2])


def test_blocks_refuse_too_little_text_and_tokenizers_without_a_start(tokenizer):
    with pytest.raises(UserError, match="less than one block of 512"):
        token_blocks(tokenizer, ["x"], 512)

    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(UserError, match="neither a start nor an end"):
        start_token(Bare())
    with pytest.raises(UserError, match="fast tokenizer"):
        tokenize_bytes(Bare(), "x")


def test_text_splits_share_no_module_and_no_content():
    splits = {s: stdlib_documents(s) for s in ("train", "search", "test")}
    assert all(split_of(d.path) == s for s, documents in splits.items() for d in documents)
    everything = [d for documents in splits.values() for d in documents]
    assert len({d.path for d in everything}) == len({d.text for d in everything}) == len(everything)
    assert len(splits["train"]) > 10 * len(splits["test"]) > 0
    with pytest.raises(UserError, match="train, search, test"):
        stdlib_documents("validation")


def test_text_skips_what_is_no_code_of_the_library(tmp_path: Path):
    body = "value = 1\n" * 40
    skipped = ("site-packages/a.py", "encodings/b.py", "pkg/__pycache__/c.py", "sitecustomize.py")
    for name in ("kept.py", "copy.py", *skipped):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body + "# " + name if name in skipped else body)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n" + body.encode())
    (tmp_path / "small.py").write_text("x = 1\n")
    found = []
    for split in ("train", "search", "test"):
        try:
            found += stdlib_documents(split, tmp_path)
        except UserError as error:
            assert "no source files" in str(error)
    assert [(d.path, d.text) for d in found] == [("copy.py", body)]


def test_an_epoch_shows_every_block_once_and_the_rate_falls_to_zero():
    from trimtab.models.pocket.train_lm import CONTEXT, Recipe, batch_at, rate_at, share_done

    recipe = Recipe(batch=2)
    stream = torch.arange(9 * (CONTEXT - 1) + 5)
    rows = torch.cat([batch_at(step, stream, recipe) for step in range(4)])
    assert bool((rows[:, 0] == 0).all()) and bool((rows[:, 2:] - rows[:, 1:-1] == 1).all())
    starts = rows[:, 1].sort().values
    assert bool((starts.diff() == CONTEXT - 1).all()) and len(starts) == 8
    assert torch.equal(batch_at(5, stream, recipe), batch_at(5, stream, recipe))
    rates = [rate_at(200, done / 100, recipe) for done in range(101)]
    assert rates[0] == 1 and rates[-1] == 0 and rates == sorted(rates, reverse=True) and rate_at(0, 0.0, recipe) < 0.05
    assert share_done({"step": 9, "steps": None, "seconds": 600.0}, guard=50) == 0
    assert share_done({"step": 50, "steps": 100, "seconds": 600.0}, guard=50) == 0.5
    assert share_done({"step": 50, "steps": 100, "seconds": 3000.0}, guard=50) == 1


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path, monkeypatch):
    from transformers import LlamaConfig

    from trimtab.models.pocket import train_lm

    tiny = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    monkeypatch.setattr(train_lm, "config", lambda: tiny)
    recipe = train_lm.Recipe(batch=2)
    stream = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0))

    def steps(model, optims, first, last):
        for step in range(first, last):
            train_lm.train_step(model, optims, train_lm.batch_at(step, stream, recipe), 0.5, recipe)

    model = train_lm.build(recipe)
    optims = train_lm.optimizers(model, recipe)
    steps(model, optims, 0, 2)
    work = train_lm.Work(tmp_path)
    work.save(model, optims, {"step": 2})
    steps(model, optims, 2, 4)
    again = train_lm.build(train_lm.Recipe(seed=1))
    again_optims = train_lm.optimizers(again, recipe)
    assert work.load(again, again_optims) == {"step": 2}
    steps(again, again_optims, 2, 4)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# ---- the vision models


def test_digit_splits_are_disjoint_and_normalised():
    rows = [set(split_indices(s)) for s in ("train", "search", "test")]
    assert [len(r) for r in rows] == [1197, 300, 300] and len(set.union(*rows)) == 1797
    images, labels = digits("test")
    assert images.shape == (300, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1 and set(labels.tolist()) == set(range(10))
    with pytest.raises(UserError, match="train, search, test"):
        digits("all")


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_vision_models_pass_97_percent_on_test(name):
    from trimtab.models.pocket.train_vision import correct, load

    right, count = correct(load(name, POCKET[f"pocket-{name}"]), "test")
    assert right / count > 0.97
    assert right == json.loads((POCKET[f"pocket-{name}"] / "figures.json").read_text())["test"]["correct"]


def test_augmentation_without_motion_changes_nothing_and_a_shift_leaves_an_empty_border():
    from trimtab.models.pocket.train_vision import Recipe, augment

    images, _ = digits("search")
    rng = torch.Generator().manual_seed(0)
    still = augment(images, Recipe(epochs=1, rate=0, turn=0, zoom=0, shift=0), rng)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)
    far = augment(images[:8], Recipe(epochs=1, rate=0, turn=0, zoom=0, shift=1e6), rng)
    torch.testing.assert_close(far, torch.full_like(far, -1.0))


def test_cnn_with_fewer_channels_round_trips(tmp_path: Path):
    config = PocketCNNConfig(widths=(5, 8, 12), inner=((3, 4), (7,), (2, 9, 1)), classes=4)
    assert PocketCNNConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    torch.manual_seed(0)
    model = PocketCNN(config).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(PocketCNN.from_pretrained(tmp_path)(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "resnet"}, "model_type 'resnet'"),
        ({"widths": [16, 0, 64]}, "must be positive"),
        ({"inner": [[16]]}, "at least one block"),
        ({"inner": 3}, "lacks or garbles"),
        ({"widths": [16, 32, 60]}, "do not fit its config"),
    ],
)
def test_cnn_refuses_a_config_that_does_not_fit(tmp_path: Path, change, message):
    config = json.loads((CNN / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((CNN / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        PocketCNN.from_pretrained(tmp_path)


def test_cnn_refuses_missing_damaged_and_incomplete_weights(tmp_path: Path):
    with pytest.raises(UserError, match="does not hold a readable PocketCNN"):
        PocketCNN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((CNN / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((CNN / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="does not hold a readable PocketCNN"):
        PocketCNN.from_pretrained(tmp_path)
    tensors = load_file(CNN / "model.safetensors")
    tensors.pop("head.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"first head\.bias"):
        PocketCNN.from_pretrained(tmp_path)


def test_the_page_quotes_the_figures():
    page = (Path(__file__).parent.parent / "docs" / "pocket.md").read_text()
    figures = {name: json.loads((POCKET[name] / "figures.json").read_text()) for name in POCKET}
    for split in ("search", "test"):
        row = figures["pocket-lm"][split]
        numbers = [f"{row[k]:.3f}" for k in ("bits_per_byte", "xz_bits_per_byte", "ratio_to_xz")]
        assert f"| {split} | {row['bytes']:,} | {' | '.join(numbers)} |" in page
    for name in ("pocket-cnn", "pocket-vit"):
        train, search, test = (figures[name][s]["correct"] for s in ("train", "search", "test"))
        assert f"| `{name}` | {train} / 1197 | {search} / 300 | {test} / 300 |" in page
        assert f"{figures[name]['parameters']:,}" in page
