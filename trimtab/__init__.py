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
    from trimtab.adapting import adapt
    from trimtab.fitting import Fit, fit
    from trimtab.loading import Loaded, load
    from trimtab.merging import merge
    from trimtab.optimising import optimizer
    from trimtab.searching import search
    from trimtab.training import train

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetError",
    "Fit",
    "Loaded",
    "UserError",
    "__version__",
    "adapt",
    "fit",
    "load",
    "merge",
    "optimizer",
    "search",
    "train",
]

_WHERE = {
    **{"fit": "fitting", "Fit": "fitting", "load": "loading", "Loaded": "loading"},
    **{"optimizer": "optimising", "train": "training", "search": "searching"},
}
_FAMILIES = ("adapt", "merge")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _WHERE:
        return getattr(import_module(f"trimtab.{_WHERE[name]}"), name)
    if name in _FAMILIES:  # which can be called, see there
        return import_module(f"trimtab.{name}")
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
