"""How the kernels are launched: `jit` in place of triton.jit, and `gluon_jit` of gluon.jit.

At every launch Triton binds the arguments, writes down as strings what compiled code may rely on, and looks it up: 45
µs on an H200's host, longer than most kernels of a short prompt take. A kernel of these keeps what Triton found under a
key that is quick to make, and tells at least as much apart: the device, constants and options by name, and of each
other argument its type, what Triton specializes on of an int or an address, and the tile of a descriptor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

HOOKS = triton.knobs.runtime
INT32, INT64 = 1 << 31, 1 << 63


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own may also be called by kernels, and takes 3 µs to find out that it is not."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is no less than n ≥ 1: likewise."""
    return 1 << (n - 1).bit_length()


def specialized(arguments: Sequence[Any], exempt: Sequence[bool]) -> tuple[list[Any], list[Any]] | None:
    """What to compile for of these arguments, those that are `exempt` (do_not_specialize) by type alone; and the values
    to launch with: addresses for tensors on a GPU, which spares Triton to ask for each. None where one is of another
    type than kernels take here."""
    key: list[Any] = []
    values: list[Any] = []
    for x, is_exempt in zip(arguments, exempt, strict=True):
        kind = type(x)
        if kind is torch.Tensor:
            address = x.data_ptr()
            key += x.dtype, address & 15 == 0
            values.append(address if x.is_cuda else x)
            continue
        values.append(x)
        if kind is int:
            width = 32 if -INT32 <= x < INT32 else 64 if x < INT64 else -64  # negative: unsigned
            key.append(width + (0 if is_exempt else 1 if x == 1 else 2 if x & 15 == 0 else 0))
        elif x is None or kind is float:
            key.append(kind)
        elif kind is TensorDescriptor:
            key.append((kind, x.base.dtype, *x.block_shape))
        elif kind is GluonDescriptor:
            key.append((kind, x.base.dtype, *x.block_shape, x.layout))
        else:
            return None
    return key, values


class _Kernel(JITFunction):
    """Parameters are those of a launch first, then constants, which a launch gives by name."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._exempt = [bool(p.do_not_specialize) for p in self.params if not p.is_constexpr]
        if any(not p.is_constexpr for p in self.params[len(self._exempt) :]):
            raise TypeError(f"{function.__name__} has constants before other parameters")
        self._constants = [p.name for p in self.params[len(self._exempt) :]]
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
        found = specialized(arguments, self._exempt) if len(arguments) == len(self._exempt) else None
        if found is None or self.pre_run_hooks or HOOKS.launch_enter_hook.calls or HOOKS.launch_exit_hook.calls:
            self.run(*arguments, grid=grid, warmup=False, **named)
            return
        key, values = found
        device = torch.cuda.current_device()
        at = (device, *key, *named, *named.values())
        known = self._known.get(at)
        if known is None:
            made = self.run(*arguments, grid=grid, warmup=False, **named)
            if made is not None and all(name in named for name in self._constants):
                constants = [named[name] for name in self._constants]
                stream = triton.runtime.driver.active.get_current_stream
                self._known[at] = made.run, made.function, made.packed_metadata, constants, stream
            return
        run, function, metadata, constants, stream = known
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream(device), function, metadata, None, None, None, *values, *constants)


class _GluonKernel(_Kernel, GluonJITFunction):
    pass


def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Iterable[str] = ()) -> Any:
    """As triton.jit. Parameters that are no constants come first, have no annotation and no default."""
    return _decorated(triton.jit if triton.knobs.runtime.interpret else _Kernel, function, do_not_specialize)


def gluon_jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Iterable[str] = ()) -> Any:
    """As gluon.jit, likewise."""
    return _decorated(gluon.jit if triton.knobs.runtime.interpret else _GluonKernel, function, do_not_specialize)


def _decorated(of: Callable[..., Any], function: Callable[..., Any] | None, exempt: Iterable[str]) -> Any:
    made = functools.partial(of, do_not_specialize=list(exempt))
    return made if function is None else made(function)
