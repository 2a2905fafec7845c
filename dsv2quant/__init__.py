"""Quantize DeepSeek-V2 checkpoints for vLLM, SGLang and transformers, and measure what it cost.

    import dsv2quant as dq

The functions are those of api.py, calib/forecast.py, allocation/ and publishing/, which are imported when one is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsv2quant.version import __version__ as __version__

if TYPE_CHECKING:
    from dsv2quant.allocation.search import search
    from dsv2quant.api import (
        calibrate,
        convert,
        evaluate,
        generate,
        inspect,
        memory,
        open,
        plan,
        push,
        verify,
        verify_engine,
    )
    from dsv2quant.calib.forecast import forecast
    from dsv2quant.publishing.compare import compare
    from dsv2quant.publishing.run import release

_ELSEWHERE = {
    "compare": "dsv2quant.publishing.compare", "forecast": "dsv2quant.calib.forecast",
    "release": "dsv2quant.publishing.run", "search": "dsv2quant.allocation.search",
}  # fmt: skip
__all__ = [
    "calibrate", "compare", "convert", "evaluate", "forecast", "generate", "inspect", "memory", "open", "plan", "push",
    "release", "search", "verify", "verify_engine",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "dsv2quant.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
