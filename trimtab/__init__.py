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
    from trimtab.optimising import optimizer

__version__ = "0.1.0"
__all__ = ["Budget", "BudgetError", "Fit", "Loaded", "UserError", "__version__", "fit", "load", "optimizer"]

_WHERE = {"fit": "fitting", "Fit": "fitting", "load": "loading", "Loaded": "loading", "optimizer": "optimising"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f"trimtab.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
