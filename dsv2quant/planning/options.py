"""What the verbs are asked for: options by their names in Python, how the command line spells them, and what is wrong
with them, told before anything is opened or downloaded. `--help` needs the names: no heavy imports here."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dsv2quant.errors import InputError, UsageError

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.planning.gguf_plan import GgufPlan
    from dsv2quant.planning.plan import Plan
    from dsv2quant.planning.recipe import Recipe

StrPath = str | os.PathLike[str]

SCHEMES = (
    "fp8-block", "fp8-channel", "fp8-tensor", "fp8-static", "int4-mixed", "int4-pure", "int4-experts",
    "int3-mixed", "int3-experts", "int2-mixed", "int2-experts", "int8", "w4a8",
)  # fmt: skip
METHODS = ("rtn", "mse", "awq", "gptq")
GROUP_SIZES = (128, 64, 32, "channel")
FEW_BITS = ("int3", "int2")
LAYOUTS = {"compressed-tensors": ("int4", *FEW_BITS, "fp8"), "gptq": ("int4",), "awq": ("int4",), "autofp8": ("fp8",)}
SERVERS = ("vllm", "sglang")
CONSUMERS = (*SERVERS, "transformers")
ENGINES = (*CONSUMERS, "llama.cpp")
ENGINE_DTYPES = ("bfloat16", "float16", "float32")
DTYPES = ("auto", "float32", "bfloat16")
BACKENDS = ("auto", "torch", "kernels")
PROTOCOLS = ("default", "llama.cpp")
DATASETS = ("wikitext2",)
PREFILLS = ("flash", "eager")
KV_CACHES = ("auto", "float32", "bf16", "fp8_e4m3", "fp8_e5m2")


class HubOptions(TypedDict, total=False):
    """How a hub id is found: `revision` is a branch, tag or commit, `cache_dir` where downloads are kept, and `offline`
    takes only what is there."""

    revision: str | None
    cache_dir: StrPath | None
    offline: bool


class Options(HubOptions, total=False):
    """What a conversion is asked for; None, False and nothing are as if not given.

    Into a folder: a `scheme` of SCHEMES (fp8-block) or a `recipe`, a YAML file; of INT4 and of fewer bits the `method`
    (gptq) and `group_size` (128, of fewer bits 64); `layout` of LAYOUTS; `targets`, consumers that must load it (all
    that can), with their tensor-parallel size `tp` and GPUs `ep` that experts are spread over (1); `max_shard_size` in
    bytes or as text ("5GB"); `kv_scales` for an FP8 KV cache; `language_only` of a multimodal model, which is else
    written whole. What calibrates takes `samples` (512) windows of `length` tokens of `calibration`, a text file or a
    data set of the hub, "ORG/NAME:SPLIT#COLUMN" (Python's library), in the order of `seed` (0), or `statistics` that
    `calibrate` wrote; `figure` is a picture of tokens per expert to draw.
    `tune` trains codes, scales, norms and routers on so many tokens of that text, a number or "8M".
    `base_model` is the hub id that the card names, by default the model's own, or what its card says.

    Into a GGUF file: `gguf`, its file type or preset; an `imatrix` file, and `imatrix_shrink` to draw experts with few
    tokens toward their layer's mean; `tensor_types`, each "PATTERN=TYPE"; `output_type`, `token_embedding_type`;
    `drop_expert_groups`; `split_max_size` of a file; `tune`, with `calibration`, `length` and `seed`, as of a folder.
    """

    scheme: str | None
    recipe: StrPath | None
    method: str | None
    group_size: int | Literal["channel"] | None
    layout: str | None
    kv_scales: bool
    language_only: bool
    targets: Sequence[str]
    tp: int
    ep: int
    max_shard_size: int | str
    calibration: StrPath | None
    samples: int | None
    length: int | None
    seed: int | None
    figure: StrPath | None
    statistics: StrPath | None
    tune: int | str | None
    base_model: str | None
    gguf: str | None
    imatrix: StrPath | None
    imatrix_shrink: bool
    tensor_types: Sequence[str]
    output_type: str | None
    token_embedding_type: str | None
    split_max_size: int | str | None
    drop_expert_groups: bool


# What shapes an artifact of each kind, in the order in which its card shows it; and what measures for one.
FOLDER = (
    "scheme", "recipe", "method", "group_size", "layout", "kv_scales", "language_only", "targets", "tp", "ep",
    "max_shard_size", "tune", "base_model",
)  # fmt: skip
GGUF = (
    "gguf", "imatrix", "imatrix_shrink", "tensor_types", "output_type", "token_embedding_type", "split_max_size",
    "drop_expert_groups",
)  # fmt: skip
WORKLOAD = ("batch", "context", "prefill", "kv_cache", "gpu", "tp", "pp")  # of `memory`
MACHINES = ("gpu", "gpus", "nodes", "samples", "length")  # of `plan --time`
CALIBRATION = ("calibration", "samples", "length", "seed", "figure")
TUNING = ("tune", "calibration", "length", "seed")
_SPELLED = {
    "layout": "--format", "targets": "--target", "tensor_types": "--tensor-type",
    "samples": "--num-calibration-samples", "length": "--max-seq-length", "engine_dtype": "--dtype", "serving": "--as",
}  # fmt: skip
_USUAL = {"tp": 1, "ep": 1, "max_shard_size": "5GB"}
_CHOICES: dict[str, Sequence[object]] = {
    "scheme": SCHEMES, "method": METHODS, "group_size": GROUP_SIZES, "layout": tuple(LAYOUTS), "targets": CONSUMERS,
    "dtype": DTYPES, "backend": BACKENDS, "kv_cache": KV_CACHES, "protocol": PROTOCOLS, "dataset": DATASETS,
    "prefill": PREFILLS, "engine": ENGINES, "serving": ENGINES, "engine_dtype": ENGINE_DTYPES,
}  # fmt: skip
_LEAST = {
    "tp": 1, "ep": 1, "samples": 1, "length": 8, "seed": 0, "ctx": 8, "limit": 1, "batch": 1, "max_new_tokens": 1,
    "windows": 1, "gpus": 1, "nodes": 1,
}  # fmt: skip


def given_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that are as if not given. Raises TypeError for one that is none."""
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(f"unknown option {unknown[0]!r}: there are {', '.join(Options.__annotations__)}")
    return {name: value for name, value in options.items() if value or (value == 0 and value is not False)}


def hub_of(given: Mapping[str, Any]) -> HubOptions:
    """Those of all options."""
    revision, cache_dir, offline = map(given.get, ("revision", "cache_dir", "offline"))
    return {"revision": revision, "cache_dir": cache_dir, "offline": bool(offline)}


def spelled(name: str, given: Mapping[str, Any]) -> str:
    """An option as the command line has it; a scheme by its family, --fp8."""
    return f"--{given[name].partition('-')[0]}" if name == "scheme" else dashed(name)


def dashed(name: str) -> str:
    """An option's name on the command line: '--group-size'."""
    return _SPELLED.get(name, f"--{name.replace('_', '-')}")


def words_of(given: Mapping[str, Any]) -> list[str]:
    """Everything that shapes the artifact, and no path of this machine."""
    words = []
    for name in (*FOLDER, *GGUF):
        value, option = given.get(name), dashed(name)
        if value is None or value == _USUAL.get(name):
            continue
        if name == "scheme":
            words.append(f"--{value.replace('-', '=', 1)}")
        elif value is True:
            words.append(option)
        elif name in ("recipe", "imatrix"):
            words.append(f"{option} {Path(value).name}")
        else:
            words += [f"{option} {item}" for item in (value if isinstance(value, list | tuple) else [value])]
    return words


def check_values(given: Mapping[str, Any]) -> None:
    """Raise UsageError for a value that an option can't have."""
    for name, value in given.items():
        if value is None:
            continue
        choices = _CHOICES.get(name)
        for item in value if name == "targets" else (value,):
            if choices is not None and item not in choices:
                raise UsageError(f"{dashed(name)} {item}", fix=f"it takes {', '.join(map(str, choices))}")
        if name in _LEAST and value < _LEAST[name]:
            raise UsageError(f"{dashed(name)} {value} is out of range", fix=f"it must be at least {_LEAST[name]}")


def check_options(given: Mapping[str, Any]) -> Recipe | None:
    """Raise UsageError for options that contradict each other. The recipe, None of GGUF."""
    check_values(given)
    into_gguf = "gguf" in given
    tuned = TUNING if "tune" in given else ()
    for name in (*FOLDER, *CALIBRATION, "statistics") if into_gguf else GGUF:
        if name in given and not (into_gguf and name in tuned):
            raise UsageError(f"{spelled(name, given)} {'does not go' if into_gguf else 'goes'} with --gguf")
    if not into_gguf:
        return _recipe(given)
    if "tune" in given:
        parse_tokens(given["tune"])
        if given["gguf"].upper() in ("F32", "F16", "BF16"):
            raise UsageError("--tune trains codes of blocks and their scales: there would be none", fix="leave it out")
    if "imatrix_shrink" in given and "imatrix" not in given:
        raise UsageError("--imatrix-shrink goes with --imatrix")
    return None


def _recipe(given: Mapping[str, Any]) -> Recipe:
    from dsv2quant.planning import recipe

    base = given.get("base_model")
    if base is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is None:
        raise UsageError(f"--base-model {base}", fix="give a hub id, owner/name")

    scheme, file, method, group, layout = map(given.get, ("scheme", "recipe", "method", "group_size", "layout"))
    if given.get("tp", 1) > 1 and set(given.get("targets", ())) == {"transformers"}:
        raise UsageError("--tp goes with vLLM and SGLang: transformers loads the whole model")
    if scheme and file:
        raise UsageError("a scheme and a recipe exclude each other")
    kind, _, variant = (scheme or "").partition("-")
    if kind == "w4a8" and group:
        raise UsageError("--w4a8 has groups of 128 columns: --group-size goes with --int4")
    if (method or group) and kind not in ("int4", "w4a8", *FEW_BITS):
        raise UsageError("--method and --group-size go with --int4, --int3 and --int2; a recipe names them itself")
    if kind in FEW_BITS and group == "channel":
        raise UsageError(f"--{kind} has scales per group alone: --group-size 128, 64 or 32")
    if kind in FEW_BITS and method == "awq":
        raise UsageError(f"--{kind} has no method awq", fix="take gptq, mse or rtn")
    if (layout and kind not in LAYOUTS[layout]) or (layout and kind == "fp8" and variant != "static"):
        raise UsageError(f"--format {layout}: gptq and awq go with --int4, autofp8 with --fp8=static")
    if (layout, group) == ("awq", "channel"):
        raise UsageError("--format awq has scales per group alone: --group-size 128, 64 or 32")
    if file:
        made = recipe.load(file)
    else:
        size = 0 if group == "channel" else group
        made = recipe.builtin(scheme or "fp8-block", method=method, group_size=size, layout=layout)
    check_tune(made.schemes, given)
    return made


def check_tune(schemes: Iterable[str], given: Mapping[str, Any]) -> None:
    """Raise UsageError where these schemes have nothing to tune, or there is no such number of tokens."""
    from dsv2quant.formats.schemes import CODECS

    if "tune" in given:
        parse_tokens(given["tune"])
        if not any(CODECS[scheme].integers for scheme in schemes):
            raise UsageError("--tune trains integers and their scales: there would be none", fix="leave it out")


def parse_tokens(text: int | str) -> int:
    """'500k' or '2M' → tokens. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", str(text))
    if match is None:
        raise UsageError(f"--tune {text}", fix="give a number of tokens, as 500k or 8M")
    return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]])


def plan_of(checkpoint: Checkpoint, recipe: Recipe | None, given: Mapping[str, Any]) -> Plan | GgufPlan:
    """The plan of a recipe, without one that of a GGUF file."""
    from dsv2quant.storage.safetensors import parse_size

    if recipe is None:
        return _gguf_plan(checkpoint, given)
    from dsv2quant.planning.plan import make_plan

    source = checkpoint.as_source()
    if given.get("language_only"):
        if source.whole is None:
            raise UsageError(f"--language-only: {source.model} is a language model alone", fix="leave it out")
        source = source.language_model()
    made = make_plan(
        source,
        recipe,
        for_targets=given.get("targets"),
        tp=given.get("tp", 1),
        ep=given.get("ep", 1),
        max_shard_size=parse_size(str(given.get("max_shard_size", "5GB"))),
        kv_scales=given.get("kv_scales", False),
    )
    usual = {} if given.keys() & {"scheme", "recipe"} else {"scheme": "fp8-block"}
    return replace(made, asked=tuple(words_of({**usual, **given})), base_model=given.get("base_model"))


def _gguf_plan(checkpoint: Checkpoint, given: Mapping[str, Any]) -> GgufPlan:
    from dsv2quant.formats.gguf import imatrix
    from dsv2quant.planning import gguf_plan as gguf
    from dsv2quant.planning.gguf_types import Overrides

    types = [given.get(name) for name in ("output_type", "token_embedding_type")]
    asked = gguf.Options(
        gguf.parse_mix(given["gguf"]),
        Overrides(
            tuple(gguf.parse_tensor_type(text) for text in given.get("tensor_types", ())),
            *(None if kind is None else gguf.parse_type(kind) for kind in types),
        ),
        given.get("drop_expert_groups", False),
        imatrix.read(Path(given["imatrix"])) if "imatrix" in given else None,
        given.get("imatrix_shrink", False),
    )
    return replace(gguf.make_gguf_plan(checkpoint, asked), asked=tuple(words_of(given)))


def check_run(out: StrPath | None, into_gguf: bool, device: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError or InputError for an `out` that is named as the other kind of artifact, a figure that can't be
    drawn, a text that can't be read, and a device that is not there."""
    name = "" if out is None else os.fspath(out)
    if name and into_gguf and not name.endswith(".gguf"):
        raise UsageError(f"-o {name}: --gguf writes a file, whose name must end in .gguf")
    if not into_gguf and name.lower().endswith(".gguf"):
        asked = "--recipe" if "recipe" in given else spelled("scheme", {"scheme": "fp8"} | dict(given))
        raise UsageError(f"-o {name}: a GGUF file is written by --gguf TYPE; {asked} writes a folder")
    check_figure(given.get("figure"))
    check_text(given.get("calibration"))
    check_device(device)


def check_figure(path: StrPath | None) -> None:
    """Raise UsageError for a figure that can't be drawn."""
    if path is None:
        return
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("--figure needs matplotlib: pip install 'dsv2quant[viz]'")
    if not os.fspath(path).lower().endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--figure {os.fspath(path)}: the name must end in .png, .svg or .pdf")


def check_text(path: StrPath | None) -> None:
    """Raise InputError for a text that can't be read, before anything is downloaded for it. What may be a data set is
    looked for later."""
    if path is not None and not os.access(path, os.R_OK):
        from dsv2quant.text.calibration import load
        from dsv2quant.text.dataset import named

        if named(os.fspath(path)) is None:
            load(path, Path())  # says what is wrong


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise InputError, before the work begins, where a file to write is also read, or named twice."""
    from dsv2quant.storage.durable import refuse_inputs

    refuse_inputs(outputs, inputs)
    for i, path in enumerate(outputs):
        if any(os.path.realpath(path) == os.path.realpath(other) for other in outputs[:i]):
            raise InputError("is named for two outputs", where=path, fix="give each a name of its own")


def check_device(device: str) -> None:
    """Raise UsageError for a device that is not there; 'cpu' needs no look, and a machine without any driver not the
    seconds that importing torch takes."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device!r} is none of cpu, cuda and cuda:N, as cuda:1.")
    if sys.platform == "linux" and not _has_driver():
        raise UsageError(f"--device {device} can't be used: there is no GPU driver on this machine")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} can't be used: {str(error).splitlines()[0]}") from None


