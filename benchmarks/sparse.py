"""At which sparsity does each sparse format beat dense fp32 here? Linear layers and whole image classifiers, as ratios.

1. Linear layers of 2048 x 8192 and 8192 x 2048, for 1, 8 and 128 inputs: unstructured at several sparsities and 2:4,
   beside torch's dense fp32 and bf16 products.
2. ResNet-20 (the trained one where TRIMTAB_DATA names it, else of random weights) and a MobileNet-like network of
   depthwise and pointwise convolutions at 32 x 32 and 112 x 112 pixels, for 1 and 32 images. Batch normalisation is
   folded into the convolutions on both sides. All convolutions but the first and the depthwise ones are pruned by
   magnitude, row by row; those two kinds keep all weights, and run on the same kernel. The dense baseline is torch's
   own convolution (oneDNN), in the faster of its two layouts.

Every ratio is dense seconds / sparse seconds, both the least of several turns taken in turn, in seconds of the
processor on one thread, which a busy machine changes less than those on the wall; what is read from memory is compared
with the limit that is measured in the same run. That the sparse outputs equal the dense ones with the same zeros is
checked, or there is no ratio. A markdown table is printed, a JSON line appended to records/benchmarks/sparse.jsonl, and
docs/sparse-speed.md written from it.

    python benchmarks/sparse.py             # some minutes
    python benchmarks/sparse.py --small     # small shapes, to see that it runs; nothing is recorded
    python benchmarks/sparse.py --page      # docs/sparse-speed.md from the last record
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.core.level import NM, Level, Sparse, parse_level, rows_cols
from trimtab.formats.packed import Packed, pack_nm, pack_sparse
from trimtab.kernels.native import native
from trimtab.kernels.sparse.module import SparseConv2d
from trimtab.kernels.weight import weight_of

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "records" / "benchmarks" / "sparse.jsonl", ROOT / "docs" / "sparse-speed.md"
LINEAR = ("50%", "70%", "80%", "90%", "95%", "2:4")
CONV = ("0%", "50%", "70%", "80%", "90%", "95%")
AGREE = 1e-3  # of the largest output; bf16 is not compared


def least(works: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The least seconds of the processor that each piece takes, all of them once a turn, after a turn to warm up."""
    found = dict.fromkeys(works, float("inf"))
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.thread_time()
            work()
            if turn:
                found[name] = min(found[name], time.thread_time() - start)
    return found


