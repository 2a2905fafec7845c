"""The Python API, which the command line calls: open, plan, memory, calibrate, convert, evaluate, verify,
verify_engine, push, generate, inspect.

    import dsv2quant as dq
    made = dq.convert("deepseek-ai/DeepSeek-V2-Lite", "LITE-FP8", scheme="fp8-block")

A model is an opened checkpoint, a folder, a GGUF file or a hub id. What contradicts itself is a UsageError before
anything is opened or downloaded; errors and what is logged name options as the command line spells them. Work that
takes long tells `progress` (progress.py); warnings are logged. torch is imported when something is computed with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.errors import UsageError
from dsv2quant.planning import options as asked
from dsv2quant.planning.options import HubOptions, Options, StrPath
from dsv2quant.planning.scoring import check_evaluation
from dsv2quant.progress import Progress, no_progress

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.engines.results import Verdict
    from dsv2quant.evaluation.results import Evaluation, Verification
    from dsv2quant.model.completion import Completion, Message
    from dsv2quant.planning.gguf_plan import GgufPlan
    from dsv2quant.planning.memory import MemoryPlan
    from dsv2quant.planning.plan import Plan
    from dsv2quant.planning.recipe import Recipe
    from dsv2quant.report.calibration import Calibrated, Conversion
    from dsv2quant.report.inspection import Inspection
    from dsv2quant.storage.push import Pushed
    from dsv2quant.text.tokenizer import Protocol

    Model = Checkpoint | str | os.PathLike[str]


def open(model: Model, *, headers_only: bool = False, **hub: Unpack[HubOptions]) -> Checkpoint:
    """A checkpoint, artifact or GGUF file, opened by its headers and checked against the tensors that its configuration
    implies. With `headers_only` a hub id's weights are not downloaded: enough to plan and inspect.

    Raises InputError for whatever is missing, surplus, mis-shaped, truncated or not understood, and UsageError for a
    revision of what has none.
    """
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.checkpoint.open import open_checkpoint

    if isinstance(model, Checkpoint):
        return model
    cache_dir = hub.get("cache_dir")
    return open_checkpoint(
        model, revision=hub.get("revision"), cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        offline=hub.get("offline", False), headers_only=headers_only,
    )  # fmt: skip


def inspect(model: Model, **hub: Unpack[HubOptions]) -> Inspection:
    """What a checkpoint, artifact or GGUF file holds, from its headers. Raises as `open` does."""
    from dsv2quant.report.inspection import inspection

    return inspection(open(model, headers_only=True, **hub))


def plan(checkpoint: Model, **options: Unpack[Options]) -> Plan | GgufPlan:
    """What a conversion would make of every tensor, from headers alone: no weight is read or downloaded.

    Raises UsageError where options contradict each other or the model, and InputError where the recipe or the
    checkpoint can't give an artifact. What only `convert` uses is checked, and changes nothing.
    """
    given = asked.given_of(options)
    recipe = asked.check_options(given)
    opened = open(checkpoint, headers_only=True, **asked.hub_of(given))
    if recipe is not None:
        opened.as_source().check_tokenizer()
    return asked.plan_of(opened, recipe, given)


def memory(
    model: Model | Plan, *, batch: Sequence[int] = (1,), context: Sequence[int] = (2048,), prefill: str = "flash",
    kv_cache: str = "bf16", tp: int = 1, pp: int = 1, gpu: str | None = None, **hub: Unpack[HubOptions],
) -> MemoryPlan:  # fmt: skip
    """What each pair of `batch` texts and `context` tokens takes of a GPU's memory, from headers alone: of a
    checkpoint, artifact or GGUF file as it is stored, or of what a plan makes.

    `prefill` "eager" is transformers of November 2023, "flash" this tool's runtime. `tp` GPUs split matrices and `pp`
    times as many layers; figures are of the fullest one. `gpu`, a card's name or size ("H200", "40GB"), says what fits.
    Raises UsageError for what can't be had of the model, else as `open` does.
    """
    asked.check_values({"prefill": prefill, "kv_cache": kv_cache, "tp": tp})
    from dsv2quant.planning.memory import Workload, plan_memory
    from dsv2quant.planning.plan import Plan

    workload = Workload(tuple(batch), tuple(context), prefill, kv_cache, tp, pp)
    made = model if isinstance(model, Plan) else open(model, headers_only=True, **hub)
    if isinstance(made, Plan):
        checkpoint: Checkpoint = made.checkpoint
        stored = [(entry.spec, entry.nbytes) for entry in made.entries]
    else:
        checkpoint, stored = made, [(weight.spec, weight.nbytes) for weight in made.weights]
    return plan_memory(checkpoint.model, checkpoint.config, stored, workload, gpu)


def check_conversion(out: StrPath | None, device: str = "cpu", **options: Unpack[Options]) -> Recipe | None:
    """Raise UsageError or InputError for what `convert` refuses before anything is opened. The recipe, None of GGUF."""
    given = asked.given_of(options)
    recipe = asked.check_options(given)
    asked.check_run(out, recipe is None, device, given)
    return recipe


def convert(
    model: Model | Plan | GgufPlan,
    out: StrPath,
    *,
    device: str = "cpu",
    force: bool = False,
    stream_hub: bool = False,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
    **options: Unpack[Options],
) -> Conversion:
    """Write an artifact: folder `out`, or with `gguf` the file `out`. A plan has what shapes it; beside one, only
    options of calibration and `split_max_size` are taken.

    A run that was killed continues when the same is asked for again, unless `force` starts over. `stream_hub` downloads
    a hub id's shards one by one, and drops each when it is converted. Raises UsageError as `plan` does, where nothing
    uses what is given for calibration, or all of what is streamed is needed at once; and InputError where a weight is
    not finite, the source changes meanwhile, or `out` can't take the artifact.
    """
    with progress(0, "", "starting"):  # imports numba
        from dsv2quant.checkpoint.open import open_streamed
        from dsv2quant.conversion.convert import convert as run
        from dsv2quant.conversion.stream import check_streamed
        from dsv2quant.planning.gguf_plan import GgufPlan
        from dsv2quant.planning.plan import Plan
        from dsv2quant.report.calibration import draw
        from dsv2quant.report.plans import tell
        from dsv2quant.storage.safetensors import parse_size

    given = asked.given_of(options)
    if stream_hub and not isinstance(model, str | os.PathLike):
        raise UsageError("--stream-hub goes with a hub id, which is not opened yet")
    if isinstance(model, Plan | GgufPlan):
        of_kind = ("split_max_size",) if isinstance(model, GgufPlan) else ("samples", "figure", "statistics")
        takes = (*of_kind, *asked.TUNING)
        if useless := [name for name in given if name not in takes]:
            raise UsageError(f"{asked.spelled(useless[0], given)} does not go with a plan, which is made already")
        asked.check_run(out, isinstance(model, GgufPlan), device, given)
        made: Plan | GgufPlan = replace(model, asked=(*model.asked, *asked.words_of(given)))
    else:
        recipe = check_conversion(out, device, **options)
        hub = asked.hub_of(given)
        if stream_hub and isinstance(model, str | os.PathLike):
            made = asked.plan_of(open_streamed(model, Path(f"{os.fspath(out)}.hub"), **hub), recipe, given)
            check_streamed(made, given)
        else:
            made = asked.plan_of(open(model, **hub), recipe, given)
    checkpoint, figure = made.checkpoint, given.get("figure")
    inputs = [Path(given[name]) for name in ("calibration", "recipe") if name in given]
    if figure is not None:
        asked.check_outputs([Path(out), Path(figure)], [*checkpoint.inputs, *inputs])
    tell(made)
    calibration, statistics, tuning, words = None, None, None, list[str]()
    if isinstance(made, Plan):
        from dsv2quant.calib.calibration import calibrated_on

        calibration, statistics, tuning, words = calibrated_on(made, given, progress)
    elif "tune" in given:
        from dsv2quant.calib.calibration import tuned_on

        calibration, statistics, tuning, words = tuned_on(checkpoint, given, progress)
    if ranks.size > 1:
        from dsv2quant.calib.calibration import check_ranks

        check_ranks(made, statistics, ranks)
    size = given.get("split_max_size")
    found = run(
        made, out, command=" ".join(["dsv2quant convert", checkpoint.model, *made.asked, *words]),
        calibration=calibration, statistics=statistics, tuning=tuning, device=device, force=force, inputs=inputs,
        split_max_size=None if size is None else parse_size(str(size)), progress=progress, ranks=ranks,
    )  # fmt: skip
    ranks.dismiss()
    if figure is not None and found.expert_tokens:
        draw(found.expert_tokens, checkpoint.config.hidden_size, os.fspath(figure))
    return found


def calibrate(
    model: Model, out: StrPath, *, text: StrPath | None = None, samples: int | None = None, length: int | None = None,
    seed: int | None = None, protocol: Protocol = "default", imatrix: StrPath | None = None,
    figure: StrPath | None = None, device: str = "cpu", force: bool = False, progress: Progress = no_progress,
    ranks: Ranks = ALONE, **hub: Unpack[HubOptions],
) -> Calibrated:  # fmt: skip
    """Run text through a model and write statistics of every linear's inputs to `out`, a safetensors file that many
    conversions take; with `imatrix` also an importance matrix for llama-quantize, a GGUF file.

    `text` is the `calibration` of `Options`, and `samples`, `length`, `seed` and `figure` are as there; `protocol`
    "llama.cpp" cuts windows in order, as llama-imatrix does. A run that was killed continues, unless `force` starts
    over. Raises UsageError for a text or seed that the protocol can't have, and InputError where an output is an input
    or holds something else.
    """
    asked.check_values({"samples": samples, "length": length, "seed": seed, "protocol": protocol})
    if protocol == "llama.cpp" and (text is None or os.fspath(text).lower().endswith((".jsonl", ".json"))):
        raise UsageError("--protocol llama.cpp needs --calibration FILE, a plain text file")
    if protocol == "llama.cpp" and seed is not None:
        raise UsageError("--seed goes with the default protocol: llama.cpp's takes the text in order")
    asked.check_figure(figure)
    asked.check_text(text)
    asked.check_device(device)
    from dsv2quant.calib import calibrate as calib
    from dsv2quant.calib.calibration import read_calibration
    from dsv2quant.report.calibration import Calibrated, draw
    from dsv2quant.storage.durable import tell_kept

    out, imatrix = Path(out), None if imatrix is None else Path(imatrix)
    if imatrix is not None:
        calib.check_imatrix(imatrix, out, force)
    checkpoint = open(model, **hub)
    inputs = [*checkpoint.inputs, *([Path(text)] if text is not None else [])]
    asked.check_outputs([Path(path) for path in (out, imatrix, figure) if path is not None], inputs)
    with progress(0, "", "tokenize"):
        where = hub.get("cache_dir"), hub.get("offline", False)
        calibration = read_calibration(checkpoint, text, samples, length, seed, protocol, *where)
    with tell_kept(out, partial(calib.is_begun, out)):
        found = calib.calibrate(
            checkpoint, out, calibration, device=device, halves=imatrix is not None, force=force, inputs=inputs,
            progress=progress, ranks=ranks,
        )  # fmt: skip
    ranks.dismiss()
    if imatrix is not None:
        calib.write_imatrix(imatrix, found, checkpoint.config, force)
    made = Calibrated(checkpoint, found, out, imatrix)
    if figure is not None:
        draw(made.expert_tokens, checkpoint.config.hidden_size, os.fspath(figure))
    return made


def evaluate(
    model: Model, *, reference: Model | None = None, save_reference: StrPath | None = None,
    text: StrPath | None = None, dataset: str | None = None,
    ctx: int | None = None, limit: int | None = None, protocol: Protocol = "default", batch: int | None = None,
    stream: bool = False, device: str = "cpu", dtype: str = "auto", backend: str = "auto", weight_only: bool = False,
    decode_path: bool = False, kv_cache: str = "auto", serving: str | None = None,
    max_ppl_increase: float | None = None, max_kld: float | None = None, progress: Progress = no_progress,
    ranks: Ranks = ALONE, **hub: Unpack[HubOptions],
) -> Evaluation:  # fmt: skip
    """A model's perplexity and, with `reference`, its divergence from that, on a `text` file, a `dataset`
    ("wikitext2"), or Python's own help topics.

    `save_reference` keeps the model as a reference in a file, which `reference` takes in its place for the same text,
    protocol and dtype; a run that was killed continues.
    `ctx` tokens are in a window (2048, or the trained context), `limit` windows are scored, `batch` of them go through
    a layer together; `stream` holds one layer's weights at a time. `max_ppl_increase`, in percent, and `max_kld`, in
    nats, set gates: `Evaluation.check_gates` raises for what failed. `decode_path` scores token by token, over a cache
    that stores `kv_cache`; `serving` computes as that consumer does where it departs from what the artifact says. Of
    several `ranks` each scores some windows, and all get the whole.
    Raises UsageError where options contradict each other or can't be had, and InputError where model, reference and
    text don't go together, or the file of a reference can't be read or written.
    """
    check_evaluation(
        {"ctx": ctx, "limit": limit, "batch": batch, "protocol": protocol, "dataset": dataset, "dtype": dtype,
         "backend": backend, "kv_cache": kv_cache, "serving": serving, "text": text, "reference": reference,
         "save_reference": save_reference, "max_ppl_increase": max_ppl_increase, "max_kld": max_kld},
        weight_only=weight_only, decode_path=decode_path, ranks=ranks.size,
    )  # fmt: skip
    from dsv2quant.text.text import from_dataset, from_file, python_topics

    if text is not None:
        scored = from_file(text)
    else:
        scored = from_dataset(dataset, hub.get("cache_dir"), hub.get("offline", False)) if dataset else python_topics()
    asked.check_device(device)
    opened = open(model, **hub)
    save = None if save_reference is None else Path(save_reference)
    read = [*opened.inputs, *([] if text is None else [Path(text)])]
    asked.check_outputs([] if save is None else [save], read)
    with progress(0, "", "starting"):
        from dsv2quant.evaluation import measure
        from dsv2quant.evaluation.reference import kept_at
        from dsv2quant.model.load import load_options

    options = load_options(device, dtype, backend, kv_cache, weight_only, serving)
    gates = (max_ppl_increase, max_kld)
    settings = measure.Settings(options, ctx, limit, batch, protocol, stream, decode_path, *gates, save)
    with progress(0, "", "reference"):
        kept = kept_at(reference)
    against = kept if kept or reference is None else open(reference, **hub | {"revision": None})
    return measure.evaluate(opened, against, scored, settings, progress, ranks)


def verify(
    artifact: Model,
    source: Model | None = None,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    **hub: Unpack[HubOptions],
) -> Verification:
    """Check an artifact's files against its manifest, or a GGUF file's blocks; with `source`, the checkpoint it was
    made from, also measure the error of what consumers decode, on `device`, and note beside its manifest that it stood
    the test. Raises InputError for the first thing that is wrong."""
    asked.check_device(device)
    opened = open(artifact, **hub)
    original = None if source is None else open(source, **hub | {"revision": None})
    with progress(0, "", "starting"):
        from dsv2quant.evaluation.verify import note_verified
        from dsv2quant.evaluation.verify import verify as run
    found = run(opened, original, device, progress)
    if original is not None and not found.wrong:
        note_verified(opened, original, found)
    return found


def verify_engine(
    artifact: Model, engine: str, source: Model | None = None, *, engine_python: StrPath | None = None,
    engine_url: str | None = None, tp: int = 1, engine_dtype: str = "bfloat16", kv_cache: str = "auto",
    text: StrPath | None = None, windows: int = 8, ctx: int | None = None, generate: bool = False,
    max_kld: float | None = None, device: str = "cpu", progress: Progress = no_progress, **hub: Unpack[HubOptions],
) -> Verdict:  # fmt: skip
    """Run an engine ("vllm", "sglang", "transformers", "llama.cpp") on an artifact and compare what it computes with
    this tool's runtime, which computes the same artifact on `device`: in the Python at `engine_python`, or by a server.

    `windows` of `ctx` tokens of a `text` are scored; `generate` also continues prompts. What may lie between both is
    twice the noise that the engine has on the `source`, and the runtime in `engine_dtype`, unless `max_kld` is given.
    `Verdict.check` raises for what is wrong. Raises UsageError where options contradict each other, and InputError
    where the artifact is damaged or the engine can't be run.
    """
    asked.check_values({"engine_dtype": engine_dtype, "windows": windows, "ctx": ctx})
    asked.check_engine(engine, engine_python, engine_url, tp, kv_cache, engine_dtype)
    asked.check_device(device)
    from dsv2quant.text.text import from_file, python_topics

    scored = python_topics() if text is None else from_file(text)
    opened = open(artifact, **hub)
    original = None if source is None else open(source, **hub | {"revision": None})
    with progress(0, "", "starting"):
        from dsv2quant.engines.verify import Settings, note_verified
        from dsv2quant.engines.verify import verify as run
    settings = Settings(
        engine, None if engine_python is None else os.fspath(engine_python), engine_url, tp, windows, ctx,  # type: ignore[arg-type]
        engine_dtype, kv_cache, generate, max_kld, device,
    )  # fmt: skip
    verdict = run(opened, original, scored, settings, progress)
    if not verdict.faults:
        note_verified(opened, verdict)
    return verdict


def push(
    artifact: StrPath, repo: str, *, private: bool = False, revision: str = "main", split: int | str | None = None,
    force: bool = False, progress: Progress = no_progress,
) -> Pushed:  # fmt: skip
    """Upload an artifact, a folder or a GGUF file, to `owner/name` on the hub, which is made if need be, into branch
    `revision`; a GGUF file of more than `split` bytes ("45GB") in several. The token is huggingface_hub's own.

    Raises UsageError where it can't be cut so, and InputError where a file is not as listed, nothing says that it was
    verified (unless `force`), the repository is public though not to be, or the hub refuses or can't be reached.
    """
    from dsv2quant.storage.push import push as run

    return run(artifact, repo, private=private, revision=revision, split=split, force=force, progress=progress)


def generate(
    model: Model, prompt: str | Sequence[Message], *, special: bool = False, max_new_tokens: int = 128,
    temperature: float = 0.0, top_p: float | None = None, seed: int | None = None, device: str = "cpu",
    dtype: str = "auto", backend: str = "auto", kv_cache: str = "auto",
    emit: Callable[[str], object] = lambda text: None, progress: Progress = no_progress, **hub: Unpack[HubOptions],
) -> Completion:  # fmt: skip
    """Continue a text, or answer the messages of a chat, {"role", "content"} each, in the model's chat template.

    `emit` is given the text in pieces as it comes. `temperature` 0 takes the likeliest token; above it, `top_p` (1) and
    `seed` (0) choose. `special` takes control tokens that are spelled out in a text as such. Raises UsageError where
    options contradict each other or the prompt leaves no room, and InputError for a model that can't generate.
    """
    asked.check_values(
        {"max_new_tokens": max_new_tokens, "dtype": dtype, "backend": backend, "kv_cache": kv_cache, "seed": seed}
    )
    if special and not isinstance(prompt, str):
        raise UsageError("--special goes with a plain prompt: the chat template spells out its own special tokens")
    for name, value in {"--top-p": top_p, "--seed": seed}.items():
        if value is not None and temperature == 0:
            raise UsageError(f"{name} goes with --temperature above 0: without sampling it does nothing")
    asked.check_device(device)
    checkpoint = open(model, **hub)
    with progress(0, "", "starting"):
        from dsv2quant.model.completion import Request, Sampling, complete
        from dsv2quant.model.load import load_options

    loading = load_options(device, dtype, backend, kv_cache)
    sampling = Sampling(temperature, 1.0 if top_p is None else top_p, seed or 0)
    return complete(checkpoint, Request(prompt, max_new_tokens, sampling, loading, special), emit, progress)
