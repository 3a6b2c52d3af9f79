"""Gives transformers our quantizer when transformers is imported, before or after this package.

transformers has no entry points for quantizers, only a table into which one puts oneself; importing it for that would
make `import kurtail_pl` take seconds. So a finder of modules waits at the head of `sys.meta_path` for the module of the
table, lets the usual finders find it, and puts us into the table once it has been executed.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register our quantizer with transformers: now, when its table is there, else as soon as it is."""
    if TABLE in sys.modules:
        _enter()
    else:
        sys.meta_path.insert(0, _Waiting())


def _enter() -> None:
    importlib.import_module("kurtail_pl.artefact.quantizer")


class _Waiting(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_enter(module: ModuleType) -> None:
            execute(module)
            _enter()

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec
