"""sha256 of every kind of artifact, and the numbers of the runtime: what a change of the code must leave as it is.

    python tools/artifact_hashes.py before.json      in one checkout
    python tools/artifact_hashes.py after.json       in another
    python tools/artifact_hashes.py --compare before.json after.json

Every scheme, method, layout and GGUF type is made of dsv2-mini and of the tests' models, by the command line.
`--compare` prints what differs and exits with 1 where anything but a card or a manifest does; cases of the second
alone are only counted. Both runs must be of one machine: GPTQ's and the runtime's numbers depend on its processor and
on torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Not of the weights, and shown apart: the card is prose, a manifest and a state name versions and commands.
PROSE = ("README.md", "dsv2quant.json", ".gguf.json")
CALIBRATION = ("--num-calibration-samples", "16", "--max-seq-length", "64")
FP8 = [("--fp8=block",), ("--fp8=channel",), ("--fp8=tensor",)]
STATIC = [
    ("--fp8=static", *CALIBRATION),
    ("--fp8=static", "--format", "autofp8", "--kv-scales", *CALIBRATION),
    ("--fp8=channel", "--kv-scales", *CALIBRATION),
]
INT4 = [
    ("--int4=mixed", "--method", "rtn"),
    ("--int4=pure", "--method", "rtn", "--group-size", "64", "--target", "transformers"),
    ("--int4=pure", "--method", "rtn", "--group-size", "channel", "--target", "transformers"),
    ("--int4=pure", "--method", "rtn", "--group-size", "32", "--target", "transformers"),
    ("--int4=pure", "--method", "rtn", "--group-size", "32", "--format", "gptq", "--target", "vllm"),
    ("--int4=pure", "--method", "rtn", "--group-size", "32", "--format", "awq", "--target", "vllm"),
]
FEW_BITS = [
    ("--int3", "--method", "rtn", "--group-size", "32"),
    ("--int2=experts", "--method", "mse", "--group-size", "32", *CALIBRATION),
    ("--int2", "--group-size", "32", *CALIBRATION),
]
ACTIVATIONS = [
    ("--int8",),
    ("--int8", "--target", "transformers"),
    ("--w4a8", "--method", "rtn"),
    ("--w4a8", "--method", "rtn", "--target", "transformers"),
]
CALIBRATED = [
    ("--int4=experts", *CALIBRATION),
    ("--int4=mixed", "--kv-scales", *CALIBRATION),
    ("--int4=pure", "--method", "mse", "--group-size", "32", "--target", "transformers", *CALIBRATION),
    ("--int4=pure", "--method", "awq", "--group-size", "32", "--target", "transformers", *CALIBRATION),
    ("--int4=pure", "--group-size", "32", "--format", "gptq", "--target", "vllm", *CALIBRATION),
]
GGUF = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
    "IQ3_M",
    "IQ3_S",
    "TQ2_0",
    "TQ1_0",
    "MXFP4_MOE",
    "DSV2_Q3_K_M",
    "DSV2_Q4_K_S",
    "DSV2_Q4_K_M",
    "DSV2_Q5_K_M",
]


def run(*words: object) -> str:
    """What the command prints on stdout; what it says of an error, where it ends in one."""
    from dsv2quant.cli.main import main

    sys.argv = ["dsv2quant", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return out.getvalue() if code == 0 else f"exit {code}: {err.getvalue().strip().splitlines()[-1]}"


def models(folder: Path) -> dict[str, Path]:
    """dsv2-mini, and models of the tests, by name."""
    import gguf_tiny
    import tiny
    import torch

    found = {"dsv2-mini": tiny.MINI}
    configs = {"lite": tiny.LITE, "v2": tiny.V2, "grouped": tiny.GROUPED, "grouped-v2": tiny.GROUPED_V2}
    for name, config in {**configs, "awkward": tiny.AWKWARD, "wordy": tiny.WORDY}.items():
        found[name] = tiny.write_checkpoint(folder / name, config, shards=2)
    for name in ("float16", "float32"):
        weights = tiny.random_weights(tiny.GROUPED, dtype=getattr(torch, name))
        found[name] = tiny.write_checkpoint(folder / name, tiny.GROUPED, weights)
    return found | gguf_tiny.write(folder)


def cases(found: dict[str, Path]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(model, options of `convert`)."""
    for name in found:
        yield from ((name, options) for options in (*FP8, *INT4))
    for name in ("dsv2-mini", "wordy"):
        yield from ((name, options) for options in (*STATIC, *CALIBRATED, *FEW_BITS))
    for name in ("dsv2-mini", "tiny-lite", "tiny-v2", "tiny-odd"):
        yield from ((name, ("--gguf", kind, "--drop-expert-groups")) for kind in GGUF)
    yield "dsv2-mini", ("--gguf", "Q4_K_M", "--split-max-size", "3MB")
    yield "dsv2-mini", ("--gguf", "Q4_K_M", "--tensor-type", "ffn_down_exps=q6_k", "--output-type", "q8_0")
    yield "dsv2-mini", ("--fp8=block", "--max-shard-size", "4MB")
    for name in found:
        yield from ((name, options) for options in ACTIVATIONS)
    yield "dsv2-mini", ("--w4a8", *CALIBRATION)


def hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of what lies in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measure() -> dict[str, object]:
    """{case: what came of it}."""
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # names of inputs are shown in artifacts: relative ones are the same everywhere
        found = models(Path("models"))
        text = Path("fox.txt")
        text.write_text("".join(f"The quick brown fox jumps over {i} lazy dogs, once more.\n" for i in range(400)))
        written: dict[str, Path] = {}
        for name, options in cases(found):
            case = f"{name} {' '.join(options)}"
            folder = Path("out") / str(len(result))
            out = folder / "model.gguf" if "--gguf" in options else folder
            folder.mkdir(parents=True)
            calibrated = ("--calibration", text) if CALIBRATION[0] in options else ()
            started = time.perf_counter()
            said = run("convert", found[name], *options, *calibrated, "-q", "-o", out)
            result[case] = hashes(folder) if not said.startswith("exit") else said
            said = said if said.startswith("exit") else ""
            print(f"{time.perf_counter() - started:6.2f} s  {case} {said}", file=sys.stderr)
            written[case] = out
        for name in ("dsv2-mini", "wordy"):
            out = Path(f"{name}.safetensors"), Path(f"{name}.imatrix.gguf")
            run("calibrate", found[name], "--calibration", text, *CALIBRATION, "-o", out[0], "--imatrix", out[1], "-q")
            result[f"{name} statistics"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out}
            gguf = Path(f"{name}-q4") / "model.gguf"
            gguf.parent.mkdir()
            run("convert", found[name], "--gguf", "Q4_K_M", "--imatrix", out[1], "--imatrix-shrink", "-o", gguf, "-q")
            result[f"{name} --imatrix"] = hashes(gguf.parent)
        scored = ["dsv2-mini", *(case for case in written if case.startswith("dsv2-mini"))]
        for case in scored:
            path = found["dsv2-mini"] if case == "dsv2-mini" else written[case]
            said = run("eval-ppl", path, "--text", text, "--ctx", "64", "--limit", "4", "--json", "-q")
            if not said.startswith("exit"):
                said = json.loads(said)["perplexity"]
            result[f"{case}: perplexity"] = said
        words = ("--temperature", "0", "--max-new-tokens", "24", "--json", "-q")
        result["generate"] = json.loads(run("generate", found["dsv2-mini"], "--prompt", "The", *words))["tokens"]
    return result


def compare(before: dict[str, object], after: dict[str, object]) -> int:
    """Print what differs; 1 where it is more than prose."""
    worst = 0
    for case in sorted(before):
        a, b = before[case], after.get(case)
        if a == b:
            continue
        if not (isinstance(a, dict) and isinstance(b, dict)):
            a, b = {f"{a} became {b}": 0}, {}
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        grave = [name for name in names if not name.endswith(PROSE)]
        worst = max(worst, bool(grave))
        print(f"{'DIFFERS' if grave else 'prose'}: {case}: {', '.join(grave or names)}")
    verdict = "they differ" if worst else "every file but cards and manifests is equal"
    print(f"{len(before)} cases before, {len(after)} after: {verdict}")
    return worst


def main() -> int:
    """See the module's docstring."""
    if sys.argv[1] == "--compare":
        before, after = (json.loads(Path(path).read_text()) for path in sys.argv[2:4])
        return compare(before, after)
    out = Path(sys.argv[1]).resolve()
    out.write_text(json.dumps(measure(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
