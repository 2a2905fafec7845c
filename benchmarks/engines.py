"""Every scheme and layout in vLLM and SGLang, beside the runtime: KLD, perplexity, top-1, noise floor and code path.

    python benchmarks/engines.py --engine sglang=/opt/sglang/bin/python --engine vllm=/opt/vllm/bin/python \\
        --scratch DIR --device cuda --jobs 8 --minutes 20 --results benchmarks/results/engines.csv

makes the models of engine_models.py in DIR, converts them for each engine, and runs `dsv2quant verify --engine` on each
artifact, several at a time. A row is written when it is done, so that a run that was cut off goes on where it was;
after `--minutes` no new one is begun. What an engine's rules refuse, or it fails on, is a row too. The floor is the
engine on the BF16 source, measured with the first artifact of each model. `--tp 2` makes rows on two GPUs; `--dry-run`
lists rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from engine_models import KINDS, make

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.engines.results import BEYOND, ERRORS

RTN = ("--method", "rtn")
ARTIFACTS: dict[str, tuple[str, ...]] = {
    "fp8-channel": ("--fp8=channel",),
    "fp8-block": ("--fp8=block",),
    "fp8-tensor": ("--fp8=tensor",),
    "fp8-static": ("--fp8=static",),
    "autofp8": ("--fp8=static", "--format", "autofp8"),
    "int4-mixed": ("--int4=mixed", *RTN),
    "int4-pure": ("--int4=pure", *RTN),
    "int4-pure g64": ("--int4=pure", *RTN, "--group-size", "64"),
    "int4-pure g32": ("--int4=pure", *RTN, "--group-size", "32"),
    "int4-pure channel": ("--int4=pure", *RTN, "--group-size", "channel"),
    "int4-experts": ("--int4=experts", *RTN),
    "gptq pure": ("--int4=pure", *RTN, "--format", "gptq"),
    "gptq experts": ("--int4=experts", *RTN, "--format", "gptq"),
    "awq pure": ("--int4=pure", *RTN, "--format", "awq"),
    "awq experts": ("--int4=experts", *RTN, "--format", "awq"),
    "int8": ("--int8",),
    "w4a8": ("--w4a8", *RTN),
    "fp8-channel, KV scales": ("--fp8=channel", "--kv-scales"),
    "autofp8, KV scales": ("--fp8=static", "--format", "autofp8", "--kv-scales"),
}
FIRST = "fp8-channel"  # that the floor is measured with
SPLIT = ("fp8-channel", "fp8-block", "int4-mixed")  # over two GPUs
SCALED = ("fp8-channel, KV scales", "autofp8, KV scales")  # over caches in FP8
CALIBRATED = ("fp8-static", "autofp8", *SCALED)
FEW = ("--num-calibration-samples", "32", "--max-seq-length", "256")
CACHES = ("fp8_e4m3", "fp8_e5m2")
HERE = [sys.executable, "-m", "dsv2quant"]


@dataclass(frozen=True)
class Case:
    """A row: what is run where."""

    model: str
    artifact: str
    engine: str
    kv_cache: str
    tp: int

    def __str__(self) -> str:
        said = [self.model, self.artifact, self.engine, *([self.kv_cache] if self.kv_cache != "auto" else [])]
        return "  ".join([*said, *([f"tp {self.tp}"] if self.tp > 1 else [])])


@dataclass(frozen=True)
class Found:
    """What `verify` measured: mean KLD from the runtime in nats and its standard error; of the source in the engine
    (`floor`, measured in the first row of each model); and of the runtime in BF16 from itself (`own`). `verdict` is
    `verify`'s: "as the runtime", or "beyond" twice the larger of these and three standard errors."""

    verdict: str = ""
    ln_ppl: float | None = None
    ln_ppl_runtime: float | None = None
    kld: float | None = None
    stderr: float | None = None
    top1: float | None = None
    floor: float | None = None
    own: float | None = None
    extra_cost: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    kernels: str = ""
    attention: str = ""
    versions: str = ""
    hardware: str = ""
    failed: str = ""


def cases(engines: Iterable[str], models: Iterable[str], tp: int) -> list[Case]:
    """The rows, those that floors are measured with first."""
    rows = [Case(model, FIRST, engine, "auto", tp) for engine in engines for model in models]
    for engine in engines:
        for model in models:
            names = [name for name in (SPLIT if tp > 1 else ARTIFACTS) if name not in (FIRST, *SCALED)]
            rows += [
                Case(model, name, engine, "auto", tp) for name in names if model != "llama" or "experts" not in name
            ]
            if tp == 1 and engine != "transformers":
                rows += [Case(model, name, engine, cache, tp) for name in (FIRST, *SCALED) for cache in CACHES]
    return rows


def folder(case: Case, scratch: Path) -> Path:
    return scratch / f"{case.model}-{case.artifact}-{case.engine}-tp{case.tp}".replace(" ", "_").replace(",", "")


def convert(case: Case, scratch: Path) -> str:
    """Make a row's artifact if it is not there. Returns why it can't be made, or ''."""
    out = folder(case, scratch)
    if (out / "dsv2quant.json").exists():
        return ""
    how = [*ARTIFACTS[case.artifact], *(FEW if case.artifact in CALIBRATED else ()), "--target", case.engine]
    how += ["--tp", str(case.tp)] if case.tp > 1 else []
    command = [*HERE, "convert", scratch / case.model, "-o", out, *how, "--force"]
    made = subprocess.run(command, capture_output=True, text=True)
    return "" if made.returncode == 0 else last_line(made.stderr)


