"""transformers, as it loads an artifact by default: compressed-tensors fake-quantizes activations of linear modules;
block FP8 is decoded first where no GPU has FP8."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from exchange import Exchange, run
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    exchange = Exchange.opened()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(exchange, device)
    with torch.inference_mode():
        exchange.each_window(partial(score, exchange, model))
        exchange.put("generated", generated(exchange, model))
    exchange.put("report", report(model, device))


def load(exchange: Exchange, device: str) -> Any:
    dtype = getattr(torch, exchange.request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(exchange.model, dtype=dtype, local_files_only=True).eval().to(device)
    # What block FP8 leaves unquantized stays in BF16 whatever dtype is asked for.
    declared = json.loads((Path(exchange.model) / "config.json").read_text()).get("quantization_config") or {}
    if dtype == torch.float32 and declared.get("quant_method") == "fp8" and device == "cpu":
        torch.nn.Module.float(model)
    return model


def score(exchange: Exchange, model: Any, window: int, ids: list[int]) -> None:
    """Keep the distributions behind a window's tokens."""
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
    exchange.put_logits(window, logits[0, exchange.first : -1])


def generated(exchange: Exchange, model: Any) -> list[dict[str, object]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(exchange.model, local_files_only=True) if exchange.prompts else None
    found: list[dict[str, object]] = []
    for prompt in exchange.prompts:
        if "text" in prompt:
            ids = tokenizer(prompt["text"])["input_ids"]
        else:
            chat = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, return_dict=True)
            ids = chat["input_ids"]
        given = torch.tensor([ids], device=model.device)
        limit = exchange.request["max_new_tokens"]
        made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=limit, do_sample=False)
        new = made[0, len(ids) :].tolist()
        ends = model.generation_config.eos_token_id
        stopped = new[-1] in (ends if isinstance(ends, list) else [ends])
        text = tokenizer.decode(new, skip_special_tokens=True)
        reason = "stop" if stopped else "length"
        found.append({"prompt_ids": list(ids), "ids": new, "text": text, "finish_reason": reason})
        exchange.advance()
    return found


def report(model: Any, device: str) -> dict[str, object]:
    kernels = Counter(
        type(module).__name__
        for module in model.modules()
        if "Linear" in type(module).__name__ or "Experts" in type(module).__name__
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if "compressed_tensors" in sys.modules:
        versions["compressed-tensors"] = sys.modules["compressed_tensors"].__version__
    return {
        "versions": versions, "kernels": dict(kernels), "attention": model.config._attn_implementation,
        "kv_cache": None, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
