"""The one dispatch table of the compiled kernels: which variant this processor runs, or none.

`TRIMTAB_KERNELS` chooses a variant: `vnni`, `avx512`, `avx2`, `generic` (plain C++), or `none` (plain torch). Without
it the best that the processor has is taken. Where nothing was compiled, everything runs on torch, slower, and says so
once.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from types import ModuleType

from trimtab.core.errors import UserError

VARIANTS = ("vnni", "avx512", "avx2", "generic")  # best first


@cache
def native() -> ModuleType | None:
    """The compiled kernels for this processor, or None where there are none.

    Raises:
        UserError: `TRIMTAB_KERNELS` names a variant that is unknown, or that this processor or installation lacks.
    """
    wanted = os.environ.get("TRIMTAB_KERNELS", "")
    if wanted == "none":
        return None
    if wanted and wanted not in VARIANTS:
        raise UserError(f"TRIMTAB_KERNELS={wanted} was asked for; choose from {', '.join(VARIANTS)}, none")
    plain = _variant("generic")
    if plain is None:
        if wanted:
            raise UserError(
                f"TRIMTAB_KERNELS={wanted} was asked for, and no kernels were compiled when Trimtab was installed"
            )
        print("the kernels were not compiled when Trimtab was installed; running on torch, slower", file=sys.stderr)
        return None
    usable = {"generic", *plain.features()}
    if wanted and wanted not in usable:
        here = ", ".join(v for v in VARIANTS if v in usable)
        raise UserError(f"TRIMTAB_KERNELS={wanted} was asked for, and this processor runs {here}")
    return _variant(wanted) if wanted else next(m for v in VARIANTS if v in usable and (m := _variant(v)) is not None)


def _variant(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"trimtab.kernels._{name}")
    except ModuleNotFoundError:
        return None
