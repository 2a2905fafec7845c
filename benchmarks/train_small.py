"""Trains a small Llama and a small DeepSeek-V3 from scratch, in transformers' own classes, for benchmarks/families.py.

    python benchmarks/train_small.py pack FOLDER ... -o text.xz
    python benchmarks/train_small.py train llama --text text.xz --minutes 8 -o llama
    python benchmarks/train_small.py train v3 --text text.xz --minutes 8 -o v3

`pack` tokenizes the texts of folders (.py, .md, .rst, .txt, .html and man pages, gzipped too) with dsv2-mini's
tokenizer. `train` draws windows of BOS and 511 tokens for so many minutes on the GPU, where there is one, and writes
BF16 weights in the Hugging Face layout with a config.json in its published form, and the curve as loss.csv. The V3's
routers are balanced without a loss, as DeepSeek-V3's (arXiv 2408.15664): after each step the bias of an expert that had
more than its share of the tokens falls by BIAS_STEP, and of one that had less it rises.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html.parser
import json
import lzma
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

TOKENIZER = Path(__file__).parent.parent / "examples" / "dsv2-mini"
BOS, EOS = 0, 1
CTX, BATCH = 512, 64
LEFT_OUT = {"pydoc_data"}  # from which the evaluation text is
HELD_OUT = 64  # windows at the end of the text
PEAK, WARM_UP = 1.5e-3, 200  # learning rate, and the steps in which it rises
BIAS_STEP = 1e-3
REPORTED = 100  # steps from one row of loss.csv to the next

COMMON = {
    "torch_dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.02,
    "use_cache": True,
}
# The second has DeepSeek-V3's own head widths and its router's rules. All widths fill K-quants' blocks of 256.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1280,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "mlp_bias": False,
    },
    "v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}


class PlainText(html.parser.HTMLParser):
    """The text of a page without its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def text_of(path: Path) -> str:
    """A file as plain text; '' for what is no English text or source code in UTF-8."""
    name = path.name.removesuffix(".gz")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    if name.endswith(".html"):
        parser = PlainText()
        parser.feed(text)
        text = "".join(parser.parts)
    elif re.search(r"\.[1-8]$", name):  # a man page: without its requests and font changes
        text = re.sub(r"(?m)^\.\\\".*\n|^['.](?:S[HS]|T[HP]|[BI]R?|RB|RI) ?|^['.].*\n", "", text)
        text = re.sub(r"\\f\[?[A-Z]{1,2}\]?|\\&|\\s[-+]?\d", "", text).replace("\\-", "-").replace("\\(aq", "'")
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()
    return text if sum(map(str.isascii, text)) > 0.98 * len(text) else ""


def documents(folders: list[Path]) -> Iterator[str]:
    """The different texts of `folders` in an order drawn once, less what the evaluation text is generated from."""
    wanted = re.compile(r"\.(?:py|md|rst|txt|html|[1-8])(?:\.gz)?$")
    paths = [p for folder in folders for p in sorted(folder.rglob("*")) if wanted.search(p.name) and p.is_file()]
    random.Random(0).shuffle(paths)
    seen = set()
    for path in paths:
        if not LEFT_OUT.isdisjoint(path.parts) or not (text := text_of(path)):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def pack(options: argparse.Namespace) -> None:
    """Token ids as uint16, each document closed by EOS, compressed with xz."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    stream: list[np.ndarray] = []
    count = 0
    for text in documents(options.folders):
        ids = np.array([*tokenizer.encode(text, add_special_tokens=False).ids, EOS], np.uint16)
        stream.append(ids[: options.longest])
        count += len(stream[-1])
        if count >= options.tokens:
            break
    packed = lzma.compress(np.concatenate(stream).tobytes(), preset=6)
    options.out.write_bytes(packed)
    print(f"{len(stream)} documents, {count / 1e6:.1f} M tokens, {len(packed) / 1e6:.1f} MB")


class Text:
    """Windows of BOS and CTX - 1 tokens, int64 [windows, CTX], on a device; the last HELD_OUT are never drawn."""

    def __init__(self, path: Path, device: str) -> None:
        ids = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint16).astype(np.int32)
        self._ids = torch.from_numpy(ids).to(device)
        self._end = len(ids) - HELD_OUT * CTX
        self._random = torch.Generator(device).manual_seed(0)
        self.held_out = self._windows(self._end + CTX * torch.arange(HELD_OUT, device=device))

    def draw(self) -> torch.Tensor:
        """A step's."""
        starts = torch.randint(self._end - CTX, (BATCH,), generator=self._random, device=self._ids.device)
        return self._windows(starts)

    def _windows(self, starts: torch.Tensor) -> torch.Tensor:
        windows = self._ids[starts[:, None] + torch.arange(CTX - 1, device=self._ids.device)].long()
        return nn.functional.pad(windows, (1, 0), value=BOS)


