"""INT against FP in block formats: which of two formats of equal bits is nearer, with rotation and without."""

from __future__ import annotations

from math import log10
from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int, parse_level
from trimtab.quant.blockformat import BlockFormat

FORMATS = ("mxint8", "mxfp8", "mxint4", "mxfp4", "nvint4/h", "nvfp4/h", "8b/row/sym", "e4m3/row")
COARSE = FORMATS[-2:]
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
    "of 16 under FP8 scales. Planted: 4 channels of every norm scaled by 30 and the columns behind them by 1/30, the "
    "function unchanged.",
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
        Check("the same with outliers planted", "kl_e4m3_row_planted", "<", "kl_8b_row_sym_planted"),
        Check("symmetric clipping lowers the bias", "bias_symmetric", "<", "bias_full"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows and of normal numbers."""
    bench = lab.bench("pocket-lm", seed)
    numbers = {}
    for text in FORMATS:
        name = text.replace("/", "_")
        found = bench.measure(f"block-format @ model.layers.*={text}")
        numbers[f"kl_{name}"] = found.damage
        numbers[f"qsnr_{name}"] = qsnr(bench, text)
    planted = lab.bench("pocket-lm", seed, outliers=30.0)
    for text in COARSE:
        found = planted.measure(f"block-format @ model.layers.*={text}")
        numbers[f"kl_{text.replace('/', '_')}_planted"] = found.damage
    normal = torch.randn(2048, 512, generator=torch.Generator().manual_seed(seed))
    for name, clip in (("symmetric", True), ("full", False)):
        error = BlockFormat(symmetric_clip=clip).solve(normal, NARROW).dense() - normal
        numbers[f"bias_{name}"] = abs(float(error.mean()))
    return numbers


def qsnr(bench: Any, text: str) -> float:
    """Signal over noise of all the blocks' weights, in dB."""
    signal = noise = 0.0
    for site in bench.sites:
        if site.kind == "linear" and site.block is not None:
            weight = bench.weight(site.path)
            signal += float(weight.square().sum())
            noise += float((BlockFormat().solve(weight, parse_level(text)).dense() - weight).square().sum())
    return 10 * log10(signal / noise)
