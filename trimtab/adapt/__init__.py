"""Trainable deltas on a frozen model, a method a file.

The package can itself be called: `trimtab.adapt(model, data)` is the function of `trimtab.adapting`, whether a method
was imported before or not.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("trimtab.adapting").adapt(*args, **options)


sys.modules[__name__].__class__ = _Callable
