"""How fast a GPU, its links and its host do what calibration consists of: measured, but where it is said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """Of one GPU with its share of a host. Measured on an NVIDIA H200 with torch 2.11 on shapes of V2 and V2-Lite;
    host, 16 cores of an Intel Xeon for a GPU. Rates are per second, times in seconds."""

    product: float = 240e12  # FLOP of TF32: xᵀx of 39,321 × 5,120 takes 8.6 ms, of 8,192 × 16,384 18.8 ms
    attention: float = 35e12  # FLOP of float32, causal ones counted: 4 × 128 heads × 2,048 × 192 take 23.4 ms
    memory: float = 3.5e12  # bytes of elementwise work, read and written
    launch: float = 7e-6  # of an operation from Python, where the GPU has little to do in it
    cholesky: float = 10e12  # FLOP of float64, batched: 64 × 2,048² 26 ms, 16 × 5,120² 58 to 90 ms
    inverse: float = 25e12  # FLOP of float64, K³ counted: 64 × 2,048² 27 ms, 16 × 5,120² 70 to 108 ms
    column: float = 4e-6  # least time of a column in both, of however few matrices
    block: float = 0.2e-3  # least time of 64 columns in GPTQ's loop: 1 × 5,120 × 16,384 takes 99 ms in 256 such
    rounded: float = 1.1e10  # weights in the loop beside that: 64 × 1,408 × 2,048 take 30 ms, 16 × 1,536 × 5,120 45 ms
    searched: float = 2e10  # weights whose scales are searched: 64 × 1,408 × 2,048 take 9.4 ms
    loaded: float = 2.8e9  # bytes of weights from the page cache to the device: V2's layer of 7.5 GB takes 3.0 s
    copied: float = 8e9  # bytes between the device and memory that is not pinned
    pinned: float = 51e9  # bytes between the device and pinned memory
    gathered_rows: float = 46e9  # bytes of states that the device gathers from pinned memory: 39,000 rows of 20 KB
    added: float = 5e9  # bytes of states added up in the host's memory; not measured
    packed: float = 1.08e9  # codes by one core: 3.77e9 of V2's layer take 3.5 s
    saved: float = 0.53e9  # bytes of a layer's file, copied, hashed and made durable: 2 GB take 3.6 s
    gathered: float = 0.5e9  # bytes of encoded matrices that the first rank gets over gloo; not measured
    disk: float = 5e9  # bytes of a node's disk; nominal
    nvlink: float = 300e9  # bytes each way; two thirds of NV18's nominal 450 GB/s
    network: float = 35e9  # bytes each way of a GPU's own adapter; two thirds of nominal 400 Gbit/s


H200 = Rates()
# The same chip: what differs is its memory, nominal 3.35 TB/s beside 4.8.
RATES = {"H200": H200, "H100": replace(H200, memory=H200.memory * 3.35 / 4.8)}
