"""SGLang, 0.5.16: one scheduler process for each GPU, which makes the model and the logits.

SGLang gives likeliest tokens alone. Whole distributions are kept where the scheduler of rank 0 makes them
(`LogitsProcessor._get_logits`, layers/logits_processor.py); what SGLang itself answers must agree with them. One window
at a time, without chunks, prefixes or overlapped steps, so that every call belongs to a known window.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from exchange import Exchange, check, clocked, run, tell

# A window's logits in one call; GPUs that others use, too.
NEEDED = {"SGLANG_ENABLE_LOGPROB_CHUNK": "0", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
PREFERRED = {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}  # it compiles its kernels at the first use of each shape
LATENT = 512  # kv_lora_rank that MLA's kernels are made for; Triton's take others
SPARE = 4096  # tokens of cache beyond what is asked


def main() -> None:
    exchange = Exchange.opened()
    os.environ.update(NEEDED)
    for name, value in PREFERRED.items():
        os.environ.setdefault(name, value)
    engine = started(exchange)
    exchange.each_window(partial(score, exchange, engine), partial(decode, exchange, engine))
    exchange.put("generated", [*generated(exchange, engine)])
    if exchange.request.get("bench"):
        exchange.put("bench", [*exchange.timed(partial(seconds, engine))])
    engine.shutdown()


def started(exchange: Exchange) -> Any:
    from sglang.srt.entrypoints.engine import Engine

    class Watched(Engine):
        run_scheduler_process_func = staticmethod(watched_scheduler)

    request = exchange.request
    return Watched(
        model_path=exchange.model, dtype=request["dtype"], tp_size=request["tp"], kv_cache_dtype=request["kv_cache"],
        attention_backend=attention_backend(exchange.model), device=None if has_gpu() else "cpu",
        disable_radix_cache=True, disable_prefill_cuda_graph=True, skip_server_warmup=True,
        sampling_backend="pytorch", grammar_backend="none", log_level="info", **sizes(exchange),
    )  # fmt: skip


def sizes(exchange: Exchange) -> dict[str, Any]:
    """Room for what is asked and no more, so that several engines fit on a GPU. Speed is that of CUDA graphs and of
    SGLang's own chunks; what is scored is a chunk of its own, since a call's rows must be a window's."""
    if speed := exchange.request.get("bench"):
        batch = max(speed["batches"])
        cache = batch * (max(speed["contexts"]) + speed["new_tokens"])
        return {
            "max_running_requests": batch, "cuda_graph_bs_decode": speed["batches"], "max_total_tokens": SPARE + cache,
        }  # fmt: skip
    longest = exchange.longest()
    return {
        "max_running_requests": 1, "max_total_tokens": SPARE + longest, "max_prefill_tokens": SPARE + longest,
        "chunked_prefill_size": -1, "disable_cuda_graph": True, "disable_overlap_schedule": True,
    }  # fmt: skip


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def attention_backend(model: str) -> str | None:
    """None, SGLang's own choice, where its kernels are there: FlashAttention 3 is a library of 1.1 GB of its own."""
    if not has_gpu():
        return "torch_native"
    config = json.loads((Path(model) / "config.json").read_text())
    found = find_spec("sgl_kernel")
    library = found and found.origin and Path(found.origin).with_name("flash_ops.abi3.so")
    usual = config.get("kv_lora_rank", LATENT) == LATENT
    return None if usual and library and library.exists() else "triton"


