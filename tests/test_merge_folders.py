"""Joined models on disk: in a fresh process they give what they gave in memory, plain where a configuration says it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_merge_join import permuted
from test_merge_search import shaken
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.engine.joining import join as join_in_memory
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.structure import replay, widening
from trimtab.joining import join, save
from trimtab.loading import load
from trimtab.merge.pleas import PLeaS
from trimtab.merge.sn_net import SNNet
from trimtab.merge.sn_netv2 import SNNetv2
from trimtab.models.pocket import POCKET
from trimtab.models.pocket.cnn import PocketCNN
from trimtab.models.source import open_source
from trimtab.tasks.digits import digits

FRESH = """
import sys, torch
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.loading import load
torch.set_num_threads(1)
model = load(sys.argv[1], kernels=False).model
found, inputs = {}, Checkpoint(sys.argv[2]).read("x")
for place in range(len(getattr(model, "routes", (0,)))):
    model.place = place
    output = model(inputs)
    found[str(place)] = getattr(output, "logits", output).detach()
write_safetensors(found, sys.argv[3])
"""


def in_a_fresh_process(folder: Path, inputs: Tensor, place: Path) -> list[Tensor]:
    """What a saved model gives for inputs, on every route."""
    write_safetensors({"x": inputs}, place / "x.safetensors")
    line = [sys.executable, "-c", FRESH, str(folder), str(place / "x.safetensors"), str(place / "y.safetensors")]
    subprocess.run(line, check=True, timeout=120)
    made = Checkpoint(place / "y.safetensors")
    return [made.read(name) for name in made.names()]


@pytest.fixture
def cnns(tmp_path: Path) -> tuple[Path, Path]:
    """Two networks of one architecture whose units are in another order, and differ a little."""
    images, labels = (part[:200] for part in digits("train"))
    first = PocketCNN.from_pretrained(POCKET["pocket-cnn"]).eval().requires_grad_(False)
    second: Any = permuted(first, {"pixel_values": images})
    with torch.no_grad():
        second.head.weight.mul_(1.1)
    first.save_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize("extra", [0.0, 0.25, 1.0])
def test_a_widened_network_is_the_same_in_a_fresh_process(
    extra: float, cnns: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    data, out = str(tmp_path / "data.npz"), tmp_path / "out"
    said = cli("merge", *cnns, "--method", f"pleas(extra={extra})", "--data", data, "--out", out, "--json")
    assert said.code == 0, said.err
    report = said.json()
    assert report["form"] == ("artifact" if extra else "plain") and report["settings"] == (
        {"extra": extra} if extra else {}
    )
    images, labels = digits("test")
    loaded: Any = load(out, kernels=False).model
    assert torch.equal(in_a_fresh_process(out, images, tmp_path)[0], loaded(images))
    right = [
        float((m(images).argmax(1) == labels).float().mean()) for m in (loaded, PocketCNN.from_pretrained(cnns[0]))
    ]
    assert right[0] > right[1] - 0.05
    assert loaded.stem[0].weight.shape[0] == round((1 + extra) * 16)
    if not extra:
        assert open_source(str(out)).task == "classification"


def test_a_widened_language_model_is_a_plain_folder(
    tiny: Path, text: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    other, out = shaken(tiny, tmp_path / "other", 0.3, seed=1), tmp_path / "out"
    said = cli("merge", tiny, other, "--method", "pleas(extra=0.5)", "--data", text, "--dtype", "fp32", "--out", out)
    assert said.code == 0 and "plain" in said.out, said.err
    was, now = (json.loads((f / "config.json").read_text()) for f in (tiny, out))
    assert (
        now["intermediate_size"] == round(1.5 * was["intermediate_size"]) and now["hidden_size"] == was["hidden_size"]
    )
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = stock(input_ids=ids).logits
    assert torch.allclose(in_a_fresh_process(out, ids, tmp_path)[0], wanted, atol=1e-4)
    assert cli("run", out, "--prompt", "import", "--tokens", "3").code == 0
    again = tmp_path / "again"
    join([tiny, other], method=PLeaS(extra=0.5), data=str(text), dtype="fp32", out=again)
    one, two = Checkpoint(out), Checkpoint(again)
    assert all(torch.equal(one.read(n), two.read(n)) for n in one.names()), "not the same the second time"


def vits(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    from transformers import ViTConfig, ViTForImageClassification

    made = []
    for name, depth, wide in (("small", 2, 16), ("large", 4, 24)):
        torch.manual_seed(depth)
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=wide, num_hidden_layers=depth,
                           num_attention_heads=4, intermediate_size=2 * wide, num_labels=10)  # fmt: skip
        ViTForImageClassification(config).to(dtype).save_pretrained(folder / name)
        made.append(folder / name)
    np.savez(
        folder / "data.npz", images=np.random.default_rng(0).random((40, 1, 8, 8), "float32"), labels=np.arange(40) % 10
    )
    return made[0], made[1]


def test_a_stitched_network_is_the_same_on_every_route(tmp_path: Path, cli: Callable[..., Any]) -> None:
    small, large = vits(tmp_path)
    out = tmp_path / "out"
    said = cli("merge", small, large, "--method", "sn-net", "--data", tmp_path / "data.npz", "--out", out, "--json")
    assert said.code == 0, said.err
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    loaded: Any = load(out).model
    wanted = []
    for place in range(len(loaded.routes)):
        loaded.place = place
        wanted.append(loaded(images).logits)
    found = in_a_fresh_process(out, images, tmp_path)
    assert len(found) == 3 and all(map(torch.equal, found, wanted))
    for anchor, logits in ((small, found[0]), (large, found[-1])):
        assert torch.equal(open_source(str(anchor)).materialise()(images).logits, logits)
    assert [loaded.cost(i) for i in range(3)] == sorted(loaded.cost(i) for i in range(3))


def test_a_trained_stitched_network_is_saved_as_it_is(tmp_path: Path) -> None:
    sources = [open_source(str(f)) for f in vits(tmp_path)]
    images = torch.rand(6, 1, 8, 8)
    method = SNNetv2(rank=2)
    made: Any = join_in_memory(method, [s.materialise() for s in sources], [{"pixel_values": images}])
    with torch.no_grad():
        for stitch in made.stitches.values():
            stitch.up.normal_()
    made.place = 2
    save(made, sources, out=tmp_path / "out", method=method)
    loaded: Any = load(tmp_path / "out").model
    assert loaded.place == 2 and torch.equal(loaded(images).logits, made(images).logits)
    assert loaded.routes == made.routes and loaded.blocks == made.blocks


def test_what_cannot_be_joined_or_saved_is_refused(
    cnns: tuple[Path, Path], tiny: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    one, two = cnns
    out, data = tmp_path / "out", tmp_path / "data.npz"

    def refused(*arguments: Any, part: str) -> None:
        said = cli("merge", *arguments)
        assert said.code == 2 and part in said.err and "\n" not in said.err.strip(), said
        assert not out.exists() and not list(tmp_path.glob(".*")), "something was left"

    refused(one, two, "--method", "pleas", "--base", one, "--data", data, "--out", out, part="no more")
    refused(one, two, "--method", "pleas", "--data", data, "--weight", "1", "--out", out, part="no more")
    refused(one, two, "--method", "linear", "--data", data, "--out", out, part="--data was given")
    refused(one, one, "--method", "pleas", "--data", data, "--out", out, part="named twice")
    refused(one, tiny, "--method", "pleas", "--data", data, "--out", out, part="one task")
    refused(one, two, "--method", "pleas", "--data", data, "--out", one / "inside", part="lies in or around")
    refused(one, two, "--method", "pleas", "--data", data, "--dtype", "int8", "--out", out, part="int8")
    refused(one, two, "--method", "pleas(extra=3)", "--data", data, "--out", out, part="extra=3")
    refused(one, two, "--method", "pleas", "--out", out, part="labelled data")
    refused(one, two, "--method", "sn-net", "--data", data, "--out", out, part="from block to block")
    other = shaken(tiny, tmp_path / "other", 0.1)
    refused(tiny, other, "--method", "sn-net", "--out", out, part="has no form on disk")


@pytest.mark.parametrize(
    "change",
    [
        {"routes": [[[0, 0, 9]]]},
        {"routes": [[[0, 1, 1]]]},
        {"routes": [[[2, 0, 1]]]},
        {"routes": [[[0, 0, "x"]]]},
        {"routes": [[]]},
        {"routes": [[[0, 0, 1], [1, 1, 4]]]},
        {"routes": 3},
        {"place": 7},
        {"place": True},
        {"anchors": [{}]},
        {"blocks": [["nothing"], ["there"]]},
        {"stitches": {}},
        {"stitches": {"0_1__1_2": {"shape": [24, -1], "rank": 0}}},
    ],
)
def test_a_damaged_stitched_network_is_refused_in_a_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    small, large = vits(tmp_path)
    join([small, large], method=SNNet(), data=str(tmp_path / "data.npz"), out=tmp_path / "out")
    path = tmp_path / "out" / "trimtab.json"
    content = json.loads(path.read_text())
    content["stitched"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "shape", "more"),
    [
        ("0", [7, 2], {}),
        ("0", [2, 2], {}),
        ("0", [5, 2, 1], {}),
        ("1", [5], {}),
        ("0", [4, 2], {"groups": 2}),
        ("9", [4, 2], {}),
    ],
)
def test_widths_that_make_no_sense_are_refused(path: str, shape: list[int], more: dict[str, int]) -> None:
    with pytest.raises(UserError, match="edit widen"):
        replay(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [{"op": "widen", "path": path, "shape": shape, **more}])


def test_widening_says_what_makes_the_wider_model() -> None:
    def made(inner: int, groups: int) -> nn.Module:
        parts = (nn.Conv2d(3, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, 3, groups=groups))
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(inner, 2))

    edits = widening(made(4, 4), made(6, 6))
    state = made(6, 6).state_dict()
    wider = replay(made(4, 4), edits)
    wider.load_state_dict(state)
    assert [e["path"] for e in edits] == ["0", "1", "2", "4"] and wider(torch.rand(1, 3, 3, 3)).shape == (1, 2)
