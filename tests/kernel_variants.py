"""The compiled variants that this machine can run, for the tests of the kernels."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def variants() -> list[object]:
    """Every variant as a parameter; where nothing was compiled, one that skips; of another build, the plain one."""
    try:
        plain = importlib.import_module("trimtab.kernels._generic")
    except ModuleNotFoundError:
        return [pytest.param(None, marks=pytest.mark.skip("no kernels were compiled"), id="none")]
    found: list[ModuleType] = [plain]
    if not os.environ.get("TRIMTAB_TEST_KERNELS"):
        found += [importlib.import_module(f"trimtab.kernels._{name}") for name in plain.features()]
    return [pytest.param(module, id=module.__name__.rpartition("._")[2]) for module in found]
