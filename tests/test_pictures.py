"""Folders of images as data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Said

from trimtab.adapting import adapt
from trimtab.core.errors import UserError
from trimtab.models.adapter import attach, merge
from trimtab.models.pocket import POCKET
from trimtab.models.source import open_source
from trimtab.tasks.digits import digits
from trimtab.tasks.pictures import read_pictures
from trimtab.training import train

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits, a folder a class, twice as large as the model's."""
    root = tmp_path_factory.mktemp("images")
    images, labels = digits("train")
    for i in range(60):
        place = root / str(int(labels[i]))
        place.mkdir(exist_ok=True)
        pixels = ((images[i, 0] + 1) * 127.5).round().to(torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
        Image.fromarray(pixels.numpy()).save(place / f"{i:03}.png")
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_of_images_is_read_as_the_model_wants_it(folder: Path) -> None:
    images, labels = read_pictures(folder, open_source("pocket-vit"))
    assert images.shape == (60, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    order = sorted(range(60), key=lambda i: (str(int(digits("train")[1][i])), i))
    plain, known = digits("train")
    assert labels.tolist() == known[order].tolist()
    assert float((images - plain[order]).abs().mean()) < 0.15, "resized, it is about the same"
    with torch.no_grad():
        said = open_source("pocket-vit").materialise().eval()(pixel_values=images).logits.argmax(1)
    assert float((said == labels).float().mean()) > 0.8


def test_a_classifier_is_adapted_to_a_folder(folder: Path, tmp_path: Path) -> None:
    made = adapt("pocket-vit", str(folder), level="r2", out=tmp_path / "run", steps=2, batch=8)
    assert made.report["items"] == 36 and made.report["held_out"] == 12 and made.report["metric"] == "accuracy"


def test_folders_that_hold_no_data_are_refused(folder: Path, tmp_path: Path, cli: Callable[..., Said]) -> None:
    source = open_source("pocket-vit")
    with pytest.raises(UserError, match="0 images in 0 folders"):
        read_pictures(tmp_path, source)
    bad = tmp_path / "bad" / "0"
    bad.mkdir(parents=True)
    for i in range(12):
        (bad / f"{i}.png").write_bytes(b"no image at all")
    said = cli("adapt", "pocket-vit", "--data", tmp_path / "bad", "--out", tmp_path / "run", "-q")
    assert said.code == 2 and "0.png cannot be read" in said.err and not (tmp_path / "run").exists()
    for i in range(12):
        (bad / f"{i}.png").unlink()
        Image.new("L", (9, 9)).save(bad / f"{i}.png")
    (tmp_path / "bad" / "0").rename(tmp_path / "bad" / "12")
    said = cli("adapt", "pocket-vit", "--data", tmp_path / "bad", "--out", tmp_path / "run", "-q")
    assert said.code == 2 and "class 12" in said.err and "--fresh-head" in said.err


# ---- classes that the model does not know


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crosses, squares and stripes, twenty each, at places of their own."""
    root, rng = tmp_path_factory.mktemp("shapes"), torch.Generator().manual_seed(0)
    for name in ("cross", "square", "stripes"):
        (root / name).mkdir()
        for i in range(20):
            image, (x, y) = torch.zeros(8, 8, dtype=torch.uint8), torch.randint(3, (2,), generator=rng).tolist()
            if name == "cross":
                image[y + 2, x : x + 5] = image[y : y + 5, x + 2] = 255
            elif name == "square":
                image[y : y + 5, x : x + 5] = 255
            else:
                image[y % 2 :: 2] = 255
            Image.fromarray(image.numpy()).save(root / name / f"{i:02}.png")
    return root


def said_by(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


LEARN = {"steps": 40, "batch": 12, "rate": 1e-2, "fresh_head": True}


@pytest.mark.parametrize("method", ["lora", "dora", "bi-lora", "lst"])
def test_a_fresh_head_learns_classes_of_the_data_and_comes_back(shapes: Path, tmp_path: Path, method: str) -> None:
    level = "w25%" if method == "lst" else "r4"
    made = adapt("pocket-vit", str(shapes), method=method, level=level, out=tmp_path / "run", **LEARN)
    assert made.report["classes"] == ["cross", "square", "stripes"] and made.report["held_out"] == 12
    assert made.report["after"]["value"] >= 0.9 > 0.8 > made.report["before"]["value"]
    images, labels = read_pictures(shapes, open_source("pocket-vit"), fresh=True)
    again = attach(open_source("pocket-vit").materialise(), made.folder)
    assert torch.equal(said_by(again, images), said_by(made.model, images))
    assert float((said_by(again, images).argmax(1) == labels).float().mean()) >= 0.9
    assert labels.tolist() == [i for i in range(3) for _ in range(20)]
    if method != "lst":
        assert torch.allclose(said_by(merge(again), images), said_by(made.model, images), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stock_peft_loads_a_fresh_head_and_what_it_saves_is_taken(shapes: Path, tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import ViTForImageClassification

    made = adapt("pocket-vit", str(shapes), method=method, level="r4", out=tmp_path / "run", **LEARN)
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base = ViTForImageClassification.from_pretrained(POCKET["pocket-vit"], **options)
    theirs = peft.PeftModel.from_pretrained(base, made.folder)
    images = read_pictures(shapes, open_source("pocket-vit"), fresh=True)[0]
    assert torch.allclose(said_by(theirs, images), said_by(made.model, images), atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = attach(open_source("pocket-vit").materialise(), tmp_path / "theirs")
    assert torch.allclose(said_by(again, images), said_by(made.model, images), atol=1e-4)


def test_auto_tries_each_method_with_the_head_as_it_was(shapes: Path, tmp_path: Path) -> None:
    made = adapt("pocket-vit", str(shapes), method="auto", level="r2", out=tmp_path / "auto", **LEARN)
    assert any(note.startswith("auto: ") for note in made.report["notes"])
    plain = adapt("pocket-vit", str(shapes), method=made.report["method"], level="r2", out=tmp_path / "one", **LEARN)
    assert plain.report["loss"] == made.report["loss"], "no trial left anything behind"


@pytest.mark.parametrize("model", ["pocket-vit", "pocket-cnn"])
def test_a_whole_model_is_trained_with_a_fresh_head_and_its_folder_knows_the_classes(
    shapes: Path, tmp_path: Path, model: str
) -> None:
    made = train(model, str(shapes), optimizer="adamw", out=tmp_path / "run", **LEARN)
    assert made.report["classes"] == ["cross", "square", "stripes"] and made.report["after"]["value"] >= 0.9
    source = open_source(str(tmp_path / "run" / "model"))
    images = read_pictures(shapes, source, fresh=True)[0]
    again = source.materialise().eval()
    with torch.no_grad():
        said, ours = (getattr(out, "logits", out) for out in (again(images), made.model(images)))
    assert said.shape == (60, 3) and torch.allclose(said, ours, atol=1e-4)
    if model == "pocket-vit":
        assert read_pictures(shapes, source)[1].tolist() == [i for i in range(3) for _ in range(20)], "by their names"


def test_unknown_classes_are_refused_with_the_flag_and_the_flag_where_it_says_nothing(
    shapes: Path, tmp_path: Path, tiny: Path, data: Path, cli: Callable[..., Said]
) -> None:
    out = ("--out", tmp_path / "run", "-q")
    said = cli("adapt", "pocket-vit", "--data", shapes, *out)
    assert said.code == 2 and "called cross" in said.err and "3 classes with --fresh-head" in said.err
    said = cli("adapt", tiny, "--data", data, "--fresh-head", *out)
    assert said.code == 2 and "is for causal-lm" in said.err
    one = tmp_path / "one" / "cross"
    shutil.copytree(shapes / "cross", one)
    said = cli("train", "pocket-vit", "--data", one.parent, "--fresh-head", *out)
    assert said.code == 2 and "all of one class" in said.err
    labels = np.arange(20) % 2 * 2
    np.savez(tmp_path / "gap.npz", images=np.zeros((20, 1, 8, 8), np.float32), labels=labels)
    said = cli("adapt", "pocket-vit", "--data", tmp_path / "gap.npz", "--fresh-head", *out)
    assert said.code == 2 and "no item of class 1 " in said.err and not (tmp_path / "run").exists()
