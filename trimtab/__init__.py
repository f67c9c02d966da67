"""Trimtab: a model and a budget in; the best model that fits out, with measured evidence.

import trimtab
result = trimtab.fit("pocket", budget=trimtab.Budget.of(size="2.5MB"))
result.best, result.front, result.report()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError, UserError

if TYPE_CHECKING:
    from trimtab.fitting import Fit, fit
    from trimtab.loading import Loaded, load
    from trimtab.merging import merge
    from trimtab.optimising import optimizer

__version__ = "0.1.0"
__all__ = ["Budget", "BudgetError", "Fit", "Loaded", "UserError", "__version__", "fit", "load", "merge", "optimizer"]


def __getattr__(name: str) -> Any:
    if name in ("fit", "Fit"):
        from importlib import import_module

        return getattr(import_module("trimtab.fitting"), name)
    if name in ("load", "Loaded"):
        from importlib import import_module

        return getattr(import_module("trimtab.loading"), name)
    if name == "optimizer":
        from importlib import import_module

        return import_module("trimtab.optimising").optimizer
    if name == "merge":
        from importlib import import_module

        return import_module("trimtab.merge")  # can be called, see there
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
