"""What a kept reference takes and what it loses, beside other ways to keep one: bytes a token, and the error of KLD,
ln perplexity and top-1 against the live reference's.

    python benchmarks/reference.py --scratch DIR --results benchmarks/results/reference.csv

- kept: the file of `eval-ppl --save-reference`, hidden states and head.
- kept, float16: the same with states rounded to 16 bits under a scale each, where they are computed in float32.
- llama.cpp: the 16-bit codes of `llama-perplexity --kl-divergence-base`, restated from tools/perplexity/perplexity.cpp
  (0c1e57098: `log_softmax` writes, the one of `process_logits` reads and leaves out what lies 16 nats down).
- top 1 − ε: the fewest tokens that have so much of the probability, each with a 3-byte id (2 below 65,536 tokens) and
  float32 ln p, 4 bytes for their number; all others are one bucket, which makes of KLD a lower bound.

dsv2-mini and its artifacts, on Python's help topics; and a made-up model of V2-Lite's vocabulary and hidden size, whose
tokens are Zipf's and whose states are Gaussian, beside the same with noise in its states.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import dsv2quant as dq
from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.evaluation.divergence import Divergence, Pass, batches_of, bootstrap, compare, log_probabilities, run
from dsv2quant.evaluation.reference import SCHEMA, KeptHead, KeptReference, Reference, write
from dsv2quant.evaluation.results import NoiseFloor
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.runtime import Model

MINI = Path(__file__).parent.parent / "examples" / "dsv2-mini"
SCORED = {"ctx": 512, "limit": 60}
VOCABULARY, HIDDEN, WINDOWS, CTX = 102_400, 2048, 8, 129
EPSILONS = (1e-2, 1e-3, 1e-4)
Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]  # KLD, ln p of targets, likeliest token; bytes of all
Encoding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Decoded]


def llama_cpp(logp: torch.Tensor, logq: torch.Tensor, targets: torch.Tensor) -> Decoded:
    """Rows [tokens, vocabulary] of both in float64, and targets [tokens, 1]."""
    logits = logp.float()  # known but for a constant, which falls out
    most = logits.amax(1, keepdim=True)
    least = torch.maximum(logits.amin(1, keepdim=True), most - 16)
    total = (logits - most).exp().double().sum(1, keepdim=True).log().float()
    scale, minimum = (most - least) / 65535, least - most - total
    codes = torch.where(logits > least, ((logits - least) / scale).round(), 0)
    kept = scale * codes + minimum
    kld = torch.where(kept > -16, kept.exp().double() * (kept - logq), 0).sum(1)
    vocabulary = logp.shape[1]
    return (
        kld,
        kept.gather(1, targets)[:, 0].double(),
        kept.argmax(1),
        len(logp) * (8 + 2 * (vocabulary + vocabulary % 2)),
    )


def top(epsilon: float) -> Encoding:
    """The fewest tokens with 1 − epsilon of the probability, and a bucket."""

    def encode(logp: torch.Tensor, logq: torch.Tensor, targets: torch.Tensor) -> Decoded:
        ordered, order = logp.sort(1, descending=True)
        before = ordered.exp().cumsum(1) - ordered.exp()
        held = before < 1 - epsilon
        p, q = ordered.float().double(), logq.gather(1, order)
        inside = torch.where(held, p.exp() * (p - q), 0).sum(1)
        rest_p, rest_q = ((1 - torch.where(held, x.exp(), 0).sum(1)).clamp(min=1e-12) for x in (p, q))
        kld = inside + rest_p * (rest_p.log() - rest_q.log())
        place = (order == targets).double().argmax(1, keepdim=True)
        others = (~held).sum(1).clamp(min=1)
        spread = (rest_p / others).log()  # an even share of the bucket
        nll = torch.where(held.gather(1, place)[:, 0], p.gather(1, place)[:, 0], spread)
        width = 6 if logp.shape[1] <= 1 << 16 else 7
        return kld, nll, order[:, 0], 4 * len(logp) + width * float(held.sum())

    return encode


def decoded(encoding: Encoding, model: Pass, reference: Pass, ids: np.ndarray, first: int) -> tuple[Divergence, float]:
    """What a reference in this encoding would have said, and bytes a token."""
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    nbytes = 0.0
    for window, row in enumerate(ids):
        done, targets = 0, torch.from_numpy(row[first + 1 :])[:, None]
        both = zip(log_probabilities(reference, window, first), log_probabilities(model, window, first), strict=True)
        for logp, logq in both:
            at = targets[done : done + len(logp)]
            kld, picked, likeliest, more = encoding(logp, logq, at)
            nbytes, done = nbytes + more, done + len(logp)
            found = (-logq.gather(1, at)[:, 0], -picked, kld, likeliest == logq.argmax(1))
            for column, values in zip(columns, found, strict=True):
                column.append(values)
    shape = (len(ids), ids.shape[1] - 1 - first)
    nll, reference_nll, kld, same = (torch.cat(column).numpy().reshape(shape) for column in columns)
    return Divergence(nll, reference_nll, kld, same, {}), nbytes / math.prod(shape)


def rounded(reference: Pass) -> Pass:
    """With states in float16, each scaled by a power of two to below 2¹⁵."""
    scale = 2 ** (14 - reference.hidden.abs().amax(-1, keepdim=True).log2().floor())
    return replace(reference, hidden=(reference.hidden * scale).half().float() / scale)


@dataclass(frozen=True)
class Case:
    """Passes of a model and its live reference over windows `ids` from position `first` on, the kept one's pass, what
    it takes a token, and once for the head."""

    name: str
    model: Pass
    live: Pass
    kept: Pass
    ids: np.ndarray
    bytes_a_token: float
    bytes_once: int

    def rows(self) -> Iterator[dict[str, Any]]:
        truth = compare(self.model, self.live, self.ids, 0)
        width = self.live.hidden.shape[-1]
        found = {"kept": (compare(self.model, self.kept, self.ids, 0), self.bytes_a_token, self.bytes_once)}
        half = compare(self.model, rounded(self.kept), self.ids, 0)
        found["kept, float16"] = (half, self.bytes_a_token - 2 * width + 4, self.bytes_once)
        for name, encoding in {"llama.cpp": llama_cpp, **{f"top 1 − {e:g}": top(e) for e in EPSILONS}}.items():
            found[name] = (*decoded(encoding, self.model, self.live, self.ids, 0), 0)
        stderr = bootstrap(truth.kld.mean(1))
        for name, (said, nbytes, once) in found.items():
            error = said.kld.mean() - truth.kld.mean()
            yield {
                "model": self.name,
                "encoding": name,
                "bytes/token": f"{nbytes:.0f}",
                "bytes once": once,
                "KLD": f"{truth.kld.mean():.5f}",
                "stderr": f"{stderr:.5f}",
                "KLD error": f"{error:.1e}",
                "error, % of stderr": f"{100 * abs(error) / stderr:.3f}",
                "ln ppl error": f"{said.reference_nll.mean() - truth.reference_nll.mean():.1e}",
                "same top-1 error": f"{said.same_top1.mean() - truth.same_top1.mean():.1e}",
                "tokens": truth.kld.size,
                "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
            }


def of_mini(scratch: Path) -> Iterator[Case]:
    """dsv2-mini beside its artifacts."""
    file = scratch / "kept"
    dq.evaluate(MINI, save_reference=file, **SCORED)
    kept, ids, a_token, once = read(file)
    live = run(Model(dq.open(MINI)), ids, batches_of(len(ids), 8))
    for name, options in (("fp8-block", {}), ("int4-pure", {"samples": 64, "length": 512})):
        out = scratch / name
        dq.convert(MINI, out, scheme=name, **options)
        passed = run(Model(dq.open(out)), ids, batches_of(len(ids), 8))
        yield Case(f"dsv2-mini {name}", passed, live, kept, ids, a_token, once)
        shutil.rmtree(out)


def made_up(scratch: Path) -> Iterator[Case]:
    """Logits have a part that all positions share, of Zipf's law, and a Gaussian one, which is stronger at some
    positions than at others: its standard deviation is 1.2 to 5.6."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=random) * 6 / math.sqrt(HIDDEN)
    weight[:, 0] = -torch.arange(1, VOCABULARY + 1).log() / math.sqrt(HIDDEN / 2)
    head = KeptHead(RMSNorm(torch.ones(HIDDEN), 1e-6), weight.bfloat16().float())
    angle = 0.2 + torch.rand(WINDOWS, CTX, 1, generator=random)
    hidden = torch.randn(WINDOWS, CTX, HIDDEN, generator=random) * angle.sin()
    hidden[..., :1] = math.sqrt(HIDDEN) * angle.cos()
    live = Pass(head, hidden, [None])
    ids = np.zeros((WINDOWS, CTX), np.int64)
    for window in range(WINDOWS):
        drawn = [logp.exp().multinomial(1, generator=random)[:, 0] for logp in log_probabilities(live, window, 0)]
        ids[window, 1:] = torch.cat(drawn).numpy()
    about = {
        "schema": SCHEMA, "text": {"source": "", "sha256": ""}, "protocol": "default", "ctx": CTX, "first": 0,
        "windows": WINDOWS, "vocabulary": VOCABULARY, "layers": 1, "eps": 1e-6, "dtype": "float32",
        "decode_path": False, "source": None,
    }  # fmt: skip
    weights = {"model": "made-up", "revision": None, "digest": None, "manifest_sha256": None, "identity": ""}
    file = scratch / "kept"
    write(file, about, ids, head, Reference(weights, live, NoiseFloor(0, 0.0, "bfloat16", 0.0)))
    kept, ids, a_token, once = read(file)
    for noise in (0.01, 0.1):
        model = replace(live, hidden=hidden * (1 + noise * torch.randn(hidden.shape, generator=random)))
        yield Case(f"made-up, {noise:.0%} noise", model, live, kept, ids, a_token, once)


def read(file: Path) -> tuple[Pass, np.ndarray, float, int]:
    """Of a kept reference its pass, its windows, what it takes a token, and what once, for norm and head."""
    opened = KeptReference.opened(file)
    with safe_open(file, "pt") as held:
        ids, head = held.get_tensor("ids").long().numpy(), held.get_tensor("head")
    once = head.nbytes + 2 * head.shape[1]
    a_token = (file.stat().st_size - once) / (ids.size - len(ids))
    return opened.reference(len(ids), "cpu").passed, ids, a_token, once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    for cases in (of_mini(options.scratch), made_up(options.scratch)):
        for case in cases:
            rows = list(case.rows())
            for row in rows:
                print("  ".join(f"{key} {value}" for key, value in row.items() if key != "versions"), flush=True)
            append(options.results, rows)


if __name__ == "__main__":
    main()
