"""The models that Trimtab ships: small, trained by the scripts beside them, and there without a network."""

from pathlib import Path

_HERE = Path(__file__).parent

POCKET: dict[str, Path] = {
    "pocket": _HERE / "lm",
    "pocket-lm": _HERE / "lm",
    "pocket-cnn": _HERE / "cnn",
    "pocket-vit": _HERE / "vit",
}
"""Name to folder; `pocket` is the language model."""
