"""Kernels' own launch: what is kept is used for the same code alone, and gets what Triton's launch would pass."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv2quant.kernels import jit

BF16, FP8 = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
LAYOUT = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
ARGUMENTS = [
    BF16, BF16.view(-1)[1:], BF16.view(-1)[8:], BF16.float(), FP8, FP8.view(-1)[8:], FP8.view(torch.int8), None,
    0.0, 1.0, 16.0, 0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**32,
    2**63 - 1, 2**63, 2**63 + 1, 2**64 - 16, TensorDescriptor.from_tensor(BF16, [32, 64]),
    TensorDescriptor.from_tensor(BF16, [64, 64]), TensorDescriptor.from_tensor(FP8, [64, 64]),
    GluonDescriptor.from_tensor(BF16, [64, 64], LAYOUT),
]  # fmt: skip


@pytest.mark.parametrize("exempt", [False, True], ids=["specialized", "exempt"])
def test_the_key_tells_apart_what_triton_does(exempt: bool) -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = [tuple(jit.specialized([x], [exempt])[0]) for x in ARGUMENTS]
    tritons = [native_specialize_impl(backend, x, False, not exempt, True) for x in ARGUMENTS]
    for one, other in combinations(range(len(ARGUMENTS)), 2):
        assert tritons[one] == tritons[other] or keys[one] != keys[other], (ARGUMENTS[one], ARGUMENTS[other])
        if not exempt:  # and compiles nothing twice
            assert tritons[one] != tritons[other] or keys[one] == keys[other], (ARGUMENTS[one], ARGUMENTS[other])


def test_no_other_types_are_taken() -> None:
    for x in (True, "text", (1, 2), torch.nn.Parameter(BF16.float())):
        assert jit.specialized([x], [False]) is None


@jit.jit(do_not_specialize=["count"])
def _kernel(x, out, count, scale, WIDE: tl.constexpr, KIND: tl.constexpr):
    column = tl.arange(0, WIDE)
    tl.store(out + column, tl.load(x + column, mask=column < count) * scale)


@pytest.fixture
def launched(monkeypatch):
    """What reaches the device, and by which way: 'triton' or 'kept'."""
    found = []

    def by_triton(self, *arguments, grid, warmup, **named):
        found.append("triton")
        return SimpleNamespace(
            run=lambda *passed: found.append(("kept", *passed)), function="function", packed_metadata="metadata"
        )

    if triton.knobs.runtime.interpret:
        pytest.skip("by the interpreter there is no launch")
    monkeypatch.setattr(type(_kernel), "run", by_triton)
    monkeypatch.setattr(_kernel, "_known", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.count("moved"))
    active = SimpleNamespace(get_current_stream=lambda device: ("stream", device))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    return found


def test_a_launch_is_kept_by_kind_and_device(launched) -> None:
    x = torch.zeros(64)
    launch = _kernel[(3, 2)]
    launch(x, None, 5, 0.5, KIND="a", WIDE=16, num_warps=4)
    launch(x, None, 7, 0.25, KIND="a", WIDE=16, num_warps=4)
    constants = (16, "a")  # in the order of the parameters
    passed = ("kept", 3, 2, 1, ("stream", 0), "function", "metadata", None, None, None, x, None, 7, 0.25, *constants)
    assert launched == ["triton", passed]
    for arguments, named in (
        ((x[1:], None, 7, 0.25), {"KIND": "a", "WIDE": 16, "num_warps": 4}),
        ((x, x, 7, 0.25), {"KIND": "a", "WIDE": 16, "num_warps": 4}),
        ((x, None, 2**40, 0.25), {"KIND": "a", "WIDE": 16, "num_warps": 4}),
        ((x, None, 7, 0.25), {"KIND": "b", "WIDE": 16, "num_warps": 4}),
        ((x, None, 7, 0.25), {"KIND": "a", "WIDE": 16, "num_warps": 8}),
        ((x, None, True, 0.25), {"KIND": "a", "WIDE": 16, "num_warps": 4}),
    ):
        launched.clear()
        launch(*arguments, **named)
        assert launched == ["triton"], (arguments, named)
    launched[:] = ["moved"]
    launch(x, None, 7, 0.25, KIND="a", WIDE=16, num_warps=4)
    launch(x, None, 7, 0.25, KIND="a", WIDE=16, num_warps=4)
    assert launched[1] == "triton"
    assert launched[2][4] == ("stream", 1)


def test_hooks_are_called_by_triton(launched, monkeypatch) -> None:
    launch = _kernel[(1,)]
    launch(BF16, BF16, 1, 1.0, WIDE=16, KIND="a")
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(BF16, BF16, 1, 1.0, WIDE=16, KIND="a")
    assert launched == ["triton", "triton"]


def test_constants_come_last() -> None:
    def kernel(WIDE: tl.constexpr, x):
        pass

    if not triton.knobs.runtime.interpret:
        with pytest.raises(TypeError, match="kernel has constants before other parameters"):
            jit.jit(kernel)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 5120, 1 << 40])
def test_integers_as_tritons(n: int) -> None:
    assert jit.power_of_2(n) == triton.next_power_of_2(n)
    assert [jit.cdiv(n, d) for d in (1, 2, 7, 128)] == [triton.cdiv(n, d) for d in (1, 2, 7, 128)]
