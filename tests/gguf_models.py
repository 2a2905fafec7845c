"""Checkpoints whose GGUF metadata is known from llama.cpp's own tools: headers and holes, with all the files beside.

Run as a program, with the folder of llama.cpp's source and that of its built programs, it writes the golden files anew:
metadata by convert_hf_to_gguf.py --outtype bf16 and llama-quantize Q8_0, tokens by llama-tokenize. The converter
refuses a vocabulary that it has not seen: its get_vocab_base_pre must fall back to "deepseek-llm".
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, TokenType
from tiny import LITE, MINI, V2, YARN, write_headers
from tokenizers.pre_tokenizers import ByteLevel

from dsv2quant.storage.gguf import Metadata, Value, array, pack_header, read, string
from dsv2quant.text.pre_tokenizers import NAMES

GOLDEN = Path(__file__).parent / "golden" / "gguf_metadata.json"
GOLDEN_TOKENS = Path(__file__).parent / "golden" / "gguf_tokens.json"
Q8_0 = 7
_LONG = 64  # values; a longer array is kept as a hash
_TEMPLATE = "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}\n\n{% endfor %}Assistant:"


def mini(_: Path) -> Path:
    """dsv2-mini as it is committed."""
    return MINI


def lite(folder: Path) -> Path:
    """V2-Lite's depth, direct queries; a model card with everything in it; a vocabulary that ends in padding."""
    path = _model(folder / "Tiny-V2-Lite-Chat", LITE | {"num_hidden_layers": 27, "vocab_size": 4103})
    (path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: deepseek\nlicense_link: https://example.org/LICENSE\n"
        "base_model: deepseek-ai/DeepSeek-V2-Lite\ntags:\n- chat\n- moe\npipeline_tag: text-generation\n"
        "language:\n- en\n- no\ndatasets: [someone/some-text-2b]\n---\n# A model\n"
    )
    generation = {"do_sample": True, "temperature": 0.3, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.05}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def v2(folder: Path) -> Path:
    """V2's latent queries and groups; added tokens of every kind; a template in a file; RoPE as in transformers 5."""
    rope = {"rope_type": "yarn", "rope_theta": 5000.0} | {key: YARN[key] for key in YARN if key != "type"}
    config = V2 | {"vocab_size": 4100, "rope_parameters": rope, "_name_or_path": "someone/Tiny-V2-0628"}
    for key in ("rope_theta", "rope_scaling", "bos_token_id", "scoring_func"):
        del config[key]
    path = _model(folder / "checkpoint", config)
    edit(path / "tokenizer.json", _add_tokens)
    edit(path / "tokenizer_config.json", lambda settings: settings.pop("chat_template"))
    (path / "chat_template.jinja").write_text(_TEMPLATE)
    (path / "generation_config.json").unlink()
    return path


def plain(folder: Path) -> Path:
    """No YaRN, no groups, normalised weights; several chat templates; special tokens spelled as objects."""
    config = V2 | {
        "vocab_size": 4096, "rope_scaling": None, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "topk_method": "greedy", "pad_token_id": 5, "tie_word_embeddings": True,
    }  # fmt: skip
    for key in ("n_group", "topk_group"):
        del config[key]
    path = _model(folder / "plain", config)

    def settings(found: dict[str, Any]) -> None:
        found["bos_token"] = {"content": found["bos_token"], "__type": "AddedToken"}
        found["chat_template"] = [
            {"name": "default", "template": _TEMPLATE},
            {"name": "tool use", "template": "{{ 1 }}"},
        ]
        del found["pad_token"], found["add_eos_token"]

    edit(path / "tokenizer_config.json", settings)
    return path


# Texts that pre-tokenizers differ on: spaces of all kinds, numbers, punctuation, scripts, special tokens spelled out.
TEXTS = [
    "Hello, world! I'm here; we'Ve a'lL told you.",
    "def f(x):\n    return x**2 + 3.14159  # 12345678 of 2026-11-22\n\n\tpass\r\n\r\n",
    " \t\t leading and trailing   \n \n  \n",
    "I have 1234567 apples, ²³¼ Ⅷ ٣٤٥ 1,000.50€ 3..3 3...3",
    "我想在apple工作1314151天～ 《你好》，。、！？：；（）‘’“”",
    "　全角　　。 、　a　b。\u3000\u3000\u2009\u00a0\u0085\u2028x\u202f.\u2003!",
    "ひらがなカタカナ漢字 한국어 텍스트 ไทย कान हिन्दी தமிழ் ខ្មែរ",
    "нещо на Български αβγ ÀÉÎõü straße ǅ ΐ K Ω \U00010400\U0001e900\U000118a2",
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 e\u0301 \u0489 \ufeff\x01\x1c\x7f",
    '------======= ```````""""......!!!!!!?????? <|>~^$+_',
    ".world.js[foo]->bar(&x)||!y \\section{a}  {b}\n\n\n\n",
    "<｜begin▁of▁sentence｜>User: <|EOT|><｜fim▁hole｜>[PAD4099] <｜tool▁call｜>",
    "øøa▁b a b øa bø øø",
    "🚀  \n🚀 \n€\t",
    "class Parser(object):\n    def __init__(self, x=None):\n        if self._x.startswith('--'):\n            return",
]