def watched_scheduler(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, *others: Any, **more: Any) -> None:
    """What a scheduler's process runs: SGLang's own, but on rank 0 the logits are kept, and the report is written."""
    from sglang.srt.managers import scheduler

    class Watched(scheduler.Scheduler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with Told():
                super().__init__(*args, **kwargs)
                if tp_rank == 0:
                    exchange, runner = Exchange.opened(), self.tp_worker.model_runner
                    keep_logits(exchange, runner.model.logits_processor)
                    exchange.put("report", report(runner))

        def run_event_loop(self) -> None:
            with Told():
                super().run_event_loop()

    scheduler.Scheduler = Watched
    scheduler.run_scheduler_process(server_args, port_args, gpu_id, tp_rank, *others, **more)


def keep_logits(exchange: Exchange, processor: Any) -> None:
    """Have a `LogitsProcessor` put the distributions of the windows, which are asked first, into the folder."""
    import torch

    make, windows, kept = processor._get_logits, iter(range(len(exchange.windows))), []

    def get_logits(*args: Any, **kwargs: Any) -> Any:
        logits = make(*args, **kwargs)
        kept.append(logits if exchange.decode else logits[exchange.first : -1])
        if len(kept) == (exchange.decode or 1):
            if (window := next(windows, None)) is not None:
                exchange.put_logits(window, torch.cat(kept))
            kept.clear()
        return logits

    processor._get_logits = get_logits


def report(runner: Any) -> dict[str, Any]:
    """Of rank 0's `ModelRunner`: what its modules compute with, counted."""
    import torch

    versions = {"torch": str(torch.__version__)}
    for package in ("sglang", "sglang-kernel", "transformers", "compressed-tensors"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    modules = [*runner.model.modules()]
    kernels = Counter(" ".join(path_of(m)) for m in modules if getattr(m, "quant_method", None) is not None)
    return {
        "versions": versions, "kernels": dict(kernels), "attention": type(runner.attn_backend).__name__,
        "kv_cache": str(runner.kv_cache_dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if has_gpu() else "cpu",
        "settings": {name: os.environ[name] for name in PREFERRED},
    }  # fmt: skip


def path_of(module: Any) -> Iterator[str]:
    """Class names of a module's quantization method and scheme, and of experts what runs them."""
    for part in (module.quant_method, getattr(module, "scheme", None)):
        if part is not None:
            yield type(part).__name__
            if runner := getattr(part, "runner", None):
                yield str(runner.runner_backend.value)


def asked(engine: Any, sampling: dict[str, Any], **given: Any) -> dict[str, Any]:
    """SGLang's greedy answer to one prompt, with its log-probabilities of the tokens."""
    answer: dict[str, Any] = engine.generate(
        sampling_params={"temperature": 0.0} | sampling, return_logprob=True, **given
    )
    return answer


def score(exchange: Exchange, engine: Any, window: int, ids: list[int]) -> None:
    """Have the distributions behind a window's tokens but the last kept."""
    answer = asked(engine, {"max_new_tokens": 1, "ignore_eos": True}, input_ids=ids, logprob_start_len=0)
    said = answer["meta_info"]["input_token_logprobs"][exchange.first + 1 :]
    agree(exchange, window, [row[1] for row in said], [row[0] for row in said])


def decode(exchange: Exchange, engine: Any, window: int, ids: list[int]) -> list[int]:
    """Have the distributions of tokens that are decoded behind a window kept, and return the tokens."""
    answer = asked(engine, {"max_new_tokens": exchange.decode, "ignore_eos": True}, input_ids=ids)
    said = answer["meta_info"]["output_token_logprobs"]
    agree(exchange, window, [row[1] for row in said], [row[0] for row in said])
    return [row[1] for row in said]


def agree(exchange: Exchange, window: int, tokens: list[int], said: list[float]) -> None:
    """Raise ValueError where SGLang's own log-probabilities of some tokens are not those that were kept."""
    kept = np.load(exchange.folder / "logprobs.npy", mmap_mode="r")[window]
    check(kept[np.arange(exchange.scored), tokens], said)


def generated(exchange: Exchange, engine: Any) -> Iterator[dict[str, Any]]:
    """Continue prompts greedily, one at a time; SGLang tokenizes them and applies the chat template."""
    for prompt in exchange.prompts:
        given = {"prompt": prompt["text"]} if "text" in prompt else {"input_ids": chat(engine, prompt["messages"])}
        answer = asked(engine, {"max_new_tokens": exchange.request["max_new_tokens"]}, logprob_start_len=0, **given)
        said = answer["meta_info"]
        yield {
            "prompt_ids": [row[1] for row in said["input_token_logprobs"]], "ids": list(answer["output_ids"]),
            "text": answer["text"], "finish_reason": said["finish_reason"]["type"],
        }  # fmt: skip
        exchange.advance()


def chat(engine: Any, messages: list[dict[str, str]]) -> list[int]:
    """The prompt of a conversation as SGLang's own server for chats makes it."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    server = OpenAIServingChat(engine.tokenizer_manager, engine.template_manager)
    request = ChatCompletionRequest(model="", messages=messages)
    made = server._process_messages(request, is_multimodal=False).prompt_ids
    return list(made) if not isinstance(made, str) else list(engine.tokenizer_manager.tokenizer.encode(made))


def seconds(engine: Any, prompts: list[list[int]], new: int) -> float:
    """How long it takes to prefill prompts and decode so many tokens behind each."""
    sampling = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
    return clocked(lambda: engine.generate(input_ids=prompts, sampling_params=sampling))


class Told:
    """What fails within a scheduler ends the driver with that as the reason: SGLang would log it and kill all."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            tell(type(error), error, trace)
            os.kill(os.getppid(), signal.SIGUSR1)
            os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))
    run(main)
