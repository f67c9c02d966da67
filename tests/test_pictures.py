"""Folders of images as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Said

from trimtab.adapting import adapt
from trimtab.core.errors import UserError
from trimtab.models.source import open_source
from trimtab.tasks.digits import digits
from trimtab.tasks.pictures import read_pictures

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
    assert said.code == 2 and "class 12" in said.err