def check_engine(
    engine: str, python: StrPath | None, url: str | None, tp: int, kv_cache: str, dtype: str
) -> None:  # fmt: skip
    """Raise UsageError for what an engine can't be asked."""
    check_values({"engine": engine, "tp": tp, "kv_cache": kv_cache})
    serves = engine in SERVERS
    if python is not None and url is not None:
        raise UsageError("--engine-python and --engine-url exclude each other")
    if url is not None and not serves:
        raise UsageError(f"--engine-url: {engine} has no server that gives a prompt's log-probabilities")
    if python is not None and engine == "llama.cpp":
        raise UsageError("--engine-python: llama.cpp's programs are found on PATH")
    if dtype != "bfloat16" and engine == "llama.cpp":
        raise UsageError(f"--dtype {dtype}: llama.cpp computes as its file's types have it", fix="leave it out")
    if url is not None and (tp > 1 or kv_cache != "auto"):
        raise UsageError("--tp and --kv-cache go with an engine that is started: a server has its own")
    if not serves and tp > 1:
        raise UsageError(f"--tp {tp} goes with vllm and sglang")
    if not serves and kv_cache != "auto":
        raise UsageError(f"--kv-cache {kv_cache} goes with vllm and sglang")


def _has_driver() -> bool:
    if os.path.exists("/dev/kfd"):  # AMD's, which torch also calls cuda
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