MODELS = {"dsv2-mini": mini, "lite": lite, "v2": v2, "plain": plain}


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Apply `change` to a JSON file's content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _model(path: Path, config: dict[str, Any]) -> Path:
    write_headers(path, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / name, path / name)
    return path


def _add_tokens(tokenizer: dict[str, Any]) -> None:
    """A user's token that is a character of the byte alphabet (as DeepSeek has), one with a space, a control token."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"] += [
        plain | {"id": 4096, "content": "øø", "normalized": True, "special": False},
        plain | {"id": 4097, "content": "a▁b", "normalized": True, "special": False},
        plain | {"id": 4098, "content": "<｜tool▁call｜>", "normalized": False, "special": False},
    ]


def described(metadata: Metadata) -> list[list[Any]]:
    """[key, type, value] in order: numbers as the file has them, long arrays as a hash."""
    return [[key, *_description(value)] for key, value in metadata.items()]


def _description(entry: Value) -> list[Any]:
    value = float(np.float32(entry.value)) if entry.type == GGUFValueType.FLOAT32 else entry.value
    if not entry.is_array:
        return [entry.type.name, value]
    if len(value) <= _LONG:
        return [f"{entry.type.name}[]", value]
    return [f"{entry.type.name}[]", len(value), hashlib.sha256(json.dumps(value).encode()).hexdigest()]


def _from_llama_cpp(source: Path, programs: Path, model: Path, folder: Path) -> Metadata:
    whole, small = folder / "whole.gguf", folder / "small.gguf"
    convert = [sys.executable, source / "convert_hf_to_gguf.py", model, "--outfile", whole, "--outtype", "bf16"]
    subprocess.run(convert, check=True, cwd=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    quantize = [programs / "llama-quantize", whole, small, "Q8_0", "1"]
    subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read(small).metadata


def _tokens_from_llama_cpp(programs: Path, metadata: Metadata, folder: Path) -> list[list[int]]:
    model, text = folder / "vocabulary.gguf", folder / "text"
    model.write_bytes(pack_header(metadata, []))
    options = ["--ids", "--no-escape", "--no-parse-special", "--log-disable"]
    found = []
    for content in TEXTS:
        text.write_text(content, encoding="utf-8", newline="")
        command = [programs / "llama-tokenize", "-m", model, "-f", text, *options]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
    return found


def vocabulary(pre: str) -> dict[str, Value]:
    """Metadata of no model: every character of the texts and every two that follow each other are a token, across any
    split; so a split that is made otherwise shows."""
    as_characters = ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = dict.fromkeys(sorted(ByteLevel.alphabet()))
    merges = {}
    for text in TEXTS:
        characters = [as_characters.pre_tokenize_str(character)[0][0] for character in text]
        for left, right in itertools.pairwise(characters):
            for character in (left, right):
                merges |= {(character[:i], character[i]): None for i in range(1, len(character))}
            merges[left, right] = None
    tokens |= dict.fromkeys(left + right for left, right in merges)
    return {
        "general.architecture": string("deepseek2"),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array(list(tokens)),
        "tokenizer.ggml.token_type": array([int(TokenType.NORMAL)] * len(tokens)),
        "tokenizer.ggml.merges": array([f"{left} {right}" for left, right in merges]),
    }


def main() -> None:
    source, programs = (Path(argument).resolve() for argument in sys.argv[1:])
    golden, tokens = {}, {}
    for name, build in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            metadata = _from_llama_cpp(source, programs, build(Path(folder)), Path(folder))
            golden[name] = described(metadata)
            tokens[name] = _tokens_from_llama_cpp(programs, metadata, Path(folder))
            tokens |= {pre: _tokens_from_llama_cpp(programs, vocabulary(pre), Path(folder)) for pre in NAMES}
    GOLDEN_TOKENS.write_text(json.dumps(tokens) + "\n", encoding="utf-8")
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