def pruned(weight: Tensor, level: Level) -> Packed:
    """The largest weights of each row, or of each group, as the level keeps them."""
    shape = tuple(weight.shape)
    rows, cols = rows_cols(shape)
    flat = weight.detach().reshape(rows, cols)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if isinstance(level, NM):
        groups = flat.abs().reshape(rows, -1, level.m)
        mask = mask.reshape(groups.shape).scatter_(2, groups.topk(level.n).indices, True).reshape(rows, cols)
        return pack_nm(flat, mask, level, shape)
    assert isinstance(level, Sparse)
    mask.scatter_(1, flat.abs().topk(level.kept(shape) // rows).indices, True)
    return pack_sparse(flat, mask, level, shape)


def agree(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises RuntimeError: the two outputs differ, so that their times do not compare."""
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= AGREE:
        raise RuntimeError(f"{what}: the sparse output differs by {worst:.2g} of the largest, so times do not compare")


# ---- linear layers


def limits(turns: int) -> dict[str, float]:
    """What the machine reads (GB/s, a set far beyond the caches) and multiplies in fp32 (GFLOP/s, torch's product)."""
    big, square = torch.ones(1 << 27), torch.randn(2048, 2048)
    took = least({"read": big.sum, "multiply": lambda: square @ square}, turns)
    return _rounded(
        {"read_gb_s": big.nbytes / took["read"] / 1e9, "fp32_gflop_s": 2 * 2048**3 / took["multiply"] / 1e9}
    )


def linear(rows: int, cols: int, turns: int) -> list[dict[str, Any]]:
    """For each number of inputs and each level: ratios, and bytes read a second."""
    torch.manual_seed(0)
    weight = torch.randn(rows, cols) * 0.02
    brief = weight.bfloat16()
    packed = {text: pruned(weight, parse_level(text)) for text in LINEAR}
    kernels = {text: weight_of(native(), [p]) for text, p in packed.items()}
    found = []
    for m in (1, 8, 128):
        x = torch.randn(m, cols)
        xs, xb = x.numpy(), x.bfloat16()
        for text, kernel in kernels.items():
            agree(torch.from_numpy(kernel.apply(xs)), x @ packed[text].dense().T, f"{rows} x {cols}, {text}, m={m}")
        works: dict[str, Callable[[], Any]] = {
            "fp32": lambda x=x: nn.functional.linear(x, weight),
            "bf16": lambda xb=xb: nn.functional.linear(xb, brief),
            **{text: (lambda kernel=kernel, xs=xs: kernel.apply(xs)) for text, kernel in kernels.items()},
        }
        took = least(works, turns)
        for text, kernel in kernels.items():
            row = {"shape": [rows, cols], "m": m, "level": text}
            numbers = {
                "to_fp32": took["fp32"] / took[text],
                "to_bf16": took["bf16"] / took[text],
                "read_gb_s": kernel.nbytes / took[text] / 1e9,
                "dense_fp32_gflop_s": 2 * m * rows * cols / took["fp32"] / 1e9,
            }
            found.append({**row, **_rounded(numbers)})
    return found


# ---- networks


class OnKernels(SparseConv2d):
    """A sparse convolution that asks nothing of whether it pays."""

    forward = SparseConv2d.on_kernels


class Separable(nn.Sequential):
    """A depthwise 3x3 and a pointwise convolution, both normalised (Howard et al. 2017, arXiv:1704.04861)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            nn.Conv2d(inside, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )


def mobile() -> nn.Module:
    """A first convolution and eight separable ones, 32 to 512 channels, three of them with a stride."""
    plan = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1))
    first = (nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*first, *(Separable(*p) for p in plan), Separable(512, 512, 1), *last)


def resnet20() -> nn.Module:
    """The trained one, or the same shapes with random weights."""
    from benchmarks.resnet import ResNet
    from benchmarks.resnet import resnet20 as trained
    from trimtab.catalogue import data_folder

    return trained() if data_folder() is not None else ResNet(3)


def folded(model: nn.Module) -> nn.Module:
    """Every batch normalisation folded into the convolution that was defined before it."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        before: tuple[str, nn.Conv2d] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                before = (name, child)
            elif isinstance(child, nn.BatchNorm2d) and before is not None:
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, nn.Identity())
                before = None
    return model


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """Every convolution, its parent and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                yield parent, name, child


def network(name: str, model: nn.Module, size: int, batches: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """For each number of images and each sparsity, how many times as fast as dense the sparse network is."""
    torch.manual_seed(0)
    dense = folded(model)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    sparse: dict[str, nn.Module] = {}
    zeroed: dict[str, nn.Module] = {}
    for text in CONV:
        sparse[text], zeroed[text] = copy.deepcopy(dense), copy.deepcopy(dense)
        pairs = zip(list(convolutions(sparse[text])), list(convolutions(zeroed[text])), strict=True)
        for (parent, path, conv), (_, _, same) in pairs:
            whole = conv.groups > 1 or conv.in_channels == 3
            packed = pruned(conv.weight, parse_level("0%" if whole else text))
            setattr(parent, path, OnKernels(packed, conv))
            same.weight.data = packed.dense()
    found = []
    for images in batches:
        x = torch.randn(images, 3, size, size)
        xl = x.to(memory_format=torch.channels_last)
        for text in CONV:
            agree(sparse[text](x), zeroed[text](x), f"{name}, {text}, {images} images")
        works: dict[str, Callable[[], Any]] = {
            "dense": lambda x=x: dense(x),
            "channels last": lambda xl=xl: last(xl),
            **{text: (lambda net=net, x=x: net(x)) for text, net in sparse.items()},
        }
        took = least(works, turns)
        baseline = min(took["dense"], took["channels last"])
        ratios = {text: baseline / took[text] for text in CONV}
        row = {"network": name, "pixels": size, "images": images, "dense_seconds": float(f"{baseline:.4g}")}
        found.append({**row, "to_dense": _rounded(ratios)})
    return found


# ---- record and page


def tables(row: Mapping[str, Any]) -> str:
    """The record as markdown."""
    reads, peak = row["limits"]["read_gb_s"], row["limits"]["fp32_gflop_s"]
    lines = [
        f"Measured on {row['machine']['cpu']}, one thread, the `{row['variant']}` kernels, "
        f"torch {row['versions']['torch']}, {row['date'][:10]}. In the same run the machine read {reads:.0f} GB/s and "
        f"torch's fp32 product of 2048 x 2048 matrices ran at {peak:.0f} GFLOP/s.",
        "",
        "## Linear layers",
        "",
        "| weight | level | inputs | to dense fp32 | to dense bf16 | read, of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for r in row["linear"]:
        rows, cols = r["shape"]
        share = f"{r['read_gb_s'] / reads:.0%}"
        ratios = f"{r['to_fp32']:.2f} | {r['to_bf16']:.2f}"
        lines.append(f"| {rows} x {cols} | {r['level']} | {r['m']} | {ratios} | {share} |")
    lines += ["", "A share above 100 % means that the packed weight stayed in the last cache between turns.", ""]
    lines += [
        "## Networks",
        "",
        f"| network | pixels | images | {' | '.join(CONV)} |",
        "|---|---|---|" + "---|" * len(CONV),
    ]
    for r in row["networks"]:
        ratios = " | ".join(f"{r['to_dense'][text]:.2f}" for text in CONV)
        lines.append(f"| {r['network']} | {r['pixels']} | {r['images']} | {ratios} |")
    lines += ["", "## Where sparse wins", "", *_wins(row)]
    return "\n".join(lines) + "\n"


def _wins(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for shape, m in dict.fromkeys((tuple(r["shape"]), r["m"]) for r in row["linear"]):
        rows = [r for r in row["linear"] if tuple(r["shape"]) == shape and r["m"] == m]
        for other in ("fp32", "bf16"):
            said = _from([(r["level"], r[f"to_{other}"]) for r in rows if "%" in r["level"]])
            pattern = next(r[f"to_{other}"] for r in rows if r["level"] == "2:4")
            verdict = f"2:4 {'wins' if pattern > 1 else 'loses'} ({pattern:.2f})"
            lines.append(f"- {shape[0]} x {shape[1]}, {m} inputs, against {other}: unstructured {said}; {verdict}.")
    for r in row["networks"]:
        where = f"{r['network']} at {r['pixels']} pixels, {r['images']} images, against fp32"
        lines.append(f"- {where}: unstructured {_from(list(r['to_dense'].items()))}.")
    return lines


def _from(ratios: list[tuple[str, float]]) -> str:
    """The sparsity from which on every ratio is above one."""
    first = None
    for text, ratio in reversed(ratios):
        if ratio <= 1:
            break
        first = text
    return "never wins" if first is None else f"wins from {first} on"


def page(row: Mapping[str, Any]) -> str:
    """docs/sparse-speed.md."""
    head = """# Speed of sparse weights

From which sparsity on is a sparse weight faster than a dense one, on the kernels that Trimtab brings? Every number
below is dense seconds divided by sparse seconds, both of the processor, on one thread, in one run: above 1, sparse is
faster. This page is written by `benchmarks/sparse.py` from the last line of `records/benchmarks/sparse.jsonl`. Outputs
are allocated anew by each call on both sides; the kernels ask for huge pages, torch does not, and it shows.

"""
    return head + tables(row)


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


@torch.no_grad()
def measured(small: bool) -> dict[str, Any]:
    """The whole benchmark as a row of the record."""
    from trimtab.evidence import machine, versions

    module = native()
    if module is None:
        raise SystemExit("no kernels are compiled here, so there is nothing to measure")
    torch.set_num_threads(1)
    module.set_threads(1)
    load, turns = os.getloadavg()[0], 3 if small else 20
    shapes = ((128, 256),) if small else ((2048, 8192), (8192, 2048))
    nets = [("ResNet-20", resnet20(), 32), ("MobileNet-like", mobile(), 32)]
    nets += [] if small else [("MobileNet-like", mobile(), 112)]
    batches = (1,) if small else (1, 32)
    return {
        "benchmark": "sparse",
        "variant": module.__name__.rpartition("._")[2],
        "limits": limits(3),
        "linear": [row for shape in shapes for row in linear(*shape, turns)],
        "networks": [row for name, net, size in nets for row in network(name, net, size, batches, turns)],
        **{"machine": machine(), "versions": versions(), "load_at_start": round(load, 1)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="small shapes; nothing is recorded")
    parser.add_argument("--page", action="store_true", help="write the page from the last record; nothing is measured")
    asked = parser.parse_args()

    if not asked.page:
        row = measured(asked.small)
        print(tables(row))
        if asked.small:
            return
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with open(RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text("utf-8").splitlines()[-1])), "utf-8")


if __name__ == "__main__":
    main()
