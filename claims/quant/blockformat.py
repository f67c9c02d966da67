"""INT against FP in block formats: which of two formats of equal bits is nearer, with rotation and without."""

from __future__ import annotations

from math import log10
from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int, parse_level
from trimtab.quant.blockformat import BlockFormat

FORMATS = ("mxint8", "mxfp8", "mxint4", "mxfp4", "nvint4/h", "nvfp4/h", "8b/row/sym", "e4m3/row")
NARROW = Int(8, 16, True, "e4m3")

CLAIM = Claim(
    method="block-format",
    statement="In blocks of 32, 8-bit integers are nearer than 8-bit floats, and 4-bit floats than 4-bit integers; in "
    "rotated blocks of 16, 4-bit integers are as near as floats or nearer; a scale for each channel favours FP8; "
    "clipping integers to a symmetric range takes their bias away.",
    source="Chen et al. 2025, arXiv:2510.25602, sections 3.2, 4.2 and 5",
    figure="crossover crest factors: MXINT8 7.55, MXINT4 2.04, NVINT4 2.39",
    setting="Weights of the shipped language model's blocks, cast without calibration, activations in full precision; "
    "64 test windows of 256 tokens. Bias: 2,048 x 512 normal numbers of unit spread, cast to 8-bit integers in blocks "
    "of 16 under FP8 scales. Inputs: what reaches the last block's down projection, a scale a token.",
    metric="kl: mean KL divergence to the original, nats a token; qsnr: signal over quantisation noise of the weights, "
    "dB; bias: size of the mean error",
    checks=(
        Check("KL: MXINT8 below MXFP8", "kl_mxint8", "<", "kl_mxfp8"),
        Check("QSNR: MXINT8 above MXFP8", "qsnr_mxint8", ">", "qsnr_mxfp8"),
        Check("KL: MXFP4 below MXINT4", "kl_mxfp4", "<", "kl_mxint4"),
        Check("QSNR: MXFP4 above MXINT4", "qsnr_mxfp4", ">", "qsnr_mxint4"),
        Check("KL, rotated: NVINT4 not above NVFP4", "kl_nvint4_h", "<=", "kl_nvfp4_h"),
        Check("QSNR, rotated: NVINT4 not below NVFP4", "qsnr_nvint4_h", ">=", "qsnr_nvfp4_h"),
        Check("KL, a scale a channel: FP8 below INT8", "kl_e4m3_row", "<", "kl_8b_row_sym"),
        Check("QSNR of inputs, a scale a token: FP8 above INT8", "inputs_e4m3_row", ">", "inputs_8b_row_sym"),
        Check("QSNR of inputs, blocks of 32: MXINT8 above MXFP8", "inputs_mxint8", ">", "inputs_mxfp8"),
        Check("symmetric clipping lowers the bias", "bias_symmetric", "<", "bias_full"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows and of normal numbers."""
    bench = lab.bench("pocket-lm", seed)
    weights = [bench.weight(site.path) for site in bench.sites if site.kind == "linear" and site.block is not None]
    numbers = {}
    for text in FORMATS:
        name = text.replace("/", "_")
        found = bench.measure(f"block-format @ model.layers.*={text}")
        numbers[f"kl_{name}"] = found.damage
        numbers[f"qsnr_{name}"] = decibels(weights, text)
    inputs = down_inputs(bench)
    for text in ("8b/row/sym", "e4m3/row", "mxint8", "mxfp8"):
        numbers[f"inputs_{text.replace('/', '_')}"] = decibels([inputs], text)
    normal = torch.randn(2048, 512, generator=torch.Generator().manual_seed(seed))
    for name, clip in (("symmetric", True), ("full", False)):
        error = BlockFormat(symmetric_clip=clip).solve(normal, NARROW).dense() - normal
        numbers[f"bias_{name}"] = abs(float(error.mean()))
    return numbers


def decibels(tensors: list[Tensor], text: str) -> float:
    """QSNR: signal over quantisation noise of all the tensors together, in dB."""
    signal = sum(float(t.square().sum()) for t in tensors)
    noise = sum(float((BlockFormat().solve(t, parse_level(text)).dense() - t).square().sum()) for t in tensors)
    return 10 * log10(signal / noise)


@torch.no_grad()
def down_inputs(bench: Any) -> Tensor:
    """The inputs `[tokens, in]` of the last block's down projection, of the first eight test windows."""
    model, caught = bench.source.materialise(), []
    last = [site.path for site in bench.sites if site.role == "down"][-1]
    model.get_submodule(last).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(**{name: value[:8] for name, value in bench.test.inputs.items()}, use_cache=False)
    return caught[0].flatten(0, 1).float()
