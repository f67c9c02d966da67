"""Many models into one, a method a file.

The package can itself be called: `trimtab.merge([...])` is the function of `trimtab.merging`, whether a method was
imported before or not.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("trimtab.merging").merge(*args, **options)


sys.modules[__name__].__class__ = _Callable