def verify(case: Case, python: str, args: argparse.Namespace) -> Found:
    """Run a row. `verify` prints what it found before it fails on it."""
    command = [
        *HERE, "verify", folder(case, args.scratch), "--engine", case.engine, "--engine-python", python, "--json",
        "--quiet", "--windows", str(args.windows), "--ctx", str(args.ctx), "--device", args.device,
        "--kv-cache", case.kv_cache, "--tp", str(case.tp), "--dtype", args.dtype,
    ]  # fmt: skip
    if case.artifact == FIRST and case.kv_cache == "auto":
        command += ["--source", args.scratch / case.model, "--generate"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if not ran.stdout:
        return Found(failed=last_line(ran.stderr))
    v = json.loads(ran.stdout)["engine"]
    floor, report = v["floor"] or {}, v["report"]
    versions = {"dsv2quant": __version__, **v["versions"]}
    faults = [*v["artifact_faults"], *(fault for each in v["generated"] for fault in each["faults"])]
    return Found(
        ln_ppl=math.log(v["perplexity"]["value"]), ln_ppl_runtime=math.log(v["runtime_perplexity"]["value"]),
        kld=v["kld"]["mean"], stderr=v["kld"]["stderr"], top1=v["top1_agreement"]["value"],
        floor=floor["kld"]["mean"] if floor else None, own=v["own_noise"],
        extra_cost=floor["extra_cost"]["value"] if floor and floor["extra_cost"] else None, tokens=v["tokens"],
        seconds=v["seconds"], kernels=counted(report["kernels"]), attention=report["attention"] or "",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        hardware=report["device"], failed="; ".join(faults),
    )  # fmt: skip


def counted(kernels: dict[str, int]) -> str:
    return ", ".join(f"{name} × {count}" for name, count in kernels.items())


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no output"


def main() -> None:
    args = parsed()
    pythons = dict(each.split("=", 1) for each in args.engine)
    done = read(args.results)
    rows = [case for case in cases(pythons, args.models, args.tp) if all(word in str(case) for word in args.only)]
    left = [case for case in rows if case not in done]
    if args.dry_run:
        print("\n".join(f"{'done  ' if case in done else '      '}{case}" for case in rows))
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        if not (args.scratch / model / "config.json").exists():
            make(model, args.scratch / model)
    started = time.monotonic()
    distinct = {folder(case, args.scratch): case for case in left}
    with ThreadPoolExecutor(args.converters) as pool:
        refused = dict(
            zip(distinct, pool.map(lambda case: convert(case, args.scratch), distinct.values()), strict=True)
        )
    print(f"{len(distinct)} artifacts, {sum(map(bool, refused.values()))} refused, {time.monotonic() - started:.0f} s")

    def run(case: Case) -> None:
        if time.monotonic() - started > 60 * args.minutes:
            return
        refusal = refused[folder(case, args.scratch)]
        found = Found(failed=f"convert: {refusal}") if refusal else verify(case, pythons[case.engine], args)
        done[case] = found
        if args.results:
            append(args.results, [written(case, found)])
        print(line(case, judged(case, done)), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, left))
    if args.results:
        args.results.unlink(missing_ok=True)
        append(args.results, [written(case, judged(case, done)) for case in sorted(done, key=order)])
    print("\n".join(["", *(line(case, judged(case, done)) for case in rows if case in done)]))


def order(case: Case) -> tuple[Any, ...]:
    return case.engine, case.tp, KINDS.index(case.model), case.kv_cache, [*ARTIFACTS].index(case.artifact)


def written(case: Case, found: Found) -> dict[str, Any]:
    return asdict(case) | {key: "" if value is None else value for key, value in asdict(found).items()}


def judged(case: Case, done: dict[Case, Found]) -> Found:
    """A row with the floor of its model, and the verdict."""
    found, first = done[case], done.get(replace(case, artifact=FIRST, kv_cache="auto"), Found())
    if found.kld is None:
        return found
    floor = first.floor or 0.0
    limit = BEYOND * max(floor, found.own or 0.0) + ERRORS * (found.stderr or 0.0)
    return replace(found, floor=first.floor, verdict="beyond" if found.kld > limit else "as the runtime")


def line(case: Case, found: Found) -> str:
    if found.kld is None:
        return f"{case!s:56} {found.failed[:140]}"
    return (
        f"{case!s:56} ln ppl {found.ln_ppl:.4f}, runtime {found.ln_ppl_runtime:.4f}  KLD {found.kld:.2e} ± "
        f"{found.stderr:.0e}, floor {found.floor or math.nan:.1e}, own {found.own:.1e}  top-1 {found.top1:.4f}  "
        f"{found.verdict}  {found.failed[:60]}"
    )


def read(path: Path | None) -> dict[Case, Found]:
    """Rows that are written already."""
    if path is None or not path.exists():
        return {}
    import csv

    def typed(kind: type, row: dict[str, str]) -> Any:
        values = {}
        for field in fields(kind):
            text = row[field.name]
            numeric = "float" in str(field.type) or "int" in str(field.type)
            values[field.name] = (json.loads(text) if text else None) if numeric else text
        return kind(**values)

    with path.open(newline="") as file:
        return {typed(Case, row): typed(Found, row) for row in csv.DictReader(file)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", action="append", required=True, metavar="NAME=PYTHON", help="an engine and its Python"
    )
    parser.add_argument("--scratch", type=Path, required=True, help="for models and artifacts")
    parser.add_argument("--results", type=Path, help="the CSV to append to, and to go on from")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows that have these words")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="the runtime's")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--converters", type=int, default=2, help="conversions at a time")
    parser.add_argument("--minutes", type=float, default=60, help="after which no row is begun")
    parser.add_argument("--dry-run", action="store_true", help="list the rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
