"""Have every process that makes SGLang's scheduler take torch_kernels.py first."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Behind(MetaPathFinder):
    """Runs `register` behind the import of SGLang's scheduler."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "sglang.srt.managers.scheduler":
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(fullname, path)
        assert found is not None and found.loader is not None
        load = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            import torch_kernels

            torch_kernels.register()

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


sys.meta_path.insert(0, Behind())