class Balance:
    """The routers' biases, moved against the loads of the last step. A Llama has none."""

    def __init__(self, model: nn.Module) -> None:
        self._gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self._loads = [torch.zeros(0)] * len(self._gates)  # float32 [experts]
        for index, gate in enumerate(self._gates):
            gate.register_forward_hook(lambda _, __, routed, index=index: self._count(index, routed[2]))

    def _count(self, index: int, chosen: torch.Tensor) -> None:
        experts = self._gates[index].num_experts
        self._loads[index] = chosen.flatten().bincount(minlength=experts).float()

    def step(self, size: float) -> None:
        for gate, load in zip(self._gates, self._loads, strict=True):
            gate.e_score_correction_bias += size * (load.mean() - load).sign()

    @property
    def greatest(self) -> float:
        """The most tokens of an expert over the mean of its layer."""
        return max((float(load.max() / load.mean()) for load in self._loads), default=1.0)


def make_model(config: dict[str, Any]) -> transformers.PreTrainedModel:
    """With BF16 parameters. Buffers, which are RoPE's frequencies and the routers' biases, stay float32."""
    torch.manual_seed(0)
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**config))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


class Trainer:
    """AdamW on float32 copies of the parameters; the rate falls with the time that is left, to 0."""

    def __init__(self, model: transformers.PreTrainedModel, text: Text) -> None:
        self._model, self._text = model, text
        self._balance = Balance(model)
        self._pairs = [(parameter, parameter.detach().float()) for parameter in model.parameters()]
        matrices = [copy for _, copy in self._pairs if copy.ndim > 1]
        vectors = [copy for _, copy in self._pairs if copy.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)

    def run(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Rows of loss.csv."""
        began, step, done = time.perf_counter(), 0, 0.0
        while done < 1:
            rate = PEAK * min(1, (step + 1) / WARM_UP) * (1 - done)
            loss = self._step(rate, BIAS_STEP if done < 0.9 else 0.0)
            step += 1
            done = (time.perf_counter() - began) / seconds
            if step % REPORTED == 0 or done >= 1:
                row = {"step": step, "tokens": step * BATCH * CTX, "loss": f"{float(loss):.4f}"}
                row |= {"greatest load": f"{self._balance.greatest:.2f}", "held out": f"{self._held_out():.4f}"}
                yield row | {"rate": f"{rate:.2e}", "seconds": f"{time.perf_counter() - began:.1f}"}

    def _step(self, rate: float, bias_step: float) -> torch.Tensor:
        ids = self._text.draw()
        loss = self._model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter, copy in self._pairs:
            copy.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_([copy for _, copy in self._pairs], 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            for parameter, copy in self._pairs:
                parameter.copy_(copy)
            self._balance.step(bias_step)
        return loss.detach()

    @torch.no_grad()
    def _held_out(self) -> float:
        batches = self._text.held_out.split(BATCH)
        losses = [float(self._model(ids, labels=ids, use_cache=False).loss) * len(ids) for ids in batches]
        return sum(losses) / HELD_OUT


def train(options: argparse.Namespace) -> None:
    config = CONFIGS[options.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(config).to(device)
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    trainer = Trainer(model, Text(options.text, device))
    rows = []
    for row in trainer.run(60 * options.minutes):
        print(options.model, *(f"{key} {value}" for key, value in row.items()), sep="  ", file=sys.stderr, flush=True)
        rows.append(row)
    model.save_pretrained(options.out, max_shard_size="40MB")
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with (options.out / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, options.out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packs = verbs.add_parser("pack")
    packs.add_argument("folders", type=Path, nargs="+")
    packs.add_argument("--tokens", type=int, default=32_000_000, help="in all")
    packs.add_argument("--longest", type=int, default=60_000, help="tokens of a document; the rest of it is left out")
    packs.add_argument("-o", "--out", type=Path, required=True)
    trains = verbs.add_parser("train")
    trains.add_argument("model", choices=CONFIGS)
    trains.add_argument("--text", type=Path, required=True)
    trains.add_argument("--minutes", type=float, default=8)
    trains.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    {"pack": pack, "train": train}[options.verb](options)


if __name__ == "__main__":
    main()
